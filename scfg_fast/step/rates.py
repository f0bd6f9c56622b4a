"""Rates that the user gives in the place of S-CFG's, or on top of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..regions import Regions

RateFunction = Callable[[int, Regions | None, torch.Tensor], torch.Tensor]
"""(step, regions, energy [B, 1, H, W]) -> rates [B or 1, 1, H, W].

`regions` are S-CFG's with their rates, or None with `SCFGConfig(rates="none")` or `"pixels"`; energy is the mean over
channels of (cond - uncond)^2, in float32 or float64."""

Given = torch.Tensor | RateFunction | Mapping[str, float]


def checked_rates(given: Any) -> Given | None:
    """The rates of `enable`, checked as far as they can be without a call.

    Raises:
        TypeError: neither a tensor, a function nor a dictionary of words.
        ValueError: a tensor of the wrong shape or dtype, or a multiplier that is no number of at least 0.
    """
    if given is None or (callable(given) and not isinstance(given, (torch.Tensor, type))):
        return given
    if isinstance(given, torch.Tensor):
        if given.dim() != 4 or given.shape[1] != 1 or not given.is_floating_point():
            raise ValueError(
                f"scfg_fast: rates must be floating-point [B or 1, 1, H, W] over the latents, got {given.dtype} of "
                f"shape {list(given.shape)}"
            )
        return given
    if isinstance(given, Mapping):
        wrong = {
            word: factor
            for word, factor in given.items()
            if not isinstance(word, str)
            or isinstance(factor, bool)
            or not isinstance(factor, (int, float))
            or not 0.0 <= factor < float("inf")
        }
        if wrong or not given:
            raise ValueError(
                f"scfg_fast: rates as a dictionary have words and finite factors of at least 0, such as "
                f"{{'boy': 1.2}}, got {wrong or given}"
            )
        return dict(given)
    raise TypeError(
        f"scfg_fast: rates must be a tensor [B or 1, 1, H, W], a function (step, regions, energy) or a dictionary of "
        f"words, got {given!r}; the names of SCFGConfig.rates belong in the configuration"
    )


@dataclass(frozen=True)
class GivenRates:
    """The user's rates, for the steps of one call.

    Attributes:
        given: a tensor or a function, or None for multipliers.
        multipliers: [B, T], factor on the rate of each token's region, or None.
        max_scale: bound on rate times weight, or None.
    """

    given: torch.Tensor | RateFunction | None
    multipliers: torch.Tensor | None
    max_scale: float | None

    def __call__(
        self, step: int, regions: Regions | None, uncond: torch.Tensor, cond: torch.Tensor, weight: float
    ) -> torch.Tensor:
        """The rates of a step, [G, 1, H, W], for predictions [G, C, H, W].

        Raises:
            ValueError: the rates do not fit the latents.
        """
        dtype = torch.promote_types(cond.dtype, torch.float32)
        count, _, height, width = cond.shape
        if self.multipliers is not None and regions is not None:
            factors = self.multipliers.to(dtype).repeat_interleave(count // len(self.multipliers), 0)  # [G, T]
            cells = factors.gather(1, regions.token_index.flatten(1)).view_as(regions.token_index)
            cell = regions.cell
            pixels = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None, :height, :width]
            rate = regions.rate * pixels
        elif isinstance(self.given, torch.Tensor):
            rate = self.given
        else:
            energy = (cond.to(dtype) - uncond.to(dtype)).square().mean(1, keepdim=True)
            rate = self.given(step, regions, energy)  # type: ignore[misc]
        fits = isinstance(rate, torch.Tensor) and rate.dim() == 4 and tuple(rate.shape[1:]) == (1, height, width)
        if not fits or count % max(1, len(rate)):
            got = list(rate.shape) if isinstance(rate, torch.Tensor) else f"a {type(rate).__name__}"
            raise ValueError(
                f"scfg_fast: step {step}: rates must be [{count} or 1, 1, {height}, {width}], one per latent pixel, "
                f"got {got}; resize a mask with torch.nn.functional.interpolate"
            )
        rate = rate.to(cond.device, dtype).repeat_interleave(count // len(rate), 0)
        if self.max_scale is not None and weight > 0.0:
            rate = rate.clamp(max=self.max_scale / weight)
        return rate
