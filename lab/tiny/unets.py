"""A real ``StableDiffusionPipeline`` that is small enough for tests: random weights, no file from anywhere else.

It has the shape of Stable Diffusion 1.x where semantic guidance looks at it: latent / 4 carries five pairs of self- and
cross-attention (two on the way down, three on the way up), latent / 8 one pair in the middle, and latent / 2 one more
that guidance must leave alone. The autoencoder halves three times: a picture has 8 * latent pixels a side.

Pipelines compute in fp64 unless another dtype is asked for: maps of random weights have near ties. In fp32 the order of
sums, which differs between processors, decides to which token such a cell falls.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

WORDS = """
    a an the of on in at with and left right above below next to red green blue yellow orange black white purple
    cat dog car tree house apple boat bird fish flower hat shirt boy girl sky sea grass table photo painting
""".split()
"""Words that are one token each; any other text falls back to single bytes."""

START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


@functools.cache
def _learn_merges() -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each of :data:`WORDS` is one symbol."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in WORDS]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spellings for pair in zip(symbols, symbols[1:], strict=False)):
        pair = pairs.most_common(1)[0][0]
        merges.append(pair)
        for symbols in spellings:
            for place in range(len(symbols) - 2, -1, -1):
                if tuple(symbols[place : place + 2]) == pair:
                    symbols[place : place + 2] = ["".join(pair)]
    return merges


def tiny_tokenizer(folder: str | Path, max_tokens: int = 77) -> CLIPTokenizer:
    """A ``CLIPTokenizer`` in which each of :data:`WORDS` is one token; its files are written to ``folder``."""
    merges = _learn_merges()
    alphabet = _byte_alphabet()
    symbols = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in merges), START, END]
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=max_tokens, pad_token=END
    )
    tokenizer.save_pretrained(out)
    return CLIPTokenizer.from_pretrained(str(out), local_files_only=True)


def sharpen(unet: UNet2DConditionModel, gain: float) -> UNet2DConditionModel:
    """Scale the query and key weights, and switch to evaluation mode."""
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, Attention):
                module.to_q.weight *= gain
                module.to_k.weight *= gain
    return unet.eval()


def tiny_unet(
    sample_size: int = 16,
    cross_attention_dim: int = 32,
    attention_gain: float = 2.5,
    in_channels: int = 4,
    uniform: bool = False,
) -> UNet2DConditionModel:
    """A UNet with attention at latent / 2 (1 pair), / 4 (5 pairs) and / 8 (1 pair), in evaluation mode.

    Args:
        sample_size: latent pixels a side.
        cross_attention_dim: width of the text embeddings.
        attention_gain: factor on the query and key weights. Fresh weights attend almost uniformly, which leaves every
            region to rounding; with the gain the maps have peaks, as those of a trained model do.
        in_channels: 4, or 9 for inpainting models, or 5 for depth models.
        uniform: Stable Diffusion's own list of blocks with one layer each, which control networks and adapters need:
            attention at the latent's own size too, and three pairs at latent / 4.
    """
    attention_down, attention_up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        sample_size=sample_size,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=(attention_down if uniform else "DownBlock2D", attention_down, attention_down, "DownBlock2D"),
        up_block_types=("UpBlock2D", attention_up, *(2 * [attention_up] if uniform else 2 * ["UpBlock2D"])),
        layers_per_block=1 if uniform else (1, 1, 2, 1),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=cross_attention_dim,
    )
    return sharpen(unet, attention_gain)


def tiny_vae(sample_size: int, channels: int = 4) -> AutoencoderKL:
    """An autoencoder that halves three times, for latents of `sample_size` pixels a side."""
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8 * sample_size,
    ).eval()


def tiny_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def silent(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    """The same pipeline without a progress bar, its models in `dtype`."""
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            torch.nn.Module.to(component, dtype)
            if isinstance(component, CLIPPreTrainedModel) and dtype == torch.float64:
                component.register_forward_pre_hook(_make_double)
                component.register_forward_hook(_make_single, always_call=True)
    return pipe


def _make_double(*_: object) -> None:
    """transformers 4 fills the mask of a text encoder in the default dtype with the least number of the model's."""
    torch.set_default_dtype(torch.float64)


def _make_single(*_: object) -> None:
    torch.set_default_dtype(torch.float32)


def _text_config(tokenizer: CLIPTokenizer, max_tokens: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_sd_pipeline(
    seed: int = 0,
    sample_size: int = 16,
    prediction_type: str = "epsilon",
    *,
    max_tokens: int = 77,
    attention_gain: float = 2.5,
    in_channels: int = 4,
    uniform: bool = False,
    dtype: torch.dtype = torch.float64,
) -> StableDiffusionPipeline:
    """Build the pipeline. The same arguments give the same weights, and the global random state is left as it was.

    Args:
        seed: of the random weights.
        sample_size: latent pixels a side of the default picture; the picture has 8 * sample_size pixels a side.
        prediction_type: of the ``DDIMScheduler``: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        max_tokens: length that prompts are padded and cut to.
        attention_gain, in_channels, uniform: see :func:`tiny_unet`.
        dtype: of the weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(folder, max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_config = _text_config(tokenizer, max_tokens)
        text_encoder = CLIPTextModel(text_config).eval()
        vae = tiny_vae(sample_size)
        unet = tiny_unet(sample_size, text_config.hidden_size, attention_gain, in_channels, uniform)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return silent(pipe, dtype)


def tiny_sdxl_unet(sample_size: int = 16, attention_gain: float = 2.5, in_channels: int = 4) -> UNet2DConditionModel:
    """A UNet of SDXL's shape: attention at latent / 2 and, two blocks deep, at latent / 4; none at latent / 8."""
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        sample_size=sample_size,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    return sharpen(unet, attention_gain)


def tiny_sdxl_pipeline(
    seed: int = 0,
    sample_size: int = 16,
    *,
    in_channels: int = 4,
    zero_negative: bool = True,
    dtype: torch.dtype = torch.float64,
) -> StableDiffusionXLPipeline:
    """An SDXL pipeline with two text encoders; the same arguments give the same weights.

    Args:
        seed: of the random weights.
        sample_size: latent pixels a side of the default picture.
        in_channels: of the UNet.
        zero_negative: whether no negative prompt means zeros, as in SDXL.
        dtype: of the weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _text_config(tokenizer, 77)
        pipe = StableDiffusionXLPipeline(
            text_encoder=CLIPTextModel(config).eval(),
            text_encoder_2=CLIPTextModelWithProjection(config).eval(),
            vae=tiny_vae(sample_size),
            unet=tiny_sdxl_unet(sample_size, in_channels=in_channels),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=tiny_scheduler(),
            force_zeros_for_empty_prompt=zero_negative,
            add_watermarker=False,
        )
    return silent(pipe, dtype)
