"""Maps of a step -> its regions -> the guided prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from scfg_kernels import guide, guide_pixels, segment, segment_and_guide

from ..capture.layers import BlockInfo, grid_size
from ..capture.maps import BlockMaps, StepMaps, collect
from ..config import SCFGConfig

Segments = tuple[torch.Tensor, torch.Tensor, int]


class RegionFinder:
    """Regions of one run: found from the maps of a step, kept while layers are skipped.

    Attributes:
        segments: token_index [B, h, w], foreground [B, h, w] and the number of tokens, or None before the first.
        nbytes: bytes of the maps of the largest step.
    """

    def __init__(self, config: SCFGConfig, token_mask: torch.Tensor | None = None) -> None:
        self.segments: Segments | None = None
        self.nbytes = 0
        self._config = config
        self._token_mask = token_mask
        self._never_there: set[str] = set()  # chosen layers that had no usable map when regions were last found

    def begin(self, latent_size: tuple[int, int]) -> bool:
        """For a step on latents of this (H, W): whether there are regions of an earlier one; forgets those of another
        size."""
        if self.segments is not None and self.segments[0].shape[1:] != grid_size(*latent_size, self._config.cell):
            self.segments = None
        return self.segments is not None

    def take(
        self, layers: Sequence[tuple[BlockInfo, BlockMaps]], latent_size: tuple[int, int]
    ) -> tuple[StepMaps | None, list[str]]:
        """The maps of a step, and the names of layers that were left out for want of one.

        No maps if none are there, or if layers are missing that were there before (block caching): the regions before
        are then kept.

        Args:
            layers: the captured blocks and what they left; taken out of them.
            latent_size: (H, W).
        """
        maps = collect(layers, *latent_size, self._config.cell)
        if not maps.tokens or (self.segments is not None and set(maps.missing) - self._never_there):
            return None, []
        self._never_there = set(maps.missing)
        self.nbytes = max(self.nbytes, maps.nbytes)
        return maps, maps.missing

    def find(self, maps: StepMaps) -> tuple[torch.Tensor, torch.Tensor]:
        """The regions of these maps, without guidance: token_index and foreground, [B, h, w] each."""
        token_index, foreground = segment(
            maps.tokens, maps.start, maps.sizes, maps.size, blur_sigma=self._config.blur_sigma,
            token_mask=self._token_mask, backend=self._config.backend,
        )  # fmt: skip
        self.segments = (token_index, foreground, maps.tokens[0].shape[-2])
        return token_index, foreground

    def guide(
        self,
        maps: StepMaps | None,
        uncond: torch.Tensor,
        cond: torch.Tensor,
        weight: float,
        rewrite: str,
        rescale: float = 0.0,
        copies: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(result, rate) of `scfg_kernels.guide`, with regions from these maps or, without any, the regions before."""
        config = self._config
        options: dict[str, Any] = dict(
            cell=config.cell, rate_min=config.rate_min, rate_max=config.rate_max, max_scale=config.max_scale,
            blur_sigma=config.blur_sigma, fidelity=config.fidelity, rewrite=rewrite, rescale=rescale,
            benchmark="foreground" if config.reference == "auto" else config.reference, copies=copies,
            backend=config.backend,
        )  # fmt: skip
        if maps is not None:
            result, rate, token_index, foreground = segment_and_guide(
                maps.tokens, maps.start, maps.sizes, maps.size, uncond, cond, weight, token_mask=self._token_mask,
                **options,
            )  # fmt: skip
            self.segments = (token_index, foreground, maps.tokens[0].shape[1])
            return result, rate
        token_index, foreground, num_tokens = cast(Segments, self.segments)
        return guide(uncond, cond, token_index, foreground, weight, num_tokens=num_tokens, **options)


def guide_by_pixel(
    config: SCFGConfig,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weight: float,
    rewrite: str = "guided",
    rescale: float = 0.0,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, rate) of `scfg_kernels.guide_pixels` for `rates="pixels"`."""
    return guide_pixels(
        uncond, cond, weight, rate_min=cast(float, config.rate_min), rate_max=cast(float, config.rate_max),
        rewrite=rewrite, rescale=rescale, copies=copies, backend=config.backend,
    )  # fmt: skip


def guide_plainly(
    config: SCFGConfig, uncond: torch.Tensor, cond: torch.Tensor, weight: float, copies: int = 1
) -> torch.Tensor:
    """uncond + weight (cond - uncond), in fp32 and rounded once; the same operator, with one rate for all pixels."""
    result, _ = guide_pixels(uncond, cond, 1.0, rate_min=weight, rate_max=weight, copies=copies, backend=config.backend)
    return result
