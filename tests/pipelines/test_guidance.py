"""Schedules and CFG++ through the public call of real pipelines, alone and with S-CFG."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)

import scfg_fast
from lab.rounding import relative
from lab.tiny.loops import NEGATIVES, PROMPTS, Literal
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.guidance import CFGPlusPlus, Step, WeightSchedule
from scfg_fast.guidance.cfgpp import lam_for_mean_weight

PLAIN = SCFGConfig(rates="none")
STEPS = 5
SCALE = 6.0


def run(pipe, **kwargs: Any) -> torch.Tensor:
    options = dict(num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent") | kwargs
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(PROMPTS, negative_prompt=NEGATIVES, generator=generators, **options).images


def run_with_scales(pipe, scales: list[float], **kwargs: Any) -> torch.Tensor:
    """The documented dynamic guidance: the pipeline's own line with another scale in every step."""

    def set_next(pipe, step, timestep, tensors):
        if step + 1 < len(scales):
            pipe._guidance_scale = scales[step + 1]
        return tensors

    return run(pipe, guidance_scale=scales[0], callback_on_step_end=set_next, **kwargs)


def weights_of(schedule: WeightSchedule) -> list[float]:
    return [schedule.weight(Step(i, STEPS, SCALE)) for i in range(STEPS)]


@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_a_constant_schedule_changes_no_bit(pipe, config: SCFGConfig) -> None:
    stock = run(pipe)
    handle = scfg_fast.enable(pipe, config)
    expected = run(pipe)
    assert torch.equal(expected, stock) == (config is PLAIN)
    handle.schedule = WeightSchedule()
    assert torch.equal(run(pipe), expected)
    assert handle.stats.weights == [SCALE] * STEPS and handle.stats.mean_weight == SCALE


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
@pytest.mark.parametrize("shape", ["linear", "clamp-cosine", "sine"])
def test_a_schedule_is_the_pipeline_with_another_scale_in_every_step(pipe, config, shape: str, rescale: float) -> None:
    schedule = WeightSchedule(shape, floor=2.0)
    handle = scfg_fast.enable(pipe, config)
    expected = run_with_scales(pipe, weights_of(schedule), guidance_rescale=rescale)
    constant = run(pipe, guidance_rescale=rescale)
    scfg_fast.enable(pipe, config, schedule=schedule)
    actual = run(pipe, guidance_rescale=rescale)
    assert handle.stats.weights == pytest.approx(weights_of(schedule))
    assert relative(actual, expected) < 1e-5
    assert relative(constant, expected) > 1e-3


def test_the_direction_of_a_run(pipe) -> None:
    """Linear rises from the noise to the picture: the published third-party code runs it backwards."""
    handle = scfg_fast.enable(pipe, PLAIN, schedule=WeightSchedule("linear"))
    run(pipe)
    assert handle.stats.weights == sorted(handle.stats.weights) and handle.stats.weights[0] < SCALE


@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_outside_an_interval_half_of_the_batch_is_computed(pipe, config: SCFGConfig, monkeypatch) -> None:
    class NearlyOne:
        """The same weights, too close to 1 to matter, but not 1."""

        needs_levels = False

        def check(self, scheduler, eta=0.0) -> None: ...

        def weight(self, step: Step) -> float:
            return SCALE if 1 <= step.index < 4 else 1.0 + 1e-9

    handle = scfg_fast.enable(pipe, config.replace(start=0.2, stop=0.8), schedule=NearlyOne())
    expected = run(pipe)
    handle.schedule = WeightSchedule(interval=(0.2, 0.8))
    actual = run(pipe)
    assert handle.stats.weights == [1.0, SCALE, SCALE, SCALE, 1.0]
    assert handle.stats.samples == 2 + 4 + 4 + 4 + 2
    assert relative(actual, expected) < 1e-5
    samples: list[int] = []
    forward = torch.nn.Conv2d.forward

    def recorded(conv, x):  # a hook on a module would keep the batch whole
        if conv is pipe.unet.conv_in:
            samples.append(x.shape[0])
        return forward(conv, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", recorded)
    run(pipe)
    assert samples == [2, 4, 4, 4, 2]


def test_a_schedule_may_keep_the_whole_batch(pipe) -> None:
    handle = scfg_fast.enable(pipe, PLAIN, schedule=WeightSchedule(interval=(0.2, 0.8), half_batch=False))
    run(pipe)
    assert handle.stats.samples == 4 * STEPS and handle.stats.weights[0] == 1.0


def test_the_whole_batch_where_features_are_cached() -> None:
    """A cache that replaces the forward of blocks would meet features of another batch size."""
    pipe = tiny_sd_pipeline()
    block, cache = pipe.unet.mid_block, {}
    forward = block.forward

    def every_second(*args, **kwargs):
        if len(cache) % 2 == 0:
            cache["kept"] = forward(*args, **kwargs)
        cache[len(cache)] = None
        return cache["kept"]

    block.forward = every_second
    handle = scfg_fast.enable(pipe, PLAIN, schedule=WeightSchedule(interval=(0.2, 0.8)))
    run(pipe)
    assert handle.stats.samples == 4 * STEPS


@pytest.mark.parametrize("shape", [lambda tau: -0.5, [1.0, float("nan")]], ids=["negative", "nan"])
def test_weights_that_are_none_are_refused(shape) -> None:
    pipe = tiny_sd_pipeline()
    before = dict(pipe.unet.attn_processors)
    scfg_fast.enable(pipe, schedule=WeightSchedule(shape))
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        run(pipe)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_zero_terminal_snr() -> None:
    """The first level is infinite: schedules do not ask for it, and CFG++ has the weight lam there."""
    pipe = tiny_sd_pipeline(prediction_type="v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    schedule = WeightSchedule("linear")
    handle = scfg_fast.enable(pipe, PLAIN)
    expected = run_with_scales(pipe, weights_of(schedule))
    handle.schedule = schedule
    assert relative(run(pipe), expected) < 1e-5
    handle.schedule = CFGPlusPlus(0.6)
    assert torch.isfinite(run(pipe)).all() and handle.stats.weights[0] == pytest.approx(0.6)


def test_an_interval_in_noise_levels(pipe) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=WeightSchedule(interval=(0.3, 5.0), interval_in="sigma"))
    run(pipe)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert handle.stats.weights == [SCALE if 0.3 <= sigma <= 5.0 else 1.0 for sigma in sigmas]
    assert 0 < handle.stats.weights.count(1.0) < STEPS


def cfgpp_run(pipe, lam: float, sampler: str) -> torch.Tensor:
    """CFG++ written out: guided denoised sample, unconditional renoising; no weight anywhere."""
    loop = Literal(pipe, STEPS)
    x, scheduler = loop.start, loop.scheduler
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t)
            eps_u, eps_c = loop.halves(scaled, scaled, t)
            guided = eps_u + lam * (eps_c - eps_u)
            if sampler == "ddim":
                alphas = scheduler.alphas_cumprod
                a, before = alphas[t], t - 1000 // STEPS
                after = alphas[before] if before >= 0 else scheduler.final_alpha_cumprod
                x = after**0.5 * (x - (1 - a) ** 0.5 * guided) / a**0.5 + (1 - after) ** 0.5 * eps_u
            else:
                sigma, after = scheduler.sigmas[i], scheduler.sigmas[i + 1]
                x = (x - sigma * guided) + after * eps_u
                scheduler._step_index += 1
    return x


SAMPLERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cfgpp_is_its_own_update_in_an_unmodified_scheduler(pipe, sampler: str, lam: float) -> None:
    pipe.scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    expected = cfgpp_run(pipe, lam, sampler)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(lam))
    assert relative(run(pipe), expected) < 2e-5
    assert len(handle.stats.weights) == STEPS


@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), DPMSolverMultistepScheduler])
def test_cfgpp_with_lam_zero_is_unconditional_sampling_bit_by_bit(pipe, sampler) -> None:
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    loop = Literal(pipe, STEPS)
    x = loop.start
    with torch.no_grad():
        for t in loop.scheduler.timesteps:
            scaled = loop.scheduler.scale_model_input(x, t)
            x = loop.scheduler.step(loop.halves(scaled, scaled, t)[0], t, x).prev_sample
    scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(0.0))
    assert torch.equal(run(pipe), x)


@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), DPMSolverMultistepScheduler])
@pytest.mark.parametrize("config", [PLAIN, SCFGConfig()], ids=["plain", "scfg"])
def test_cfgpp_with_lam_of_the_identity_is_plain_guidance(pipe, config: SCFGConfig, sampler) -> None:
    """One step, where one lam says one weight; in the multistep solver that step is of first order."""
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    handle = scfg_fast.enable(pipe, config)
    expected = run(pipe, num_inference_steps=1)
    handle.schedule = CFGPlusPlus(lam_for_mean_weight(SCALE, pipe.scheduler, 1))
    assert relative(run(pipe, num_inference_steps=1), expected) < 2e-6
    assert handle.stats.weights == pytest.approx([SCALE])


def test_cfgpp_of_equal_predictions_is_any_weight(pipe) -> None:
    """With the same prompt in both halves every lam gives the stock image."""
    handle = scfg_fast.enable(pipe, PLAIN)
    images = []
    for schedule in (None, CFGPlusPlus(0.2), CFGPlusPlus(0.9)):
        handle.schedule = schedule
        images.append(
            pipe("a cat", negative_prompt="a cat", generator=torch.Generator().manual_seed(0), num_inference_steps=3,
                 guidance_scale=5.0, output_type="latent").images
        )  # fmt: skip
    assert relative(images[1], images[0]) < 1e-5 and relative(images[2], images[0]) < 1e-5


def test_img2img_takes_the_levels_of_its_own_steps() -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(tiny_sd_pipeline(), torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(0.5))
    picture = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    run(pipe, image=picture, strength=0.4, num_inference_steps=10)
    short = handle.stats.weights
    run(pipe, image=picture, strength=1.0, num_inference_steps=10)
    assert len(short) == 4 and handle.stats.weights[-4:] == short


def test_a_run_that_ends_early_takes_the_levels_of_its_own_steps() -> None:
    """SDXL img2img at full strength with denoising_end: the steps begin at the first level, and are fewer."""
    pipe = StableDiffusionXLImg2ImgPipeline.from_pipe(tiny_sdxl_pipeline(), torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(0.5))
    picture = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    options = dict(image=picture, strength=1.0, num_inference_steps=10)
    run(pipe, **options)
    whole = handle.stats.weights
    run(pipe, **options, denoising_end=0.6)
    assert 1 < len(handle.stats.weights) < 10 and handle.stats.weights == whole[: len(handle.stats.weights)]


def test_cfgpp_and_regions_multiply(pipe) -> None:
    """S-CFG with CFG++ is the pipeline's S-CFG at the weight of every step."""
    handle = scfg_fast.enable(pipe, schedule=CFGPlusPlus(1.0))
    actual = run(pipe)
    weights = handle.stats.weights
    assert handle.stats.steps_applied == STEPS and min(weights) > 1.05
    scfg_fast.enable(pipe)
    assert relative(run_with_scales(pipe, weights), actual) < 1e-5


@pytest.mark.parametrize("config", [PLAIN, SCFGConfig(), SCFGConfig.pixels()], ids=["plain", "scfg", "pixels"])
@pytest.mark.parametrize("schedule", [WeightSchedule("linear"), CFGPlusPlus(1.2)], ids=["linear", "cfg++"])
def test_a_weight_with_perturbed_attention_guidance(config: SCFGConfig, schedule) -> None:
    pipe = StableDiffusionPAGPipeline.from_pipe(tiny_sd_pipeline(), torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    handle = scfg_fast.enable(pipe, config, schedule=schedule)
    actual = run(pipe, pag_scale=2.0)
    weights = handle.stats.weights
    handle.schedule = None
    assert relative(run_with_scales(pipe, weights, pag_scale=2.0), actual) < 2e-5


class ClippingDDIM:
    """DDIM with its default clipping of the denoised sample, which is not linear in the prediction."""

    @staticmethod
    def from_config(config):
        return DDIMScheduler.from_config(config, clip_sample=True)


class SDESolver:
    """DPM-Solver++ with noise of its own."""

    @staticmethod
    def from_config(config):
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize("scheduler, options, message", [
    (UniPCMultistepScheduler, {}, "UniPCMultistepScheduler is neither a first-order nor a known multistep scheduler"),
    (SDESolver, {}, "algorithm_type='sde-dpmsolver\\+\\+' adds noise"),
    (DDIMScheduler, {"eta": 0.5}, "eta=0.5"), (ClippingDDIM, {}, "clips the denoised sample"),
])  # fmt: skip
def test_where_the_identity_does_not_hold_cfgpp_is_refused(scheduler, options, message: str) -> None:
    pipe = tiny_sd_pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    before = dict(pipe.unet.attn_processors)
    scfg_fast.enable(pipe, schedule=CFGPlusPlus())
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("schedule", ["linear", 0.6, WeightSchedule])
def test_a_schedule_of_another_type_is_refused_where_it_is_given(schedule) -> None:
    pipe = tiny_sd_pipeline()
    with pytest.raises(TypeError, match="schedule must be a rule"):
        scfg_fast.enable(pipe, schedule=schedule)
    assert "scfg_kwargs" not in str(inspect.signature(type(pipe).__call__)), "half enabled"
    handle = scfg_fast.enable(pipe)
    with pytest.raises(TypeError, match="schedule must be a rule"):
        handle.schedule = schedule
    with pytest.raises(TypeError, match="schedule must be a rule"):
        run(pipe, scfg_kwargs={"schedule": schedule})


def test_per_call_and_disabled(pipe) -> None:
    stock = run(pipe)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=WeightSchedule("linear"))
    scheduled = run(pipe)
    assert torch.equal(run(pipe, scfg_kwargs={"schedule": None}), stock)
    assert torch.equal(run(pipe, scfg_kwargs={"enabled": False}), stock)
    handle.schedule = None
    assert torch.equal(run(pipe, scfg_kwargs={"schedule": WeightSchedule("linear")}), scheduled)
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe), stock)
