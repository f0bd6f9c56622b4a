"""The two predictions of a step -> the guided one, with the rates that the configuration asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from ..capture.maps import StepMaps
from ..config import SCFGConfig
from ..guidance.mixing import Mixer
from ..regions import Regions
from .finder import RegionFinder, Segments, guide_by_pixel
from .plan import StepPlan, zero_step
from .rates import GivenRates
from .rewrite import rewritten


def mixer_of(config: SCFGConfig, given: bool = False) -> Mixer | None:
    """What mixes the predictions of a run, or None where the operators' own plain mixing is what is asked for.

    Args:
        config: the run's.
        given: whether rates are given that no operator knows.
    """
    if (config.combine, config.dose) == ("cfg", "as-published") and not given:
        return None
    return Mixer(
        config.combine, config.dose, config.adaptive_projected_guidance_momentum,
        config.adaptive_projected_guidance_rescale, config.eta,
    )  # fmt: skip


@dataclass(frozen=True)
class Combined:
    """What a step makes of its two predictions.

    Attributes:
        result: f, or the u' that stands in for u; twice, one after the other, where an operator made copies.
        rate: [B, 1, H, W], or None for 1 everywhere.
        moved: f - u where it was mixed here, or None.
        regions: of this step, or None.
    """

    result: torch.Tensor
    rate: torch.Tensor | None = None
    moved: torch.Tensor | None = None
    regions: Regions | None = None


class Combiner:
    """Combines the predictions of one run.

    Args:
        config: the run's.
        finder: of its regions.
        given: the user's rates, or None.
        samples: images of the call.
    """

    def __init__(self, config: SCFGConfig, finder: RegionFinder, given: GivenRates | None, samples: int) -> None:
        self._config = config
        self._finder = finder
        self._given = given
        self._samples = samples
        self._mixer = mixer_of(config, given is not None)

    def __call__(
        self,
        uncond: torch.Tensor,
        cond: torch.Tensor,
        maps: StepMaps | None,
        *,
        step: int,
        weight: float,
        scale: float,
        has_rates: bool,
        rewrite: str,
        copies: int,
    ) -> Combined:
        """Combine with rates or by a rule.

        Args:
            uncond, cond: [B, C, H, W].
            maps: of this step, or None for the regions before.
            step: its index.
            weight, scale: of the step, and the pipeline's own.
            has_rates: whether rates act in it.
            rewrite: "guided" for f, "unconditional" for u'.
            copies: of the result, where an operator makes it.
        """
        config, regions = self._config, None
        result: torch.Tensor | None = None
        rate: torch.Tensor | None = None
        moved: torch.Tensor | None = None
        if has_rates and config.rates == "pixels":
            result, rate = guide_by_pixel(config, uncond, cond, weight, rewrite, copies=copies)
        elif has_rates and config.rates == "regions":
            result, rate = self._finder.guide(maps, uncond, cond, weight, rewrite, copies=copies)
            token_index, foreground, _ = cast(Segments, self._finder.segments)
            regions = Regions(step, token_index, foreground, rate)
        if has_rates and self._given is not None:
            rate = self._given(step, regions, uncond, cond, weight)
        if self._mixer is not None:
            mixed = self._mixer(uncond, cond, weight, rate, self._samples)
            rate, moved = mixed.rate, mixed.moved
            if zero_step(config, step):
                moved = -uncond.to(moved.dtype)
            result = rewritten(uncond, cond, moved, None if rewrite == "guided" else scale)
            if regions is not None:
                regions = Regions(step, regions.token_index, regions.foreground, cast(torch.Tensor, rate))
        return Combined(cast(torch.Tensor, result), rate, moved, regions)


class Combination:
    """What a step's predictions are combined to, once they are: called as `rewrite` does, it keeps what was done.

    Attributes:
        done: rates, regions and what was mixed; empty before the call.
    """

    def __init__(self, combiner: Combiner, planned: StepPlan, maps: StepMaps | None) -> None:
        self.done = Combined(torch.empty(0))
        self._combiner, self._plan, self._maps = combiner, planned, maps

    def __call__(
        self, uncond: torch.Tensor, cond: torch.Tensor, weight: float, rewrite: str, copies: int
    ) -> torch.Tensor:
        """f, or the u' that stands in for u."""
        planned = self._plan
        self.done = self._combiner(
            uncond, cond, self._maps, step=planned.index, weight=weight, scale=planned.scale,
            has_rates=planned.reason is None, rewrite=rewrite, copies=copies,
        )  # fmt: skip
        return self.done.result
