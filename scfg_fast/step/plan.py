"""What one step does: a pure function of the call, the configuration and the state of the step.

Decisions rest on shapes and Python numbers alone: nothing here knows a module, a pipeline or a device. The hook of the
pipelines and the guider of modular pipelines use the same plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..config import SCFGConfig
from ..guidance.steps import Step, StepWeight, in_part
from .context import CallContext

# Below this scale the factor s/(s-1) of `rewrite`'s second form exceeds 21 and magnifies rounding.
MIN_SCALE_OF_REWRITE = 1.05

GUIDANCE_IS_OFF = "guidance is off"


@dataclass(frozen=True)
class StepState:
    """Where the run is, as the hook or the guider sees it when a step begins.

    Attributes:
        index: of the step in its run, from 0.
        count: denoising steps of the run.
        scale: the pipeline's own guidance scale in this step; at most 1 for none.
        rescale: phi of guidance_rescale.
        groups: groups of samples in a batch: 2, 3 with a perturbed one, 1 where the two predictions are passes.
        batch: samples that the denoiser got, or None where nobody can say how many it should get (guiders).
        guided_steps: steps of this run that S-CFG has guided before.
        has_regions: whether there are regions of an earlier step.
        sigmas: noise level of the input, and the one that the step leads to; None where unknown or not asked for.
        flow: whether the levels are those of flow matching.
        conditional_first: whether a batch of the conditional samples alone means that the pipeline guides no more.
        can_halve: whether the denoiser could run on the conditional half alone; asked only where that would do.
    """

    index: int
    count: int
    scale: float
    rescale: float = 0.0
    groups: int = 2
    batch: int | None = None
    guided_steps: int = 0
    has_regions: bool = False
    sigmas: tuple[float, float] | None = None
    flow: bool = False
    conditional_first: bool = False
    can_halve: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class StepPlan:
    """What a step does. All windows and passes of the step share it.

    Attributes:
        index: of the step in its run, from 0.
        scale: s, the pipeline's own.
        weight: w, of the conditional direction, in the place of s.
        guided: whether S-CFG and schedules may act; else the step is left to the pipeline altogether.
        regions: "find" from the maps of this step, "keep" those of an earlier one, or "none".
        reason: why rates do not act, or None where they do.
        rereads: whether the pipeline also uses the conditional prediction.
        half: whether the conditional half of the batch alone is computed.
        shifted: whether Characteristic Guidance is solved.
        combines: whether a rule other than classifier-free guidance mixes the predictions.
        zero: whether the prediction is zero, in the first steps of CFG-Zero*.
        sigmas: noise level of the input, and the one that the step leads to, or None.
        rescale: phi of guidance_rescale.
        groups: groups of samples in a batch.
        warnings: (what is wrong, what happens instead) of all that the user did not choose.
    """

    index: int
    scale: float
    weight: float
    guided: bool = True
    regions: Literal["find", "keep", "none"] = "none"
    reason: str | None = None
    rereads: bool = False
    half: bool = False
    shifted: bool = False
    combines: bool = False
    zero: bool = False
    sigmas: tuple[float, float] | None = None
    rescale: float = 0.0
    groups: int = 2
    warnings: tuple[tuple[str, str], ...] = ()

    @property
    def changes(self) -> bool:
        """Whether the step returns anything but the denoiser's own output."""
        other = self.weight != self.scale or self.half or self.shifted or self.combines
        return self.guided and (self.reason is None or other)

    def without_maps(self) -> StepPlan:
        """The plan of a step in which no layer left a map, and there are no regions before it."""
        message = "no captured layer left a usable attention map."
        return dataclasses.replace(self, regions="none", reason=message, warnings=((message, PLAIN_INSTEAD),))


PLAIN_INSTEAD = "Plain guidance is used instead."


def plan(context: CallContext, config: SCFGConfig, state: StepState) -> StepPlan:
    """What a step does.

    Args:
        context: of the call; its callables are not called, `state` has what they say.
        config: of the call.
        state: of the step.

    Raises:
        ValueError: the schedule's weight is not finite or below 0.
    """
    rereads = context.two_pass or context.rereads or state.rescale > 0.0 or state.groups > 2
    off = StepPlan(
        state.index, state.scale, state.scale, guided=False, rereads=rereads, sigmas=state.sigmas, groups=state.groups
    )
    reason, chosen = _reason_to_stay_out(context, state, rereads)
    if reason is not None:
        return dataclasses.replace(off, reason=reason, warnings=() if chosen else ((reason, PLAIN_INSTEAD),))
    sigma, next_sigma = state.sigmas or (None, None)
    weight = step_weight(context.schedule, Step(state.index, state.count, state.scale, sigma, next_sigma, state.flow))
    settings = context.characteristic
    two_halves = state.groups == 2 and not context.two_pass
    shifted = settings is not None and two_halves and weight != 1.0 and state.sigmas is not None
    reason = _reason_without_rates(config, state.index, state.count, weight, context.rates is not None)
    zero = zero_step(config, state.index)
    due = not state.has_regions or state.guided_steps % config.reuse_every == 0
    warnings: tuple[tuple[str, str], ...] = ()
    if context.undone_by and config.rates != "none":
        warnings = ((f"this pipeline {context.undone_by}.", "Rates change directions there, not lengths."),)
    return StepPlan(
        index=state.index,
        scale=state.scale,
        weight=weight,
        regions="none" if reason is not None or config.rates != "regions" else "find" if due else "keep",
        reason=reason,
        rereads=rereads,
        half=weight == 1.0 and two_halves and not context.renoises and state.can_halve(),
        shifted=shifted and settings is not None and in_part(state.index, state.count, settings.start, settings.stop),
        combines=config.combine != "cfg" and (weight != 1.0 or zero),  # of weight 1 it is t by every rule
        zero=zero,
        sigmas=state.sigmas,
        rescale=state.rescale,
        groups=state.groups,
        warnings=warnings,
    )


def _reason_to_stay_out(context: CallContext, state: StepState, rereads: bool) -> tuple[str | None, bool]:
    """Why this step is the pipeline's own affair, or None, and whether that is the user's choice.

    A callback that turns guidance off for a part of the run is a choice; a whole run without guidance is not.
    """
    expected = state.groups * context.samples
    if not state.scale > 1.0:
        if state.index > 0 or context.loss is not None:
            return GUIDANCE_IS_OFF, True
        return f"guidance is off: there is nothing to scale. Pass {context.switch}.", False
    if state.conditional_first and state.batch == context.samples:
        return GUIDANCE_IS_OFF, True  # cut off by the pipeline in a part of the run
    if state.batch not in (None, expected):
        return (
            f"the denoiser ran on {state.batch} samples, S-CFG expected {expected} ({state.groups} groups of "
            f"{context.samples}, unconditional, then conditional).",
            False,
        )
    if rereads and state.scale < MIN_SCALE_OF_REWRITE:
        return (
            f"guidance_scale={state.scale:g} below {MIN_SCALE_OF_REWRITE} where the pipeline reads the conditional "
            "prediction again (guidance_rescale, perturbed attention, two passes) would magnify rounding. Raise "
            "guidance_scale.",
            False,
        )
    return None, True


def zero_step(config: SCFGConfig, index: int) -> bool:
    """Whether the prediction of step `index` is zero: the first of CFG-Zero*."""
    return config.combine == "cfg-zero" and index < config.zero_init_steps


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


def _reason_without_rates(config: SCFGConfig, index: int, count: int, weight: float, given: bool) -> str | None:
    """Why a step has one weight for the whole image, or None. All of these are the user's choice.

    `given`: whether the user gives rates, which need no capture.
    """
    if config.rates == "none" and not given:
        return "rates='none'"
    if not in_part(index, count, config.start, config.stop):
        return f"outside start={config.start:g}, stop={config.stop:g}"
    if weight == 1.0:
        return "the schedule's weight is 1, the conditional prediction"
    return None
