"""Characteristic guidance: exact on Gaussians in float64, and every sample by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scfg_fast.guidance.characteristic import CharacteristicGuidance, CharacteristicSolver, Solution, _Space, solve
from scfg_fast.guidance.predictions import alpha_bar_of
from scfg_fast.guidance.steps import trained_level


def identity(memory: int = 2, early_stop: bool = True, **settings) -> CharacteristicGuidance:
    return CharacteristicGuidance(**settings, solver=CharacteristicSolver("identity", memory, early_stop))


EXACT = identity(4, tolerance=1e-14)
"""Enough memory for the Gaussians below, whose largest dimension is 4."""
PROJECTIONS = [identity(5), CharacteristicGuidance()]
by_projection = pytest.mark.parametrize("settings", PROJECTIONS, ids=["identity", "ridge"])


class Gaussians:
    """p_c and p_u, Gaussians over the last axis of [B, 1, 1, d], and the product p_c^(1 + omega) p_u^(-omega)."""

    def __init__(self, size: int, omega: float, alpha_bar: float, *, seed: int = 0, same: bool = False) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.one = torch.eye(size, dtype=torch.float64)
        self.omega, self.alpha_bar, self.scale = omega, alpha_bar, math.sqrt(1.0 - alpha_bar)

        def covariance(least: float) -> Tensor:
            root = torch.randn(size, size, generator=rng, dtype=torch.float64)
            return 0.3 * root @ root.T / size + least * self.one

        self.cov_c, self.cov_u = covariance(0.3), covariance(1.5)
        if same:
            self.cov_u = self.cov_c
        self.mean_c, self.mean_u = torch.randn(2, size, generator=rng, dtype=torch.float64)
        self.x = 1.5 * torch.randn(3, 1, 1, size, generator=rng, dtype=torch.float64)

    def slope(self, covariance: Tensor) -> Tensor:
        """K of eps(x) = K (x - sqrt(abar) mean)."""
        return self.scale * torch.linalg.inv(self.alpha_bar * covariance + (1.0 - self.alpha_bar) * self.one)

    def eps(self, covariance: Tensor, mean: Tensor, x: Tensor) -> Tensor:
        slope = self.slope(covariance)
        shifted = x - math.sqrt(self.alpha_bar) * mean
        return torch.stack([(slope @ row.flatten()).reshape(row.shape) for row in shifted])

    def predict(self, x2: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        return self.eps(self.cov_u, self.mean_u, x2), self.eps(self.cov_c, self.mean_c, x1)

    def exact(self) -> Tensor:
        """Noise prediction of the product density, diffused."""
        precision_c, precision_u = torch.linalg.inv(self.cov_c), torch.linalg.inv(self.cov_u)
        precision = (1.0 + self.omega) * precision_c - self.omega * precision_u
        assert float(torch.linalg.eigvalsh(precision).min()) > 0.0
        covariance = torch.linalg.inv(precision)
        natural = (1.0 + self.omega) * precision_c @ self.mean_c - self.omega * precision_u @ self.mean_u
        return self.eps(covariance, covariance @ natural, self.x)

    def jacobian(self) -> Tensor:
        """Of the plain iteration dx <- sqrt(1 - abar) (eps_u(x2) - eps_c(x1))."""
        return self.scale * ((1.0 + self.omega) * self.slope(self.cov_u) - self.omega * self.slope(self.cov_c))

    def closed_form(self) -> Tensor:
        """dx of the linear fixed point."""
        uncond, cond = self.predict(self.x, self.x)
        inverse = torch.linalg.inv(self.one - self.jacobian())
        return self.scale * (uncond - cond) @ inverse.T

    def solve(self, settings: CharacteristicGuidance) -> Solution:
        uncond, cond = self.predict(self.x, self.x)
        return solve(self.predict, self.x, uncond, cond, 1.0 + self.omega, self.alpha_bar, settings)

    def plain(self) -> Tensor:
        uncond, cond = self.predict(self.x, self.x)
        return uncond + (1.0 + self.omega) * (cond - uncond)


GAUSSIANS = pytest.mark.parametrize("size, omega, alpha_bar", [
    (1, 2.0, 0.05), (2, 9.0, 0.9), (3, 4.0, 0.5), (4, 9.0, 0.3), (3, 2.0, 0.7),
])  # fmt: skip


class Pictures:
    """A nonlinear denoiser for [B, 4, 8, 8] whose every operation is rounded the same in a batch of any size.

    The conditional density is narrow with a bend and a mean that changes over the picture, the unconditional one broad.
    """

    def __init__(self, alpha_bar: float = 0.5, batch: int = 3, dtype: torch.dtype = torch.float64) -> None:
        rng = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
        self.alpha_bar, self.mean, self.x = alpha_bar, draw(4, 8, 8), draw(batch, 4, 8, 8)
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.poison: int | None = None

    def predict(self, x2: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((x2, x1))
        uncond, cond = self.unshifted(x2, x1)
        if self.poison is not None and len(self.calls) == 1:
            cond[self.poison, 0, 0, 0] = math.nan
        return uncond, cond

    def unshifted(self, x2: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        a, noise = self.alpha_bar, 1.0 - self.alpha_bar
        bent = x1 - math.sqrt(a) * self.mean
        bent = bent + 0.3 * bent / (1.0 + bent * bent).sqrt()
        return math.sqrt(noise) / (1.5 * a + noise) * x2, math.sqrt(noise) / (0.7 * a + noise) * bent

    def solve(self, settings: CharacteristicGuidance, weight: float | Tensor = 6.0, **options) -> Solution:
        self.calls.clear()
        uncond, cond = self.unshifted(self.x, self.x)
        return solve(self.predict, self.x, uncond, cond, weight, self.alpha_bar, settings, **options)

    def plain(self, weight: float | Tensor = 6.0) -> Tensor:
        uncond, cond = self.unshifted(self.x, self.x)
        return uncond + weight * (cond - uncond)

    def only(self, sample: int) -> Pictures:
        other = Pictures(self.alpha_bar, 1, self.x.dtype)
        other.x, other.mean = self.x[sample : sample + 1].clone(), self.mean
        return other


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def tight(settings: CharacteristicGuidance, **changes) -> CharacteristicGuidance:
    return dataclasses.replace(settings, **{"tolerance": 1e-13, **changes})


def solver(settings: CharacteristicGuidance, **changes) -> CharacteristicGuidance:
    return dataclasses.replace(settings, solver=dataclasses.replace(settings.solver, **changes))


def assert_same(one: Solution, other: Solution) -> None:
    """Bit for bit, up to the length of the residuals."""
    for name in ("guided", "converged", "iterations"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.shift, other.shift)
    length = min(len(one.residuals), len(other.residuals))
    assert torch.equal(one.residuals[:length], other.residuals[:length])


# What it solves.


@GAUSSIANS
def test_it_is_exact_for_gaussians(size: int, omega: float, alpha_bar: float) -> None:
    """The noise prediction of the diffused product density, where plain guidance errs; covariances do not commute."""
    case = Gaussians(size, omega, alpha_bar)
    found = case.solve(EXACT)
    assert bool(found.converged.all()) and largest(case.plain() - case.exact()) > 0.06
    assert largest(found.guided - case.exact()) <= 3e-13
    assert largest(found.shift - case.closed_form()) <= 3e-13
    if size > 1:
        assert largest(case.cov_c @ case.cov_u - case.cov_u @ case.cov_c) > 1e-3


def test_the_default_memory_solves_them_too() -> None:
    """Two differences for four unknowns: more evaluations, same answer."""
    case = Gaussians(4, 9.0, 0.3)
    short, long = case.solve(identity(2, tolerance=1e-14, max_iterations=200)), case.solve(EXACT)
    assert bool(short.converged.all()) and largest(short.guided - case.exact()) <= 3e-13
    assert int(long.iterations.max()) == 5 < int(short.iterations.min())


@pytest.mark.parametrize("size, omega, alpha_bar, least, rounding", [
    (1, 2.0, 0.9, 0.2, 2e-15), (2, 2.0, 0.9, 0.1, 2e-15), (3, 2.0, 0.9, 0.2, 2e-15), (4, 2.0, 0.9, 0.2, 2e-15),
    (3, 9.0, 0.6, 1.5, 5e-14),
])  # fmt: skip
def test_equal_covariances_need_a_shift_but_change_nothing(
    size: int, omega: float, alpha_bar: float, least: float, rounding: float
) -> None:
    """Plain guidance within 2e-15 where the shift is small, and of the terms that are added everywhere.

    At omega 9, abar 0.6 the shift is 1.6, (1 + omega) eps_c and omega eps_u reach 270 together while their difference
    stays near 10: rounding alone, with the shift of the closed form, is 3e-14 there (with the solver's, 4e-14).
    """
    case = Gaussians(size, omega, alpha_bar, same=True)
    found = case.solve(EXACT)
    dx = found.shift
    assert bool(found.converged.all()) and largest(dx) > least
    error = (found.guided - case.plain()).abs()
    assert largest(error) < rounding and largest(case.plain() - case.exact()) < max(rounding, 1e-14)
    uncond, cond = case.predict(case.x + (1.0 + omega) * dx, case.x + omega * dx)
    assert largest(error / ((1.0 + omega) * cond.abs() + omega * uncond.abs())) < 2e-15


def test_plain_iteration_diverges_where_anderson_converges() -> None:
    """omega 9, abar 0.9: |J| = 1.42. Plain iteration falls back to plain guidance, bit by bit."""
    case = Gaussians(4, 9.0, 0.9)
    case.cov_c = torch.diag(torch.tensor([0.302, 0.35, 0.5, 0.7], dtype=torch.float64))
    case.cov_u = case.one.clone()
    assert float(torch.linalg.eigvals(case.jacobian()).abs().max()) == pytest.approx(1.42, abs=0.005)
    picard, anderson = case.solve(solver(EXACT, memory=0)), case.solve(EXACT)
    assert not picard.converged.any() and bool(anderson.converged.all())
    assert torch.equal(picard.guided, case.plain()) and largest(picard.shift) == 0.0
    assert (picard.residuals[-1] > 1e3 * picard.residuals[0]).all()
    assert largest(anderson.guided - case.exact()) <= 3e-13 < 0.06 < largest(case.plain() - case.exact())


@by_projection
def test_weight_one_is_the_conditional_prediction(settings: CharacteristicGuidance) -> None:
    case = Pictures()
    found = case.solve(tight(settings), weight=1.0)
    assert bool(found.converged.all()) and largest(found.shift) > 1e-2
    assert largest(found.guided - case.unshifted(case.x, case.x)[1]) < 1e-14


@by_projection
def test_equal_predictions_need_no_shift(settings: CharacteristicGuidance) -> None:
    """dx = 0 is a fixed point, whatever reg: no evaluation."""
    case = Pictures()
    eps = case.unshifted(case.x, case.x)[0]
    found = solve(case.predict, case.x, eps, eps, 6.0, 0.5, settings)
    assert bool(found.converged.all()) and not case.calls and not found.iterations.any()
    assert torch.equal(found.guided, eps) and largest(found.shift) == 0.0 == largest(found.residuals)


@by_projection
def test_a_constant_difference_is_solved_in_one_evaluation(settings: CharacteristicGuidance) -> None:
    """dx = sqrt(1 - abar) k, and plain guidance comes out."""
    case = Pictures()
    base, k = case.unshifted(case.x, case.x)[0], case.mean[None].expand(3, 4, 8, 8)
    settings = dataclasses.replace(settings, regularization=0.0)
    found = solve(lambda x2, x1: (base + k, base), case.x, base + k, base, 6.0, 0.5, settings)
    assert found.iterations.tolist() == [1, 1, 1] and bool(found.converged.all())
    assert largest(found.shift - math.sqrt(0.5) * k) < 1e-14
    assert largest(found.guided - (base - 5.0 * k)) < 1e-13


def test_a_weight_map_is_a_weight_per_pixel() -> None:
    """Independent pixels: each has the exact prediction of its own omega, and its inputs still mix to x."""
    case = Pictures()
    a, noise = case.alpha_bar, 1.0 - case.alpha_bar
    weight = torch.linspace(1.0, 10.0, 3 * 64, dtype=torch.float64).reshape(3, 1, 8, 8)
    precision = weight / 0.4 - (weight - 1.0) / 1.5
    mean = weight / 0.4 * case.mean / precision
    eps = lambda variance, mean, x: math.sqrt(noise) * (x - math.sqrt(a) * mean) / (a * variance + noise)  # noqa: E731
    calls: list[tuple[Tensor, Tensor]] = []

    def predict(x2: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((x2, x1))
        return eps(1.5, 0.0, x2), eps(0.4, case.mean, x1)

    settings = identity(12, tolerance=1e-14)
    found = solve(predict, case.x, *predict(case.x, case.x), weight, a, settings)
    assert bool(found.converged.all())
    assert largest(found.guided - eps(1.0 / precision, mean, case.x)) <= 3e-13
    assert all(largest(weight * x1 - (weight - 1.0) * x2 - case.x) < 5e-14 for x2, x1 in calls)


@by_projection
def test_the_inputs_mix_to_the_sample(settings: CharacteristicGuidance) -> None:
    """(1 + omega) x1 - omega x2 = x, to 1e-15 of the largest terms, and x2 - x1 = dx, in every evaluation."""
    case = Pictures()
    found = case.solve(settings)
    assert case.calls and all(largest(6.0 * x1 - 5.0 * x2 - case.x) < 2e-14 for x2, x1 in case.calls)
    for x2, x1 in case.calls:
        assert largest(6.0 * x1 - 5.0 * x2 - case.x) < 1e-15 * largest(6.0 * x1.abs() + 5.0 * x2.abs())
    x2, x1 = case.calls[-1]
    last = found.iterations == len(case.calls)
    assert last.any() and largest((x2 - x1 - found.shift)[last]) < 1e-14


@by_projection
def test_the_result_is_the_accepted_evaluation(settings: CharacteristicGuidance) -> None:
    case = Pictures()
    found = case.solve(settings)
    again = case.unshifted(case.x + 6.0 * found.shift, case.x + 5.0 * found.shift)
    assert bool(found.converged.all()) and torch.equal(found.guided, again[0] + 6.0 * (again[1] - again[0]))
    assert largest(found.guided - case.plain()) > 0.01


# The projection and its regularisation.


def test_the_projector_keeps_its_direction_alone(rng: torch.Generator) -> None:
    direction = torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64)
    other = torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64)
    space = _Space.of(direction, CharacteristicSolver())
    project = lambda field: space.field(space.coordinates(field))  # noqa: E731
    assert space.unknowns == 1 and largest(project(direction) - direction) < 2e-15
    assert largest(project(project(other)) - project(other)) < 2e-15
    rest = ((other - project(other)) * direction).flatten(1).sum(1)
    assert largest(rest) < 1e-13


def test_a_ridge_shrinks_the_projection() -> None:
    """A constant difference: dx = sqrt(1 - abar) k / (1 + reg); a large reg is plain guidance."""
    case = Pictures()
    base, k = case.unshifted(case.x, case.x)[0], case.mean[None].expand(3, 4, 8, 8)
    for reg in (0.0, 1.0, 7.0):
        settings = CharacteristicGuidance(regularization=reg, tolerance=1e-14)
        found = solve(lambda x2, x1: (base + k, base), case.x, base + k, base, 6.0, 0.5, settings)
        assert bool(found.converged.all())
        assert largest(found.shift - math.sqrt(0.5) * k / (1.0 + reg)) < 1e-13
    found = case.solve(CharacteristicGuidance(regularization=1e9))
    assert bool(found.converged.all()) and largest(found.guided - case.plain()) < 1e-6


def test_regularisation_falls_along_the_run() -> None:
    settings = CharacteristicGuidance(regularization=3.0)
    target = lambda level: settings.regularization_at(level, 0.01)  # noqa: E731
    assert [target(0.01), target(0.04), target(1.0)] == pytest.approx([3.0, 0.75, 0.03])
    assert target(0.0) == target(0.005) == 3.0 == settings.regularization_at(0.7)
    assert settings.regularization_at(0.5, 0.0) == 0.0
    assert identity().regularization_at(0.1, 0.01) == 0.0


@pytest.mark.parametrize("steps, ratio", [(50, 1.24), (10, 3.0), (5, 7.8)])
def test_the_regularisation_is_anchored_at_the_trained_tables_last_level(steps: int, ratio: float) -> None:
    """As published: reg = 1 at abar_999, whatever the number of steps. Anchored at the run's own first step it would
    be `ratio` times as large throughout (SD 1.5's table, DDIM)."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1
    )
    scheduler.set_timesteps(steps)
    last = alpha_bar_of(trained_level(scheduler))
    assert last == pytest.approx(float(scheduler.alphas_cumprod[999]), rel=1e-6)
    abar = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    used = [CharacteristicGuidance().regularization_at(level, last) for level in abar]
    assert [abar[0] / level / reg for level, reg in zip(abar, used, strict=True)] == pytest.approx(
        [ratio] * steps, rel=0.02
    )


def test_the_levels_reach_the_regularisation() -> None:
    case = Pictures()
    late = case.solve(tight(PROJECTIONS[1]), last_alpha_bar=0.05)
    assert_same(late, case.solve(tight(PROJECTIONS[1], regularization=0.05 / 0.5)))
    early = case.solve(tight(PROJECTIONS[1]))
    assert bool((early.converged & late.converged).all())
    assert float(early.shift.norm()) < 0.9 * float(late.shift.norm())


# The iteration.


@by_projection
def test_residuals_pass_the_test_and_then_stay(settings: CharacteristicGuidance) -> None:
    case = Pictures()
    found = case.solve(settings)
    assert bool(found.converged.all()) and len(found.residuals) == int(found.iterations.max()) + 1
    for sample, last in enumerate(found.iterations.tolist()):
        course = found.residuals[:, sample]
        assert (course[:last] >= settings.tolerance).all() and (course[last:] == course[last]).all()
        assert float(course[last]) < settings.tolerance


def test_the_residual_is_a_root_mean_square_per_sample() -> None:
    case = Pictures()
    uncond, cond = case.unshifted(case.x, case.x)
    expected = ((uncond - cond) * math.sqrt(0.5)).square().mean(dim=(1, 2, 3)).sqrt()
    assert case.solve(PROJECTIONS[0]).residuals[0].allclose(expected, rtol=1e-13)
    assert case.solve(PROJECTIONS[1]).residuals[0].allclose(expected / 2.0, rtol=1e-13)


@by_projection
def test_evaluations_are_counted_as_documented(settings: CharacteristicGuidance) -> None:
    case = Pictures()
    found = case.solve(settings)
    assert len(case.calls) == int(found.iterations.max()) == len(found.residuals) - 1
    found = case.solve(solver(dataclasses.replace(settings, max_iterations=30), early_stop=False))
    assert len(case.calls) == 30 == len(found.residuals) - 1
    found = case.solve(dataclasses.replace(settings, max_iterations=1))
    assert len(case.calls) == 1 and found.iterations.tolist() == [1, 1, 1]


@by_projection
@pytest.mark.parametrize("failing", [False, True], ids=["done", "out of iterations"])
def test_early_stop_reads_the_host_and_changes_no_bit(settings: CharacteristicGuidance, failing: bool) -> None:
    case = Pictures()
    settings = dataclasses.replace(settings, max_iterations=2 if failing else 30)
    with HostReads() as reads:
        stopped = case.solve(settings)
    assert reads.count == (2 if failing else len(stopped.residuals))
    with HostReads() as reads:
        free = case.solve(solver(settings, early_stop=False))
    assert reads.count == 0 and bool(free.converged.all()) is not failing
    assert_same(stopped, free)


def test_dependent_differences_are_left_out() -> None:
    """A linear problem with one direction: every further difference is a multiple of the first."""
    case = Gaussians(1, 9.0, 0.3)
    for memory in (1, 5, 20):
        found = case.solve(identity(memory, tolerance=1e-18, max_iterations=30))
        assert bool(found.residuals.isfinite().all()) and float(found.residuals[-1].max()) < 1e-13


# Every sample by itself.


@by_projection
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_is_its_samples(settings: CharacteristicGuidance, dtype: torch.dtype) -> None:
    case = Pictures(dtype=dtype)
    weight = torch.linspace(2.0, 8.0, 3 * 64, dtype=dtype).reshape(3, 1, 8, 8)
    batch = case.solve(settings, weight)
    assert bool(batch.converged.all())
    for i in range(3):
        row = slice(i, i + 1)
        alone = case.only(i).solve(settings, weight[row])
        length = len(alone.residuals)
        assert torch.equal(alone.guided, batch.guided[row]) and torch.equal(alone.shift, batch.shift[row])
        assert torch.equal(alone.residuals, batch.residuals[:length, row])
        assert alone.iterations[0] == batch.iterations[i]


@by_projection
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_mate_that_is_not_finite_spoils_nothing(settings: CharacteristicGuidance, early_stop: bool) -> None:
    """It ends at its first NaN, is evaluated at the sample from then on, where all is well, and falls back."""
    case = Pictures()
    settings = solver(dataclasses.replace(settings, max_iterations=30), early_stop=early_stop)
    good = case.solve(settings)
    case.poison = 1
    found = case.solve(settings)
    assert found.converged.tolist() == [True, False, True] and int(found.iterations[1]) == 1
    assert torch.equal(found.guided[1], case.plain()[1]) and largest(found.shift[1]) == 0.0
    assert all(torch.equal(x[1], case.x[1]) for call in case.calls[1:] for x in call)
    assert found.residuals[1:, 1].isnan().all()
    for i in (0, 2):
        assert torch.equal(found.guided[i], good.guided[i]) and torch.equal(found.shift[i], good.shift[i])
        assert torch.equal(found.residuals[:, i], good.residuals[: len(found.residuals), i])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_given_predictions_that_are_not_finite(value: float) -> None:
    case = Pictures()
    uncond, cond = case.unshifted(case.x, case.x)
    cond[2, 0, 3, 3] = value
    for settings in PROJECTIONS:
        found = solve(case.predict, case.x, uncond, cond, 6.0, 0.5, settings)
        assert found.converged.tolist() == [True, True, False] and int(found.iterations[2]) == 0
        assert torch.equal(found.guided[:2], case.solve(settings).guided[:2])


def test_a_sample_that_does_not_converge_gets_plain_guidance() -> None:
    """Too few evaluations for some: their guided prediction has the plain formula's bits, the others keep theirs."""
    case = Pictures()
    case.x[0] *= 20.0
    settings = identity(2, max_iterations=60)
    full = case.solve(settings)
    fewest, most = int(full.iterations.min()), int(full.iterations.max())
    assert bool(full.converged.all()) and fewest < most
    found = case.solve(dataclasses.replace(settings, max_iterations=fewest))
    assert 0 < int(found.converged.sum()) < 3
    for i, done in enumerate(found.converged.tolist()):
        assert torch.equal(found.guided[i], full.guided[i] if done else case.plain()[i])
        assert torch.equal(found.shift[i], full.shift[i] if done else torch.zeros_like(case.x[i]))
        assert int(found.iterations[i]) == fewest


def test_later_evaluations_of_an_accepted_sample_are_ignored() -> None:
    """A denoiser that adds the number of the call to both predictions: the same shifts, guided by the accepted call."""
    case = Pictures()
    case.x[0] *= 20.0
    settings = identity(2, max_iterations=60)
    found = case.solve(settings)

    def drifting(x2: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        uncond, cond = case.predict(x2, x1)
        return uncond + len(case.calls), cond + len(case.calls)

    case.calls.clear()
    drifted = solve(drifting, case.x, *case.unshifted(case.x, case.x), 6.0, 0.5, settings)
    assert torch.equal(found.iterations, drifted.iterations) and len(set(found.iterations.tolist())) > 1
    added = (drifted.guided - found.guided - found.iterations[:, None, None, None]).abs()
    assert largest(added) < 1e-4


def test_samples_diverge_by_themselves() -> None:
    """Plain iteration where one sample of the batch has |J| above 1 and the others below: up to infinity and back."""
    slope = torch.tensor([0.5, -4.0, -0.5], dtype=torch.float64)[:, None, None, None]
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    predict: Callable = lambda x2, x1: (1.0 + slope * (x2 - x1), torch.zeros_like(x1))  # noqa: E731
    settings = identity(0, max_iterations=400)
    given = (torch.ones_like(x), torch.zeros_like(x))
    found = solve(predict, x, *given, 3.0, 0.0, settings)
    assert found.converged.tolist() == [True, False, True] and 50 < int(found.iterations[1]) < 400
    assert not bool(found.residuals[-1, 1].isfinite()) and float(found.guided[1].max()) == 1.0 - 3.0
    assert largest(found.shift[[0, 2]] - 1.0 / (1.0 - slope[[0, 2]])) < 1e-3


# Dtypes, layouts, arguments.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_solves_in_float32(dtype: torch.dtype) -> None:
    """The model sees the sample's dtype; one direction per image averages its rounding out."""
    case, single = Pictures(dtype=dtype), Pictures(dtype=torch.float32)
    single.x, single.mean = case.x.float(), case.mean.float()
    settings = CharacteristicGuidance(tolerance=1e-3)
    found, reference = case.solve(settings), single.solve(settings)
    assert bool(found.converged.all()) and found.guided.dtype == dtype
    assert found.shift.dtype == torch.float32 == found.residuals.dtype
    assert all(x.dtype == dtype for call in case.calls for x in call)
    assert largest(found.shift - reference.shift) < 0.02
    plain = case.solve(dataclasses.replace(settings, max_iterations=1, tolerance=1e-12)).guided
    uncond, cond = case.unshifted(case.x, case.x)
    assert torch.equal(plain, (uncond.float() + 6.0 * (cond.float() - uncond.float())).to(dtype))


def test_channels_last_and_a_weight_of_no_dimension() -> None:
    case = Pictures()
    expected = case.solve(PROJECTIONS[1])
    case.x = case.x.to(memory_format=torch.channels_last)
    found = case.solve(PROJECTIONS[1], torch.tensor(6.0, dtype=torch.float32))
    assert torch.equal(found.iterations, expected.iterations)
    assert largest(found.guided - expected.guided) < 1e-13 > largest(found.shift - expected.shift)


def test_levels_at_the_ends_of_the_range() -> None:
    """No noise left: no shift. Pure noise, from a zero-terminal-SNR schedule: an ordinary step."""
    clean, noise = Pictures(1.0), Pictures(0.0)
    assert not clean.solve(PROJECTIONS[0]).iterations.any()
    found = noise.solve(PROJECTIONS[1], last_alpha_bar=0.0)
    assert bool(found.converged.all()) and bool(found.guided.isfinite().all())


BAD = {
    "regularization": -0.5, "tolerance": 0.0, "max_iterations": 0, "start": 0.9, "stop": 0.1, "solver": "ridge",
}  # fmt: skip


def test_every_bad_setting_is_listed_at_once() -> None:
    with pytest.raises(ValueError, match="CharacteristicGuidance: ") as caught:
        CharacteristicGuidance(**BAD)
    assert all(name in str(caught.value) for name in BAD)
    with pytest.raises(ValueError, match="CharacteristicSolver: ") as caught:
        CharacteristicSolver("pixel", -1, 1)  # type: ignore[arg-type]
    for words in ("projection='pixel' is unknown, use one of ('ridge', 'identity')", "memory", "early_stop"):
        assert words in str(caught.value)


def test_arguments_that_do_not_fit_are_listed_at_once() -> None:
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError) as caught:
        solve(
            lambda x2, x1: (x2, x1), x, x[:1], x[..., :4], torch.ones(2, 3, 8, 8), 1.5, CharacteristicGuidance(),
            -0.1,
        )  # fmt: skip
    for reason in (
        "uncond must match the sample, (2, 4, 8, 8) on cpu, got (1, 4, 8, 8)", "cond must match",
        "weight must broadcast to (2, 4, 8, 8) on cpu, got (2, 3, 8, 8)",
        "alpha_bar must be a number in [0, 1], got 1.5", "last_alpha_bar must be a number in [0, 1], got -0.1",
    ):  # fmt: skip
        assert reason in str(caught.value)
    with pytest.raises(ValueError, match="weight must be a finite number or a tensor, got inf"):
        solve(lambda x2, x1: (x2, x1), x, x, x, math.inf, 0.5, CharacteristicGuidance())
    with pytest.raises(
        ValueError, match=r"sample must be floating-point \[B, C, H, W\] and not empty, got torch.int64"
    ):
        solve(lambda x2, x1: (x2, x1), x.long(), x, x, 2.0, 0.5, CharacteristicGuidance())


def test_a_prediction_of_another_shape_is_refused() -> None:
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"predict must return two predictions of shape \(2, 4, 8, 8\), got \(1, 4,"):
        solve(lambda x2, x1: (x2[:1], x1), x, x + 1.0, x, 2.0, 0.5, CharacteristicGuidance())
