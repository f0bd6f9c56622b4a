"""What one step does: decisions that rest on shapes and Python numbers alone."""

from __future__ import annotations

from ..config import SCFGConfig
from ..guidance.steps import Step, StepWeight, in_part


def step_weight(schedule: StepWeight | None, step: Step) -> float:
    """The weight of the conditional direction: the schedule's, or guidance_scale.

    Raises:
        ValueError: the schedule's weight is not finite or below 0.
    """
    if schedule is None:
        return step.guidance_scale
    weight = float(schedule.weight(step))
    if not 0.0 <= weight < float("inf"):
        raise ValueError(
            f"scfg_fast: the schedule gives step {step.index} of {step.count} the weight {weight:g}; "
            "weights must be finite and at least 0"
        )
    return weight


def regions_skip_reason(
    config: SCFGConfig, index: int, num_steps: int, weight: float, given: bool = False
) -> str | None:
    """Why a step has one weight for the whole image, or None. All of these are the user's choice.

    `given`: whether the user gives rates, which need no capture."""
    if config.rates == "none" and not given:
        return "rates='none'"
    if not in_part(index, num_steps, config.start, config.stop):
        return f"outside start={config.start:g}, stop={config.stop:g}"
    if weight == 1.0:
        return "the schedule's weight is 1, the conditional prediction"
    return None
