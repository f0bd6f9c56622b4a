"""Which step of which run an evaluation of the denoiser belongs to.

A run is one way through the scheduler's timesteps; a call of a pipeline can have several (draft and final, best of n).
A step is one timestep of a run; it can evaluate the denoiser several times (two passes, windows of a panorama).
Evaluations are not counted. What decides, in this order:

    the timestep's place      the timestep that the denoiser gets is a view into `scheduler.timesteps`: its offset there
    the timestep's value      of a number, or of a tensor on the CPU
    the scheduler             its `step` ends a step, its `set_timesteps` begins a run

A place or a value equal to the last one is the same step. Schedulers that have every timestep twice (Heun) have two
places for it, so these are two steps. A return to the first timestep begins a run. Nothing is read from a device.
"""

from __future__ import annotations

from typing import Any

import torch


class StepClock:
    """Told of every evaluation, and of the scheduler's calls; knows the present run and step.

    Args:
        scheduler: the pipeline's, with `timesteps` and, above 1 where it visits them twice, `order`.

    Attributes:
        run: index of the run, from 0; -1 before the first evaluation.
        index: of the step in its run, from 0.
    """

    def __init__(self, scheduler: Any) -> None:
        self.run = -1
        self.index = 0
        self._scheduler = scheduler
        self._begins = True  # whether the next evaluation begins a run
        self._stepped = False  # whether the scheduler has made its step since the last evaluation
        self._following: int | None = None  # index of the step after the scheduler's last one
        self._origin: int | None = None  # place of the first step
        self._first: Any = None  # timestep of the run's first evaluation
        self._last: Any = None  # timestep of the last evaluation

    def set_timesteps(self) -> None:
        """The scheduler got timesteps: the next evaluation begins a run."""
        self._begins = True

    def stepped(self, timestep: Any) -> None:
        """The scheduler made its step at this timestep."""
        place = place_of(timestep, self._timesteps)
        self._stepped = True
        if place is not None and self._origin is None:
            self._origin = place - self.index
        known = place is not None and self._origin is not None and place >= self._origin
        self._following = (place - self._origin if known else self.index) + 1  # type: ignore[operator]

    def evaluated(self, timestep: Any) -> bool:
        """The denoiser is evaluated at this timestep. Returns whether that begins a step."""
        last, self._last = self._last, timestep
        timesteps, stepped = self._timesteps, self._stepped
        place = place_of(timestep, timesteps)
        if not self._begins:
            same = _are_same(timestep, last, timesteps)
            if place is None and stepped and getattr(self._scheduler, "order", 1) > 1:
                same = False  # the second visit
            if same if same is not None else not stepped:
                return False
            before = place is not None and self._origin is not None and place < self._origin
            self._begins = before or _are_same(timestep, self._first, timesteps) is True
        if self._begins:
            self.run, self.index, self._origin, self._first = self.run + 1, 0, place, timestep
        elif place is not None and self._origin is not None:
            self.index = place - self._origin
        else:
            self.index = self._following if stepped and self._following is not None else self.index + 1
        self._begins, self._stepped, self._following = False, False, None
        return True

    @property
    def _timesteps(self) -> Any:
        return getattr(self._scheduler, "timesteps", None)


def place_of(timestep: Any, timesteps: Any) -> int | None:
    """Place of a timestep in a scheduler's timesteps [N] if it is a view of one of them, else None."""
    if not isinstance(timestep, torch.Tensor) or not isinstance(timesteps, torch.Tensor) or timesteps.dim() != 1:
        return None
    repeated = all(stride == 0 or size == 1 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
    if not _share(timestep, timesteps) or timestep.dtype != timesteps.dtype or not repeated:
        return None
    offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    place, rest = divmod(offset, max(1, timesteps.stride(0)))
    return place if rest == 0 and 0 <= place < len(timesteps) else None


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _are_same(timestep: Any, other: Any, timesteps: Any) -> bool | None:
    """Whether two timesteps of one run are the same; None if that cannot be known without reading from a device."""
    if timestep is other:
        return True
    place, other_place = place_of(timestep, timesteps), place_of(other, timesteps)
    if place is not None and other_place is not None:
        return place == other_place
    both = isinstance(timestep, torch.Tensor) and isinstance(other, torch.Tensor)
    if both and _share(timestep, other) and timestep.dim() == other.dim() == 0:  # of the pipeline's own list
        return bool(timestep.storage_offset() == other.storage_offset())
    value, other_value = _value(timestep), _value(other)
    return None if value is None or other_value is None else value == other_value


def _value(timestep: Any) -> float | None:
    """A number, or the first number of a tensor that is not on a device; else None."""
    if isinstance(timestep, torch.Tensor):
        on_host = timestep.device.type == "cpu" and timestep.numel() > 0 and type(timestep) is torch.Tensor
        return float(timestep.flatten()[0]) if on_host else None
    return float(timestep) if isinstance(timestep, (int, float)) else None
