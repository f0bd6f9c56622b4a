"""Diffusion transformers: one size of layers, that of their patches; called with images, packed patches or videos.

Each class of transformers has an entry in `TRANSFORMERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.alongside import wrap_layers
from ..capture.compared import Reader
from ..capture.layers import BlockInfo
from ..config import SCFGConfig
from ..layouts import Geometry, Images, Lists, Packed, Videos, View
from .readers import (
    read_cogview4,
    read_cross,
    read_flux,
    read_hunyuan,
    read_ltx,
    read_lumina2,
    read_qwen,
    read_sana,
    read_sd3,
    read_self,
    read_wan,
    read_z_image,
)


def _patch_size(model: Any) -> int:
    return model.config.patch_size


def _of_images(model: Any, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None) -> Geometry:
    return Geometry(1, sample.shape[-2], sample.shape[-1])


def _of_lists(model: Any, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None) -> Geometry:
    return Geometry(1, sample[0].shape[-2], sample[0].shape[-1])


def _of_videos(model: Any, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None) -> Geometry:
    return Geometry(*sample.shape[-3:])


def _of_pipeline(model: Any, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None) -> Geometry:
    """The pipeline's, or from the positions (picture, row, column, ...) of the tokens, which are read back from the
    device. The first picture is the one that is drawn."""
    if size is None:
        positions = arguments["img_ids"].flatten(0, -2)
        drawn = torch.where(positions[:, :1] == positions[0, 0], positions, 0)
        rows, columns = drawn[:, 1:3].amax(0).tolist()
        size = 2 * (int(rows) + 1), 2 * (int(columns) + 1)
    return Geometry(1, *size)


def _of_shapes(model: Any, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None) -> Geometry:
    """Qwen-Image says (frames, h, w) of every picture in patches of 2 x 2; the first is the one that is drawn."""
    shape = arguments["img_shapes"][0]
    frames, height, width = shape if isinstance(shape[0], int) else shape[0]
    return Geometry(frames, 2 * height, 2 * width)


def _of_arguments(model: Any, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None) -> Geometry:
    return Geometry(arguments["num_frames"], arguments["height"], arguments["width"])


def _images(model: Any) -> View:
    """Twice the channels of the input: a prediction and its variance."""
    learned = model.config.out_channels == 2 * model.config.in_channels
    return Images(model.config.in_channels if learned else 0)


def _hunyuan_images(model: Any) -> View:
    return Images(model.config.in_channels if model.config.learn_sigma else 0)


@dataclass(frozen=True)
class Transformer:
    """A class of diffusion transformers.

    Attributes:
        readers: attention module of a block -> its reader, in the order in which they run.
        stack: name of the list of blocks.
        patch: latent pixels per side of a token.
        size: geometry of a call.
        opened: view of its predictions.
        start_token: which attended text token stands for the start token; see `readers.start_column`.
        foreground: half of the batch whose start token decides the foreground.
        sample: name of the first argument.
        conditional_first: whether the conditional samples of a batch come first.
    """

    readers: dict[str, Reader]
    stack: str = "transformer_blocks"
    patch: Callable[[Any], int] = _patch_size
    size: Callable[..., Geometry] = _of_images
    opened: Callable[[Any], View] = field(default=lambda model: Images())
    start_token: str = "first"
    foreground: str | None = "unconditional"
    sample: str = "hidden_states"
    conditional_first: bool = False

    def blocks(self, model: torch.nn.Module) -> Iterator[tuple[BlockInfo, torch.nn.Module]]:
        stack = getattr(model, self.stack)
        level = self.patch(model)
        for index, block in enumerate(stack):
            yield BlockInfo(f"{self.stack}.{index}", level, index / max(1, len(stack) - 1)), block

    def layers(self) -> tuple[str, ...]:
        return tuple(self.readers)

    def wrap(self, info: BlockInfo, block: torch.nn.Module, config: SCFGConfig) -> tuple[BlockInfo, tuple[Any, ...]]:
        layers = [(getattr(block, name), reader) for name, reader in self.readers.items()]
        mapped = BlockInfo(info.name, max(config.cell, info.level), info.depth)
        return mapped, wrap_layers(layers, config, info.level, self.start_token)

    def geometry(
        self, model: torch.nn.Module, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None
    ) -> Geometry:
        return self.size(model, sample, arguments, size)

    def view(self, model: torch.nn.Module) -> View:
        return self.opened(model)


TRANSFORMERS: dict[str, Transformer] = {
    # T5 has no start token, and its padding is masked: an empty prompt is one token, and its half knows no regions.
    "PixArtTransformer2DModel": Transformer(
        dict(attn1=read_self, attn2=read_cross), opened=_images, start_token="last", foreground="conditional"
    ),
    # BERT's [CLS] comes first; padding is embedded, not masked.
    "HunyuanDiT2DModel": Transformer(
        dict(attn1=read_hunyuan, attn2=read_hunyuan), stack="blocks", opened=_hunyuan_images
    ),
    # CLIP's start token comes first; nothing is masked.
    "SD3Transformer2DModel": Transformer(dict(attn=read_sd3)),
    # T5, its padding zeroed and not masked, after eight learned tokens: the last column is padding, or the end token.
    "AuraFlowTransformer2DModel": Transformer(
        dict(attn=read_qwen), stack="joint_transformer_blocks", start_token="last", foreground="conditional"
    ),
    # T5, nothing masked: the last column is padding, or the end token of a long prompt.
    "FluxTransformer2DModel": Transformer(
        dict(attn=read_flux), patch=lambda model: 2, size=_of_pipeline, opened=lambda model: Packed(2),
        start_token="last", foreground="conditional",
    ),
    "ChromaTransformer2DModel": Transformer(
        dict(attn=read_flux), patch=lambda model: 2, size=_of_pipeline, opened=lambda model: Packed(2),
        start_token="last", foreground="conditional",
    ),
    # A chat template around the words, then padding, nothing masked: the template's start comes first.
    "Flux2Transformer2DModel": Transformer(
        dict(attn=read_flux), patch=lambda model: 2, size=_of_pipeline, opened=lambda model: Packed(2)
    ),
    # The words come first, the end of the chat template last.
    "QwenImageTransformer2DModel": Transformer(
        dict(attn=read_qwen), patch=lambda model: 2, size=_of_shapes, opened=lambda model: Packed(2),
        start_token="last", foreground="conditional",
    ),
    # Padded on the left: the first column is padding, or the start token of a prompt that fills a multiple of 16.
    "CogView4Transformer2DModel": Transformer(dict(attn1=read_cogview4)),
    # Linear self-attention has no map; Gemma's start token comes first, padding is masked.
    "SanaTransformer2DModel": Transformer(dict(attn2=read_sana), opened=_images, foreground="conditional"),
    "LTXVideoTransformer3DModel": Transformer(
        dict(attn1=read_ltx, attn2=read_ltx), size=_of_arguments, opened=lambda model: Packed(1),
        start_token="last", foreground="conditional",
    ),
    "WanTransformer3DModel": Transformer(
        dict(attn1=read_wan, attn2=read_wan), stack="blocks", patch=lambda model: model.config.patch_size[1],
        size=_of_videos, opened=lambda model: Videos(), start_token="last", foreground="conditional",
    ),
    # Gemma's start token comes first; an empty prompt is little more.
    "Lumina2Transformer2DModel": Transformer(dict(attn=read_lumina2), stack="layers", foreground="conditional"),
    # The chat template's first token comes first, in both halves.
    "ZImageTransformer2DModel": Transformer(
        dict(attention=read_z_image), stack="layers", patch=lambda model: 2, size=_of_lists,
        opened=lambda model: Lists(), sample="x", conditional_first=True,
    ),
}  # fmt: skip
"""Class name in diffusers -> how it is read. Names, because importing ten models to ask about one takes seconds."""
