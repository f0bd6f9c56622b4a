r"""Characteristic guidance: shift the two inputs of the denoiser until its two predictions agree with the shift.

Plain guidance mixes two predictions at one point. That is the noise prediction of p_c^(1 + omega) p_u^(-omega) only for
clean data: a mixture of scores does not obey the score Fokker-Planck equation, the less the larger omega. Without that
equation's Laplacian ("harmonic ansatz") the mixture is carried along characteristics, which leaves a fixed point for
the shift dx of one step, with omega = guidance_scale - 1 and abar = alphas_cumprod at the step:

    x1 = x + omega dx                                    input of the conditional prediction
    x2 = x + (1 + omega) dx                              of the unconditional one: (1 + omega) x1 - omega x2 = x
    dx = P[ sqrt(1 - abar) (eps_u(x2) - eps_c(x1)) ]
    guided = (1 + omega) eps_c(x1) - omega eps_u(x2)     computed as eps_u + (1 + omega) (eps_c - eps_u)

x is in the variance-preserving space that the denoiser sees, sqrt(abar) x0 + sqrt(1 - abar) e. omega may be a map over
pixels, all of this pixel by pixel. With P = 1 the result is exact for Gaussian densities; with equal covariances, or
where eps_u - eps_c is constant, it is plain guidance although dx is not 0.

P is the identity or, by default, a ridge projection onto one direction per image,
g = sqrt(1 - abar) (eps_u(x) - eps_c(x)):

    P = a a^T / (1 + reg)              a = g / ||g||, reg without a unit

so the problem has one unknown per image, a^T dx. reg falls along the run as published, from the end of the trained
table: reg_t = regularization abar_T / abar_t, with abar_T the table's last level. A run whose first step lies at a
higher level starts with a smaller reg. With zero terminal SNR, abar_T = 0, there is no regularisation.

Solver: Anderson acceleration, since plain iteration diverges where the method is of use: for Gaussians of variances
0.302 and 1 its Jacobian sqrt(1 - abar) ((1 + omega) eps_u' - omega eps_c') has spectral radius 1.42 at omega 9, abar
0.9. Least squares per sample, by modified Gram-Schmidt over the last differences; dependent ones are left out. The
samples of a batch share nothing: the bits of one do not depend on its mates if those of `predict` do not.

Where this differs from the published code:

* That code also anneals reg within a step, starts from the last step's shift, offers several directions per channel
  and damps the iteration. Annealing and the warm start leave the equation as it is. Measured with the bundled model
  (3 pictures of 10 DDIM steps in float32, at most 20 evaluations, guidance 5 and 15; commit 8fe9cb5), in evaluations
  per step of the samples that converged: as here 3.9 and 4.5, annealed 9.7 and 8.4, warm 4.2 and 4.2, one direction per
  channel 7.2 and 7.3. So none of them is built.
* At dx = 0 the pipeline has evaluated both predictions: the direction and the first residual cost nothing. The first
  step is dx = g, P = 1, as published. The accepted evaluation is the result, no last one follows.
* x and the tolerance are variance-preserving with every scheduler. With sigma-space samplers the published dx is larger
  by 1 / sqrt(abar), and its test stricter by as much.
* A sample with a NaN or an infinity ends there; published, it changes the least squares of the whole batch.

Source: Zheng and Lan, "Characteristic Guidance: Non-linear Correction for Diffusion Model at Large Guidance Scale",
ICML 2024 (arXiv 2312.07586), and the behaviour of its published web UI extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

PROJECTIONS = ("ridge", "identity")

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(input of the unconditional prediction, of the conditional one) -> (eps_u, eps_c), noise predictions.

All [B, C, H, W], the inputs in the dtype of the sample."""


@dataclass(frozen=True)
class CharacteristicSolver:
    """How the fixed point is solved: for experts, the defaults are the recommendation.

    Args:
        projection: P, `"ridge"` or `"identity"`. The identity has as many unknowns as the latents: exact for Gaussians,
            hard to solve for networks (with the bundled model 2 of 60 samples converged in 20 evaluations).
        memory: differences that Anderson acceleration keeps with the identity; 0 for plain iteration. The ridge
            projection has one unknown and keeps at most one.
        early_stop: stop when every sample is done, which reads one flag from the device per iteration. False: none is
            read, always `max_iterations` evaluations, the same result bit for bit.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    projection: str = "ridge"
    memory: int = 2
    early_stop: bool = True

    def __post_init__(self) -> None:
        reasons = []
        if self.projection not in PROJECTIONS:
            reasons.append(f"projection={self.projection!r} is unknown, use one of {PROJECTIONS}")
        if not _is_int(self.memory) or self.memory < 0:
            reasons.append(f"memory must be an integer of at least 0, got {self.memory!r}")
        if not isinstance(self.early_stop, bool):
            reasons.append(f"early_stop must be True or False, got {self.early_stop!r}")
        if reasons:
            raise ValueError("CharacteristicSolver: " + "; ".join(reasons))


@dataclass(frozen=True)
class CharacteristicGuidance:
    """Settings of characteristic guidance; the module has the formulas. Useful where `guidance_scale` is large.

    Args:
        regularization: reg at the last level of the trained table, where noise is strongest; 0 for none.
        tolerance: a sample is done when the root mean square of its residual over C, H, W is below it; in units of x,
            whose own is about 1.
        max_iterations: most evaluations of both predictions in a step, beyond the pipeline's own. A sample that is not
            done then gets plain guidance in this step.
        start: fraction of the steps after which it begins; before it, plain guidance.
        stop: fraction of the steps at which it ends; the authors save time with 0.4.
        solver: see `CharacteristicSolver`.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    regularization: float = 1.0
    tolerance: float = 1e-4
    max_iterations: int = 50
    start: float = 0.0
    stop: float = 1.0
    solver: CharacteristicSolver = field(default_factory=CharacteristicSolver)

    def __post_init__(self) -> None:
        reasons = list(self._reasons())
        if reasons:
            raise ValueError("CharacteristicGuidance: " + "; ".join(reasons))

    def _reasons(self) -> Iterator[str]:
        if not _is_number(self.regularization) or self.regularization < 0.0:
            yield f"regularization must be a number of at least 0, got {self.regularization!r}"
        if not _is_number(self.tolerance) or self.tolerance <= 0.0:
            yield f"tolerance must be a positive number, got {self.tolerance!r}"
        if not _is_int(self.max_iterations) or self.max_iterations < 1:
            yield f"max_iterations must be an integer of at least 1, got {self.max_iterations!r}"
        if not (_is_number(self.start) and _is_number(self.stop) and 0.0 <= self.start <= self.stop <= 1.0):
            yield f"start and stop must satisfy 0 <= start <= stop <= 1, got {self.start!r} and {self.stop!r}"
        if not isinstance(self.solver, CharacteristicSolver):
            yield f"solver must be a CharacteristicSolver, got {self.solver!r}"

    def regularization_at(self, alpha_bar: float, last_alpha_bar: float | None = None) -> float:
        """reg_t of a step at level `alpha_bar`, never above `regularization`.

        Args:
            alpha_bar: level of the step, in [0, 1].
            last_alpha_bar: abar_T, the last level of the trained table; None for one that is the step's own.
        """
        if self.solver.projection == "identity":
            return 0.0
        if last_alpha_bar is None or alpha_bar <= last_alpha_bar:
            return float(self.regularization)
        return self.regularization * last_alpha_bar / alpha_bar


@dataclass(frozen=True)
class Solution:
    """The guided prediction of one step, and how it was found.

    Attributes:
        guided: [B, C, H, W], dtype of the sample: u + weight (c - u) of the evaluation that was accepted, in float32 or
            float64; of the given predictions for a sample that was not.
        shift: [B, C, H, W], float32 or float64, the accepted dx in units of x; 0 for a sample without one.
        converged: [B] bool.
        iterations: [B] int64, evaluations of `predict` up to the end of the sample; the batch pays the largest.
        residuals: [K, B], float32 or float64: root mean square residual at dx = 0 and after each evaluation; a sample
            that has ended repeats its last.
    """

    guided: Tensor
    shift: Tensor
    converged: Tensor
    iterations: Tensor
    residuals: Tensor


def solve(
    predict: Predict,
    sample: Tensor,
    uncond: Tensor,
    cond: Tensor,
    weight: float | Tensor,
    alpha_bar: float,
    settings: CharacteristicGuidance,
    last_alpha_bar: float | None = None,
) -> Solution:
    """Solve one step's fixed point for every sample of the batch, each by itself.

    Computes in float32, float64 if the sample is; waits for the device only for `early_stop`. `predict` is called once
    per iteration for the whole batch: with the last dx of a sample that has been accepted, with dx = 0 for one that met
    a NaN or an infinity.

    Args:
        predict: evaluates the two predictions at two inputs.
        sample: x [B, C, H, W], any floating dtype, in the variance-preserving space.
        uncond, cond: eps_u(x) and eps_c(x), [B, C, H, W].
        weight: 1 + omega, a number or a tensor that broadcasts to x, such as a map [B, 1, H, W].
        alpha_bar: level of the step, in [0, 1].
        settings: see `CharacteristicGuidance`; `start` and `stop` are the caller's affair.
        last_alpha_bar: last level of the trained table, for the regularisation; None for the step's own.

    Returns:
        A `Solution`; nothing in it is written to later.

    Raises:
        ValueError: shapes, dtypes or levels do not fit; the message lists every reason. Or `predict` returns another
            shape.
    """
    _check(sample, uncond, cond, weight, alpha_bar, last_alpha_bar)
    dtype = torch.promote_types(sample.dtype, torch.float32)
    x, u, c = sample.to(dtype), uncond.to(dtype), cond.to(dtype)
    gamma = weight.to(dtype) if isinstance(weight, Tensor) else float(weight)
    omega = gamma - 1.0
    scale = math.sqrt(1.0 - alpha_bar)
    space = _Space.of(scale * (u - c), settings.solver)
    memory = min(settings.solver.memory, space.unknowns)
    reg = settings.regularization_at(alpha_bar, last_alpha_bar)

    batch = x.shape[0]
    guided = u + gamma * (c - u)
    y = torch.zeros(batch, space.unknowns, dtype=dtype, device=x.device)  # dx, in the coordinates of the projection
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    converged = torch.zeros_like(active)
    iterations = torch.zeros(batch, dtype=torch.int64, device=x.device)
    shown = torch.zeros(batch, dtype=dtype, device=x.device)
    residuals: list[Tensor] = []
    history: list[tuple[Tensor, Tensor]] = []  # (y, image of y without the factor 1 / (1 + reg)), newest last
    for iteration in range(settings.max_iterations + 1):
        if iteration > 0:
            dx = space.field(y)
            u, c = predict((x + gamma * dx).to(sample.dtype), (x + omega * dx).to(sample.dtype))
            if u.shape != x.shape or c.shape != x.shape:
                raise ValueError(
                    f"characteristic guidance: predict must return two predictions of shape {tuple(x.shape)}, got "
                    f"{tuple(u.shape)} and {tuple(c.shape)}"
                )
            u, c = u.to(dtype), c.to(dtype)
        image = space.coordinates(scale * (u - c))
        error = _norm(y - image / (1.0 + reg)) / math.sqrt(x[0].numel())
        shown = torch.where(active, error, shown)
        residuals.append(shown)
        iterations = torch.where(active, iteration, iterations)
        accepted = active & (error < settings.tolerance)
        lost = active & ~error.isfinite()
        guided = torch.where(_over_field(accepted), u + gamma * (c - u), guided)
        converged = converged | accepted
        active = active & ~(accepted | lost)
        if iteration == settings.max_iterations or (settings.solver.early_stop and not bool(active.any())):
            break

        history = [*history[-memory:], (y, image)] if memory else [(y, image)]
        # The first step is that of P = 1, as published.
        update = _anderson(history, 1.0 if iteration == 0 else 1.0 / (1.0 + reg))
        y = torch.where(active[:, None], update, y)
        y = torch.where(lost[:, None], 0.0, y)
    shift = torch.where(_over_field(converged), space.field(y), 0.0)
    return Solution(guided.to(sample.dtype), shift, converged, iterations, torch.stack(residuals))


@dataclass(frozen=True)
class _Space:
    """The unknowns: all of dx, or its coordinate along one direction per sample.

    Attributes:
        shape: (B, C, H, W).
        direction: a, [B, C H W], rows of norm 1, or 0 where the predictions agree. None for the identity.
    """

    shape: Sequence[int]
    direction: Tensor | None

    @classmethod
    def of(cls, direction: Tensor, solver: CharacteristicSolver) -> _Space:
        """The space of the solver's projection.

        Args:
            direction: g [B, C, H, W], the first residual up to its sign.
        """
        if solver.projection == "identity":
            return cls(direction.shape, None)
        rows = direction.flatten(1)
        return cls(direction.shape, rows / _norm(rows)[:, None].clamp_min(torch.finfo(rows.dtype).tiny ** 0.5))

    @property
    def unknowns(self) -> int:
        """Per sample."""
        return math.prod(self.shape[1:]) if self.direction is None else 1

    def coordinates(self, field: Tensor) -> Tensor:
        """a^T field: [B, C, H, W] -> [B, unknowns]."""
        return field.flatten(1) if self.direction is None else _dot(self.direction, field.flatten(1))

    def field(self, coordinates: Tensor) -> Tensor:
        """a y: [B, unknowns] -> [B, C, H, W]."""
        whole = coordinates if self.direction is None else self.direction * coordinates
        return whole.reshape(*self.shape)


def _anderson(history: Sequence[tuple[Tensor, Tensor]], factor: float) -> Tensor:
    """Next iterate of y = factor image(y), from the last ones.

    Subtracts from the newest iterate the combination of earlier differences that makes its residual smallest, then
    steps along what is left of the residual. Differences of residuals are made orthonormal, newest first, and those of
    iterates go along with them, so that the least squares needs no system of equations; a difference that the newer
    ones explain, within the square root of the rounding error, is left out.

    Args:
        history: (y, image), [B, unknowns] each, newest last.
        factor: 1 / (1 + reg).
    """
    (newest, newest_residual), *earlier = [(y, y - factor * image) for y, image in reversed(history)]
    y, residual = newest, newest_residual
    negligible = torch.finfo(y.dtype).eps ** 0.5
    kept: list[tuple[Tensor, Tensor]] = []
    for older, older_residual in earlier:
        dy, dr = newest - older, newest_residual - older_residual
        size = _norm(dr)
        for axis_y, axis_r in kept:
            along = _dot(axis_r, dr)
            dy, dr = dy - along * axis_y, dr - along * axis_r
        norm = _norm(dr)
        counts = (norm > negligible * size)[:, None]
        axis_y = torch.where(counts, dy / norm[:, None], 0.0)
        axis_r = torch.where(counts, dr / norm[:, None], 0.0)
        kept.append((axis_y, axis_r))
        along = _dot(axis_r, residual)
        y, residual = y - along * axis_y, residual - along * axis_r
    return y - residual


# Sums run over one sample at a time: a reduction over a whole batch may add in an order that depends on its size.
def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B, n], [B, n] -> [B, 1]."""
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)])[:, None]


def _norm(a: Tensor) -> Tensor:
    """[B, n] -> [B], Euclidean."""
    return torch.stack([(p * p).sum() for p in a]).sqrt()


def _over_field(mask: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return mask[:, None, None, None]


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(
    sample: Tensor,
    uncond: Tensor,
    cond: Tensor,
    weight: float | Tensor,
    alpha_bar: float,
    last_alpha_bar: float | None,
) -> None:
    """Raise ValueError with every reason why `solve` cannot take these."""
    reasons = []
    shape = tuple(sample.shape)
    if len(shape) != 4 or 0 in shape or not sample.is_floating_point():
        reasons.append(f"sample must be floating-point [B, C, H, W] and not empty, got {sample.dtype} {shape}")
    for name, tensor in (("uncond", uncond), ("cond", cond)):
        if tuple(tensor.shape) != shape or tensor.device != sample.device:
            got = f"{tuple(tensor.shape)} on {tensor.device}"
            reasons.append(f"{name} must match the sample, {shape} on {sample.device}, got {got}")
    if isinstance(weight, Tensor):
        fits = weight.dim() <= len(shape) and all(
            w in (1, s) for w, s in zip(reversed(weight.shape), reversed(shape), strict=False)
        )
        if not fits or weight.device != sample.device:
            reasons.append(
                f"weight must broadcast to {shape} on {sample.device}, got {tuple(weight.shape)} on {weight.device}"
            )
    elif not _is_number(weight):
        reasons.append(f"weight must be a finite number or a tensor, got {weight!r}")
    for name, level in (("alpha_bar", alpha_bar), ("last_alpha_bar", last_alpha_bar)):
        if not (_is_number(level) and 0.0 <= level <= 1.0) and not (level is None and name == "last_alpha_bar"):
            reasons.append(f"{name} must be a number in [0, 1], got {level!r}")
    if reasons:
        raise ValueError("characteristic guidance: " + "; ".join(reasons))
