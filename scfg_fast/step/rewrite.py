"""What the hook returns in place of the denoiser's prediction.

From the two halves [u; t] that the denoiser returns, the pipeline computes  u + s (t - u). S-CFG wants a rate map r in
it,  f = u + s r (t - u),  and reaches that by changing what the denoiser returns:

    both halves   (f, f)                              f + s (f - f) = f: one rounding, exact
    u alone       (u - s/(s-1) (r-1) (t-u), t)        where the pipeline also uses t

A schedule (`scfg_fast.guidance`) puts a weight w of the step in the place of s: f = u + w r d, d = t - u, and
u' = (s t - f) / (s - 1) where the pipeline also uses t.
"""

from __future__ import annotations

from typing import Any

import torch

# Below this scale the factor s/(s-1) of the second form exceeds 21 and magnifies rounding.
MIN_SCALE_OF_REWRITE = 1.05


def compensating_uncond(guided: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
    """The u' of which the pipeline's own line makes `guided`: u' + s (t - u') = guided.

    Args:
        guided, cond: [B, C, H, W].
        scale: s, above 1.
    """
    dtype = torch.promote_types(cond.dtype, torch.float32)
    return ((scale * cond.to(dtype) - guided.to(dtype)) / (scale - 1.0)).to(cond.dtype)


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
