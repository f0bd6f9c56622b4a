r"""Head-mean attention maps from queries, keys and the log-sum-exp that attention itself has found.

    M[b, n, t] = 1/H  sum_h  exp( scale * q[b, h, n] . k[b, h, t] - lse[b, h, n] )
               = 1/H  sum_h  softmax_t( scale * q[b, h, n] . k[b, h, t] )

with the lse of `attention_with_lse`, or of another implementation of attention (xformers, FlashAttention). Without
one, the rows' lse is found first. Bytes that must move: q, k and lse once, M once.

The torch implementation forms scores in blocks, in fp32 (fp64 for fp64 inputs), and no per-head map outlives a block.
A block on a CPU is one head's and stays in the cache; on an accelerator it has all heads and as many samples as fit in
`DEVICE_BLOCK`, because a launch must fill the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch

from ._checks import Reasons, check_attention
from ._launch import choose_backend, outside_autocast
from ._triton import KERNELS

CPU_BLOCK = 1 << 18
"""Scores at a time on a CPU: 1 MiB in fp32."""
DEVICE_BLOCK = 1 << 26
"""Scores at a time on an accelerator: 256 MiB in fp32."""
_WIDENING_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a map for inputs of `dtype`: fp32, because entries near 1/N are subnormal in fp16; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_scale(q: torch.Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)


def _products(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q k^T of [B, H, rows, d] and [B, H, T, d] in `dtype`; operands of half precision stay as they are on CUDA."""
    a, b = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    if a.dtype != dtype and a.device.type == "cuda" and _WIDENING_PRODUCTS:
        product = torch.bmm(a, b, out_dtype=dtype)
    else:
        product = torch.bmm(a.to(dtype), b.to(dtype))
    return product.unflatten(0, q.shape[:2])


def product_blocks(q: torch.Tensor, k: torch.Tensor, most: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Samples, rows, and their products q k^T of all heads [samples, H, rows, T]: `most` of them, or 16 rows."""
    batch, heads, n, _ = q.shape
    a_row = max(1, heads * k.shape[2])
    rows, together = max(16, most // a_row), max(1, most // (a_row * max(1, n)))
    for first in range(0, batch, together):
        for start in range(0, n, rows):
            samples, block = slice(first, first + together), slice(start, start + rows)
            yield samples, block, _products(q[samples, :, block], k[samples], map_dtype(q.dtype))


Blocks = Iterator[tuple[slice, slice, torch.Tensor]]
"""Samples, rows, and their part of the map [samples, rows, T], to be used before the next."""


def device_blocks(
    q: torch.Tensor, k: torch.Tensor, scale: float, lse: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> Blocks:
    """Blocks of all heads. bias [B, T] is added to the scores if lse is None."""
    for samples, rows, products in product_blocks(q, k, DEVICE_BLOCK):
        if lse is not None:
            offset = -lse[samples, :, rows, None]
            part = torch.add(offset, products, alpha=scale, out=products).exp_()
        elif bias is not None:
            part = torch.softmax(torch.add(bias[samples, None, None], products, alpha=scale, out=products), -1)
        else:
            part = torch.softmax(products.mul_(scale), -1)
        yield samples, rows, part.mean(1)


def cpu_blocks(
    q: torch.Tensor, k: torch.Tensor, scale: float, lse: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> Blocks:
    """The same one head at a time: a product of many rows is faster than a batch of products of few."""
    batch, heads, n, _ = q.shape
    dtype, size = map_dtype(q.dtype), max(16, CPU_BLOCK // k.shape[2])
    nothing = torch.zeros((), dtype=dtype)
    for sample in range(batch):
        keys = k[sample].to(dtype).transpose(1, 2)
        for start in range(0, n, size):
            rows = slice(start, start + size)
            total: torch.Tensor | None = None
            for head in range(heads):
                queries = q[sample, head, rows].to(dtype)
                if lse is not None:
                    offset = -lse[sample, head, rows, None]
                    part = torch.addmm(offset, queries, keys[head], alpha=scale).exp_()
                else:
                    offset = nothing if bias is None else bias[sample].to(dtype)
                    part = torch.softmax(torch.addmm(offset, queries, keys[head], alpha=scale), -1)
                total = part if total is None else total.add_(part)
            yield slice(sample, sample + 1), rows, cast(torch.Tensor, total).div_(heads)[None]


def mean_blocks(q: torch.Tensor, k: torch.Tensor, scale: float, *offsets: torch.Tensor | None) -> Blocks:
    """The blocks of the device that q is on; offsets: lse, bias."""
    return (cpu_blocks if q.device.type == "cpu" else device_blocks)(q, k, scale, *offsets)


def row_lse(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """The log-sum-exp [B, H, N] of the scores, by a pass over them."""
    result = torch.empty(q.shape[:3], dtype=map_dtype(q.dtype), device=q.device)
    most = CPU_BLOCK if q.device.type == "cpu" else DEVICE_BLOCK
    for samples, rows, products in product_blocks(q, k, most):
        result[samples, :, rows] = torch.logsumexp(products.mul_(scale), -1)
    return result


@torch.no_grad()
def head_mean_map(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The torch implementation: [B, H, N, d], [B, H, T, d], [B, H, N] -> [B, N, T]."""
    shape = (q.shape[0], q.shape[2], k.shape[2])
    result = None
    with outside_autocast(q.device):
        for samples, rows, mean in mean_blocks(q, k, scale, lse):
            if mean.shape == shape:
                return mean
            result = q.new_empty(shape, dtype=mean.dtype) if result is None else result
            result[samples, rows] = mean
    return q.new_empty(shape, dtype=map_dtype(q.dtype)) if result is None else result


@torch.library.custom_op("scfg_kernels::attention_map", mutates_args=())
def _attention_map(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None, scale: float, backend: str
) -> torch.Tensor:
    if backend == "triton":
        return KERNELS["attention_map"](q, k, lse, scale)
    return head_mean_map(q, k, lse, scale)


@_attention_map.register_fake
def _(q: torch.Tensor, k: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], k.shape[2]), dtype=map_dtype(q.dtype))


@torch.library.custom_op("scfg_kernels::attention_maps", mutates_args=())
def _attention_maps(
    q1: torch.Tensor, k1: torch.Tensor, lse1: torch.Tensor | None, scale1: float,
    q2: torch.Tensor, k2: torch.Tensor, lse2: torch.Tensor | None, scale2: float, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if backend == "triton":
        return KERNELS["attention_maps"](q1, k1, lse1, scale1, q2, k2, lse2, scale2)
    return head_mean_map(q1, k1, lse1, scale1), head_mean_map(q2, k2, lse2, scale2)


@_attention_maps.register_fake
def _(
    q1: torch.Tensor, k1: torch.Tensor, lse1: torch.Tensor | None, scale1: float,
    q2: torch.Tensor, k2: torch.Tensor, *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    own = q1.new_empty((q1.shape[0], q1.shape[2], k1.shape[2]), dtype=map_dtype(q1.dtype))
    return own, q2.new_empty((q2.shape[0], q2.shape[2], k2.shape[2]), dtype=map_dtype(q2.dtype))


MAX_HEAD_DIM = 512
"""Columns of a head that three tiles of the kernels hold."""


def map_limits(*operands: torch.Tensor) -> list[str]:
    """Every reason why the kernels cannot take these queries and keys; empty if they can."""
    reasons = []
    if any(x.dtype == torch.float64 for x in operands):
        reasons.append("the kernel computes in fp32, fp64 needs the torch implementation")
    if max(x.shape[3] for x in operands) > MAX_HEAD_DIM:
        reasons.append(f"head sizes beyond {MAX_HEAD_DIM} are not supported, got {operands[0].shape[3]}")
    if any(x.shape[3] > 1 and x.stride(3) != 1 for x in operands):
        reasons.append("the last dimension of queries and keys must have stride 1")
    return reasons


def _check(op: str, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None) -> None:
    check_attention(op, q, k, None)
    if lse is None or (lse.shape == q.shape[:3] and lse.dtype == map_dtype(q.dtype) and lse.device == q.device):
        return
    reasons = Reasons(op)
    expected = f"{list(q.shape[:3])} {map_dtype(q.dtype)} on {q.device}"
    reasons.unless(False, f"lse must be {expected}, got {list(lse.shape)} {lse.dtype} on {lse.device}")
    reasons.raise_if_any()


def attention_map(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Head-mean attention probabilities of a layer, alongside whatever computes its output.

    Args:
        q: queries [B, H, N, d], fp16, bf16, fp32 or fp64, any strides.
        k: keys [B, H, T, d], same dtype and device.
        lse: log-sum-exp of the scaled scores [B, H, N], natural logarithm, fp32 (fp64 for fp64 inputs), any strides;
            None to have it found.
        scale: factor on the scores; default 1/sqrt(d).
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        map [B, N, T], fp32 (fp64 for fp64 inputs); every row sums to 1 if lse is that of the scores.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    _check("attention_map", q, k, lse)
    chosen = choose_backend("attention_map", backend, q.device, map_limits(q, k))
    if chosen == "torch" and not torch.compiler.is_compiling():
        return head_mean_map(q, k, lse, default_scale(q, scale))
    return _attention_map(q, k, lse, default_scale(q, scale), chosen)


def attention_maps(
    q1: torch.Tensor,
    k1: torch.Tensor,
    lse1: torch.Tensor | None,
    q2: torch.Tensor,
    k2: torch.Tensor,
    lse2: torch.Tensor | None,
    *,
    scale1: float | None = None,
    scale2: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of two layers, for example of a block's self- and cross-attention: one launch of the Triton kernel.

    Args:
        q1, k1, lse1, scale1: of the first layer, as in `attention_map`.
        q2, k2, lse2, scale2: of the second.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        both maps [B, N, T], as `attention_map`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    _check("attention_maps: first layer", q1, k1, lse1)
    _check("attention_maps: second layer", q2, k2, lse2)
    scale1, scale2 = default_scale(q1, scale1), default_scale(q2, scale2)
    limits = map_limits(q1, k1, q2, k2)
    chosen = choose_backend("attention_maps", backend, q1.device, limits)
    if chosen == "torch" and not torch.compiler.is_compiling():
        return head_mean_map(q1, k1, lse1, scale1), head_mean_map(q2, k2, lse2, scale2)
    return _attention_maps(q1, k1, lse1, scale1, q2, k2, lse2, scale2, chosen)
