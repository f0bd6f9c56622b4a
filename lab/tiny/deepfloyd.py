"""Real DeepFloyd IF pipelines that are small enough for tests: random weights, no file from anywhere else.

They have IF's blocks where semantic guidance looks at them: attention over text and picture jointly (added keys and
values), three channels of noise and three of variance. Stage I attends at picture / 2, / 4 (five layers: two on the way
down, three on the way up) and / 8 (four: one on the way down, one in the middle, two on the way up); stage II, which
starts from a larger picture, at picture / 8 alone (four). There is no text encoder: calls take embeddings.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from lab.tiny.unets import silent

TEXT_WIDTH = 24
"""Channels of the text embeddings that a call takes."""

STAGE_ONE = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
STAGE_TWO = ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline")


def tiny_if_unet(
    sample_size: int = 32, *, attention_gain: float = 3.0, stage: int = 1, only_cross_attention: bool = False
) -> UNet2DConditionModel:
    """A UNet of IF's shape in evaluation mode.

    Args:
        sample_size: pixels a side.
        attention_gain: factor on the query and key weights, so that the maps have peaks.
        stage: 1, or 2 for a super-resolution model: six channels in, and the noise level of the small picture.
        only_cross_attention: layers attend to the text alone, but for the one in the middle.
    """
    upscaling: dict[str, Any] = dict(class_embed_type="timestep", mid_block_scale_factor=1.414) if stage == 2 else {}
    plain, attending = (1, 3) if stage == 1 else (3, 1)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=3 * stage,
        out_channels=6,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=(*plain * ("ResnetDownsampleBlock2D",), *attending * ("SimpleCrossAttnDownBlock2D",)),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*attending * ("SimpleCrossAttnUpBlock2D",), *plain * ("ResnetUpsampleBlock2D",)),
        layers_per_block=(1, 1, 2, 1),
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        only_cross_attention=only_cross_attention,
        mid_block_only_cross_attention=False,
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        **upscaling,
    )
    with torch.no_grad():
        unet.conv_out.weight[3:] *= 0.1  # schedulers expect the variance within -1 and 1, and take its exponential
        for module in unet.modules():
            if isinstance(module, Attention):
                for projection in (module.to_q, module.to_k, module.add_k_proj):
                    if projection is not None:
                        projection.weight *= attention_gain
    return unet.eval()


def tiny_if_scheduler() -> DDPMScheduler:
    """The noise schedule of DeepFloyd IF: cosine, dynamic thresholding, a learned variance."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.0,
        variance_type="learned_range",
    )


def tiny_if_pipeline(
    name: str = "IFPipeline",
    seed: int = 3,
    sample_size: int | None = None,
    *,
    attention_gain: float = 3.0,
    only_cross_attention: bool = False,
    dtype: torch.dtype = torch.float64,
) -> DiffusionPipeline:
    """Build one of the six pipelines. The same arguments give the same weights; the global random state is left alone.

    Args:
        name: of the pipeline class.
        seed: of the random weights.
        sample_size: pixels a side; 32 for stage I and 48 for stage II unless given.
        attention_gain, only_cross_attention: see :func:`tiny_if_unet`.
        dtype: of the weights.
    """
    stage = 2 if name in STAGE_TWO else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = tiny_if_unet(
            sample_size or 16 + 16 * stage,
            attention_gain=attention_gain,
            stage=stage,
            only_cross_attention=only_cross_attention,
        )
    noising = {"image_noising_scheduler": tiny_if_scheduler()} if stage == 2 else {}
    pipe = getattr(diffusers, name)(
        tokenizer=None,
        text_encoder=None,
        unet=unet,
        scheduler=tiny_if_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **noising,
    )
    return silent(pipe, dtype)


def if_arguments(
    name: str,
    indices: range | list[int] = range(3),
    *,
    tokens: int = 21,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> dict[str, Any]:
    """Arguments of a call of the default size for some of three samples: embeddings [B, tokens, TEXT_WIDTH], pictures.

    Args:
        name: of the pipeline class.
        indices: which samples.
        tokens: of the text.
        seed: of everything random.
        dtype: of the embeddings and pictures; their numbers are those of fp32.
        overrides: further arguments, or others.
    """
    rows = list(indices)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 3, tokens, TEXT_WIDTH, generator=generator).to(dtype)
    side = 48 if name in STAGE_TWO else 32
    picture = (2.0 * torch.rand(3, 3, side, side, generator=generator)[rows] - 1.0).to(dtype)
    hole = torch.zeros(1, 1, side, side, dtype=dtype)
    hole[:, :, side // 5 : 3 * side // 4, side // 4 : 7 * side // 8] = 1.0
    arguments: dict[str, Any] = dict(
        prompt_embeds=states[0, rows],
        negative_prompt_embeds=states[1, rows],
        generator=[torch.Generator().manual_seed(20 + row) for row in rows],
        num_inference_steps=4,
        guidance_scale=4.0 if name in STAGE_TWO else 7.0,
        output_type="pt",
    )
    if name == "IFSuperResolutionPipeline":
        arguments["image"] = picture[..., ::2, ::2]
    elif name in STAGE_TWO:
        arguments |= dict(image=picture[..., ::2, ::2], original_image=picture, strength=0.9)
    elif name != "IFPipeline":
        arguments |= dict(image=picture, strength=0.9)
    if "Inpainting" in name:
        arguments["mask_image"] = hole
    return arguments | overrides
