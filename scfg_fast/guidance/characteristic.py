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

P is the identity or a ridge projection onto directions taken from g = sqrt(1 - abar) (eps_u(x) - eps_c(x)):

    P = A (A^T A + reg)^-1 A^T = A A^T / (1 + reg)       A: pieces of g with disjoint support, of Euclidean norm 1

one piece per image, or n per channel, each with the values between two n-quantiles of the channel. Because A^T A = 1
the published floor of 1e-4 under the eigenvalues never acts, reg has no unit, and the problem is solved in the
coordinates A^T dx: 1 or n C numbers per sample. reg falls along the run, from `regularization` to nearly 0:
reg_t = regularization (abar_T / abar_t)^(1 / regularization_range), with abar_T at the first step.

Solver: Anderson acceleration, since plain iteration diverges where the method is of use: for Gaussians of variances
0.302 and 1 its Jacobian sqrt(1 - abar) ((1 + omega) eps_u' - omega eps_c') has spectral radius 1.42 at omega 9, abar
0.9. Least squares per sample, by modified Gram-Schmidt over the last differences; dependent ones are left out. The
samples of a batch share nothing: the bits of one do not depend on its mates if those of `predict` do not.

What differs from the published code (its defaults for `anneal` and `reuse` are 0.4 and 1; see what was measured):

* Annealing. Published, reg starts at 5 and is an unknown of the Anderson system itself. Here sqrt(reg) relaxes by the
  factor 1 - `anneal` per iteration, and the residual that is tested always is that of the step's own reg_t, so that the
  answer does not depend on the annealing, only its price does.
* The history keeps images before the factor 1 / (1 + reg), so that its residuals are those of the present reg.
* At dx = 0 the pipeline has evaluated both predictions: directions and first residual cost nothing. The first step is
  dx = g, P = 1, as published. A warm start is projected onto the new directions, and the residual at 0 is the first
  entry of its history. The accepted evaluation is the result, no last one follows.
* x and the tolerance are variance-preserving with every scheduler. With sigma-space samplers the published dx is larger
  by 1 / sqrt(abar), and its test stricter by as much.
* A sample with a NaN or an infinity ends there; published, it changes the least squares of the whole batch.

Measured with the bundled model: 3 pictures of 10 DDIM steps in float32, at most 20 evaluations, with guidance 5 and 15
(`python -m benchmarks.guidance solver --pictures 3 --steps 10`, benchmarks/results/guidance-solver.csv). Evaluations
are means over the samples that converged, of 30 in all:

* the default: 3.9 at guidance 5, 4.5 at 15, where 2 did not converge;
* `anneal=0.4`: 9.7, and 8.4 with 1 that did not converge;
* `reuse=1`: 4.2 and 4.2. It saves nothing at guidance 5; at 15 all converged;
* `bases=1`, per channel: 7.2 and 7.3, up to 17;
* the identity: 2 of 60 converged (`characteristic` in the place of `solver`; guidance-characteristic.csv).

Source: Zheng and Lan, "Characteristic Guidance: Non-linear Correction for Diffusion Model at Large Guidance Scale",
ICML 2024 (arXiv 2312.07586), and the behaviour of its published web UI extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

PROJECTIONS = ("ridge", "identity")
_FIRST_REGULARIZATION = 5.0
"""Where the annealing starts, unless `regularization` is larger."""

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(input of the unconditional prediction, of the conditional one) -> (eps_u, eps_c), noise predictions.

All [B, C, H, W], the inputs in the dtype of the sample."""


@dataclass(frozen=True)
class CharacteristicGuidance:
    """Settings of characteristic guidance; the module has the formulas. Useful where `guidance_scale` is large.

    Args:
        projection: P, `"ridge"` or `"identity"`. The identity has as many unknowns as the latents: exact for Gaussians,
            hard to solve for networks.
        bases: directions of the ridge projection: 0 for one per image, n >= 1 for n per channel.
        regularization: reg at the first step of the run; 0 for none.
        regularization_range: larger values keep reg up for longer.
        anneal: in (0, 1], relaxation of sqrt(reg) towards the step's value per iteration. 1 for no annealing, which
            takes about half of the evaluations (see the module).
        tolerance: a sample is done when the root mean square of its residual over C, H, W is below it; in units of x,
            whose own is about 1.
        max_iterations: most evaluations of both predictions in a step, beyond the pipeline's own. A sample that is not
            done then gets plain guidance in this step.
        memory: differences that Anderson acceleration keeps; never more than there are unknowns, so 1 with
            `bases=0`. 0 for plain iteration.
        step_size: damping of the iteration, 1 for none.
        reuse: how much of the last step's shift to start from, 0 for a cold start.
        start: fraction of the steps after which it begins; before it, plain guidance.
        stop: fraction of the steps at which it ends; the authors save time with 0.4.
        early_stop: stop when every sample is done, which reads one flag from the device per iteration. False: none is
            read, always `max_iterations` evaluations, the same result bit by bit.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    projection: str = "ridge"
    bases: int = 0
    regularization: float = 1.0
    regularization_range: float = 1.0
    anneal: float = 1.0
    tolerance: float = 1e-4
    max_iterations: int = 50
    memory: int = 2
    step_size: float = 1.0
    reuse: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    early_stop: bool = True

    def __post_init__(self) -> None:
        reasons = list(self._reasons())
        if reasons:
            raise ValueError("CharacteristicGuidance: " + "; ".join(reasons))

    def _reasons(self) -> Iterator[str]:
        if self.projection not in PROJECTIONS:
            yield f"projection={self.projection!r} is unknown, use one of {PROJECTIONS}"
        for name, least in (("bases", 0), ("max_iterations", 1), ("memory", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                yield f"{name} must be an integer of at least {least}, got {value!r}"
        for name in ("regularization", "reuse"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0.0:
                yield f"{name} must be a number of at least 0, got {value!r}"
        for name in ("regularization_range", "tolerance", "step_size"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0.0:
                yield f"{name} must be a positive number, got {value!r}"
        if not _is_number(self.anneal) or not 0.0 < self.anneal <= 1.0:
            yield f"anneal must be above 0 and at most 1, got {self.anneal!r}"
        if not (_is_number(self.start) and _is_number(self.stop) and 0.0 <= self.start <= self.stop <= 1.0):
            yield f"start and stop must satisfy 0 <= start <= stop <= 1, got {self.start!r} and {self.stop!r}"
        if not isinstance(self.early_stop, bool):
            yield f"early_stop must be True or False, got {self.early_stop!r}"

    def target_regularization(self, alpha_bar: float, first_alpha_bar: float | None = None) -> float:
        """reg_t of a step at level `alpha_bar`; `regularization` at and before the first step of the run.

        Args:
            alpha_bar: level of the step, in [0, 1].
            first_alpha_bar: abar_T, the level of the run's first step; None if this is it.
        """
        if self.projection == "identity":
            return 0.0
        if first_alpha_bar is None or alpha_bar <= first_alpha_bar:
            return float(self.regularization)
        return self.regularization * (first_alpha_bar / alpha_bar) ** (1.0 / self.regularization_range)

    def _applied_regularization(self, target: float, iteration: int) -> float:
        """reg of the update in an iteration: 0 in the first, then annealed from the start value to the target."""
        if self.projection == "identity" or iteration == 0:
            return 0.0
        last, first = math.sqrt(target), math.sqrt(max(_FIRST_REGULARIZATION, self.regularization))
        return (last + (1.0 - self.anneal) ** iteration * (first - last)) ** 2


@dataclass(frozen=True)
class Shift:
    """What a step leaves for the warm start of the next.

    Attributes:
        dx: [B, C, H, W], float32 or float64, in units of x; 0 for samples that fell back to plain guidance.
        alpha_bar: level of the step that it belongs to.
    """

    dx: Tensor
    alpha_bar: float

    def at(self, alpha_bar: float) -> Tensor:
        """dx carried to another level: times abar_prev (1 - abar) / (abar (1 - abar_prev)), which is the ratio of
        squared sigmas and 1 at equal levels; 0 where that is undefined, from noiseless or to pure noise."""
        before, after = self.alpha_bar, alpha_bar
        if before == after:
            return self.dx
        if before >= 1.0 or after <= 0.0:
            return torch.zeros_like(self.dx)
        return self.dx * (before * (1.0 - after) / (after * (1.0 - before)))


@dataclass(frozen=True)
class Solution:
    """The guided prediction of one step, and how it was found.

    Attributes:
        guided: [B, C, H, W], dtype of the sample: u + weight (c - u) of the evaluation that was accepted, in float32 or
            float64; of the given predictions for a sample that was not.
        shift: the accepted dx; 0 for a sample without one.
        converged: [B] bool.
        iterations: [B] int64, evaluations of `predict` up to the end of the sample; the batch pays the largest.
        residuals: [K, B], float32 or float64: root mean square residual at dx = 0 and after each evaluation; a sample
            that has ended repeats its last.
    """

    guided: Tensor
    shift: Shift
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
    previous: Shift | None = None,
    first_alpha_bar: float | None = None,
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
        previous: shift of the step before, same shape as x; None for a cold start.
        first_alpha_bar: level of the run's first step, for the regularisation; None if this is it.

    Returns:
        A `Solution`; nothing in it is written to later.

    Raises:
        ValueError: shapes, dtypes or levels do not fit; the message lists every reason. Or `predict` returns another
            shape.
    """
    _check(sample, uncond, cond, weight, alpha_bar, previous, first_alpha_bar)
    dtype = torch.promote_types(sample.dtype, torch.float32)
    x, u, c = sample.to(dtype), uncond.to(dtype), cond.to(dtype)
    gamma = weight.to(dtype) if isinstance(weight, Tensor) else float(weight)
    omega = gamma - 1.0
    scale = math.sqrt(1.0 - alpha_bar)
    space = _Space.of(scale * (u - c), settings)
    memory = min(settings.memory, space.unknowns)
    target = settings.target_regularization(alpha_bar, first_alpha_bar)
    warm = settings.reuse > 0.0 and previous is not None

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
        error = _norm(y - image / (1.0 + target)) / math.sqrt(x[0].numel())
        shown = torch.where(active, error, shown)
        residuals.append(shown)
        iterations = torch.where(active, iteration, iterations)
        accepted = active & (error < settings.tolerance)
        lost = active & ~error.isfinite()
        guided = torch.where(_over_field(accepted), u + gamma * (c - u), guided)
        converged = converged | accepted
        active = active & ~(accepted | lost)
        if iteration == settings.max_iterations or (settings.early_stop and not bool(active.any())):
            break

        history = [*history[-memory:], (y, image)] if memory else [(y, image)]
        if iteration == 0 and warm and previous is not None:
            update = space.coordinates(settings.reuse * previous.at(alpha_bar).to(dtype))
        else:
            applied = settings._applied_regularization(target, iteration)
            update = _anderson(history, 1.0 / (1.0 + applied), settings.step_size)
        y = torch.where(active[:, None], update, y)
        y = torch.where(lost[:, None], 0.0, y)
    shift = Shift(torch.where(_over_field(converged), space.field(y), 0.0), float(alpha_bar))
    return Solution(guided.to(sample.dtype), shift, converged, iterations, torch.stack(residuals))


@dataclass(frozen=True)
class _Space:
    """The unknowns: all of dx, or its coordinates along orthonormal directions.

    Attributes:
        shape: (B, C, H, W).
        basis: A^T, [B, groups, pieces, elements of a group], one group per image or per channel; rows of norm 1, or 0
            where a piece is empty. None for the identity.
    """

    shape: Sequence[int]
    basis: Tensor | None

    @classmethod
    def of(cls, direction: Tensor, settings: CharacteristicGuidance) -> _Space:
        """The space of the settings' projection.

        Args:
            direction: g [B, C, H, W], the first residual up to its sign.
        """
        if settings.projection == "identity":
            return cls(direction.shape, None)
        batch, channels = direction.shape[:2]
        rows = direction.reshape(batch, channels if settings.bases else 1, 1, -1)
        pieces = rows
        if settings.bases > 1:
            count, size = settings.bases, rows.shape[-1]
            ordered = rows.sort(dim=-1).values
            piece = torch.zeros_like(rows, dtype=torch.int64)
            for i in range(1, count):
                piece = piece + (rows >= ordered[..., i * size // count, None])
            index = torch.arange(count, device=rows.device)[:, None]
            pieces = torch.where(piece == index, rows, 0.0)
        norm = torch.stack([one.square().sum(-1, keepdim=True).sqrt() for one in pieces])
        return cls(direction.shape, pieces / norm.clamp_min(torch.finfo(rows.dtype).tiny ** 0.5))

    @property
    def unknowns(self) -> int:
        """Per sample."""
        if self.basis is None:
            return math.prod(self.shape[1:])
        return self.basis.shape[1] * self.basis.shape[2]

    def coordinates(self, field: Tensor) -> Tensor:
        """A^T field: [B, C, H, W] -> [B, unknowns]."""
        if self.basis is None:
            return field.reshape(self.shape[0], -1)
        rows = field.reshape(self.shape[0], self.basis.shape[1], 1, -1)
        return torch.stack([(a * row).sum(-1).flatten() for a, row in zip(self.basis, rows, strict=True)])

    def field(self, coordinates: Tensor) -> Tensor:
        """A y: [B, unknowns] -> [B, C, H, W]."""
        if self.basis is None:
            return coordinates.reshape(*self.shape)
        return (self.basis * coordinates.reshape(*self.basis.shape[:3], 1)).sum(2).reshape(*self.shape)


def _anderson(history: Sequence[tuple[Tensor, Tensor]], factor: float, step_size: float) -> Tensor:
    """Next iterate of y = factor image(y), from the last ones.

    Subtracts from the newest iterate the combination of earlier differences that makes its residual smallest, then
    steps along what is left of the residual. Differences of residuals are made orthonormal, newest first, and those of
    iterates go along with them, so that the least squares needs no system of equations; a difference that the newer
    ones explain, within the square root of the rounding error, is left out.

    Args:
        history: (y, image), [B, unknowns] each, newest last.
        factor: 1 / (1 + reg).
        step_size: of the last step.
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
    return y - step_size * residual


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


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(
    sample: Tensor,
    uncond: Tensor,
    cond: Tensor,
    weight: float | Tensor,
    alpha_bar: float,
    previous: Shift | None,
    first_alpha_bar: float | None,
) -> None:
    """Raise ValueError with every reason why `solve` cannot take these."""
    reasons = []
    shape = tuple(sample.shape)
    if len(shape) != 4 or 0 in shape or not sample.is_floating_point():
        reasons.append(f"sample must be floating-point [B, C, H, W] and not empty, got {sample.dtype} {shape}")
    for name, tensor in (("uncond", uncond), ("cond", cond), ("previous", sample if previous is None else previous.dx)):
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
    for name, level in (("alpha_bar", alpha_bar), ("first_alpha_bar", first_alpha_bar)):
        if not (_is_number(level) and 0.0 <= level <= 1.0) and not (level is None and name == "first_alpha_bar"):
            reasons.append(f"{name} must be a number in [0, 1], got {level!r}")
    if reasons:
        raise ValueError("characteristic guidance: " + "; ".join(reasons))
