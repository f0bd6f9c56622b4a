"""From a picture to its noise and back: exactly for a denoiser that does not look, with a reported error for one that
does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline

import scfg_fast
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import SCFGConfig, bundled_model_path, invert
from scfg_fast.guidance import CFGPlusPlus, CharacteristicGuidance, LossGuidance, WeightSchedule

PLAIN = SCFGConfig(rates="none")
STEPS = 10
CALL: dict[str, Any] = dict(negative_prompt=["", "a car"], num_inference_steps=STEPS, guidance_scale=3.0)
PROMPTS = ["a red cat", "a blue boat"]


def freeze(monkeypatch, pipe) -> None:
    """A denoiser whose answer depends on the step and the prompt alone."""

    def forward(sample, timestep, encoder_hidden_states=None, **kwargs):
        random = torch.Generator().manual_seed(int(timestep))
        noise = torch.randn(1, *sample.shape[1:], generator=random, dtype=torch.float64)
        return ((noise * (1.0 + encoder_hidden_states.double().mean((1, 2)).view(-1, 1, 1, 1))).to(sample.dtype),)

    monkeypatch.setattr(pipe.unet, "forward", forward)


def picture(pipe) -> torch.Tensor:
    """Latents that the tiny pipeline could have made."""
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5)).to(pipe.unet.dtype) * 0.5


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def tiny_pipeline(family: str) -> DiffusionPipeline:
    return tiny_sdxl_pipeline() if family == "sdxl" else tiny_sd_pipeline()


@pytest.mark.parametrize("family, kind", [("sd", "epsilon"), ("sd", "v_prediction"), ("sdxl", "epsilon")])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("schedule", [None, CFGPlusPlus(0.6)], ids=["cfg", "cfg++"])
def test_a_frozen_denoiser_returns_the_picture(monkeypatch, schedule, spacing: str, family: str, kind: str) -> None:
    pipe = tiny_pipeline(family) if family == "sdxl" else tiny_sd_pipeline(prediction_type=kind)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    freeze(monkeypatch, pipe)
    handle = scfg_fast.enable(pipe, PLAIN, schedule=schedule)
    stock = pipe.scheduler
    noise = invert(pipe, PROMPTS, latents=picture(pipe), **CALL)
    upwards = handle.stats.weights
    assert pipe.scheduler is stock and relative(noise, picture(pipe)) > 0.5
    again = pipe(PROMPTS, latents=noise, output_type="latent", **CALL).images
    assert upwards == pytest.approx(handle.stats.weights[::-1]), "the weights of sampling, backwards"
    assert relative(again, picture(pipe)) < 1e-5


def test_a_trained_denoiser_comes_near_and_nearer_with_more_steps(record_property) -> None:
    """The bundled model, on latents that it made itself, at a guidance that an inversion can follow."""
    pipe = StableDiffusionPipeline.from_pretrained(bundled_model_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    text = "a red heart above a house in a meadow"
    made = pipe(text, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="latent").images
    scfg_fast.enable(pipe, PLAIN, schedule=CFGPlusPlus(0.05))
    errors = []
    for steps in (4, 10, 24):
        call = dict(num_inference_steps=steps, guidance_scale=3.0)
        noise = invert(pipe, text, latents=made, **call)
        errors.append(relative(pipe(text, latents=noise, output_type="latent", **call).images, made))
    record_property("relative error at 4, 10 and 24 steps", errors)
    print(errors)
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.2


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_picture_and_an_edit(family: str) -> None:
    """A picture goes in as pixels; another prompt makes another picture of the same noise."""
    pipe = tiny_pipeline(family)
    pixels = np.random.default_rng(0).random((1, 128, 128, 3)).astype(np.float32)
    call = dict(num_inference_steps=5, guidance_scale=3.0)
    scfg_fast.enable(pipe, schedule=CFGPlusPlus(0.3))
    noise = invert(pipe, "a red cat", image=pixels, **call)
    assert noise.shape == (1, 4, 16, 16)
    again, edited = (pipe(text, latents=noise, output_type="latent", **call).images for text in ("a red cat", "a sea"))
    assert relative(edited, again) > 1e-3
    assert torch.equal(noise, invert(pipe, "a red cat", latents=_encoded(pipe, pixels), **call))


def _encoded(pipe, pixels: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2.0 - 1.0
    with torch.no_grad():
        return pipe.vae.encode(values.to(pipe.vae.dtype)).latent_dist.mode() * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("schedule", [None, CFGPlusPlus(0.6)], ids=["cfg", "cfg++"])
def test_an_exception_leaves_a_stock_pipeline(monkeypatch, schedule, family: str) -> None:
    pipe = tiny_pipeline(family)
    stock, before = pipe.scheduler, dict(pipe.unet.attn_processors)
    scfg_fast.enable(pipe, schedule=schedule)
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        invert(pipe, PROMPTS, latents=picture(pipe), **CALL)
    assert pipe.scheduler is stock and "step" not in vars(stock)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks
    assert all(pipe.unet.attn_processors[key] is processor for key, processor in before.items())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_neutral_inversions(family: str) -> None:
    """Enabled without anything is the stock pipeline bit by bit; lam = 0 is the inversion of the negative prompt."""
    pipe = tiny_pipeline(family)
    expected = invert(pipe, PROMPTS, latents=picture(pipe), **CALL)
    alone = invert(pipe, CALL["negative_prompt"], latents=picture(pipe), **(CALL | {"guidance_scale": 1.0}))
    handle = scfg_fast.enable(pipe, PLAIN)
    assert torch.equal(invert(pipe, PROMPTS, latents=picture(pipe), **CALL), expected)
    handle.schedule = CFGPlusPlus(0.0)
    assert relative(invert(pipe, PROMPTS, latents=picture(pipe), **CALL), alone) < 2e-5
    assert relative(expected, alone) > 1e-2


@pytest.mark.parametrize("options, message", [
    (dict(schedule=WeightSchedule("linear")), "cannot take schedule=WeightSchedule"),
    (dict(config=SCFGConfig(stop=0.5)), "cannot take start, stop or reuse_every"),
    (dict(loss=LossGuidance(lambda x0: x0.mean((1, 2, 3)), space="latents")), "cannot take loss"),
    (dict(characteristic=CharacteristicGuidance()), "cannot take characteristic"),
])  # fmt: skip
def test_what_an_inversion_cannot_go_through_backwards_is_refused(options, message: str) -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe, **options)
    with pytest.raises(ValueError, match=message):
        invert(pipe, PROMPTS, latents=picture(pipe), **CALL)
    assert type(pipe.scheduler) is DDIMScheduler


@pytest.mark.parametrize("change, arguments, message", [
    (DDIMScheduler.from_config, {"output_type": "pil", "eta": 0.5}, "eta, output_type cannot be chosen"),
    (lambda config: EulerDiscreteScheduler.from_config(config), {}, "EulerDiscreteScheduler has no inverse"),
    (lambda config: DDIMScheduler.from_config(config, timestep_spacing="linspace"), {}, "timestep_spacing='linspace'"),
    (lambda config: DDIMScheduler.from_config(config, clip_sample=True), {}, "clips"),
    (lambda config: DDIMScheduler.from_config(config, prediction_type="sample"), {}, "has no noise at the picture"),
    (DDIMScheduler.from_config, {"image": np.zeros((1, 128, 128, 3), np.float32)}, "not as both"),
    (DDIMScheduler.from_config, {"latents": None}, "not as both"),
])  # fmt: skip
def test_what_cannot_be_inverted_is_refused(change, arguments, message: str) -> None:
    pipe = tiny_sd_pipeline()
    pipe.scheduler = change(pipe.scheduler.config)
    with pytest.raises(ValueError, match=message):
        invert(pipe, PROMPTS, **({"latents": picture(pipe)} | arguments), **CALL)
