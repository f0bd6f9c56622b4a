r"""Completion of a cross-attention map from the queries and keys of self-attention, for layers whose map is not held.

The result is that of `complete` with the map S of `attention_map`. With P(X) = S X of `propagate` and R = `powers`:

    official   X = (Y + (R - 1) P(Y)) / R,    Y = P(C)
    paper      X <- P(C + X), R times, then / R

The kernel is one launch and forms the scores R + 1 times (official: 3), once for the softmax and once per product,
which is the price of having no map. In torch a `propagate` per product would take twice the time of one map, so there
the map is made after all, of one sample at a time and up to `MAP_TOKENS`; it is gone before the next sample's.

Scores, softmax and products are fp32 (fp64 for fp64 inputs), as in `propagate`. The unconditional samples need their
start column alone, and have no other. Bytes that must move: q, k, the used columns of C and X once.
"""

from __future__ import annotations

import torch

from ._checks import Reasons, check_attention, check_fidelity
from ._launch import choose_backend, propagate_limits
from ._triton import KERNELS
from .attention_map import attention_map, default_scale, map_dtype
from .complete import complete
from .propagate import propagate

MAP_TOKENS = 8192
"""Image tokens up to which torch makes the map of one sample at a time: 256 MiB in fp32."""


def _by_maps(
    q: torch.Tensor, k: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The map of one sample after another."""
    completed = [
        complete(
            attention_map(q[one], k[one], scale=scale, backend="torch"), cross_map[one],
            unconditional=int(one.start < unconditional), fidelity=fidelity, powers=powers, backend="torch",
        )
        for one in (slice(sample, sample + 1) for sample in range(q.shape[0]))
    ]  # fmt: skip
    tokens, start = zip(*completed, strict=True)
    return torch.cat(tokens), torch.cat(start)


def _by_products(
    q: torch.Tensor, k: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Without any map."""

    def spread(samples: slice, columns: slice) -> torch.Tensor:  # [B, T, N]
        queries, keys, cross = q[samples], k[samples], cross_map[samples, :, columns]
        total = propagate(queries, keys, cross, scale=scale, backend="torch")
        if fidelity == "official":
            twice = propagate(queries, keys, total, scale=scale, backend="torch")
            total = torch.lerp(total, twice, (powers - 1.0) / powers)
        else:
            for _ in range(powers - 1):
                total = propagate(queries, keys, cross + total, scale=scale, backend="torch")
            total = total / powers
        return total.transpose(1, 2).contiguous()

    start = spread(slice(unconditional), slice(1))
    return spread(slice(unconditional, None), slice(None)), start.squeeze(1)


@torch.library.custom_op("scfg_kernels::complete_from_qk", mutates_args=())
def _complete_from_qk(
    q: torch.Tensor, k: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int,
    scale: float, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if backend == "triton":
        return KERNELS["complete_from_qk"](q, k, cross_map, unconditional, fidelity, powers, scale)
    by_maps = q.shape[0] > 0 and q.shape[2] <= MAP_TOKENS
    way = _by_maps if by_maps else _by_products
    return way(q, k, cross_map, unconditional, fidelity, powers, scale)


@_complete_from_qk.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int,
    scale: float, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, n, tokens = cross_map.shape
    dtype = map_dtype(q.dtype)
    return q.new_empty((batch - unconditional, tokens, n), dtype=dtype), q.new_empty((unconditional, n), dtype=dtype)


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
        backend: `"auto"`, `"triton"` or `"torch"`.

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
    chosen = choose_backend("complete_from_qk", backend, q.device, propagate_limits(q, k, cross_map, "cross_map"))
    return _complete_from_qk(q, k, cross_map, unconditional, fidelity, powers, default_scale(q, scale), chosen)
