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
CONVENTIONS = ("omega", "guidance_scale")
GRIDS = ("midpoint", "left", "inclusive")


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
        shape: one of `SHAPES`, a table of factors on the weight (entry by entry if it is as long as the run, else
            resampled linearly), or a function of the progress in [0, 1], or of the noise level, that returns a factor.
            Weights below 0 are refused when they come up.
        floor: c of the clamped shapes, as a weight in the chosen convention (the paper's SD 1.5: 2, SDXL: 4); other
            shapes ignore it.
        power: s of `"power-cosine"` (SD 1.5: 1, SDXL: 0.1).
        convention: what is scheduled: `"omega"`, guidance_scale - 1, the paper's, never below the conditional
            prediction; or `"guidance_scale"` itself, which starts at the unconditional prediction where a shape starts
            at 0.
        grid: where in its share of the run a step reads the shape: `"midpoint"` (i + 1/2) / N keeps the mean exactly,
            `"left"` i / N, `"inclusive"` i / (N - 1).
        interval: (start, stop) fractions of the steps, or noise levels if `interval_in="sigma"`: guided inside, the
            conditional prediction alone outside. Steps with weight 1 compute the conditional half of the batch alone.
        interval_in: `"progress"` or `"sigma"`.
        shape_in: what a function is called with: `"progress"` or `"sigma"`, `Step.sigma`.
        half_batch: whether steps with weight 1 leave out the unconditional half. It stays anyway where the batch size
            must not change: under `torch.compile`, with attention arguments, and with caches that replace the forward
            of blocks.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    shape: str | Sequence[float] | Callable[[float], float] = "constant"
    floor: float = 0.0
    power: float = 1.0
    convention: str = "omega"
    grid: str = "midpoint"
    interval: tuple[float, float] = (0.0, 1.0)
    interval_in: str = "progress"
    shape_in: str = "progress"
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
        if self.convention not in CONVENTIONS:
            reasons.append(f"convention={self.convention!r} is unknown, use one of {CONVENTIONS}")
        if self.grid not in GRIDS:
            reasons.append(f"grid={self.grid!r} is unknown, use one of {GRIDS}")
        for name in ("interval_in", "shape_in"):
            if getattr(self, name) not in ("progress", "sigma"):
                reasons.append(f"{name}={getattr(self, name)!r} is unknown, use 'progress' or 'sigma'")
        if self.shape_in == "sigma" and not callable(self.shape):
            reasons.append("shape_in='sigma' needs a function; named shapes and tables are over the progress")
        low, high = self.interval
        if not 0.0 <= low <= high:
            reasons.append(f"interval must be 0 <= start <= stop, got {self.interval}")
        if self.power <= 0.0:
            reasons.append(f"power must be positive, got {self.power}")
        if reasons:
            raise ValueError("WeightSchedule: " + "; ".join(reasons))

    @property
    def needs_levels(self) -> bool:
        """Only an interval or a function in noise levels does."""
        return "sigma" in (self.interval_in, self.shape_in)

    def check(self, scheduler: Any, eta: float = 0.0) -> None:
        """Every scheduler will do; noise levels are asked for step by step."""

    def weight(self, step: Step) -> float:
        """The weight w of a step; see the module's formulas.

        Raises:
            ValueError: the interval or the function is in sigma and the scheduler publishes none.
        """
        if not self._inside(step):
            return 1.0
        unit = step.guidance_scale - 1.0 if self.convention == "omega" else step.guidance_scale
        return (1.0 if self.convention == "omega" else 0.0) + unit * self._factor(step, unit)

    def _factor(self, step: Step, unit: float) -> float:
        progress = self._progress(step)
        if isinstance(self.shape, str):
            floor = self.floor / unit if unit > 0.0 else 0.0
            return shape_value(self.shape, progress, floor=floor, power=self.power)
        if callable(self.shape):
            return float(self.shape(progress if self.shape_in == "progress" else self._sigma(step)))
        last = len(self.shape) - 1
        if step.count == last + 1:
            return self.shape[step.index]
        # Entries sit where as many steps would: at midpoints of their shares of the run, or from end to end.
        place = progress * last if self.grid == "inclusive" else progress * (last + 1) - 0.5
        place = min(max(place, 0.0), float(last))
        low = min(int(place), max(0, last - 1))
        return self.shape[low] + (place - low) * (self.shape[min(low + 1, last)] - self.shape[low])

    def _progress(self, step: Step) -> float:
        if self.grid == "midpoint":
            return (step.index + 0.5) / step.count
        if self.grid == "left":
            return step.index / step.count
        return step.index / max(1, step.count - 1)

    def _inside(self, step: Step) -> bool:
        low, high = self.interval
        if self.interval_in == "sigma":
            return low <= self._sigma(step) <= high
        return in_part(step.index, step.count, low, high)

    @staticmethod
    def _sigma(step: Step) -> float:
        if step.sigma is None:
            raise ValueError(
                "WeightSchedule: this scheduler publishes no noise levels; give the interval and the shape in progress"
            )
        return step.sigma


def mean_factor(shape: str, *, floor: float = 0.0, power: float = 1.0, samples: int = 4096) -> float:
    """Mean of a shape over the run, which is its dose relative to a constant weight; midpoint rule."""
    values = (shape_value(shape, (i + 0.5) / samples, floor=floor, power=power) for i in range(samples))
    return sum(values) / samples
