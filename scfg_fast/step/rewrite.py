"""What the hook returns in place of the denoiser's prediction.

From the two halves [u; t] that the denoiser returns, the pipeline computes  u + s (t - u). S-CFG wants a rate map r in
it,  f = u + w r (t - u),  with the weight w of the step: s, or a schedule's. It gets f by changing [u; t]:

    both halves   (f, f)       f + s (f - f) = f: one rounding, exact
    u alone       (u', t)      u' + s (t - u') = f, where the pipeline also uses t
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import SCFGConfig
from .finder import guide_plainly

Combine = Callable[..., torch.Tensor]
"""(u, t, w, rewrite, copies) -> f, once or twice; or u' of w = s with rewrite="unconditional": `combiner.Combiner`."""

Solve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(f, u, t) -> another f."""


@dataclass(frozen=True)
class Rewrite:
    """How one step rewrites predictions.

    Attributes:
        scale: s, the pipeline's own, above 1 where t is used again.
        weight: w.
        rereads: whether the pipeline also uses t.
        groups: groups of samples in a prediction, [u; t] or [u; t; others].
        config: of the call; its backend computes what has no rates.
    """

    scale: float
    weight: float
    rereads: bool
    groups: int
    config: SCFGConfig

    def __call__(
        self, prediction: torch.Tensor, combine: Combine | None = None, solve: Solve | None = None
    ) -> torch.Tensor:
        """[G B, C, H, W] -> what to return in its place, same shape and dtype.

        Args:
            prediction: [u; t] or [u; t; others].
            combine: applies rates and rules, or None for f = u + w (t - u).
            solve: makes another prediction of the guided one (Characteristic Guidance), or None.
        """
        uncond, cond, *others = prediction.chunk(self.groups)
        if self.rereads:
            return torch.cat([self._unconditional(uncond, cond, combine, solve), cond, *others])
        guided = self._guided(uncond, cond, combine, copies=1 if solve or len(uncond) == 1 else 2)
        if solve is not None:
            guided = solve(guided, uncond, cond)
        if len(guided) > len(uncond):
            return guided
        return guided.expand(2, *guided.shape).flatten(0, 1)  # (f, f): of one image a view

    def _unconditional(
        self, uncond: torch.Tensor, cond: torch.Tensor, combine: Combine | None, solve: Solve | None
    ) -> torch.Tensor:
        """u' with u' + s (t - u') = f."""
        scale, weight = self.scale, self.weight
        if solve is None and combine is not None and weight == scale:
            # u' = u - s / (s - 1) (r - 1) (t - u): for r = 1 it is u, bit for bit
            return combine(uncond, cond, weight, "unconditional", 1)
        if solve is None and combine is None:
            # u' = u + (s - w) / (s - 1) (t - u), in one launch
            return guide_plainly(self.config, uncond, cond, (scale - weight) / (scale - 1.0))
        guided = self._guided(uncond, cond, combine, copies=1)
        if solve is not None:
            guided = solve(guided, uncond, cond)
        # u' = (s t - f) / (s - 1)
        dtype = torch.promote_types(cond.dtype, torch.float32)
        return ((scale * cond.to(dtype) - guided.to(dtype)) / (scale - 1.0)).to(cond.dtype)

    def _guided(self, uncond: torch.Tensor, cond: torch.Tensor, combine: Combine | None, copies: int) -> torch.Tensor:
        """f, once or twice."""
        if combine is not None:
            # f = u + w r (t - u)
            return combine(uncond, cond, self.weight, "guided", copies)
        if self.weight == self.scale:
            # f = u + s (t - u), the pipeline's own line, bit for bit
            return uncond + self.weight * (cond - uncond)
        # f = u + w (t - u), in fp32 and rounded once
        return guide_plainly(self.config, uncond, cond, self.weight, copies)


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


def with_prediction(output: Any, prediction: Any) -> Any:
    """A denoiser's output, a tuple or a diffusers record, with another prediction as its first member."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(**{**output, next(iter(output)): prediction})
