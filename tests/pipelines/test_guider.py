"""`SCFGGuidance` in a modular SDXL pipeline, against the standard pipeline with S-CFG enabled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

import scfg_fast
from lab.rounding import otherwise_rounded, relative
from lab.tiny.unets import tiny_sdxl_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.guider import SCFGGuidance

STEPS = 4
TOLERANCE = 1e-5
SCALE = 6.0


@pytest.fixture()
def standard():
    return tiny_sdxl_pipeline()


def modular(standard, guider: ClassifierFreeGuidance):
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
    pipe.update_components(**{name: getattr(standard, name) for name in names}, guider=guider)
    pipe.update_components(force_zeros_for_empty_prompt=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(**overrides: Any) -> dict[str, Any]:
    common = dict(
        prompt=["a red cat on the grass", "a blue boat"],
        negative_prompt=["a car", "the sky"],
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(20 + i) for i in range(2)],
        height=128,
        width=128,
    )
    return common | overrides


def run(pipe, **overrides: Any) -> torch.Tensor:
    return pipe(**arguments(**overrides), output="latents")


def run_standard(pipe, **overrides: Any) -> torch.Tensor:
    return pipe(**arguments(**overrides), guidance_scale=SCALE, output_type="latent").images


def state(unet) -> tuple:
    return dict(unet.attn_processors), dict(unet._forward_hooks), dict(unet._forward_pre_hooks)


@pytest.mark.parametrize("options", [
    {}, {"foreground": "conditional"}, {"fidelity": "paper"}, {"reuse_every": 2}, {"start": 0.25, "stop": 0.75},
    {"rate_max": 1.5, "blur_sigma": 0.0},
], ids=str)  # fmt: skip
def test_it_is_what_the_standard_pipeline_makes(standard, options: dict[str, Any]) -> None:
    handle = scfg_fast.enable(standard, SCFGConfig(**options))
    with otherwise_rounded(standard):
        expected = run_standard(standard)
    scfg_fast.disable(standard)
    guider = SCFGGuidance(SCALE, scfg=options)
    before = state(standard.unet)
    actual = run(modular(standard, guider))
    assert relative(actual, expected) < TOLERANCE
    assert guider.stats.steps_applied == handle.stats.steps_applied and guider.stats.layers == handle.stats.layers
    assert torch.equal(guider.regions.token_index, handle.regions.token_index)
    after = state(standard.unet)
    assert after[1:] == before[1:] and all(after[0][name] is processor for name, processor in before[0].items())


def test_guidance_rescale(standard) -> None:
    scfg_fast.enable(standard)
    expected = run_standard(standard, guidance_rescale=0.7)
    scfg_fast.disable(standard)
    assert relative(run(modular(standard, SCFGGuidance(SCALE, guidance_rescale=0.7))), expected) < TOLERANCE


def test_without_a_negative_prompt_the_foreground_comes_from_the_conditional_pass(standard) -> None:
    handle = scfg_fast.enable(standard)
    expected = run_standard(standard, negative_prompt=None)
    scfg_fast.disable(standard)
    guider = SCFGGuidance(SCALE)
    assert relative(run(modular(standard, guider), negative_prompt=None), expected) < TOLERANCE
    assert torch.equal(guider.regions.foreground, handle.regions.foreground)


def test_disabled_is_plain_guidance(standard) -> None:
    plain = run(modular(standard, ClassifierFreeGuidance(SCALE)))
    for options in ({"start": 0.0, "stop": 0.0}, {"rates": "none"}):
        assert torch.equal(run(modular(standard, SCFGGuidance(SCALE, scfg=options))), plain)
    assert not torch.equal(run(modular(standard, SCFGGuidance(SCALE))), plain)


def test_the_configuration_survives_saving(tmp_path) -> None:
    guider = SCFGGuidance(5.5, guidance_rescale=0.2, stop=0.9, scfg={"rate_max": 2.0, "fidelity": "paper"})
    guider.save_pretrained(tmp_path)
    loaded = SCFGGuidance.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(guider.config)
    assert loaded.scfg_config == SCFGConfig(rate_max=2.0, fidelity="paper") and loaded.guidance_scale == 5.5
    assert guider.new(guidance_scale=3.0).scfg_config == guider.scfg_config


def test_mistakes(standard) -> None:
    with pytest.raises(ValueError, match="unknown parameters"):
        SCFGGuidance(scfg={"rate_maximum": 2.0})
    with pytest.raises(ValueError, match="does not see the prompt's text"):
        SCFGGuidance(scfg={"tokens": "words"})
    guider = SCFGGuidance()
    guider.set_state(0, STEPS, torch.tensor(1))
    with pytest.raises(ValueError, match="the denoiser is a Linear"):
        guider.prepare_models(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("interruption", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_denoiser_is_left_stock(standard, interruption: type[BaseException]) -> None:
    """The modular loop has no `finally`; the capture has."""
    before = state(standard.unet)
    pipe = modular(standard, SCFGGuidance(SCALE))

    def interrupt(*_) -> None:
        raise interruption

    hook = standard.unet.mid_block.register_forward_pre_hook(interrupt)
    with pytest.raises(interruption):
        run(pipe)
    hook.remove()
    assert "forward" not in standard.unet.__dict__
    after = state(standard.unet)
    assert after[1:] == before[1:] and all(after[0][name] is processor for name, processor in before[0].items())
    assert torch.isfinite(run(pipe)).all()
