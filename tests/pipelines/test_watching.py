"""Regions as a service: masks of words from stock pictures, and rates that the user gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import scfg_fast
from lab.tiny.loops import NEGATIVES, PROMPTS
from lab.tiny.transformers import TINY
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import Regions, SCFGConfig
from scfg_fast.guidance import CharacteristicGuidance, WeightSchedule
from scfg_fast.pipelines.call import tokenizer_of, word_tokens

STEPS, SCALE = 3, 6.0
PLAIN = SCFGConfig(rates="none")


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    return tiny_sd_pipeline() if request.param == "sd" else tiny_sdxl_pipeline()


def run(pipe, **kwargs: Any) -> torch.Tensor:
    options = dict(num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent") | kwargs
    generators = [torch.Generator().manual_seed(pick) for pick in range(2)]
    return pipe(PROMPTS[:2], negative_prompt=NEGATIVES[:2], generator=generators, **options).images


def run_tiny(pipe, name: str, **more: Any) -> torch.Tensor:
    return pipe(**TINY[name].call([0, 1], **more))[0]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def first_word(prompt: int) -> str:
    return next(word for word in PROMPTS[prompt].split() if len(word) > 2)


# Out -----------------------------------------------------------------------------------------------------------------


def test_watching_changes_no_bit_and_leaves_the_pipeline_stock(pipe) -> None:
    expected, cls = run(pipe), type(pipe)
    with scfg_fast.watch(pipe, words=[first_word(0)]) as maps:
        assert torch.equal(run(pipe), expected)
    assert type(pipe) is cls and torch.equal(run(pipe), expected)
    assert [step.step for step in maps.steps] == list(range(STEPS))
    shares = maps.shares(first_word(0))
    assert shares.shape == maps.mask(first_word(0)).shape == maps.steps[0].token_index.shape
    assert bool(((shares >= 0.0) & (shares <= 1.0)).all()) and float(shares[0].max()) > 0.0


def test_the_masks_are_the_regions_of_s_cfg(pipe) -> None:
    """With S-CFG on, its own regions; without, those that it would find at the same latents: of the first step."""
    word = first_word(0)
    found: list[Regions] = []
    scfg_fast.enable(pipe, on_regions=lambda step, regions: found.append(regions.clone()))
    expected = run(pipe)
    with scfg_fast.watch(pipe, words=[word]) as maps:
        assert torch.equal(run(pipe), expected), "S-CFG goes on"
    for step, regions in zip(maps.steps, found, strict=False):
        assert torch.equal(step.token_index, regions.token_index)
        assert torch.equal(step.foreground, regions.foreground)
    assert torch.equal(run(pipe), expected)
    scfg_fast.disable(pipe)
    with scfg_fast.watch(pipe, words=[word]) as plain:
        run(pipe)
    assert torch.equal(plain.steps[0].token_index, found[0].token_index)
    tokens = word_tokens(tokenizer_of(pipe), PROMPTS[:2], [word])[:, 0]
    owned = torch.stack([torch.isin(ids, row.nonzero()) for ids, row in zip(found[0].token_index, tokens, strict=True)])
    assert torch.equal(plain.mask(word, 0), owned)


def test_shares_of_all_tokens_add_up_to_one() -> None:
    """A word's share is its part of the rows of the completed maps, which sum to 1."""
    pipe = tiny_sd_pipeline()
    everything = SCFGConfig(layers="all")
    with scfg_fast.watch(pipe, words=[first_word(0)], config=everything) as maps:
        begin = maps.begin
        maps.begin = lambda tokens: begin(torch.ones_like(tokens))  # type: ignore[method-assign]
        run(pipe)
    assert all(float((step.shares - 1.0).abs().max()) < 1e-5 for step in maps.steps)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_transformers_can_be_watched(name: str) -> None:
    pipe = TINY[name].pipeline()
    expected = run_tiny(pipe, name)
    with scfg_fast.watch(pipe) as maps:
        assert torch.equal(run_tiny(pipe, name), expected)
    scfg_fast.enable(pipe)
    run_tiny(pipe, name)
    assert len(maps.steps) == 3 and maps.steps[0].shares.shape[1] == 0
    assert maps.steps[0].token_index.shape == pipe_regions(pipe).token_index.shape
    with scfg_fast.watch(pipe, words=["cat"]), pytest.raises(ValueError, match="watch needs the prompt's text"):
        run_tiny(pipe, name)


def pipe_regions(pipe) -> Regions:
    regions = scfg_fast.enable(pipe).regions
    assert regions is not None
    return regions


def test_masks_are_saved(tmp_path) -> None:
    pipe, word = tiny_sd_pipeline(), first_word(0)
    with scfg_fast.watch(pipe, words=[word]) as maps:
        with pytest.raises(ValueError, match="nothing was watched yet"):
            maps.mask(word)
        with pytest.raises(ValueError, match="there is nothing to save"):
            maps.save(tmp_path / "masks.npz")
        run(pipe)
    with np.load(maps.save(tmp_path / "masks.npz")) as saved:
        assert saved["words"].tolist() == [word] and saved["step"].tolist() == list(range(STEPS))
        assert (saved["shares"][1, :, 0] == maps.steps[1].shares[:, 0].numpy()).all()
    assert [path.name for path in tmp_path.iterdir()] == ["masks.npz"]


def test_what_cannot_be_watched_says_why() -> None:
    pipe = tiny_sd_pipeline()
    with scfg_fast.watch(pipe, words=["zebra", first_word(0)]) as maps:
        with pytest.raises(ValueError, match=r"no prompt has the words \['zebra'\]"):
            run(pipe)
        with pytest.raises(ValueError, match="'sky' was not asked for"):
            maps.mask("sky")
    with pytest.raises(TypeError, match=r"write \['cat'\]"), scfg_fast.watch(pipe, words="cat"):
        pass
    with pytest.raises(ValueError, match="rates='none' captures nothing"), scfg_fast.watch(pipe, config=PLAIN):
        pass
    assert type(pipe).__name__ == "StableDiffusionPipeline" and scfg_fast.supports(pipe).supported
    scfg_fast.enable(pipe, SCFGConfig.pixels())
    with pytest.raises(ValueError, match="rates='pixels' captures nothing"), scfg_fast.watch(pipe):
        pass


def test_an_error_inside_leaves_the_pipeline_stock() -> None:
    pipe = tiny_sd_pipeline()
    expected, cls = run(pipe), type(pipe)
    with pytest.raises(ZeroDivisionError), scfg_fast.watch(pipe):
        raise ZeroDivisionError
    assert type(pipe) is cls and torch.equal(run(pipe), expected)


# In ------------------------------------------------------------------------------------------------------------------


def test_our_own_rates_give_our_own_picture(pipe) -> None:
    """A function that returns S-CFG's rates; the operator and the mixing here round apart."""
    handle = scfg_fast.enable(pipe)
    expected = run(pipe)
    assert relative(run(pipe, scfg_kwargs={"rates": lambda step, regions, energy: regions.rate}), expected) < 1e-4
    handle.rates = lambda step, regions, energy: torch.ones_like(energy)
    plain = run(pipe, scfg_kwargs={"enabled": False})
    assert relative(run(pipe), plain) < 1e-5
    assert handle.stats.effective_weight == pytest.approx(SCALE, rel=1e-5)


def test_a_mask_needs_no_capture_and_ones_are_plain_guidance(pipe) -> None:
    expected = run(pipe)
    size = expected.shape[-2:]
    handle = scfg_fast.enable(pipe, rates=torch.ones(1, 1, *size))
    assert relative(run(pipe), expected) < 1e-5 and handle.stats.layers == ()
    assert handle.stats.steps_applied == STEPS
    half = torch.ones(2, 1, *size)
    half[0, :, :, : size[1] // 2] = 0.25
    handle.rates = half
    assert relative(run(pipe)[1:], expected[1:]) < 1e-5, "the second image has ones"
    assert relative(run(pipe)[:1], expected[:1]) > 1e-2


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_a_mask_of_ones_is_stock_bit_for_bit_in_transformers(name: str) -> None:
    pipe = TINY[name].pipeline()
    seen: list[tuple[int, ...]] = []
    expected = run_tiny(pipe, name)
    scfg_fast.enable(pipe, PLAIN, rates=lambda step, regions, energy: seen.append(energy.shape) or 0.5 + 0.0 * energy)
    assert relative(run_tiny(pipe, name), expected) > 1e-3
    scfg_fast.enable(pipe, rates=torch.ones(1, *seen[0][1:]))
    assert torch.equal(run_tiny(pipe, name), expected)


def test_rates_are_bounded_by_max_scale() -> None:
    pipe = tiny_sd_pipeline()
    ones = torch.ones(1, 1, *run(pipe).shape[-2:])
    handle = scfg_fast.enable(pipe, SCFGConfig(max_scale=9.0), rates=100.0 * ones)
    run(pipe)
    assert handle.stats.effective_weight == pytest.approx(9.0, rel=1e-5)


def test_factors_of_words_multiply_the_rates_of_their_regions(pipe) -> None:
    word = first_word(0)
    found: list[Regions] = []
    handle = scfg_fast.enable(pipe, on_regions=lambda step, regions: found.append(regions.clone()))
    expected = run(pipe)
    plain, first = found[0].rate, found[0]
    handle.rates = {word: 1.0}
    assert relative(run(pipe), expected) < 1e-4
    found.clear()
    handle.rates = {word: 1.5}
    run(pipe)
    tokens = word_tokens(tokenizer_of(pipe), PROMPTS[:2], [word])[:, 0]
    owned = torch.stack([torch.isin(ids, row.nonzero()) for ids, row in zip(first.token_index, tokens, strict=True)])
    pixels = owned.repeat_interleave(first.cell, 1).repeat_interleave(first.cell, 2)[:, None]
    pixels = pixels[:, :, : plain.shape[2], : plain.shape[3]]
    bounded = (torch.where(pixels, 1.5, 1.0) * plain).clamp(max=15.0 / SCALE)
    assert relative(found[0].rate, bounded) < 1e-5


def test_given_rates_compose() -> None:
    """With a rule, a schedule, the matched dose and Characteristic Guidance."""
    pipe = tiny_sd_pipeline()
    mask = torch.ones(1, 1, *run(pipe).shape[-2:])
    mask[..., :3] = 0.5
    handle = scfg_fast.enable(pipe, SCFGConfig(combine="apg", eta=0.0, dose="matched"), rates=mask)
    handle.schedule = WeightSchedule("linear")
    run(pipe)
    weights = [float(weight.mean()) for weight in handle.stats.effective_weights]
    assert weights == pytest.approx(handle.stats.weights, rel=1e-4)
    handle = scfg_fast.enable(pipe, PLAIN, rates=mask, characteristic=CharacteristicGuidance(max_iterations=2))
    assert torch.isfinite(run(pipe)).all() and len(handle.stats.characteristic) == STEPS


@pytest.mark.parametrize("rates, error, words", [
    (torch.ones(1, 8, 8), ValueError, r"\[B or 1, 1, H, W\]"),
    (torch.ones(1, 1, 8, 8).long(), ValueError, "torch.int64"), ({"boy": -1.0}, ValueError, "'boy': -1.0"),
    ({}, ValueError, "have words"), ("regions", TypeError, "names of SCFGConfig"),
    (3.0, TypeError, "got 3.0"),
])  # fmt: skip
def test_rates_that_are_none_are_refused_at_once(rates: Any, error: type[Exception], words: str) -> None:
    pipe = tiny_sd_pipeline()
    with pytest.raises(error, match=words):
        scfg_fast.enable(pipe, rates=rates)
    assert type(pipe).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize("rates", [torch.ones(1, 1, 3, 3), lambda step, regions, energy: energy[:, 0], lambda *_: 1.0])
def test_rates_that_do_not_fit_the_latents_are_refused_in_their_step(rates: Any) -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, rates=rates)
    with pytest.raises(ValueError, match=r"step 0: rates must be \[2 or 1, 1, \d+, \d+\]"):
        run(pipe)


def test_words_need_regions_and_to_be_in_a_prompt() -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, SCFGConfig.pixels(), rates={first_word(0): 1.2})
    with pytest.raises(ValueError, match="rates of words need regions"):
        run(pipe)
    scfg_fast.enable(pipe, rates={"zebra": 1.2})
    with pytest.raises(ValueError, match=r"no prompt has the words \['zebra'\]"):
        run(pipe)
