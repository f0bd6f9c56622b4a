"""UNets: layers at several sizes, and samples that are images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention

from ..capture.alongside import wrap_joint
from ..capture.layers import BlockInfo
from ..capture.processors import wrap_block
from ..config import SCFGConfig
from ..layouts import Geometry, Images, View
from .readers import read_added_kv


@dataclass(frozen=True)
class UNet:
    """`UNet2DConditionModel`."""

    sample: str = "sample"
    foreground: str | None = None
    conditional_first: bool = False

    def blocks(self, model: torch.nn.Module) -> Iterator[tuple[BlockInfo, torch.nn.Module]]:
        return find_blocks(model)

    def layers(self) -> tuple[str, ...]:
        return "attn1", "attn2"

    def wrap(self, info: BlockInfo, block: torch.nn.Module, config: SCFGConfig) -> tuple[BlockInfo, tuple[Any, ...]]:
        return info, wrap_block(cast(Any, block), config)

    def geometry(
        self, model: torch.nn.Module, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None
    ) -> Geometry:
        return Geometry(1, sample.shape[-2], sample.shape[-1])

    def view(self, model: torch.nn.Module) -> View:
        return Images()


@dataclass(frozen=True)
class JointUNet(UNet):
    """`UNet2DConditionModel` with the blocks of DeepFloyd IF: joint attention, and a learned variance."""

    def blocks(self, model: torch.nn.Module) -> Iterator[tuple[BlockInfo, torch.nn.Module]]:
        return find_joint_layers(model)

    def layers(self) -> tuple[str, ...]:
        return ("",)

    def wrap(self, info: BlockInfo, block: torch.nn.Module, config: SCFGConfig) -> tuple[BlockInfo, tuple[Any, ...]]:
        return info, (wrap_joint(cast(Any, block), read_added_kv, config),)

    def view(self, model: Any) -> View:
        """IF's pipelines take the second half of the channels for the variance, always."""
        return Images(model.config.out_channels // 2)


def find_blocks(unet: torch.nn.Module) -> Iterator[tuple[BlockInfo, BasicTransformerBlock]]:
    """Every transformer block of a UNet with a self- and a cross-attention layer over image tokens, in the order of the
    model."""
    for name, module, level in _modules_with_level(unet):
        if not isinstance(module, BasicTransformerBlock) or module.attn2 is None:
            continue
        if not module.attn1.is_cross_attention and module.attn2.is_cross_attention:
            yield BlockInfo(name, level), module


def find_joint_layers(unet: torch.nn.Module) -> Iterator[tuple[BlockInfo, Attention]]:
    """Every attention layer of a UNet over text and picture jointly, in the order of the model."""
    for name, module, level in _modules_with_level(unet):
        if not isinstance(module, Attention) or module.added_kv_proj_dim is None:
            continue
        if not module.only_cross_attention:
            yield BlockInfo(name, level, joint=True), module


def _modules_with_level(unet: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """Name, module and level of everything between the first and the last convolution, in the order of the model.

    The level comes from the structure: the downsamplers before a stage minus the upsamplers before it.
    """
    level = 1
    stages = [(f"down_blocks.{i}", stage) for i, stage in enumerate(getattr(unet, "down_blocks", []))]
    if getattr(unet, "mid_block", None) is not None:
        stages.append(("mid_block", unet.mid_block))
    stages += [(f"up_blocks.{i}", stage) for i, stage in enumerate(getattr(unet, "up_blocks", []))]
    for stage_name, stage in stages:
        for name, module in stage.named_modules():
            yield f"{stage_name}.{name}", module, level
        if getattr(stage, "downsamplers", None):
            level *= 2
        if getattr(stage, "upsamplers", None):
            level //= 2
