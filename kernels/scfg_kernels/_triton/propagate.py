r"""Head-mean attention applied to columns, two sweeps over the keys in one launch and no N x N map.

    sweep 1, per tile of keys:  m_h[n] = max_t s_h[n, t],   l_h[n] = sum_t 2^(s_h[n, t] - m_h[n])
    sweep 2, per tile of keys:  Y[n] += (1/H sum_h 2^(s_h[n, t] - m_h[n]) / l_h[n]) X[t]

with s_h = scale log2(e) q_h k_h^T in fp32, for a group of HEADS heads at once; queries, maxima and sums stay in
registers. Heads are added up before the product with X, which is therefore one product per group and not one per head.
It is formed in fp32 (three TF32 products on NVIDIA): the argmax over the columns reads the last bits. Columns are two
tiles side by side (77 = 64 + 16).

Program (i, b, j) takes BLOCK_M query rows of sample b and up to 128 columns. Bytes: Q and Y once per 128 columns; K
twice and X once per row block and group of heads, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import PropagateConfig, device_guard, head_widths, propagate_config
from ..attention_map import map_dtype
from ._attention import LOG2E, common_strides, load_tile, masked_scores, rows_first
from ._device import current_limits


@triton.jit
def _column_tile(x, key, column, keys, columns, x_stride_n, x_stride_t):
    """[BLOCK_N, columns] of X in fp32, zero outside."""
    inside = (key[:, None] < keys) & (column[None, :] < columns)
    return tl.load(x + key[:, None] * x_stride_n + column[None, :] * x_stride_t, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_columns(out, row, column, values, rows, columns):
    tl.store(out + row * columns + column[None, :], values, mask=(row < rows) & (column[None, :] < columns))


@triton.jit
def propagate_kernel(
    q, k, x, out, scale, heads, rows, keys, columns,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, x_stride_b, x_stride_n, x_stride_t,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    COLUMNS_1: tl.constexpr, COLUMNS_2: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    q += batch * q_stride_b * ALIGN
    k += batch * k_stride_b * ALIGN
    x += batch * x_stride_b
    out += batch * rows * columns
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column1 = tl.program_id(2) * (BLOCK_T1 + BLOCK_T2) + tl.arange(0, BLOCK_T1)
    out1 = tl.zeros([BLOCK_M, BLOCK_T1], tl.float32)
    if BLOCK_T2 > 0:
        column2 = tl.program_id(2) * (BLOCK_T1 + BLOCK_T2) + BLOCK_T1 + tl.arange(0, BLOCK_T2)
        out2 = tl.zeros([BLOCK_M, BLOCK_T2], tl.float32)

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
        for start in tl.range(0, keys, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            p = masked_scores(
                q1, q2, k, head, key, scale, heads, keys, k_stride_h, k_stride_n,
                COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN, PRECISION,
            )  # fmt: skip  # [HEADS, BLOCK_M, BLOCK_N]
            previous = top
            top = tl.maximum(top, tl.max(p, 2))  # finite: a tile has at least one key
            total = total * tl.exp2(previous - top) + tl.sum(tl.exp2(p - top[:, :, None]), 2)

        weight = tl.where(head[:, None] < heads, 1.0 / total, 0.0)[:, :, None]
        for start in tl.range(0, keys, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            p = masked_scores(
                q1, q2, k, head, key, scale, heads, keys, k_stride_h, k_stride_n,
                COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN, PRECISION,
            )  # fmt: skip
            share = tl.sum(tl.exp2(p - top[:, :, None]) * weight, 0)  # [BLOCK_M, BLOCK_N]
            tile = _column_tile(x, key, column1, keys, columns, x_stride_n, x_stride_t)
            out1 = tl.dot(share, tile, out1, input_precision=PRECISION)
            if BLOCK_T2 > 0:
                tile = _column_tile(x, key, column2, keys, columns, x_stride_n, x_stride_t)
                out2 = tl.dot(share, tile, out2, input_precision=PRECISION)

    _store_columns(out, row[:, None], column1, out1 / heads, rows, columns)
    if BLOCK_T2 > 0:
        _store_columns(out, row[:, None], column2, out2 / heads, rows, columns)


def launch(
    q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float, config: PropagateConfig | None = None
) -> torch.Tensor:
    """Y [B, N, T] in fp32; `config` overrides the choice."""
    batch, heads, rows, head_dim = q.shape
    keys, columns = x.shape[1:]
    out = torch.empty((batch, rows, columns), dtype=map_dtype(q.dtype), device=q.device)
    if out.numel() == 0:
        return out
    with device_guard(q.device):
        config = config or propagate_config(batch, heads, rows, columns, head_dim, q.dtype, current_limits())
        strides, widths = common_strides(q, k), head_widths(head_dim)
        grid = (triton.cdiv(rows, config.block_m), batch, triton.cdiv(columns, sum(config.block_t)))
        propagate_kernel[grid](
            q, k, x, out, scale * LOG2E, heads, rows, keys, columns, *strides.values, *x.stride(),
            HEAD_DIM=head_dim, ALIGN=strides.align, PRECISION=config.precision, HEADS=config.heads,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_T1=config.block_t[0], BLOCK_T2=config.block_t[1],
            COLUMNS_1=widths[0], COLUMNS_2=widths[1], num_warps=config.num_warps, num_stages=config.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out
