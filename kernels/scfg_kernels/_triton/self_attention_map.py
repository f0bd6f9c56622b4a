r"""Attention with its head-mean map in two sweeps over the keys, one launch: self-attention, or T > 96 text tokens.

    sweep 1, per tile of keys:  O_h by online softmax, m_h[n] = max_t s_h[n, t], l_h[n] = sum_t 2^(s_h[n, t] - m_h[n])
    sweep 2, per tile of keys:  S[n, t] = 1/H  sum_h 2^(s_h[n, t] - m_h[n]) / l_h[n]

with s_h = scale log2(e) q_h k_h^T in fp32, for a group of HEADS heads at once. A row of scores of every head does not
fit in registers, so the second sweep forms the scores again; queries, maxima and sums stay in registers for both.
Further groups of heads add their share to S in memory, in order. Queries and O are two tiles side by side (160 = 128 +
32 columns).

Program (i, b) takes BLOCK_M query rows of sample b. Bytes: Q and O once, S once and for each further group of heads
twice more; K twice and V once per row block, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import AttentionConfig, head_widths
from ._attention import LOG2E, common_strides, load_tile, masked_scores, rows_first, store_tile


@triton.jit
def self_attention_map_kernel(
    q, k, v, out, mean, scale, heads, rows, keys,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, o_stride_b, o_stride_h, o_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WITH_OUTPUT: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS_1: tl.constexpr, COLUMNS_2: tl.constexpr, VALUES_1: tl.constexpr, VALUES_2: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    q += batch * q_stride_b * ALIGN
    k += batch * k_stride_b * ALIGN
    v += batch * v_stride_b * ALIGN
    out += batch * o_stride_b * ALIGN
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean += (batch * rows + row[:, None]) * keys

    for first in tl.range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        q1 = rows_first(load_tile(q, head, row, 0, heads, rows, q_stride_h, q_stride_n, COLUMNS_1, HEAD_DIM, ALIGN))
        q2 = q1
        if COLUMNS_2 > 0:
            q2 = rows_first(
                load_tile(q, head, row, COLUMNS_1, heads, rows, q_stride_h, q_stride_n, COLUMNS_2, HEAD_DIM, ALIGN)
            )
        top = tl.full([HEADS, BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([HEADS, BLOCK_M], tl.float32)
        if WITH_OUTPUT:
            out1 = tl.zeros([HEADS, BLOCK_M, VALUES_1], tl.float32)
            if VALUES_2 > 0:
                out2 = tl.zeros([HEADS, BLOCK_M, VALUES_2], tl.float32)
        for start in tl.range(0, keys, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            p = masked_scores(
                q1, q2, k, head, key, scale, heads, keys, k_stride_h, k_stride_n,
                COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN, PRECISION,
            )  # fmt: skip  # [HEADS, BLOCK_M, BLOCK_N]
            previous = top
            top = tl.maximum(top, tl.max(p, 2))  # finite: a tile has at least one key
            p = tl.exp2(p - top[:, :, None])
            shrink = tl.exp2(previous - top)
            total = total * shrink + tl.sum(p, 2)
            if WITH_OUTPUT:
                weights = p.to(v.dtype.element_ty)
                tile = load_tile(v, head, key, 0, heads, keys, v_stride_h, v_stride_n, VALUES_1, VALUE_DIM, ALIGN)
                out1 = tl.dot(weights, rows_first(tile), out1 * shrink[:, :, None], input_precision=PRECISION)
                if VALUES_2 > 0:
                    tile = load_tile(
                        v, head, key, VALUES_1, heads, keys, v_stride_h, v_stride_n, VALUES_2, VALUE_DIM, ALIGN
                    )
                    out2 = tl.dot(weights, rows_first(tile), out2 * shrink[:, :, None], input_precision=PRECISION)
        # Heads beyond the last one have all-equal scores; a weight of 0 keeps them out of the map.
        weight = tl.where(head[:, None] < heads, 1.0 / total, 0.0)[:, :, None]
        if WITH_OUTPUT:
            store_tile(
                out, out1 * weight, head, row, 0, heads, rows, o_stride_h, o_stride_n, VALUES_1, VALUE_DIM, ALIGN
            )
            if VALUES_2 > 0:
                store_tile(
                    out, out2 * weight, head, row, VALUES_1, heads, rows, o_stride_h, o_stride_n,
                    VALUES_2, VALUE_DIM, ALIGN,
                )  # fmt: skip

        for start in tl.range(0, keys, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            p = masked_scores(
                q1, q2, k, head, key, scale, heads, keys, k_stride_h, k_stride_n,
                COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN, PRECISION,
            )  # fmt: skip
            share = tl.sum(tl.exp2(p - top[:, :, None]) * weight, 0) / heads  # [BLOCK_M, BLOCK_N]
            inside = (row[:, None] < rows) & (key[None, :] < keys)
            share += tl.load(mean + key[None, :], mask=inside & (first > 0), other=0.0)
            tl.store(mean + key[None, :], share, mask=inside)
        tl.debug_barrier()  # the next heads add to what other threads may have written


def run_two_sweeps(
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
    values, result = (k, q) if v is None or out is None else (v, out)  # placeholders, not read
    strides = common_strides(q, k, values, result)
    columns, widths = head_widths(head_dim), head_widths(values.shape[3])
    self_attention_map_kernel[(triton.cdiv(rows, config.block_m), batch)](
        q, k, values, result, mean, scale * LOG2E, heads, rows, k.shape[2], *strides.values,
        HEAD_DIM=head_dim, VALUE_DIM=values.shape[3], ALIGN=strides.align, PRECISION=config.precision,
        WITH_OUTPUT=out is not None, HEADS=config.heads, BLOCK_M=config.block_m, BLOCK_N=config.block_n[0],
        COLUMNS_1=columns[0], COLUMNS_2=columns[1], VALUES_1=widths[0], VALUES_2=widths[1], num_warps=config.num_warps,
        num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
