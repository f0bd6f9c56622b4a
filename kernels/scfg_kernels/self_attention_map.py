r"""Self-attention that also returns its head-mean map.

    O[b, h]    = softmax( scale * q[b, h] k[b, h]^T ) v[b, h]
    S[b, n, t] = 1/H  sum_h  softmax_t( scale * q[b, h, n] . k[b, h, t] )

Queries and keys are the same n image tokens. The output is `scaled_dot_product_attention`, bit for bit; the map is
accumulated in fp32 over blocks of query rows, so no per-head map exists. Bytes that must move: q, k, v, O and the map,
once each.
"""

from __future__ import annotations

import torch

from ._checks import check_attention
from ._launch import attention_limits, choose_backend
from ._triton import KERNELS
from .attention_map import attention_with_map, default_scale, empty_output_and_map


@torch.library.custom_op("scfg_kernels::self_attention_map", mutates_args=())
def _self_attention_map(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        return KERNELS["self_attention_map"](q, k, v, scale)
    return attention_with_map(q, k, v, scale)


@_self_attention_map.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_output_and_map(q, k, v)


def self_attention_map(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory-efficient self-attention and its head-mean map.

    Args:
        q: queries [B, H, N, d], fp16, bf16, fp32 or fp64, any strides.
        k: keys [B, H, N, d], same dtype and device.
        v: values [B, H, N, dv]. On a CPU only dv = d keeps the output memory-efficient: torch decides so.
        scale: factor on the scores; default 1/sqrt(d).
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        out [B, H, N, dv] in the dtype of q, and map [B, N, N] in fp32 (fp64 for fp64 inputs), whose rows sum to 1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    check_attention("self_attention_map", q, k, v, same_tokens=True)
    chosen = choose_backend("self_attention_map", backend, q.device, attention_limits(q, k, v))
    return _self_attention_map(q, k, v, default_scale(q, scale), chosen)
