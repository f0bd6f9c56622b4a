"""Around one step of a scheduler: for one pipeline call, `scheduler.step` does something before and after itself.

Guidance that is a change of the prediction needs none of this. What must see the sample as well does: a correction of
the sample after the step (loss guidance), a step repeated from the sample before it (time travel), renoising with
another prediction (CFG++ in a multistep solver).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

SchedulerStep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(prediction, sample) -> previous sample: the scheduler's own step at the present timestep."""

Around = Callable[[SchedulerStep, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, prediction, sample) -> previous sample."""


@contextlib.contextmanager
def stepping(scheduler: Any, around: Around) -> Iterator[None]:
    """`scheduler.step` runs through `around` inside the block; afterwards the scheduler is stock.

    Args:
        scheduler: a diffusers scheduler. The replacement keeps the signature of `step`, which pipelines inspect.
        around: called with the original step, whose other arguments (eta, generator) are bound.
    """
    shadowed = scheduler.__dict__.get("step")
    original = scheduler.step

    @functools.wraps(original)
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        last: list[Any] = []

        def own(prediction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            last[:] = [original(prediction, timestep, at, *args, **kwargs)]
            return last[0][0]

        previous = around(own, model_output, sample)
        output = last[0]
        if isinstance(output, tuple):
            return (previous, *output[1:])
        return type(output)(**{**output, "prev_sample": previous})

    scheduler.__dict__["step"] = step
    try:
        yield
    finally:
        if shadowed is None:
            scheduler.__dict__.pop("step", None)
        else:
            scheduler.__dict__["step"] = shadowed


def snapshot(scheduler: Any) -> dict[str, Any]:
    """The scheduler's state before a step, for `rewind`: its counters, and its history, which it changes in place."""
    return _copied(vars(scheduler))


def rewind(scheduler: Any, state: dict[str, Any]) -> None:
    """Take back the steps since `snapshot`; the state stays good for another time."""
    vars(scheduler).update(_copied(state))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
