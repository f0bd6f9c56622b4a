r"""Scaled dot-product attention with torch's own operators, and the log-sum-exp that they find on the way.

    O[b, h]      = softmax( scale * q[b, h] k[b, h]^T ) v[b, h]
    lse[b, h, n] = log  sum_t  exp( scale * q[b, h, n] . k[b, h, t] )

`torch._fused_sdp_choice` says which operator `F.scaled_dot_product_attention` takes for these operands. This one is
called, with the arguments that torch gives it, so the output has the bits of `F.scaled_dot_product_attention`; on a
GPU that is by construction and was not tried on a device. The log-sum-exp is what `attention_map` needs to form
probabilities without a pass over the scores of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from ._checks import check_attention
from .attention_map import default_scale, map_dtype, row_lse

_FLASH, _EFFICIENT, _CUDNN = (
    int(kind.value) for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
)
_aten = torch.ops.aten


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    choice = torch._fused_sdp_choice(q, k, v, scale=scale)
    kind = q.device.type
    if choice == _FLASH and kind == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if choice == _FLASH and kind == "cuda":
        size = q.shape[3]
        missing = -size % 8  # torch pads the head size so, too
        padded = [F.pad(x, (0, missing)) for x in (q, k, v)] if missing else (q, k, v)
        out, lse = _aten._scaled_dot_product_flash_attention(*padded, scale=default_scale(q, scale))[:2]
        return (out[..., :size] if missing else out), lse
    if choice == _EFFICIENT and kind == "cuda":
        out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
        return out, lse[:, :, : q.shape[2]]  # rows are padded to a multiple of 32
    if choice == _CUDNN and kind == "cuda":
        out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
        return out, lse.reshape(q.shape[:3])  # [B, H, N, 1]
    return F.scaled_dot_product_attention(q, k, v, scale=scale), None


@torch.library.custom_op("scfg_kernels::attention_with_lse", mutates_args=())
def _attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For a compiled graph, where results must have shapes and strides that do not depend on torch's choice."""
    out, lse = _attend(q, k, v, scale)
    lse = row_lse(q, k, default_scale(q, scale)) if lse is None else lse
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


@_attention_with_lse.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, n, _ = q.shape
    out = q.new_empty((batch, n, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, n), dtype=map_dtype(q.dtype))


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `F.scaled_dot_product_attention(q, k, v, scale=scale)` returns, with its log-sum-exp.

    Args:
        q: queries [B, H, N, d], floating point, any strides.
        k: keys [B, H, T, d], same dtype and device.
        v: values [B, H, T, dv].
        scale: factor on the scores; default 1/sqrt(d).

    Returns:
        out [B, H, N, dv] in the dtype of q, and lse [B, H, N] in fp32 (fp64 for fp64), natural logarithm, any strides.
        lse is None where the operator that torch takes does not have it, and under autocast, where torch attends to
        other operands than these. Under `torch.compile` it is found by a pass over the scores in the first case.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
    """
    check_attention("attention_with_lse", q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        return F.scaled_dot_product_attention(q, k, v, scale=scale), None
    if torch.compiler.is_compiling():
        return _attention_with_lse(q, k, v, scale)
    return _attend(q, k, v, scale)
