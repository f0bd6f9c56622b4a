r"""Completion of a cross-attention map without the self-attention map, from the queries and keys that it is made of.

With P(X) = S X of `propagate` and R = `powers`:

    official   X = (Y + (R - 1) P(Y)) / R,    Y = P(C)
    paper      X <- P(C + X), R times, then / R

which is `complete`, for layers whose map S is too large to hold. A composition of `propagate` and not an operator of
its own. Each product forms the scores again; the two of the official form are its two launches of attention.

The unconditional samples need their start column alone. A product costs the scores first of all, whatever the number of
columns, so up to `COLUMNS` of them both halves are one call and the other columns are dropped at the end; beyond, the
scores would be formed again for every further group of columns, and the start column is a call of its own.
"""

from __future__ import annotations

from functools import partial

import torch

from ._checks import Reasons, check_attention, check_fidelity
from .propagate import propagate

COLUMNS = 128
"""Columns that one program of `propagate` takes at most."""


def complete_from_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cross_map: torch.Tensor,
    *,
    unconditional: int = 0,
    fidelity: str = "official",
    powers: int = 4,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread every token's cross-attention over the image by the self-attention of q and k.

    Args:
        q: queries [B, H, N, d], fp16, bf16, fp32 or fp64, any strides.
        k: keys [B, H, N, d], same dtype and device.
        cross_map: C, head-mean cross-attention [B, N, T] of the same block, any strides.
        unconditional: how many leading samples are the unconditional half; only their start-token column is completed.
        fidelity: `"official"` for (S + (R-1) S S)/R, `"paper"` for the mean of the powers S^1 .. S^R.
        powers: R, 4 in the paper and in the code.
        scale: factor on the scores; default 1/sqrt(d).
        backend: of `propagate`.

    Returns:
        tokens [B - unconditional, T, N] and start [unconditional, N] in fp32 (fp64 for fp64 queries), as `complete`.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    check_attention("complete_from_qk", q, k, None, same_tokens=True)
    reasons = Reasons("complete_from_qk")
    fits = cross_map.dim() == 3 and cross_map.shape[:2] == (q.shape[0], q.shape[2]) and cross_map.shape[2] >= 1
    reasons.unless(fits, f"cross_map must be [{q.shape[0]}, {q.shape[2]}, T], got {tuple(cross_map.shape)}")
    reasons.unless(cross_map.is_floating_point(), f"cross_map must be floating point, got {cross_map.dtype}")
    in_range = 0 <= unconditional <= q.shape[0]
    reasons.unless(in_range, f"unconditional must lie in 0..{q.shape[0]}, got {unconditional}")
    reasons.unless(powers >= 1, f"powers must be at least 1, got {powers}")
    check_fidelity(reasons, fidelity)
    reasons.same_device(q, cross_map)
    reasons.raise_if_any()
    spread = partial(_complete_columns, fidelity=fidelity, powers=powers, scale=scale, backend=backend)
    if 0 < unconditional < q.shape[0] and cross_map.shape[2] <= COLUMNS:
        completed = spread(q, k, cross_map)
        tokens, start = completed[unconditional:], completed[:unconditional, :, 0]
    else:
        start = spread(q[:unconditional], k[:unconditional], cross_map[:unconditional, :, :1])[:, :, 0]
        tokens = spread(q[unconditional:], k[unconditional:], cross_map[unconditional:])
    return tokens.transpose(1, 2).contiguous(), start.contiguous()


def _complete_columns(
    q: torch.Tensor,
    k: torch.Tensor,
    columns: torch.Tensor,
    fidelity: str,
    powers: int,
    scale: float | None,
    backend: str,
) -> torch.Tensor:
    """[B, H, N, d] twice, [B, N, T] -> [B, N, T]."""
    once = propagate(q, k, columns, scale=scale, backend=backend)
    if fidelity == "official":
        return torch.lerp(once, propagate(q, k, once, scale=scale, backend=backend), (powers - 1.0) / powers)
    total = once
    for _ in range(powers - 1):
        total = propagate(q, k, columns + total, scale=scale, backend=backend)
    return total / powers
