"""SDXL's refiner, alone and after the base model (`denoising_end`, `denoising_start`), against replaced pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

import scfg_fast
from lab.reference.replaced import replaced_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.unets import sharpen, silent, tiny_sdxl_pipeline
from scfg_fast.capture import choose_layers
from scfg_fast.config import SCFGConfig
from scfg_fast.denoisers.unet import find_blocks

STEPS = 6
HANDOVER = 0.5
TOLERANCE = 5e-6
REFINER_FACTORS = (4, 8)


def tiny_refiner_unet() -> UNet2DConditionModel:
    """A UNet of the refiner's shape: attention at latent / 2, / 4 and, unlike the base model, in the middle at / 8."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        transformer_layers_per_block=2,
        attention_head_dim=(2, 2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 5 * 8,
    )
    return sharpen(unet, 2.5)


@pytest.fixture(scope="module")
def base() -> StableDiffusionXLPipeline:
    return tiny_sdxl_pipeline()


@pytest.fixture(scope="module")
def refiner(base) -> StableDiffusionXLImg2ImgPipeline:
    """The second text encoder alone, aesthetic scores in the place of the target size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = tiny_refiner_unet()
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae, text_encoder=None, text_encoder_2=base.text_encoder_2, tokenizer=None,
        tokenizer_2=base.tokenizer_2, unet=unet, scheduler=type(base.scheduler).from_config(base.scheduler.config),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    return silent(pipe, torch.float64)


def arguments(**more: Any) -> dict[str, Any]:
    common = dict(
        prompt=["a red cat on the grass", "a blue boat"], negative_prompt=["a car", "the sky"],
        generator=[torch.Generator().manual_seed(20 + i) for i in range(2)], num_inference_steps=STEPS,
        guidance_scale=6.0, output_type="latent",
    )  # fmt: skip
    return common | more


def test_the_layers_of_the_refiner(refiner) -> None:
    chosen = choose_layers([info for info, _ in find_blocks(refiner.unet)], SCFGConfig())
    assert [(info.name.partition(".attentions")[0], info.level) for info in chosen] == (
        [("down_blocks.2", 4)] * 2 + [("mid_block", 8)] * 2 + [("up_blocks.1", 4)] * 4
    )


def test_the_refiner_alone(refiner) -> None:
    picture = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    call = lambda: arguments(image=picture, strength=0.6)  # noqa: E731
    plain = refiner(**call()).images
    with otherwise_rounded(refiner):
        expected = replaced_run(refiner, call(), factors=REFINER_FACTORS).images
    handle = scfg_fast.enable(refiner)
    actual = refiner(**call()).images
    assert handle.stats.steps_applied == 3 and not handle.stats.steps_skipped
    scfg_fast.disable(refiner)
    assert relative(actual, expected) < TOLERANCE and relative(plain, expected) > 100 * TOLERANCE
    assert torch.equal(refiner(**call()).images, plain)


def test_base_and_refiner_share_a_run(base, refiner) -> None:
    """The base model makes the steps of the first half of the noise schedule, the refiner the rest from its latents."""

    def both(run_base, run_refiner) -> torch.Tensor:
        latents = run_base(arguments(denoising_end=HANDOVER)).images
        return run_refiner(arguments(image=latents, denoising_start=HANDOVER)).images

    call = lambda pipe: lambda kwargs: pipe(**kwargs)  # noqa: E731
    plain = both(call(base), call(refiner))
    with otherwise_rounded(base, refiner):
        expected = both(
            lambda kwargs: replaced_run(base, kwargs, factors=(4,)),
            lambda kwargs: replaced_run(refiner, kwargs, factors=REFINER_FACTORS),
        )
    handles = scfg_fast.enable(base), scfg_fast.enable(refiner)
    actual = both(call(base), call(refiner))
    assert [handle.stats.steps_applied for handle in handles] == [2, 4], "timesteps above 500, and the rest"
    for pipe in (base, refiner):
        scfg_fast.disable(pipe)
    assert relative(actual, expected) < TOLERANCE and relative(plain, expected) > 100 * TOLERANCE
    assert torch.equal(both(call(base), call(refiner)), plain)


@pytest.mark.parametrize("start, stop, steps", [(0.0, 0.5, (1, 2)), (0.5, 1.0, (1, 2))])
def test_start_and_stop_are_fractions_of_each_pipelines_own_steps(base, refiner, start, stop, steps) -> None:
    handles = [scfg_fast.enable(pipe, SCFGConfig(start=start, stop=stop)) for pipe in (base, refiner)]
    latents = base(**arguments(denoising_end=HANDOVER)).images
    refiner(**arguments(image=latents, denoising_start=HANDOVER))
    assert tuple(handle.stats.steps_applied for handle in handles) == steps
    for pipe in (base, refiner):
        scfg_fast.disable(pipe)
