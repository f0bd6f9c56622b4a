r"""Head-mean attention map alone.

    M[b, n, t] = 1/H  sum_h  softmax_t( scale * q[b, h, n] . k[b, h, t] )

For layers whose output another implementation has already computed (xformers, a user's own processor). Scores are
formed in fp32 (fp64 for fp64 inputs) for a block of query rows at a time; the block is sized so that the transient
stays near 1 MiB, so no [H, N, T] tensor ever exists. Bytes that must move: q, k once, M once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ._checks import check_attention
from ._launch import attention_limits, choose_backend, outside_autocast
from ._triton import KERNELS

# Elements of the [H, rows, T] block of scores: 1 MiB in fp32, half of a typical L2 cache.
BLOCK_ELEMENTS = 1 << 18


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a map for inputs of `dtype`: fp32, because entries near 1/N are subnormal in fp16; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_mean_map(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """torch implementation shared by the three attention operators: [B, H, N, d], [B, H, T, d] -> [B, N, T]."""
    batch, heads, n, _ = q.shape
    tokens = k.shape[2]
    dtype = map_dtype(q.dtype)
    result = torch.empty((batch, n, tokens), dtype=dtype, device=q.device)
    # One sample at a time: blocks of many rows make better GEMMs than blocks of few rows over the whole batch.
    rows = max(16, BLOCK_ELEMENTS // (heads * tokens))
    with outside_autocast(q.device):
        for sample in range(batch):
            keys = k[sample].to(dtype).transpose(-1, -2)
            for start in range(0, n, rows):
                block = q[sample, :, start : start + rows].to(dtype) * scale
                probabilities = torch.softmax(block @ keys, dim=-1)
                torch.mean(probabilities, dim=0, out=result[sample, start : start + rows])
    return result


def attention_with_map(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch implementation of the two operators that return the output too: ([B, H, N, dv], [B, N, T]).

    The output is laid out as [B, N, H, dv] in memory, which is what the layer's projection reads next.
    """
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), head_mean_map(q, k, scale)


def empty_output_and_map(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised results with the shapes, dtypes and strides of `attention_with_map`."""
    batch, heads, n, _ = q.shape
    out = q.new_empty((batch, n, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, n, k.shape[2]), dtype=map_dtype(q.dtype))


def default_scale(q: torch.Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)


@torch.library.custom_op("scfg_kernels::attention_map", mutates_args=())
def _attention_map(q: torch.Tensor, k: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
    if backend == "triton":
        return KERNELS["attention_map"](q, k, scale)
    return head_mean_map(q, k, scale)


@_attention_map.register_fake
def _(q: torch.Tensor, k: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], k.shape[2]), dtype=map_dtype(q.dtype))


def attention_map(
    q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Head-mean attention probabilities without the attention output.

    Args:
        q: queries [B, H, N, d], fp16, bf16, fp32 or fp64, any strides.
        k: keys [B, H, T, d], same dtype and device.
        scale: factor on the scores; default 1/sqrt(d).
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        map [B, N, T], fp32 (fp64 for fp64 inputs); every row sums to 1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    check_attention("attention_map", q, k, None)
    chosen = choose_backend("attention_map", backend, q.device, attention_limits(q, k, None))
    return _attention_map(q, k, default_scale(q, scale), chosen)
