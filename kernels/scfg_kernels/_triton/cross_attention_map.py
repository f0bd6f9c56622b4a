r"""Cross-attention with its head-mean map in one sweep over the text tokens, T <= 96.

    s_h    = scale q_h k_h^T                               [BLOCK_M, T] of HEADS heads at once, fp32
    p_h    = 2^(s_h log2(e) - max) / sum                   exact softmax: the whole row is in registers
    O_h    = p_h v_h                                       2^(..) rounded to the dtype of v, the rest in fp32
    C      = 1/H  sum_h p_h                                fp32, heads in a fixed order, one store

The T columns are two tiles side by side (77 = 64 + 16 columns), which wastes less than one power of two. Program (i, b)
takes BLOCK_M query rows of sample b and loops over groups of HEADS heads. Bytes: Q, O and C once; K and V once per row
block, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import AttentionConfig
from ._attention import LOG2E, columns_first, common_strides, load_tile, rows_first, store_tile


@triton.jit
def _store_map(mean, row, key, values, rows, keys):
    """values [BLOCK_M, BLOCK_N] at row [BLOCK_M, 1] and key [BLOCK_N]."""
    tl.store(mean + row * keys + key[None, :], values, mask=(row < rows) & (key[None, :] < keys))


@triton.jit
def cross_attention_map_kernel(
    q, k, v, out, mean, scale, heads, rows, keys, head_dim, value_dim,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, o_stride_b, o_stride_h, o_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WITH_OUTPUT: tl.constexpr, ONE_GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N1: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """head_dim and value_dim again at run time: loops with a constant bound are unrolled, which takes registers."""
    batch = tl.program_id(1).to(tl.int64)
    q += batch * q_stride_b * ALIGN
    k += batch * k_stride_b * ALIGN
    v += batch * v_stride_b * ALIGN
    out += batch * o_stride_b * ALIGN
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    key1 = tl.arange(0, BLOCK_N1)
    key2 = BLOCK_N1 + tl.arange(0, BLOCK_N2 if BLOCK_N2 > 0 else 1)
    mean += batch * rows * keys
    share = 1.0 / heads
    if not ONE_GROUP:
        mean1 = tl.zeros([BLOCK_M, BLOCK_N1], tl.float32)
        if BLOCK_N2 > 0:
            mean2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)

    for first in tl.range(0, HEADS if ONE_GROUP else heads, HEADS):
        head = first + tl.arange(0, HEADS)
        p1 = tl.zeros([HEADS, BLOCK_M, BLOCK_N1], tl.float32)
        if BLOCK_N2 > 0:
            p2 = tl.zeros([HEADS, BLOCK_M, BLOCK_N2], tl.float32)
        for start in tl.range(0, head_dim, BLOCK_D):
            tile = load_tile(q, head, row, start, heads, rows, q_stride_h, q_stride_n, BLOCK_D, HEAD_DIM, ALIGN)
            k1 = load_tile(k, head, key1, start, heads, keys, k_stride_h, k_stride_n, BLOCK_D, HEAD_DIM, ALIGN)
            p1 = tl.dot(rows_first(tile), columns_first(k1), p1, input_precision=PRECISION)
            if BLOCK_N2 > 0:
                k2 = load_tile(k, head, key2, start, heads, keys, k_stride_h, k_stride_n, BLOCK_D, HEAD_DIM, ALIGN)
                p2 = tl.dot(rows_first(tile), columns_first(k2), p2, input_precision=PRECISION)
        p1 = tl.where(key1[None, None, :] < keys, p1 * scale, float("-inf"))
        top = tl.max(p1, 2)  # [HEADS, BLOCK_M]
        if BLOCK_N2 > 0:
            p2 = tl.where(key2[None, None, :] < keys, p2 * scale, float("-inf"))
            top = tl.maximum(top, tl.max(p2, 2))
            p2 = tl.exp2(p2 - top[:, :, None])
        p1 = tl.exp2(p1 - top[:, :, None])
        total = tl.sum(p1, 2)
        if BLOCK_N2 > 0:
            total += tl.sum(p2, 2)
        # Heads beyond the last one have all-equal scores; a weight of 0 keeps them out of the map.
        weight = tl.where(head[:, None] < heads, 1.0 / total, 0.0)[:, :, None]
        if ONE_GROUP:  # stored before the output is formed, which needs the registers
            _store_map(mean, row[:, None], key1, tl.sum(p1 * weight, 0) * share, rows, keys)
            if BLOCK_N2 > 0:
                _store_map(mean, row[:, None], key2, tl.sum(p2 * weight, 0) * share, rows, keys)
        else:
            mean1 += tl.sum(p1 * weight, 0)
            if BLOCK_N2 > 0:
                mean2 += tl.sum(p2 * weight, 0)

        if WITH_OUTPUT:
            # Rounded before they are divided by their sum: the largest is 1, so fp16 loses no small ones.
            w1 = p1.to(v.dtype.element_ty)
            if BLOCK_N2 > 0:
                w2 = p2.to(v.dtype.element_ty)
            for start in tl.range(0, value_dim, BLOCK_D):
                v1 = load_tile(v, head, key1, start, heads, keys, v_stride_h, v_stride_n, BLOCK_D, VALUE_DIM, ALIGN)
                tile = tl.dot(w1, rows_first(v1), input_precision=PRECISION)  # [HEADS, BLOCK_M, BLOCK_D]
                if BLOCK_N2 > 0:
                    v2 = load_tile(v, head, key2, start, heads, keys, v_stride_h, v_stride_n, BLOCK_D, VALUE_DIM, ALIGN)
                    tile = tl.dot(w2, rows_first(v2), tile, input_precision=PRECISION)
                store_tile(
                    out, tile * weight, head, row, start, heads, rows, o_stride_h, o_stride_n,
                    BLOCK_D, VALUE_DIM, ALIGN,
                )  # fmt: skip

    if not ONE_GROUP:
        _store_map(mean, row[:, None], key1, mean1 * share, rows, keys)
        if BLOCK_N2 > 0:
            _store_map(mean, row[:, None], key2, mean2 * share, rows, keys)


def run_one_sweep(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    out: torch.Tensor | None,
    mean: torch.Tensor,
    scale: float,
    config: AttentionConfig,
) -> None:
    """Fill `mean` [B, N, T], and `out` [B, H, N, dv] unless it is None."""
    batch, heads, rows, head_dim = q.shape
    keys = k.shape[2]
    values, result = (k, q) if v is None or out is None else (v, out)  # placeholders, not read
    strides = common_strides(q, k, values, result)
    cross_attention_map_kernel[(triton.cdiv(rows, config.block_m), batch)](
        q, k, values, result, mean, scale * LOG2E, heads, rows, keys, head_dim, values.shape[3],
        *strides.values,
        HEAD_DIM=head_dim, VALUE_DIM=values.shape[3], ALIGN=strides.align, PRECISION=config.precision,
        WITH_OUTPUT=out is not None, ONE_GROUP=heads <= config.heads, HEADS=config.heads, BLOCK_M=config.block_m,
        BLOCK_N1=config.block_n[0], BLOCK_N2=config.block_n[1], BLOCK_D=config.block_d, num_warps=config.num_warps,
        num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
