r"""Completion of a cross-attention map from the queries and keys of self-attention, for layers whose map is not held.

The result is that of `complete` with the map S of `attention_map`. With P(X) = S X of `propagate` and R = `powers`:

    official   X = (Y + (R - 1) P(Y)) / R,    Y = P(C)
    paper      X <- P(C + X), R times, then / R

A composition of other operators. Every P forms the scores again. Where `propagate` is a kernel that is the price of
having no map: two launches. In torch it would double the time, so there the map is made after all, of one sample at a
time and up to `MAP_TOKENS`; it is gone before the next sample's.

The unconditional samples need their start column alone. A product costs the scores first of all, whatever the number of
columns, so up to `COLUMNS` of them both halves are one call and the other columns are dropped at the end; beyond, the
scores would be formed again for every further group of columns, and the start column is a call of its own.
"""

from __future__ import annotations

import torch

from ._checks import Reasons, check_attention, check_fidelity
from ._launch import choose_backend, propagate_limits
from .attention_map import attention_map, default_scale
from .complete import complete
from .propagate import propagate

COLUMNS = 128
"""Columns that one program of `propagate` takes at most."""

MAP_TOKENS = 8192
"""Image tokens up to which torch makes the map of one sample at a time: 256 MiB in fp32."""


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
        backend: `"auto"`, `"triton"` or `"torch"`, as of `propagate`.

    Returns:
        tokens [B - unconditional, T, N] and start [unconditional, N] in fp32 (fp64 for fp64 queries), as `complete`.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    check_attention("complete_from_qk", q, k, None, same_tokens=True)
    batch, _, n, _ = q.shape
    reasons = Reasons("complete_from_qk")
    fits = cross_map.dim() == 3 and cross_map.shape[:2] == (batch, n) and cross_map.shape[2] >= 1
    reasons.unless(fits, f"cross_map must be [{batch}, {n}, T], got {tuple(cross_map.shape)}")
    reasons.unless(cross_map.is_floating_point(), f"cross_map must be floating point, got {cross_map.dtype}")
    in_range = 0 <= unconditional <= batch
    reasons.unless(in_range, f"unconditional must lie in 0..{batch}, got {unconditional}")
    reasons.unless(powers >= 1, f"powers must be at least 1, got {powers}")
    check_fidelity(reasons, fidelity)
    reasons.same_device(q, cross_map)
    reasons.raise_if_any()
    chosen = choose_backend("propagate", backend, q.device, propagate_limits(q, k, cross_map))
    way = _by_maps if chosen == "torch" and batch > 0 and n <= MAP_TOKENS else _by_products
    return way(q, k, cross_map, unconditional, fidelity, powers, default_scale(q, scale), chosen)


def _by_maps(
    q: torch.Tensor, k: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int,
    scale: float, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`complete_from_qk`, the map of one sample after another."""
    completed = [
        complete(
            attention_map(q[one], k[one], scale=scale, backend=backend), cross_map[one],
            unconditional=int(one.start < unconditional), fidelity=fidelity, powers=powers, backend=backend,
        )
        for one in (slice(sample, sample + 1) for sample in range(q.shape[0]))
    ]  # fmt: skip
    tokens, start = zip(*completed, strict=True)
    return torch.cat(tokens), torch.cat(start)


def _by_products(
    q: torch.Tensor, k: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int,
    scale: float, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`complete_from_qk`, without any map."""

    def spread(samples: slice, columns: slice) -> torch.Tensor:  # [B, N, T]
        queries, keys, cross = q[samples], k[samples], cross_map[samples, :, columns]
        once = propagate(queries, keys, cross, scale=scale, backend=backend)
        if fidelity == "official":
            twice = propagate(queries, keys, once, scale=scale, backend=backend)
            return torch.lerp(once, twice, (powers - 1.0) / powers)
        total = once
        for _ in range(powers - 1):
            total = propagate(queries, keys, cross + total, scale=scale, backend=backend)
        return total / powers

    if 0 < unconditional < q.shape[0] and cross_map.shape[2] <= COLUMNS:
        whole = spread(slice(None), slice(None))
        start, tokens = whole[:unconditional], whole[unconditional:]
    else:
        start, tokens = spread(slice(unconditional), slice(1)), spread(slice(unconditional, None), slice(None))
    return tokens.transpose(1, 2).contiguous(), start[:, :, 0].contiguous()
