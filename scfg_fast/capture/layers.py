"""Which attention layers a step captures: their names and sizes, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import SCFGConfig


@dataclass(frozen=True)
class BlockInfo:
    """A transformer block with a self- and a cross-attention layer.

    Attributes:
        name: its name in `named_modules()`, for example `mid_block.attentions.0.transformer_blocks.0`.
        level: downsampling factor of its token grid against the latent: 1, 2, 4, 8, ...
        depth: in a transformer, whose blocks are all of one level: where it lies, 0 to 1. None in a UNet.
        joint: a single layer that attends to text and picture in one softmax (DeepFloyd IF).
    """

    name: str
    level: int
    depth: float | None = None
    joint: bool = False


JOINT_LAYERS = 3
"""How many joint layers of a level are captured by default: the last ones, as in the published code."""


def grid_size(height: int, width: int, level: int) -> tuple[int, int]:
    """Token grid of a latent of height x width at downsampling factor `level`, a power of two.

    A stride-2 convolution with padding 1 halves upwards, so every halving is ceil(n / 2): 65 x 97 -> 33 x 49 -> 17 x 25
    -> 9 x 13.
    """
    while level > 1:
        height, width, level = -(-height // 2), -(-width // 2), level // 2
    return height, width


def choose_layers(blocks: Sequence[BlockInfo], config: SCFGConfig) -> list[BlockInfo]:
    """The blocks that `config` asks to capture, in the order of the model.

    Raises:
        ValueError: a named layer or level does not exist, or nothing is left; says what the model has.
    """
    have = sorted({block.level for block in blocks})
    if isinstance(config.layers, tuple):
        names = {block.name for block in blocks}
        missing = sorted(set(config.layers) - names)
        if missing:
            raise ValueError(f"layers: {missing} are not transformer blocks of this model; it has {sorted(names)}")
        blocks = [block for block in blocks if block.name in config.layers]
    if isinstance(config.levels, tuple):
        missing_levels = sorted(set(config.levels) - set(have))
        if missing_levels:
            raise ValueError(f"levels: this model has no attention at {missing_levels}; it has {have}")
        levels = set(config.levels)
    elif isinstance(config.layers, tuple):
        levels = set(have)
    elif any(block.depth is not None for block in blocks):
        if config.layers == "auto":
            return central(blocks)
        levels = set(have)
    else:
        levels = {config.cell, 2 * config.cell}
    chosen = [block for block in blocks if block.level in levels]
    if not chosen:
        raise ValueError(
            f"no attention layer at the downsampling factors {sorted(levels)} that cell={config.cell} needs; this "
            f"model has attention at {have}. Pass SCFGConfig(levels=[...]) to choose among them."
        )
    if config.layers == "one-per-transformer":
        return middles(chosen)
    if config.layers == "auto" and any(block.joint for block in chosen):
        return [block for block in chosen if block in last_of_level(chosen, block.level)]
    return chosen


def middles(blocks: Sequence[BlockInfo]) -> list[BlockInfo]:
    """The middle block of every transformer (`attentions.0` and so on), the later one of two middles, in order."""
    transformers: dict[str, list[BlockInfo]] = {}
    for block in blocks:
        transformers.setdefault(block.name.rpartition(".transformer_blocks.")[0], []).append(block)
    return [members[len(members) // 2] for members in transformers.values()]


def last_of_level(blocks: Sequence[BlockInfo], level: int) -> list[BlockInfo]:
    """The last `JOINT_LAYERS` of one level."""
    return [block for block in blocks if block.level == level][-JOINT_LAYERS:]


CENTRAL_BLOCKS = 4
"""How many blocks of a transformer are captured by default."""


def central(blocks: Sequence[BlockInfo]) -> list[BlockInfo]:
    """`CENTRAL_BLOCKS` blocks, evenly spaced over the middle half of a transformer's stack, or all of a short one.

    The first blocks have not yet related text and image, the last ones prepare the output. A choice, not a measurement:
    nothing is published for S-CFG in transformers.
    """
    if len(blocks) <= CENTRAL_BLOCKS:
        return list(blocks)
    wanted = [0.25 + 0.5 * place / (CENTRAL_BLOCKS - 1) for place in range(CENTRAL_BLOCKS)]
    nearest = {min(blocks, key=lambda block: abs((block.depth or 0.0) - depth)).name for depth in wanted}
    return [block for block in blocks if block.name in nearest]
