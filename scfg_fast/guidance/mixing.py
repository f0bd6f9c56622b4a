r"""How the two predictions become one: plain guidance, APG or CFG-Zero*, with rates, and by how much they were mixed.

With u, t the unconditional and the conditional prediction, d = t - u, w the weight of the step and r its rates per
pixel (1 where there are none), norms and inner products those of a whole sample:

    cfg         f = u + w r d
    apg         m <- d + beta m;  m = m min(1, norm_threshold / ||m||);  m = m_par + m_orth along and across t
                f = u + w r (m_orth + eta m_par)
    cfg-zero    a = <t, u> / ||u||^2;  f = a u + w r (t - a u);  f = 0 in the first `zero_init_steps` steps

beta is `adaptive_projected_guidance_momentum`, norm_threshold `adaptive_projected_guidance_rescale`. Rates come from d,
before the rule. Momentum belongs to one run.

The dose of a step is the effective weight of the prediction g that the scheduler gets,

    w_eff = ||g - u|| / ||t - u||          1 where t = u

which for plain guidance is w, and for rates w ||r d|| / ||d||. With dose = "matched" the rates are multiplied by one
factor per sample, k, with which w_eff = w: k = ||d|| / ||r m|| for cfg and apg, and for cfg-zero, where
f - u = (a - 1) u + k w r (t - a u), the positive root of a quadratic equation. `guidance_rescale`, which the pipeline
applies later, is not part of k, but of w_eff.

Source: Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models", ICLR 2025
(arXiv 2410.02416); Fan et al., "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models" (arXiv
2503.18886), with the names and defaults of diffusers' guiders; the effective weight as in "Guidance Matters" (arXiv
2602.22570); the composition with rates and the matched dose are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COMBINATIONS = ("cfg", "apg", "cfg-zero")
DOSES = ("as-published", "matched")


@dataclass(frozen=True)
class Mixed:
    """What a step's mixing amounts to.

    Attributes:
        moved: [G, C, H, W], f - u, float32 or float64.
        rate: [G, 1, H, W], the rates as applied, or None for 1 everywhere.
    """

    moved: Tensor
    rate: Tensor | None


class Mixer:
    """Mixes the predictions of one run; holds APG's momentum.

    Args:
        combine: one of `COMBINATIONS`.
        dose: one of `DOSES`.
        momentum: beta of APG, None for none.
        norm_threshold: of APG; 0 for none.
        eta: of APG, how much of the part along t stays.
    """

    def __init__(
        self,
        combine: str = "cfg",
        dose: str = "as-published",
        momentum: float | None = None,
        norm_threshold: float = 15.0,
        eta: float = 1.0,
    ) -> None:
        self._combine = combine
        self._matched = dose == "matched"
        self._momentum = momentum
        self._norm_threshold = norm_threshold
        self._eta = eta
        self._average: Tensor | None = None

    def __call__(self, uncond: Tensor, cond: Tensor, weight: float, rate: Tensor | None, samples: int) -> Mixed:
        """Mix the predictions of one step; call it once per step, in order.

        Args:
            uncond, cond: [G, C, H, W], the frames of a sample side by side.
            weight: w.
            rate: [G, 1, H, W] from the plain d, or None for 1 everywhere.
            samples: how many samples the G images belong to.
        """
        dtype = torch.promote_types(cond.dtype, torch.float32)
        u, t = uncond.to(dtype), cond.to(dtype)
        offset: Tensor | None = None
        if self._combine == "cfg-zero":
            along = _inner(t, u, samples) / (_inner(u, u, samples) + 1e-8)  # [samples]
            scaled = _over(along, u) * u
            offset, direction = scaled - u, t - scaled
        else:
            direction = t - u if self._combine == "cfg" else self._projected(t - u, t, samples)
        applied = direction if rate is None else rate * direction
        if self._matched:
            factor = _over(_matching_factor(applied, offset, weight, t - u, samples), u)
            applied = factor * applied
            rate = None if rate is None else factor * rate
        return Mixed(weight * applied if offset is None else offset + weight * applied, rate)

    def _projected(self, difference: Tensor, cond: Tensor, samples: int) -> Tensor:
        """APG's direction [G, C, H, W]."""
        if self._momentum is not None:
            if self._average is not None:
                difference = difference + self._momentum * self._average
            self._average = difference
        if self._norm_threshold > 0.0:
            length = norm(difference, samples)
            difference = _over((self._norm_threshold / length).clamp(max=1.0), difference) * difference
        if self._eta == 1.0:
            return difference
        wide, axis = difference.double(), cond.double()
        along = _inner(wide, axis, samples) / _inner(axis, axis, samples).clamp_min(1e-24)
        parallel = (_over(along, axis) * axis).to(difference.dtype)
        return difference - parallel + self._eta * parallel


def _matching_factor(applied: Tensor, offset: Tensor | None, weight: float, difference: Tensor, samples: int) -> Tensor:
    """k [samples] with ||offset + k w applied|| = w ||difference||; 1 where there is none."""
    size, wanted = norm(applied, samples), norm(difference, samples)
    if offset is None:
        return torch.where(size > 0.0, wanted / size, 1.0)
    offset = offset / max(weight, torch.finfo(offset.dtype).tiny)
    half = _inner(offset, applied, samples)
    root = half.square() - size.square() * (_inner(offset, offset, samples) - wanted.square())
    factor = (root.clamp_min(0.0).sqrt() - half) / size.square()
    return torch.where((root >= 0.0) & (size > 0.0) & (factor > 0.0), factor, 1.0)


def distances(
    uncond: Tensor, cond: Tensor, weight: float, rate: Tensor | None, moved: Tensor | None, rescale: float, samples: int
) -> tuple[Tensor, Tensor]:
    """(||g - u||, ||t - u||), [samples] each, whose ratio is the effective weight.

    Args:
        uncond, cond: u and t, [G, C, H, W].
        weight, rate: w and r of f = u + w r d; a rate of None is 1 everywhere.
        moved: f - u where it is something else, or None.
        rescale: phi of guidance_rescale, which makes g of f.
        samples: how many samples the G images belong to.
    """
    dtype = torch.promote_types(cond.dtype, torch.float32)
    difference = cond.to(dtype) - uncond.to(dtype)
    if moved is None:
        moved = weight * (difference if rate is None else rate * difference)
    if rescale > 0.0:
        moved = rescaled(moved, uncond, cond, rescale, samples)
    return norm(moved.to(dtype), samples), norm(difference, samples)


def rescaled(moved: Tensor, uncond: Tensor, cond: Tensor, rescale: float, samples: int) -> Tensor:
    """g - u after `guidance_rescale`, f (phi std(t) / std(f) + 1 - phi) with f = u + moved; [G, C, H, W]."""
    f = uncond.to(moved.dtype) + moved
    target, spread = (x.reshape(samples, -1).std(1) for x in (cond.to(moved.dtype), f))
    return _over(rescale * target / spread + (1.0 - rescale), f) * f - uncond


def norm(x: Tensor, samples: int) -> Tensor:
    """Euclidean norm over a whole sample: [G, C, H, W] -> [samples]."""
    return torch.linalg.vector_norm(x.reshape(samples, -1), dim=1)


def _inner(a: Tensor, b: Tensor, samples: int) -> Tensor:
    """[G, C, H, W], [G, C, H, W] -> [samples]."""
    return (a * b).reshape(samples, -1).sum(1)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """[samples] -> [G, 1, 1, 1]."""
    return values.repeat_interleave(like.shape[0] // values.shape[0])[:, None, None, None]
