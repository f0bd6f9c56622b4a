"""Around a pipeline's scheduler: for one call, its `set_timesteps` and `step` tell what they do.

They begin runs and end steps (`clock`). What must see the sample as well acts around the step: a correction of the
sample after it (loss guidance), a step repeated from the sample before it (time travel), renoising with another
prediction (CFG++ in a multistep solver).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

SchedulerStep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(prediction, sample) -> previous sample: the scheduler's own step at the present timestep."""


class Watched:
    """A method of a scheduler that runs through `around`; it keeps the signature, which pipelines inspect.

    A deep copy of the scheduler has the scheduler's own method in its place: pipelines make one for audio, or per view.
    """

    def __init__(self, scheduler: Any, name: str, around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(scheduler, name))
        self._scheduler, self._name, self._around = scheduler, name, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self._scheduler))
        return self if copy is None else getattr(type(copy), self._name).__get__(copy)


@contextlib.contextmanager
def watched(scheduler: Any, **arounds: Callable[..., Any]) -> Iterator[None]:
    """Methods of a scheduler run through functions inside the block; what somebody else sets meanwhile stays.

    Args:
        scheduler: a diffusers scheduler.
        arounds: name of a method -> a function that is called with the method and its arguments.
    """
    own = vars(scheduler)
    before = {name: own[name] for name in arounds if name in own}
    watching = {name: Watched(scheduler, name, around) for name, around in arounds.items() if hasattr(scheduler, name)}
    own.update(watching)
    try:
        yield
    finally:
        for name, method in watching.items():
            if own.get(name) is method:
                del own[name]
                own.update({name: before[name]} if name in before else {})


def around_prediction(
    step: Callable[..., Any],
    around: Callable[[SchedulerStep, torch.Tensor, torch.Tensor], torch.Tensor],
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a scheduler's `step` returns, with the previous sample that `around` makes of it.

    Args:
        step: the scheduler's own; `around` gets it as a `SchedulerStep`, with the other arguments (eta, generator)
            bound.
        around: (step, prediction, sample) -> previous sample.
        model_output, timestep, sample, args, kwargs: of the call.
    """
    last: list[Any] = []

    def own(prediction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        last[:] = [step(prediction, timestep, at, *args, **kwargs)]
        return last[0][0]

    previous = around(own, model_output, sample)
    output = last[0]
    if isinstance(output, tuple):
        return (previous, *output[1:])
    return type(output)(**{**output, "prev_sample": previous})


def snapshot(scheduler: Any) -> dict[str, Any]:
    """The scheduler's state before a step, for `rewind`: its counters, and its history, which it changes in place."""
    return _copied(vars(scheduler))


def rewind(scheduler: Any, state: dict[str, Any]) -> None:
    """Take back the steps since `snapshot`; the state stays good for another time."""
    vars(scheduler).update(_copied(state))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
