"""What one denoising step captures: which layers, at which size, and the completed maps they leave behind.

Knows names, sizes and tensors; how a layer computes attention is in `processors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .config import SCFGConfig


class CompletedMaps(Protocol):
    """What a captured block leaves behind for the step: see `processors.CrossAttentionCapture`."""

    tokens: torch.Tensor | None  # [B, T, N] completed maps of the conditional samples
    start: torch.Tensor | None  # [B, N] completed start-token map of the unconditional samples; or [B, 2, N], with the
    # sum of the other tokens' where rows do not sum to 1


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


FUSED_MAP_TOKENS = 1024
"""Image tokens up to which a layer holds its self-attention map whatever it takes: up to here one kernel makes the map
beside the layer's output."""
QUERY_KEY_WORTH = 2
"""How many bytes of queries and keys may be held to save one of a larger map. At the layer's peak, in self-attention,
they are there anyway."""


def holds_map(tokens: int, heads: int, head_dim: int, itemsize: int) -> bool:
    """Whether a layer of a UNet holds its self-attention map until its cross-attention, or its queries and keys.

    Per sample, the map takes 4 N^2 bytes (8 in fp64), queries and keys 2 e N H d: the same at N = e H d / 2. Held are
    queries and keys above `FUSED_MAP_TOKENS`, where they take at most `QUERY_KEY_WORTH` times the map. So up to 1024
    tokens it is the map, because completion without it forms the scores again; in half precision above it never is in
    Stable Diffusion 1.5, 2.x and XL, whose H d is at most 1280.

    Args:
        tokens: N, image tokens.
        heads, head_dim: H and d.
        itemsize: e, bytes of an element of the layer's activations.
    """
    map_bytes = max(4, itemsize) * tokens * tokens
    return tokens <= FUSED_MAP_TOKENS or 2 * itemsize * tokens * heads * head_dim > QUERY_KEY_WORTH * map_bytes


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


@dataclass(frozen=True)
class StepMaps:
    """The maps of one step, ready for `scfg_kernels.segment`.

    Attributes:
        tokens: per layer [B, T, N_l].
        start: per layer [B, N_l] or [B, 2, N_l].
        sizes: per layer (h_l, w_l).
        size: (h, w) of the grid of cells.
        missing: names of chosen layers that left nothing usable in this step.
    """

    tokens: list[torch.Tensor]
    start: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    size: tuple[int, int]
    missing: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes that stay allocated from the layers to the end of the step."""
        return sum(t.numel() * t.element_size() for t in (*self.tokens, *self.start))


def collect(layers: Sequence[tuple[BlockInfo, CompletedMaps]], height: int, width: int, cell: int) -> StepMaps:
    """Take the completed maps out of the layers (they are forgotten there) and pair them with their sizes.

    Args:
        layers: the captured blocks and their maps.
        height, width: of the latent, in latent pixels.
        cell: latent pixels per side of a cell.
    """
    tokens, start, sizes, missing = [], [], [], []
    for block, maps in layers:
        size = grid_size(height, width, block.level)
        found, maps.tokens = maps.tokens, None
        found_start, maps.start = maps.start, None
        if found is None or found_start is None or found.shape[-1] != size[0] * size[1]:
            missing.append(block.name)
            continue
        tokens.append(found)
        start.append(found_start)
        sizes.append(size)
    return StepMaps(tokens, start, sizes, grid_size(height, width, cell), missing)
