"""What a step does, without a pipeline or a module."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from scfg_fast import SCFGConfig
from scfg_fast.guidance import CFGPlusPlus, CharacteristicGuidance, WeightSchedule
from scfg_fast.step.context import CallContext
from scfg_fast.step.plan import GUIDANCE_IS_OFF, StepPlan, StepState, plan


def context(**options: Any) -> CallContext:
    return CallContext(
        samples=2, guidance_scale=lambda _: 7.5, guidance_rescale=lambda: 0.0, num_steps=lambda: 10, **options
    )


def planned(config: SCFGConfig | None = None, call: dict[str, Any] | None = None, **state: Any) -> StepPlan:
    values = dict(index=3, count=10, scale=7.5, batch=4) | state
    return plan(context(**(call or {})), config or SCFGConfig(), StepState(**values))


def test_the_plain_case() -> None:
    step = planned()
    assert (step.index, step.scale, step.weight, step.regions, step.reason) == (3, 7.5, 7.5, "find", None)
    assert step.guided and step.changes and not (step.half or step.rereads or step.shifted or step.warnings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.weight = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("config, reason", [
    (dict(rates="none"), "rates='none'"), (dict(start=0.4), "outside start=0.4, stop=1"),
    (dict(stop=0.3), "outside start=0, stop=0.3"),
])  # fmt: skip
def test_what_the_user_chose_is_no_warning(config: dict[str, Any], reason: str) -> None:
    step = planned(SCFGConfig(**config))
    assert step.reason == reason and step.regions == "none" and not step.changes and not step.warnings


@pytest.mark.parametrize("guided, has_regions, regions", [
    (0, False, "find"), (0, True, "find"), (1, True, "keep"), (2, True, "keep"), (3, True, "find"), (1, False, "find"),
])  # fmt: skip
def test_reuse(guided: int, has_regions: bool, regions: str) -> None:
    assert planned(SCFGConfig(reuse_every=3), guided_steps=guided, has_regions=has_regions).regions == regions


def test_pixels_need_no_regions() -> None:
    step = planned(SCFGConfig(rates="pixels", rate_min=0.5, rate_max=2.0))
    assert step.regions == "none" and step.reason is None and step.changes


@pytest.mark.parametrize("state, message", [
    (dict(index=0, scale=1.0), "guidance is off: there is nothing to scale"),
    (dict(batch=6), "the denoiser ran on 6 samples, S-CFG expected 4"),
    (dict(scale=1.01, rescale=0.7), "would magnify rounding"),
])  # fmt: skip
def test_what_nobody_chose_is_said(state: dict[str, Any], message: str) -> None:
    step = planned(**state)
    assert not step.guided and not step.changes and message in str(step.reason)
    assert [text for text, _ in step.warnings] == [step.reason]


def test_guidance_that_goes_off_in_the_run_is_a_choice() -> None:
    assert planned(scale=0.0).reason == GUIDANCE_IS_OFF and not planned(scale=0.0).warnings
    assert planned(batch=2, conditional_first=True).reason == GUIDANCE_IS_OFF


@pytest.mark.parametrize("call, state, rereads", [
    ({}, {}, False), ({}, dict(rescale=0.7), True), ({}, dict(groups=3, batch=6), True), (dict(rereads=True), {}, True),
    (dict(two_pass=True), dict(groups=1, batch=2), True),
])  # fmt: skip
def test_who_uses_the_conditional_prediction_again(call: dict, state: dict, rereads: bool) -> None:
    assert planned(call=call, **state).rereads is rereads


@pytest.mark.parametrize("state, call, half", [
    ({}, {}, True), (dict(groups=3, batch=6), {}, False), (dict(groups=1, batch=2), dict(two_pass=True), False),
])  # fmt: skip
def test_half_of_the_batch(state: dict, call: dict, half: bool) -> None:
    interval = WeightSchedule(interval=(0.5, 1.0))
    asked = []
    step = planned(
        SCFGConfig(rates="none"), dict(schedule=interval) | call, can_halve=lambda: asked.append(1) or True, **state
    )
    assert step.weight == 1.0 and step.half is half and bool(asked) is half
    assert not planned(call=dict(schedule=interval) | call, index=7, can_halve=lambda: True, **state).half


def test_a_schedule_that_needs_levels_gets_them() -> None:
    step = planned(call=dict(schedule=CFGPlusPlus(0.6)), sigmas=(2.0, 1.0))
    assert step.weight == pytest.approx(1.2) and step.sigmas == (2.0, 1.0) and step.changes


def test_a_weight_that_is_no_number_is_refused() -> None:
    class Endless(WeightSchedule):
        def weight(self, step):
            return float("inf")

    with pytest.raises(ValueError, match="the schedule gives step 3 of 10 the weight inf"):
        planned(call=dict(schedule=Endless()))


@pytest.mark.parametrize("sigmas, groups, shifted", [((2.0, 1.0), 2, True), (None, 2, False), ((2.0, 1.0), 3, False)])
def test_characteristic_guidance(sigmas, groups: int, shifted: bool) -> None:
    call = dict(characteristic=CharacteristicGuidance())
    assert planned(call=call, sigmas=sigmas, groups=groups, batch=2 * groups).shifted is shifted


def test_a_rule_acts_without_rates_and_zero_steps_come_first() -> None:
    step = planned(SCFGConfig(rates="none", combine="apg"))
    assert step.combines and step.changes and not step.zero
    zero = planned(SCFGConfig(rates="none", combine="cfg-zero", zero_init_steps=1), index=0)
    assert zero.zero and zero.changes


def test_without_maps_a_step_is_plain_and_says_so() -> None:
    step = planned().without_maps()
    assert step.regions == "none" and not step.changes
    assert step.warnings[0][0] == "no captured layer left a usable attention map." == step.reason
