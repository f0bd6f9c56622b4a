r"""Guidance weights that change over the run.

With tau the progress of the run in [0, 1] and omega = guidance_scale - 1, the weight of the direction beyond the
conditional prediction (the paper's equation 4, eps_c + omega (eps_c - eps_u)):

    constant      omega                       linear      2 tau omega
    cosine        (1 - cos(pi tau)) omega     inverse-linear   2 (1 - tau) omega
    sine          (1 + cos(pi tau)) omega     v           2 omega |1 - 2 tau|
    lambda        2 omega (1 - |1 - 2 tau|)   power-cosine     omega (1 - cos(pi tau^s)) / 2
    clamp-linear, clamp-cosine                max(c, linear), max(c, cosine)

All but the last three rows' power-cosine and clamps have mean omega over tau in [0, 1]. Clamped ones have a larger mean
(clamp-linear: omega + c^2 / (4 omega)), power-cosine a smaller one (omega / 2 at s = 1): a comparison "at equal
guidance_scale" is then not at equal dose, so the mean that was applied is reported in `handle.stats`.

Source: Wang et al., "Analysis of Classifier-Free Guidance Weight Schedulers", TMLR 2024 (arXiv 2404.13040); the
normalisation of v and lambda is ours. The interval is that of Kynkaanniemi et al., "Applying Guidance in a Limited
Interval" (arXiv 2404.07724): outside, the conditional prediction alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .steps import Step, in_part

SHAPES = (
    "constant", "linear", "cosine", "inverse-linear", "sine", "v", "lambda", "clamp-linear", "clamp-cosine",
    "power-cosine",
)  # fmt: skip


def shape_value(shape: str, progress: float, *, floor: float = 0.0, power: float = 1.0) -> float:
    """Value of a shape of mean weight 1, at a progress in [0, 1].

    Args:
        shape: one of `SHAPES`.
        progress: tau, 0 at the noise, 1 at the picture.
        floor: lower bound of the clamped shapes, in units of the weight.
        power: s of `"power-cosine"`.
    """
    tau = progress
    linear, cosine = 2.0 * tau, 1.0 - math.cos(math.pi * tau)
    return {
        "constant": lambda: 1.0,
        "linear": lambda: linear,
        "cosine": lambda: cosine,
        "inverse-linear": lambda: 2.0 - linear,
        "sine": lambda: 2.0 - cosine,
        "v": lambda: 2.0 * abs(1.0 - linear),
        "lambda": lambda: 2.0 * (1.0 - abs(1.0 - linear)),
        "clamp-linear": lambda: max(floor, linear),
        "clamp-cosine": lambda: max(floor, cosine),
        "power-cosine": lambda: 0.5 * (1.0 - math.cos(math.pi * tau**power)),
    }[shape]()


@dataclass(frozen=True)
class WeightSchedule:
    """A guidance weight that changes over the steps, in the place of a constant `guidance_scale`.

    Args:
        shape: one of `SHAPES`, a table of factors on omega = guidance_scale - 1 (entry by entry if it is as long as the
            run, else resampled linearly), or a function of the progress in (0, 1) that returns a factor. Step i of N
            reads the shape at (i + 1/2) / N, which keeps the mean exactly. Weights below 0 are refused when they come
            up.
        floor: c of the clamped shapes, as omega (the paper's SD 1.5: 2, SDXL: 4); other shapes ignore it.
        power: s of `"power-cosine"` (SD 1.5: 1, SDXL: 0.1).
        interval: (start, stop) fractions of the steps, or noise levels if `interval_in="sigma"`: guided inside, the
            conditional prediction alone outside. Steps with weight 1 compute the conditional half of the batch alone.
        interval_in: `"progress"` or `"sigma"`.
        half_batch: whether steps with weight 1 leave out the unconditional half. It stays anyway where the batch size
            must not change: under `torch.compile`, with attention arguments, and with caches that replace the forward
            of blocks.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    shape: str | Sequence[float] | Callable[[float], float] = "constant"
    floor: float = 0.0
    power: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    interval_in: str = "progress"
    half_batch: bool = True

    def __post_init__(self) -> None:
        reasons = []
        if isinstance(self.shape, str):
            if self.shape not in SHAPES:
                reasons.append(f"shape={self.shape!r} is unknown, use one of {SHAPES}, a table or a function")
        elif not callable(self.shape):
            object.__setattr__(self, "shape", tuple(float(x) for x in self.shape))
            if not self.shape:
                reasons.append("a table needs at least one factor")
        if self.interval_in not in ("progress", "sigma"):
            reasons.append(f"interval_in={self.interval_in!r} is unknown, use 'progress' or 'sigma'")
        low, high = self.interval
        if not 0.0 <= low <= high:
            reasons.append(f"interval must be 0 <= start <= stop, got {self.interval}")
        if self.power <= 0.0:
            reasons.append(f"power must be positive, got {self.power}")
        if reasons:
            raise ValueError("WeightSchedule: " + "; ".join(reasons))

    @property
    def needs_levels(self) -> bool:
        """Only an interval in noise levels does."""
        return self.interval_in == "sigma"

    def check(self, scheduler: Any, eta: float = 0.0) -> None:
        """Every scheduler will do; noise levels are asked for step by step."""

    def weight(self, step: Step) -> float:
        """The weight w of a step; see the module's formulas.

        Raises:
            ValueError: the interval is in sigma and the scheduler publishes no levels.
        """
        if not self._inside(step):
            return 1.0
        omega = step.guidance_scale - 1.0
        return 1.0 + omega * self._factor((step.index + 0.5) / step.count, step, omega)

    def _factor(self, progress: float, step: Step, omega: float) -> float:
        if isinstance(self.shape, str):
            floor = self.floor / omega if omega > 0.0 else 0.0
            return shape_value(self.shape, progress, floor=floor, power=self.power)
        if callable(self.shape):
            return float(self.shape(progress))
        last = len(self.shape) - 1
        if step.count == last + 1:
            return self.shape[step.index]
        # Entries sit where as many steps would: at midpoints of their shares of the run.
        place = min(max(progress * (last + 1) - 0.5, 0.0), float(last))
        low = min(int(place), max(0, last - 1))
        return self.shape[low] + (place - low) * (self.shape[min(low + 1, last)] - self.shape[low])

    def _inside(self, step: Step) -> bool:
        low, high = self.interval
        if self.interval_in == "progress":
            return in_part(step.index, step.count, low, high)
        if step.sigma is None:
            raise ValueError("WeightSchedule: this scheduler publishes no noise levels; give the interval in progress")
        return low <= step.sigma <= high
