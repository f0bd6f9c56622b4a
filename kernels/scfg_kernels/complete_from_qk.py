r"""Completion of a cross-attention map from the queries and keys of self-attention, for layers whose map is not held.

The result is that of `complete` with the map S of `attention_map`. S X is attention with X in the place of the values:

    P(X)       = 1/H  sum_h  softmax( scale * q_h k_h^T ) X
    official   X = (Y + (R - 1) P(Y)) / R,    Y = P(C)
    paper      X <- P(C + X), R times, then / R

So torch's own fused attention computes it, on every device, and S never exists. Operands of half precision stay so, as
they do in the layer itself, and a head's result is rounded to them; on a CPU they are widened. There, two passes over
the scores of all heads take about twice the time of one, so the map of one sample after another is made after all, up
to `MAP_TOKENS`. The unconditional samples need their start column alone, and have no other. Bytes that must move: q, k,
the used columns of C and X once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._checks import Reasons, check_attention, check_fidelity
from ._launch import outside_autocast
from .attention_map import attention_map, default_scale, map_dtype
from .complete import complete

MAP_TOKENS = 8192
"""Image tokens up to which a CPU makes the map of one sample at a time: 256 MiB in fp32."""
FRACTION = 256.0
"""What columns of half precision are multiplied by: shares below 6e-5 are subnormal in fp16."""


def _spread(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    """P(X): [B, H, N, d], [B, H, N, d], [B, N, T] -> [B, N, T] in the dtype of x."""
    columns, head_dim = x.shape[2], q.shape[3]
    # A CPU's fused attention wants values of the size of keys, a GPU's a multiple of 8.
    width = max(columns, head_dim) if q.device.type == "cpu" else -(-columns // 8) * 8
    if q.device.type == "cpu" and width > head_dim:
        q, k = F.pad(q, (0, width - head_dim)), F.pad(k, (0, width - head_dim))
    factor = FRACTION if q.dtype in (torch.float16, torch.bfloat16) else 1.0
    values = F.pad(x * factor if factor > 1.0 else x, (0, width - columns)).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, values[:, None].expand(-1, q.shape[1], -1, -1), scale=scale)
    mean = out[..., :columns].mean(1, dtype=x.dtype)
    return mean / factor if factor > 1.0 else mean


def _completed(
    q: torch.Tensor, k: torch.Tensor, columns: torch.Tensor, fidelity: str, powers: int, scale: float
) -> torch.Tensor:
    """[B, T, N] of columns [B, N, T]."""
    total = _spread(q, k, columns, scale)
    if fidelity == "official":
        total = torch.lerp(total, _spread(q, k, total, scale), (powers - 1.0) / powers)
    else:
        for _ in range(powers - 1):
            total = _spread(q, k, columns + total, scale)
        total = total / powers
    return total.transpose(1, 2).contiguous()


def complete_from_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cross_map: torch.Tensor,
    *,
    unconditional: int = 0,
    fidelity: str = "official",
    powers: int = 4,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`complete` with the head-mean attention of q and k in the place of the map, which is never made.

    Args:
        q: queries of self-attention [B, H, N, d], fp16, bf16, fp32 or fp64, any strides.
        k: keys [B, H, N, d], same dtype and device.
        cross_map: C, head-mean cross-attention [B, N, T] of the same block, any strides.
        unconditional: how many leading samples are the unconditional half; only their start-token column is completed.
        fidelity: `"official"` for (S + (R-1) S S)/R, `"paper"` for the mean of the powers S^1 .. S^R.
        powers: R, 4 in the paper and in the code.
        scale: factor on the scores; default 1/sqrt(d).

    Returns:
        tokens [B - unconditional, T, N] and start [unconditional, N] in fp32 (fp64 for fp64 queries), as `complete`.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; every reason is listed.
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
    scale, dtype = default_scale(q, scale), map_dtype(q.dtype)
    cross_map = cross_map.to(dtype)
    with torch.no_grad(), outside_autocast(q.device):
        if q.device.type == "cpu" and batch > 0 and n <= MAP_TOKENS:
            completed = [
                complete(
                    attention_map(q[one], k[one], scale=scale), cross_map[one],
                    unconditional=int(one.start < unconditional), fidelity=fidelity, powers=powers, backend="torch",
                )
                for one in (slice(sample, sample + 1) for sample in range(batch))
            ]  # fmt: skip
            return torch.cat([tokens for tokens, _ in completed]), torch.cat([start for _, start in completed])
        if q.device.type == "cpu":
            q, k = q.to(dtype), k.to(dtype)
        first, rest = slice(unconditional), slice(unconditional, None)
        start = _completed(q[first], k[first], cross_map[first, :, :1], fidelity, powers, scale)
        return _completed(q[rest], k[rest], cross_map[rest], fidelity, powers, scale), start.squeeze(1)
