r"""Attention with its head-mean map in two sweeps over the keys, one launch: self-attention, or T > 128 text tokens.

    sweep 1, per group of HEADS heads:  O_h by online softmax, and  lse_h[n] = log2 sum_t 2^(s_h[n, t])
    sweep 2, per tile of keys:          S[n, t] = 1/H  sum_h 2^(s_h[n, t] - lse_h[n])

with s_h = scale log2(e) q_h k_h^T in fp32. A row of scores of every head does not fit in registers, so the second sweep
forms the scores again. The log-sum-exps go through memory (4 B H N bytes, written and read by the same program). O is
two tiles side by side (160 = 128 + 32 columns).

Program (i, b) takes BLOCK_M query rows of sample b. Bytes: Q twice, O and S once; K twice and V once per row block,
from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import AttentionConfig, two_widths
from ._attention import LOG2E, common_strides, head_scores, head_tile


@triton.jit
def _value_tile(
    v, head, key, heads, keys, v_stride_h, v_stride_n,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of V: [HEADS, BLOCK_N, WIDTH]."""
    column = FIRST + tl.arange(0, WIDTH)[None, None, :]
    inside = (head < heads) & (key < keys) & ((column < VALUE_DIM) | (FIRST + WIDTH <= VALUE_DIM))
    return tl.load(head_tile(v, head, key, column, v_stride_h, v_stride_n, ALIGN), mask=inside, other=0.0)


@triton.jit
def _store_output(
    out, values, head, row, heads, rows, o_stride_h, o_stride_n,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of O from [HEADS, BLOCK_M, WIDTH]."""
    column = FIRST + tl.arange(0, WIDTH)[None, None, :]
    inside = (head < heads) & (row < rows) & ((column < VALUE_DIM) | (FIRST + WIDTH <= VALUE_DIM))
    target = head_tile(out, head, row, column, o_stride_h, o_stride_n, ALIGN)
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def self_attention_map_kernel(
    q, k, v, out, mean, lse, scale, heads, rows, keys,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, o_stride_b, o_stride_h, o_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WITH_OUTPUT: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUES_1: tl.constexpr, VALUES_2: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    q += batch * q_stride_b * ALIGN
    k += batch * k_stride_b * ALIGN
    v += batch * v_stride_b * ALIGN
    out += batch * o_stride_b * ALIGN
    lse += batch * heads * rows
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :, None]  # [1, BLOCK_M, 1]

    for first in tl.range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None, None]  # [HEADS, 1, 1]
        top = tl.full([HEADS, BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([HEADS, BLOCK_M], tl.float32)
        if WITH_OUTPUT:
            out1 = tl.zeros([HEADS, BLOCK_M, VALUES_1], tl.float32)
            if VALUES_2 > 0:
                out2 = tl.zeros([HEADS, BLOCK_M, VALUES_2], tl.float32)
        for start in tl.range(0, keys, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            p = head_scores(
                q, k, head, row, key[None, :, None], heads, rows, keys, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
                HEAD_DIM, BLOCK_D, HEADS, BLOCK_M, BLOCK_N, ALIGN, PRECISION,
            )  # fmt: skip  # [HEADS, BLOCK_M, BLOCK_N]
            p = tl.where(key[None, None, :] < keys, p * scale, float("-inf"))
            previous = top
            top = tl.maximum(top, tl.max(p, 2))  # finite: a tile has at least one key
            p = tl.exp2(p - top[:, :, None])
            shrink = tl.exp2(previous - top)
            total = total * shrink + tl.sum(p, 2)
            if WITH_OUTPUT:
                weights = p.to(v.dtype.element_ty)
                tile = _value_tile(
                    v, head, key[None, :, None], heads, keys, v_stride_h, v_stride_n, 0, VALUES_1, VALUE_DIM, ALIGN
                )
                out1 = tl.dot(weights, tile, out1 * shrink[:, :, None], input_precision=PRECISION)
                if VALUES_2 > 0:
                    tile = _value_tile(
                        v, head, key[None, :, None], heads, keys, v_stride_h, v_stride_n, VALUES_1, VALUES_2,
                        VALUE_DIM, ALIGN,
                    )  # fmt: skip
                    out2 = tl.dot(weights, tile, out2 * shrink[:, :, None], input_precision=PRECISION)
        if WITH_OUTPUT:
            inverse = (1.0 / total)[:, :, None]
            _store_output(
                out, out1 * inverse, head, row, heads, rows, o_stride_h, o_stride_n, 0, VALUES_1, VALUE_DIM, ALIGN
            )
            if VALUES_2 > 0:
                _store_output(
                    out, out2 * inverse, head, row, heads, rows, o_stride_h, o_stride_n, VALUES_1, VALUES_2,
                    VALUE_DIM, ALIGN,
                )  # fmt: skip
        lse_at = lse + head * rows + row  # [HEADS, BLOCK_M, 1]
        tl.store(lse_at, (top + tl.log2(total))[:, :, None], mask=(head < heads) & (row < rows))

    tl.debug_barrier()  # the log-sum-exps are read by other threads than wrote them
    row2 = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # [BLOCK_M, 1]
    mean += (batch * rows + row2) * keys
    for start in tl.range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        share = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, heads, HEADS):
            head = first + tl.arange(0, HEADS)[:, None, None]
            p = head_scores(
                q, k, head, row, key[None, :, None], heads, rows, keys, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
                HEAD_DIM, BLOCK_D, HEADS, BLOCK_M, BLOCK_N, ALIGN, PRECISION,
            )  # fmt: skip  # [HEADS, BLOCK_M, BLOCK_N]
            # Heads beyond the last one: 2^(0 - inf) = 0.
            row_lse = tl.load(lse + head * rows + row, mask=(head < heads) & (row < rows), other=float("inf"))
            share += tl.sum(tl.exp2(p * scale - row_lse), 0)
        tl.store(mean + key[None, :], share / heads, mask=(row2 < rows) & (key[None, :] < keys))


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
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    widths = two_widths(values.shape[3])
    self_attention_map_kernel[(triton.cdiv(rows, config.block_m), batch)](
        q, k, values, result, mean, lse, scale * LOG2E, heads, rows, k.shape[2], *strides.values,
        HEAD_DIM=head_dim, VALUE_DIM=values.shape[3], ALIGN=strides.align, PRECISION="ieee",
        WITH_OUTPUT=out is not None, HEADS=config.heads, BLOCK_M=config.block_m, BLOCK_N=config.block_n[0],
        BLOCK_D=config.block_d, VALUES_1=widths[0], VALUES_2=widths[1], num_warps=config.num_warps,
        num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
