"""The effective weight of every step, the matched dose, APG and CFG-Zero*: through the public call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

import scfg_fast
from lab.tiny.loops import NEGATIVES, PROMPTS
from lab.tiny.transformers import TINY
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.guidance import CFGPlusPlus, CharacteristicGuidance, LossGuidance, WeightSchedule
from scfg_fast.guider import SCFGGuidance

PLAIN = SCFGConfig(rates="none")
STEPS, SCALE = 4, 6.0
UNETS: dict[str, Callable[[], Any]] = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


def run(pipe, picks: tuple[int, ...] = (0, 1), **kwargs: Any) -> torch.Tensor:
    options = dict(num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent") | kwargs
    generators = [torch.Generator().manual_seed(pick) for pick in picks]
    prompts, negatives = ([texts[pick] for pick in picks] for texts in (PROMPTS, NEGATIVES))
    return pipe(prompts, negative_prompt=negatives, generator=generators, **options).images


def run_tiny(pipe, name: str, picks: tuple[int, ...] = (0, 1), **more: Any) -> torch.Tensor:
    return pipe(**TINY[name].call(list(picks), **more))[0]


def scale_of(name: str) -> float:
    call = TINY[name].call([0])
    return call.get("true_cfg_scale") or call["guidance_scale"]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


class Watched:
    """The raw predictions of the denoiser, and what the scheduler is given, of the next run of a pipeline.

    Hooks run in the order of their registration, so this one sees the denoiser's own output.
    """

    def __init__(self, pipe, denoiser: torch.nn.Module) -> None:
        self.raw: list[torch.Tensor] = []
        self.given: list[torch.Tensor] = []
        denoiser.register_forward_hook(lambda module, args, output: self.raw.append(output[0].clone()) or None)
        step = pipe.scheduler.step

        def record(prediction, *args, **kwargs):
            self.given.append(prediction.clone())
            return step(prediction, *args, **kwargs)

        pipe.scheduler.step = record

    def weights(self, two_pass: bool = False) -> list[torch.Tensor]:
        """||g - u|| / ||t - u|| of each step, in fp64; 1 where t alone was computed."""
        found = []
        raw = (
            [torch.cat(pair[::-1]) for pair in zip(self.raw[::2], self.raw[1::2], strict=True)]
            if two_pass
            else self.raw
        )
        for prediction, given in zip(raw, self.given, strict=True):
            g = given.double().flatten(1)
            if len(prediction) == len(given):
                found.append(torch.ones(len(given), dtype=torch.float64))
                continue
            u, t = (half.double().flatten(1) for half in prediction.chunk(2))
            found.append((g - u).norm(dim=1) / (t - u).norm(dim=1))
        return found


METHODS: dict[str, dict[str, Any]] = {
    "plain": dict(config=PLAIN),
    "scfg": dict(config=SCFGConfig()),
    "paper": dict(config=SCFGConfig.paper()),
    "pixels": dict(config=SCFGConfig.pixels()),
    "matched": dict(config=SCFGConfig(dose="matched")),
    "matched pixels": dict(config=SCFGConfig.pixels(dose="matched")),
    "schedule": dict(config=SCFGConfig(), schedule=WeightSchedule("linear")),
    "plain schedule": dict(config=PLAIN, schedule=WeightSchedule("linear")),
    "interval": dict(config=SCFGConfig(), schedule=WeightSchedule(interval=(0.25, 0.75))),
    "part of the run": dict(config=SCFGConfig(stop=0.5)),
    "apg": dict(config=SCFGConfig(combine="apg", eta=0.0, adaptive_projected_guidance_momentum=-0.5)),
    "plain apg": dict(config=PLAIN.replace(combine="apg", adaptive_projected_guidance_rescale=0.5)),
    "cfg-zero": dict(config=SCFGConfig(combine="cfg-zero")),
    "matched cfg-zero": dict(config=SCFGConfig(combine="cfg-zero", dose="matched", zero_init_steps=0)),
}


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", METHODS)
def test_the_effective_weight_is_that_of_what_the_scheduler_gets(name: str, rescale: float) -> None:
    """Both halves rewritten, or with guidance_rescale u alone; computed apart in fp64: below 1e-4 relative."""
    options = METHODS[name]
    if options["config"].combine == "cfg-zero" and rescale > 0.0:
        options = options | dict(config=options["config"].replace(zero_init_steps=0))
    pipe = tiny_sd_pipeline()
    watched = Watched(pipe, pipe.unet)
    handle = scfg_fast.enable(pipe, **options)
    run(pipe, guidance_rescale=rescale)
    stats = handle.stats
    assert len(stats.effective_weights) == STEPS and all(weight.shape == (2,) for weight in stats.effective_weights)
    for measured, expected in zip(stats.effective_weights, watched.weights(), strict=True):
        assert relative(measured, expected) < 1e-4
    mean = float(torch.stack(stats.effective_weights).mean())
    assert stats.effective_weight == pytest.approx(mean, rel=1e-6)
    if name == "plain" and rescale == 0.0:
        assert stats.effective_weight == SCALE
    if "matched" in name and rescale == 0.0:
        assert all(relative(weight, torch.full((2,), SCALE)) < 1e-4 for weight in watched.weights())


def test_characteristic_guidance_has_a_dose_too() -> None:
    pipe = tiny_sd_pipeline()
    handle = scfg_fast.enable(pipe, SCFGConfig(), characteristic=CharacteristicGuidance())
    given: list[torch.Tensor] = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda p, *args, **kwargs: given.append(p.clone()) or step(p, *args, **kwargs)
    inputs: list[torch.Tensor] = []
    pipe.unet.register_forward_hook(lambda module, args, output: inputs.append(output[0].clone()) or None)
    run(pipe)
    at = 0
    for solved, measured, g in zip(handle.stats.characteristic, handle.stats.effective_weights, given, strict=True):
        u, t = (half.flatten(1) for half in inputs[at].chunk(2))
        assert relative(measured, (g.flatten(1) - u).norm(dim=1) / (t - u).norm(dim=1)) < 1e-4
        at += 1 + int(solved.iterations.max())


@pytest.mark.parametrize("constant", [0.5, 1.0, 1.7])
def test_rates_of_one_constant_have_that_multiple_of_the_scale(constant: float) -> None:
    pipe = tiny_sdxl_pipeline()
    handle = scfg_fast.enable(pipe, SCFGConfig.pixels(rate_min=constant, rate_max=constant))
    run(pipe)
    for weight in handle.stats.effective_weights:
        assert weight.tolist() == pytest.approx([constant * SCALE] * 2, rel=1e-5)


def test_batch_mates_change_no_dose() -> None:
    pipe = tiny_sd_pipeline()
    handle = scfg_fast.enable(pipe)
    run(pipe)
    together = torch.stack(handle.stats.effective_weights)
    for pick in (0, 1):
        run(pipe, (pick,))
        assert relative(torch.stack(handle.stats.effective_weights)[:, 0], together[:, pick]) < 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
@pytest.mark.parametrize("config", [SCFGConfig(), SCFGConfig(dose="matched"), SCFGConfig(combine="apg", eta=0.0)],
                         ids=["scfg", "matched", "apg"])  # fmt: skip
def test_transformers_of_one_pass_and_of_two(name: str, config: SCFGConfig) -> None:
    """u alone is rewritten; Wan's video is one sample, whatever its frames. Packed patches are a permutation."""
    tiny = TINY[name]
    pipe = tiny.pipeline()
    watched = Watched(pipe, pipe.transformer)
    handle = scfg_fast.enable(pipe, config)
    run_tiny(pipe, name)
    for measured, expected in zip(handle.stats.effective_weights, watched.weights(tiny.layout.two_pass), strict=True):
        assert relative(measured, expected) < 1e-4
        if config.dose == "matched":
            assert expected.tolist() == pytest.approx([scale_of(name)] * 2, rel=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_matched_rates_of_one_are_stock_bit_for_bit(name: str) -> None:
    pipe = TINY[name].pipeline()
    expected = run_tiny(pipe, name)
    scfg_fast.enable(pipe, SCFGConfig(dose="matched", rate_min=1.0, rate_max=1.0, max_scale=None, blur_sigma=0.0))
    assert torch.equal(run_tiny(pipe, name), expected)


# APG and CFG-Zero*, whole runs ---------------------------------------------------------------------------------------

APG: dict[str, Any] = dict(adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=2.0, eta=0.25)
GUIDERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "apg": (AdaptiveProjectedGuidance, APG),
    "apg, defaults": (AdaptiveProjectedGuidance, {}),
    "cfg-zero": (ClassifierFreeZeroStarGuidance, {}),
}


def literal(denoiser: torch.nn.Module, guider: Any, steps: int, scale: float, keeps_cond: bool) -> Any:
    """A hook that has diffusers' guider combine: the pipeline's own line then gives what it says."""
    count = iter(range(steps))

    def combine(module, args, output):
        guider.set_state(next(count), steps, torch.tensor(0))
        guider.prepare_inputs({"x": (torch.zeros(1), torch.zeros(1))})
        uncond, cond = output[0].chunk(2)
        f = guider.forward(cond, uncond).pred
        return (torch.cat([(scale * cond - f) / (scale - 1.0), cond] if keeps_cond else [f, f]),)

    return denoiser.register_forward_hook(combine)


@pytest.mark.parametrize("method", GUIDERS)
@pytest.mark.parametrize("family", UNETS)
def test_a_run_is_that_of_diffusers_guider(family: str, method: str) -> None:
    """Without rates and with rates of one; 1e-6 a step, measured below 5e-6 over the run."""
    make, options = GUIDERS[method]
    pipe = UNETS[family]()
    hook = literal(pipe.unet, make(SCALE, **options), STEPS, SCALE, False)
    expected = run(pipe)
    hook.remove()
    rule = method.split(",")[0]
    handle = scfg_fast.enable(pipe, PLAIN.replace(combine=rule, **options))
    assert relative(run(pipe), expected) < 1e-5
    handle.config = SCFGConfig.pixels(combine=rule, rate_min=1.0, rate_max=1.0, **options)
    assert relative(run(pipe), expected) < 1e-5
    handle.config = SCFGConfig(combine=rule, **options)
    assert relative(run(pipe), expected) > 1e-3, "and with regions it is another picture"


@pytest.mark.parametrize("method", GUIDERS)
def test_a_run_of_stable_diffusion_3_is_that_of_diffusers_guider(method: str) -> None:
    make, options = GUIDERS[method]
    pipe = TINY["sd3"].pipeline()
    scale, steps = scale_of("sd3"), TINY["sd3"].call([0])["num_inference_steps"]
    hook = literal(pipe.transformer, make(scale, **options), steps, scale, True)
    expected = run_tiny(pipe, "sd3")
    hook.remove()
    scfg_fast.enable(pipe, PLAIN.replace(combine=method.split(",")[0], **options))
    assert relative(run_tiny(pipe, "sd3"), expected) < 1e-5


def test_apg_composes_with_regions_schedules_intervals_and_rescale() -> None:
    """One run with all of them; what the scheduler gets is the formula of the step, from the denoiser's own output."""
    pipe = tiny_sd_pipeline()
    rates: list[torch.Tensor] = []
    config = SCFGConfig(combine="apg", eta=0.0, adaptive_projected_guidance_rescale=0.0)
    schedule = WeightSchedule("linear", interval=(0.25, 1.0))
    watched = Watched(pipe, pipe.unet)
    handle = scfg_fast.enable(
        pipe, config, schedule=schedule, on_regions=lambda step, regions: rates.append(regions.rate.clone())
    )
    run(pipe, guidance_rescale=0.5)
    assert handle.stats.weights[0] == 1.0
    assert handle.stats.samples == 4 * STEPS, "`watched` sees the batch, which stays whole"
    for prediction, g, weight, rate in zip(
        watched.raw[1:], watched.given[1:], handle.stats.weights[1:], rates, strict=True
    ):
        u, t = prediction.double().chunk(2)
        axis = t / t.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        across = (t - u) - ((t - u) * axis).sum((1, 2, 3), keepdim=True) * axis
        f = u + weight * rate.double() * across
        f = f * (0.5 * t.std((1, 2, 3), keepdim=True) / f.std((1, 2, 3), keepdim=True) + 0.5)
        assert relative(g, f) < 1e-4


def test_momentum_begins_anew_with_every_call() -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, SCFGConfig(combine="apg", adaptive_projected_guidance_momentum=-0.75))
    assert torch.equal(run(pipe), run(pipe))


@pytest.mark.parametrize("options, words", [
    (dict(schedule=CFGPlusPlus(0.6)), "renoises"), (dict(characteristic=CharacteristicGuidance()), "Characteristic"),
    (dict(loss=LossGuidance(lambda x: x.square().mean((1, 2, 3)), space="latents")), "loss guidance differentiates"),
])  # fmt: skip
def test_what_apg_does_not_go_with_is_refused(options: dict[str, Any], words: str) -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, SCFGConfig(combine="apg"), **options)
    with pytest.raises(ValueError, match=f"combine='apg': .*{words}"):
        run(pipe)


def test_a_prediction_of_zero_has_no_spread_to_rescale() -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, SCFGConfig(combine="cfg-zero"))
    with pytest.raises(ValueError, match="use zero_init_steps=0"):
        run(pipe, guidance_rescale=0.5)


def test_an_inversion_is_refused() -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, SCFGConfig(combine="apg"))
    with pytest.raises(ValueError, match="cannot take combine='apg'"):
        scfg_fast.invert(pipe, "a cat", latents=torch.zeros(1, 4, 16, 16))


# Guiders -------------------------------------------------------------------------------------------------------------


def modular(standard, guider: ClassifierFreeGuidance) -> torch.Tensor:
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
    pipe.update_components(**{name: getattr(standard, name) for name in names}, guider=guider)
    pipe.update_components(force_zeros_for_empty_prompt=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=PROMPTS[:2], negative_prompt=NEGATIVES[:2], num_inference_steps=STEPS, height=128, width=128,
        generator=[torch.Generator().manual_seed(pick) for pick in (0, 1)], output="latents",
    )  # fmt: skip


@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("config", [
    SCFGConfig(), SCFGConfig(dose="matched"), SCFGConfig.pixels(dose="matched"), SCFGConfig(combine="apg", **APG),
    SCFGConfig(combine="cfg-zero", zero_init_steps=0), PLAIN.replace(combine="apg", **APG),
], ids=["scfg", "matched", "matched pixels", "apg", "cfg-zero", "plain apg"])  # fmt: skip
def test_a_guider_makes_the_same_and_has_the_same_dose(config: SCFGConfig, rescale: float) -> None:
    pipe = tiny_sdxl_pipeline()
    handle = scfg_fast.enable(pipe, config)
    expected = run(pipe, guidance_rescale=rescale, height=128, width=128)
    scfg_fast.disable(pipe)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    guider = SCFGGuidance(SCALE, guidance_rescale=rescale, scfg=fields)
    assert relative(modular(pipe, guider), expected) < 1e-4
    for measured, of_pipeline in zip(guider.stats.effective_weights, handle.stats.effective_weights, strict=True):
        assert relative(measured, of_pipeline) < 1e-4


def test_a_guider_without_rates_is_diffusers_own() -> None:
    pipe = tiny_sdxl_pipeline()
    for rule, make in (("apg", AdaptiveProjectedGuidance), ("cfg-zero", ClassifierFreeZeroStarGuidance)):
        expected = modular(pipe, make(SCALE))
        assert relative(modular(pipe, SCFGGuidance(SCALE, scfg=dict(rates="none", combine=rule))), expected) < 1e-5
