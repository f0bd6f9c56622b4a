"""Maps of a step -> its regions -> the guided prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from scfg_kernels import guide, guide_pixels, segment_and_guide

from ..capture.layers import BlockInfo, grid_size
from ..capture.maps import BlockMaps, StepMaps, collect
from ..config import SCFGConfig
from ..guidance.mixing import Mixer
from ..regions import Regions
from .plan import StepPlan


def mixer_of(config: SCFGConfig) -> Mixer | None:
    """What mixes the predictions of a run, or None where the operators' own plain mixing is what is asked for."""
    if (config.combine, config.dose) == ("cfg", "as-published"):
        return None
    return Mixer(
        config.combine, config.dose, config.adaptive_projected_guidance_momentum,
        config.adaptive_projected_guidance_rescale, config.eta,
    )  # fmt: skip


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


class Combination:
    """How the two predictions of one evaluation are combined: with the rates of regions or pixels, by a rule, or both.

    Args:
        config: of the call.
        finder: of the regions.
        maps: of this step, or None where regions are kept.
        mixer: of the run, or None for u + w r (t - u).
        planned: of the step.
        samples: that the predictions belong to.
        rescale: phi of guidance_rescale, where the pipeline leaves that to the guided prediction (guiders).

    Attributes:
        rate: [B, 1, H, W] once called, or None without rates.
        moved: f - u once called, where it was mixed here, else None.
    """

    def __init__(
        self,
        config: SCFGConfig,
        finder: RegionFinder,
        maps: StepMaps | None,
        mixer: Mixer | None,
        planned: StepPlan,
        samples: int,
        rescale: float = 0.0,
    ) -> None:
        self.rate: torch.Tensor | None = None
        self.moved: torch.Tensor | None = None
        self._config, self._finder, self._maps, self._mixer = config, finder, maps, mixer
        self._plan, self._samples, self._rescale = planned, samples, rescale

    def __call__(
        self, uncond: torch.Tensor, cond: torch.Tensor, weight: float, rewrite: str = "guided", copies: int = 1
    ) -> torch.Tensor:
        """The guided prediction f or, with `rewrite="unconditional"`, the u' of which a pipeline of this scale makes f;
        see `scfg_kernels.guide`."""
        config, result = self._config, None
        if self._plan.reason is None and config.rates == "pixels":
            result, self.rate = guide_pixels(
                uncond, cond, weight, rate_min=cast(float, config.rate_min), rate_max=cast(float, config.rate_max),
                rewrite=rewrite, rescale=self._rescale, copies=copies, backend=config.backend,
            )  # fmt: skip
        elif self._plan.reason is None:
            result, self.rate = self._finder.guide(self._maps, uncond, cond, weight, rewrite, self._rescale, copies)
        if self._mixer is None:
            return cast(torch.Tensor, result)
        mixed = self._mixer(uncond, cond, weight, self.rate, self._samples)
        self.rate, self.moved = mixed.rate, mixed.moved
        if self._plan.zero:
            self.moved = -uncond.to(mixed.moved.dtype)
        return rewritten(uncond, cond, self.moved, None if rewrite == "guided" else weight)

    def regions(self) -> Regions | None:
        """The regions that the rates are of; None of pixels, without rates, or before a call."""
        if self.rate is None or self._finder.segments is None or self._plan.regions == "none":
            return None
        token_index, foreground, _ = self._finder.segments
        return Regions(self._plan.index, token_index, foreground, self.rate)


def rewritten(uncond: torch.Tensor, cond: torch.Tensor, moved: torch.Tensor, scale: float | None) -> torch.Tensor:
    """f = u + moved or, with the pipeline's scale s, the u' of which its own line makes f: u + (s d - moved) / (s - 1).

    That is u bit for bit where moved is s d.

    Args:
        uncond, cond: [B, C, H, W].
        moved: f - u, in the dtype of the arithmetic.
        scale: s, above 1, or None for f.
    """
    u = uncond.to(moved.dtype)
    if scale is not None:
        moved = (scale * (cond.to(moved.dtype) - u) - moved) / (scale - 1.0)
    return (u + moved).to(cond.dtype)


def guide_plainly(
    config: SCFGConfig, uncond: torch.Tensor, cond: torch.Tensor, weight: float, copies: int = 1
) -> torch.Tensor:
    """uncond + weight (cond - uncond), in fp32 and rounded once; the same operator, with one rate for all pixels."""
    result, _ = guide_pixels(uncond, cond, 1.0, rate_min=weight, rate_max=weight, copies=copies, backend=config.backend)
    return result
