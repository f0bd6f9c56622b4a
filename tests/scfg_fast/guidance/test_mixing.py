"""Mixing two predictions: diffusers' own rules where rates are 1, the matched dose, and samples that stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from torch import Tensor

from scfg_fast.guidance.mixing import Mixer, norm, rescaled

WEIGHT = 5.0
RULES: dict[str, dict[str, Any]] = {
    "cfg": {},
    "apg": dict(combine="apg"),
    "apg, all": dict(combine="apg", momentum=-0.5, norm_threshold=4.0, eta=0.25),
    "cfg-zero": dict(combine="cfg-zero"),
}
by_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def predictions(rng: torch.Generator, groups: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    uncond = torch.randn(groups, 4, 6, 5, generator=rng, dtype=torch.float64)
    return uncond.to(dtype), (uncond + 0.4 * torch.randn(groups, 4, 6, 5, generator=rng, dtype=torch.float64)).to(dtype)


def rates(rng: torch.Generator, groups: int = 3) -> Tensor:
    return 0.8 + torch.rand(groups, 1, 6, 5, generator=rng, dtype=torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("options", [
    {}, {"eta": 0.0}, {"eta": 0.5, "adaptive_projected_guidance_momentum": -0.75},
    {"adaptive_projected_guidance_rescale": 2.0, "adaptive_projected_guidance_momentum": 0.3},
    {"adaptive_projected_guidance_rescale": 0.0, "eta": 0.2},
], ids=str)  # fmt: skip
def test_apg_is_that_of_diffusers(rng: torch.Generator, options: dict[str, Any]) -> None:
    """Three steps, so that momentum counts; float32, below 1e-6 relative."""
    guider = AdaptiveProjectedGuidance(WEIGHT, **options)
    mixer = Mixer(
        "apg", "as-published", options.get("adaptive_projected_guidance_momentum"),
        options.get("adaptive_projected_guidance_rescale", 15.0), options.get("eta", 1.0),
    )  # fmt: skip
    for step in range(3):
        guider.set_state(step, 3, torch.tensor(step))
        guider.prepare_inputs({"x": (torch.zeros(1), torch.zeros(1))})
        uncond, cond = predictions(rng, dtype=torch.float32)
        expected = guider.forward(cond, uncond).pred
        assert relative(uncond + mixer(uncond, cond, WEIGHT, None, 3).moved, expected) < 1e-6


def test_cfg_zero_is_that_of_diffusers(rng: torch.Generator) -> None:
    guider = ClassifierFreeZeroStarGuidance(WEIGHT)
    guider.set_state(1, 3, torch.tensor(1))
    uncond, cond = predictions(rng, dtype=torch.float32)
    moved = Mixer("cfg-zero")(uncond, cond, WEIGHT, None, 3).moved
    assert relative(uncond + moved, guider.forward(cond, uncond).pred) < 1e-6


def test_apg_without_its_parts_is_plain_mixing_with_rates(rng: torch.Generator) -> None:
    (uncond, cond), rate = predictions(rng), rates(rng)
    apg = Mixer("apg", momentum=None, norm_threshold=0.0, eta=1.0)(uncond, cond, WEIGHT, rate, 3)
    assert relative(apg.moved, WEIGHT * rate * (cond - uncond)) < 1e-15 and torch.equal(apg.rate, rate)


@by_rule
def test_a_rate_scales_the_direction_of_the_rule(rng: torch.Generator, rule: dict[str, Any]) -> None:
    """f with rates is (1 - r) base + r f: the rule's base is u, or a u for CFG-Zero*."""
    (uncond, cond), rate = predictions(rng), rates(rng)
    whole = uncond + Mixer(**rule)(uncond, cond, WEIGHT, None, 3).moved
    none = uncond + Mixer(**rule)(uncond, cond, 0.0, None, 3).moved
    mixed = uncond + Mixer(**rule)(uncond, cond, WEIGHT, rate, 3).moved
    assert relative(mixed, (1.0 - rate) * none + rate * whole) < 1e-14


@by_rule
@pytest.mark.parametrize("samples", [6, 2], ids=["images", "videos"])
def test_the_matched_dose_is_the_weight(rng: torch.Generator, rule: dict[str, Any], samples: int) -> None:
    """||f - u|| = w ||t - u|| over each whole sample, of three frames in a video; the rates keep their proportions."""
    mixer = Mixer(dose="matched", **rule)
    for _ in range(3):
        (uncond, cond), rate = predictions(rng, 6), rates(rng, 6)
        mixed = mixer(uncond, cond, WEIGHT, rate, samples)
        ratio = norm(mixed.moved, samples) / norm(cond - uncond, samples)
        assert float((ratio - WEIGHT).abs().max()) < 1e-12
        factor = (mixed.rate / rate).reshape(samples, -1)
        assert float((factor.amax(1) - factor.amin(1)).abs().max()) < 1e-12 and bool((factor > 0.0).all())


def test_matched_rates_of_one_change_no_bit(rng: torch.Generator) -> None:
    uncond, cond = predictions(rng, dtype=torch.float32)
    ones = torch.ones(3, 1, 6, 5)
    mixed = Mixer(dose="matched")(uncond, cond, WEIGHT, ones, 3)
    assert torch.equal(mixed.rate, ones) and torch.equal(mixed.moved, WEIGHT * (cond - uncond))


@by_rule
@pytest.mark.parametrize("dose", ["as-published", "matched"])
def test_equal_predictions_stay_what_they_are(rng: torch.Generator, rule: dict[str, Any], dose: str) -> None:
    uncond, _ = predictions(rng)
    moved = Mixer(dose=dose, **rule)(uncond, uncond, WEIGHT, rates(rng), 3).moved
    assert float(moved.abs().max()) < 1e-7


@by_rule
@pytest.mark.parametrize("dose", ["as-published", "matched"])
def test_a_batch_is_each_sample_alone(rng: torch.Generator, rule: dict[str, Any], dose: str) -> None:
    together, alone = Mixer(dose=dose, **rule), Mixer(dose=dose, **rule)
    for _ in range(2):
        (uncond, cond), rate = predictions(rng), rates(rng)
        mixed = together(uncond, cond, WEIGHT, rate, 3)
        single = alone(uncond[1:2], cond[1:2], WEIGHT, rate[1:2], 1)
        assert relative(mixed.moved[1:2], single.moved) < 1e-14 and relative(mixed.rate[1:2], single.rate) < 1e-14


def test_rescaled_is_the_documented_formula(rng: torch.Generator) -> None:
    uncond, cond = predictions(rng)
    moved = WEIGHT * (cond - uncond)
    f = uncond + moved
    factor = 0.7 * cond.std((1, 2, 3)) / f.std((1, 2, 3)) + 0.3
    expected = factor[:, None, None, None] * f - uncond
    assert relative(rescaled(moved, uncond, cond, 0.7, 3), expected) < 1e-14
