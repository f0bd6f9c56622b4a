"""What a step weight may depend on: where the run is, and the noise levels around the step."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch


def whole_steps(fraction: float, count: int) -> int:
    """The whole number of steps in a fraction of all: 0.57 * 100 is 56.99999999999999, and means 57."""
    return int(fraction * count + 1e-6)


def in_part(index: int, count: int, start: float, stop: float) -> bool:
    """Whether step `index` (from 0) of `count` lies in the part of the run from fraction `start` to `stop`."""
    return whole_steps(start, count) <= index < whole_steps(stop, count)


@dataclass(frozen=True)
class Step:
    """One denoising step, in host numbers.

    Attributes:
        index: i, from 0.
        count: N, the number of steps of the call.
        guidance_scale: of the pipeline in this step.
        sigma: noise level of the input: sqrt((1 - abar) / abar) for variance-preserving and -exploding schedulers, t in
            [0, 1] for flow matching. None where the scheduler does not tell.
        next_sigma: the level that the step leads to.
        flow: whether the levels are those of flow matching.
    """

    index: int
    count: int
    guidance_scale: float
    sigma: float | None = None
    next_sigma: float | None = None
    flow: bool = False


@runtime_checkable
class StepWeight(Protocol):
    """A rule for the weight w >= 0 of a step: guided = uncond + w (cond - uncond).

    1 is the conditional prediction alone, 0 the unconditional one.

    Attributes:
        needs_levels: whether `weight` reads `sigma` and `next_sigma`; reading the scheduler's tables waits for the
            device, once per call.
    """

    @property
    def needs_levels(self) -> bool: ...

    def weight(self, step: Step) -> float:
        """The weight w, in the place of `guidance_scale`."""
        ...

    def check(self, scheduler: Any, eta: float = 0.0) -> None:
        """Raise ValueError, with what to do instead, if the rule cannot be applied with this scheduler and `eta`."""
        ...


def step_levels(scheduler: Any, start: Any = None) -> tuple[list[tuple[float, float]], bool] | None:
    """(level of the input, level the step leads to) of each step, and whether they are flow times.

    Reads the scheduler's tables back from the device: for once per call, before its first step.

    Args:
        scheduler: a diffusers scheduler whose `set_timesteps` has run.
        start: the timestep that the run begins with, a number or a tensor; img2img begins later than the scheduler.
            None for the scheduler's first.

    Returns:
        One pair per step from `start` on, or None for a scheduler that publishes neither `sigmas` nor `alphas_cumprod`,
        or in an unknown layout. The level of pure noise (abar = 0, zero terminal SNR) is inf.
    """
    flow = "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas", False))
    timesteps = scheduler.timesteps.tolist()
    first = 0
    if getattr(scheduler, "begin_index", None) is not None:
        first = scheduler.begin_index
    elif start is not None:
        begin = float(torch.as_tensor(start).flatten()[0])
        first = min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - begin))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        return list(itertools.pairwise(sigmas.tolist()))[first:], flow
    if getattr(scheduler, "alphas_cumprod", None) is None or flow:
        return None
    levels = [_sigma(alpha_bar) for alpha_bar in scheduler.alphas_cumprod.tolist()]
    final = _sigma(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
    timesteps = [int(t) for t in timesteps]
    if type(scheduler).__name__.startswith("DDIM"):  # its step goes to t - T // N, wherever the next timestep lies
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        following = [t - stride for t in timesteps]
    else:
        following = [*timesteps[1:], -1]
    pairs = [(levels[t], levels[n] if n >= 0 else final) for t, n in zip(timesteps, following, strict=True)]
    return pairs[first:], flow


def trained_level(scheduler: Any) -> float | None:
    """The noise level at the end of the table that the model was trained with, sqrt((1 - abar) / abar).

    Reads one number back from the scheduler's table: for once per call.

    Args:
        scheduler: a diffusers scheduler with `alphas_cumprod` or, without it, `config.sigma_max`.

    Returns:
        The level, inf for zero terminal SNR; None for a scheduler with neither.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        return _sigma(float(table[-1]))
    largest = scheduler.config.get("sigma_max")
    return None if largest is None else float(largest)


def _sigma(alpha_bar: float) -> float:
    return ((1.0 - alpha_bar) / alpha_bar) ** 0.5 if alpha_bar > 0.0 else math.inf
