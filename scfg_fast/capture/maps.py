"""What a captured block leaves behind, for which samples, and the maps of a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from .layers import BlockInfo, grid_size


@dataclass
class BlockMaps:
    """What a captured block left behind, taken out of it.

    Attributes:
        tokens: [B, T, N], completed maps of the conditional samples; None if the block made none.
        start: [B, N], completed start-token map of the samples that decide the foreground; or [B, 2, N], with the sum
            of the other tokens' maps, where rows do not sum to 1; None if the block made none.
    """

    tokens: torch.Tensor | None
    start: torch.Tensor | None


MAP_TOKENS = 1024
"""Image tokens up to which a layer of a UNet has its self-attention map made: 4 MiB a sample. Above, completion is
attention with the cross-attention map in the place of the values, and the map is never made."""


@dataclass(frozen=True)
class BatchLayout:
    """What the samples of a denoiser batch are.

    Attributes:
        groups: how many groups of B samples: unconditional, conditional, and what else the pipeline adds; or 1 if the
            two are separate passes.
        foreground: "unconditional" or "conditional", whose start token is wanted.
        branch: "both", or which of the two this pass is.
        conditional_first: whether the conditional group comes first.
    """

    groups: int = 2
    foreground: str = "unconditional"
    branch: str = "both"
    conditional_first: bool = False

    def rows(self, batch: int) -> tuple[slice, int]:
        """The samples whose maps are needed, and how many of them, at the front, are unconditional."""
        if self.branch != "both":
            return slice(0, batch), batch if self.branch == "unconditional" else 0
        samples = batch // self.groups
        unconditional = samples if self.foreground == "unconditional" else 0
        return slice(samples - unconditional, 2 * samples), unconditional


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


def shares_of(maps: StepMaps, words: torch.Tensor) -> torch.Tensor:
    """The share of each cell's attention that the tokens of each word get, mean over layers: [B, W, h, w], float32 or
    float64.

    Args:
        maps: of a step.
        words: [B, W, T] bool, the tokens of each word.
    """
    total: torch.Tensor | float = 0.0
    for tokens, size in zip(maps.tokens, maps.sizes, strict=True):
        share = words.to(tokens.device, tokens.dtype) @ tokens  # [B, W, N]
        total = total + F.interpolate(share.unflatten(-1, size), size=maps.size, mode="bilinear")
    return cast(torch.Tensor, total) / len(maps.tokens)


def collect(layers: Sequence[tuple[BlockInfo, BlockMaps]], height: int, width: int, cell: int) -> StepMaps:
    """Take the completed maps out of the blocks' (they are dropped there) and pair them with their sizes.

    Args:
        layers: the captured blocks and what they left.
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
