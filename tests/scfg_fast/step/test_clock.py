"""Which step an evaluation belongs to, without a pipeline."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scfg_fast.step.clock import StepClock, place_of

TIMESTEPS = torch.tensor([900, 600, 300, 0])
EXPANDED = {
    "views": lambda t: t,
    "expanded": lambda t: t.expand(3),
    "numbers": lambda t: int(t),
    "fractions": lambda t: t / 1000,
}


def scheduler(timesteps: torch.Tensor = TIMESTEPS, order: int = 1) -> SimpleNamespace:
    return SimpleNamespace(timesteps=timesteps, order=order)


def indices(clock: StepClock, evaluations) -> list[tuple[int, int]]:
    """(run, index) after each evaluation; "step" and "set" are the scheduler's calls."""
    seen = []
    for what, timestep in evaluations:
        if what == "set":
            clock.set_timesteps()
        elif what == "step":
            clock.stepped(timestep)
        else:
            clock.evaluated(timestep)
            seen.append((clock.run, clock.index))
    return seen


@pytest.mark.parametrize("kind", EXPANDED)
@pytest.mark.parametrize("stepped", [True, False], ids=["scheduler seen", "scheduler not seen"])
@pytest.mark.parametrize("windows", [1, 3])
def test_windows_share_a_step_and_a_second_run_starts_anew(kind: str, stepped: bool, windows: int) -> None:
    clock, given, events = StepClock(scheduler()), EXPANDED[kind], []
    for _ in range(2):
        for t in TIMESTEPS:
            events += [("evaluate", given(t))] * windows
            events += [("step", t)] if stepped else []
    expected = [(run, index) for run in range(2) for index in range(4) for _ in range(windows)]
    assert indices(clock, events) == expected


def test_set_timesteps_begins_a_run_wherever_the_last_one_stopped() -> None:
    events = [("set", None), ("evaluate", TIMESTEPS[1]), ("set", None), ("evaluate", TIMESTEPS[1])]
    assert indices(StepClock(scheduler()), events) == [(0, 0), (1, 0)]


def test_a_scheduler_with_every_timestep_twice_has_two_steps_of_it() -> None:
    timesteps = torch.tensor([900, 600, 600, 300, 300])
    for given in (lambda t: t, float):
        clock = StepClock(scheduler(timesteps, order=2))
        events = [event for t in timesteps for event in (("evaluate", given(t)), ("step", t))]
        assert indices(clock, events) == [(0, index) for index in range(5)]


def test_a_window_that_is_stepped_by_itself_shares_the_step() -> None:
    """A panorama steps the scheduler once per view."""
    clock = StepClock(scheduler())
    events = [event for t in TIMESTEPS for _ in range(2) for event in (("evaluate", t), ("step", t))]
    assert indices(clock, events) == [(0, index) for index in range(4) for _ in range(2)]


def test_a_run_that_begins_late_counts_from_there_and_time_travel_returns() -> None:
    clock = StepClock(scheduler())
    events = [("evaluate", TIMESTEPS[place]) for place in (1, 2, 3, 2, 3)]
    assert indices(clock, events) == [(0, 0), (0, 1), (0, 2), (0, 1), (0, 2)]


def test_places() -> None:
    late = TIMESTEPS[1:]
    assert [place_of(t, TIMESTEPS) for t in late] == [1, 2, 3]
    assert place_of(late, TIMESTEPS) is None and place_of(TIMESTEPS[1].clone(), TIMESTEPS) is None
    assert place_of(600, TIMESTEPS) is None and place_of(TIMESTEPS[1], [900, 600]) is None


def test_on_a_device_the_scheduler_decides() -> None:
    """Nothing is read: `meta` has nothing to read."""
    clock, fraction = StepClock(scheduler()), lambda: torch.empty((), device="meta")
    events = [("evaluate", fraction()), ("evaluate", fraction()), ("step", TIMESTEPS[0]), ("evaluate", fraction())]
    assert indices(clock, events) == [(0, 0), (0, 0), (0, 1)]
