r"""Head-mean attention applied to columns, Y = S X, one launch in two parts and no N x N map.

The first tickets (`_order`) find m and w of the softmax, for one head and a block of rows each (part 1 of `_flash`, no
output). Each of the others has a block of rows of Y and up to 128 columns: it waits for all heads of its rows, forms S
a tile at a time (part 2) and multiplies it with X. Heads are added up before that product, which is therefore one and
not one per head. It is formed in fp32 (three TF32 products on NVIDIA): the argmax over the columns reads the last bits.
Columns are two tiles side by side (77 = 64 + 16).

Bytes: Y once; K twice and X once per block of rows; Q once, and once more per tile of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import PropagateConfig, device_guard, head_widths, propagate_config, refuse
from ..attention_map import map_dtype
from ._attention import LOG2E, common_strides
from ._columns import column_tiles, store_matrix
from ._device import copy_stages, current_limits
from ._flash import map_product, store_statistics
from ._order import announce, counters, leave, take_ticket, wait


@triton.jit
def propagate_kernel(
    q, k, x, out, top, weight, counters, scale, samples, heads, rows, keys, columns,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, x_stride_b, x_stride_n, x_stride_t,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MAP_N: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    COLUMNS_1: tl.constexpr, COLUMNS_2: tl.constexpr,
    LENGTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ticket = take_ticket(counters)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    statistics = samples * row_blocks * heads
    column_blocks = tl.cdiv(columns, BLOCK_T1 + BLOCK_T2)
    is_statistics = ticket < statistics
    block = ticket // heads if is_statistics else (ticket - statistics) // column_blocks  # of rows, of all samples
    batch = (block // row_blocks).to(tl.int64)
    row = block % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q += batch * q_stride_b * ALIGN
    k += batch * k_stride_b * ALIGN
    top += batch * heads * rows
    weight += batch * heads * rows
    if is_statistics:
        store_statistics(
            q, k, top, weight, row, ticket % heads, heads, rows, keys, scale, q_stride_h, q_stride_n,
            k_stride_h, k_stride_n, HEAD_DIM, ALIGN, PRECISION, BLOCK_N, COLUMNS_1, COLUMNS_2,
        )  # fmt: skip
        announce(counters + 2 + block)
    else:
        first = (ticket - statistics) % column_blocks * (BLOCK_T1 + BLOCK_T2)
        out += batch * rows * columns
        wait(counters + 2 + block, heads)
        out1, out2 = map_product(
            q, k, x + batch * x_stride_b, top, weight, row, first, heads, rows, keys, columns, scale,
            q_stride_h, q_stride_n, k_stride_h, k_stride_n, x_stride_n, x_stride_t,
            HEAD_DIM, ALIGN, PRECISION, COLUMNS_1, COLUMNS_2, STAGES, MAP_N, BLOCK_T1, BLOCK_T2, True,
        )  # fmt: skip
        column1, column2 = column_tiles(first, BLOCK_T1, BLOCK_T2)
        store_matrix(out, row, column1, out1, columns, 1, rows, columns)
        if BLOCK_T2 > 0:
            store_matrix(out, row, column2, out2, columns, 1, rows, columns)
    leave(counters, counters + 1, statistics + samples * row_blocks * column_blocks, LENGTH)


def launch(
    q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float, config: PropagateConfig | None = None
) -> torch.Tensor:
    """Y [B, N, T] in fp32; `config` overrides the choice."""
    samples, heads, rows, head_dim = q.shape
    keys, columns = x.shape[1:]
    out = torch.empty((samples, rows, columns), dtype=map_dtype(q.dtype), device=q.device)
    if out.numel() == 0:
        return out
    if config is not None:
        refuse("propagate", config, config.reasons())
    with device_guard(q.device):
        config = config or propagate_config(samples, heads, rows, columns, head_dim, q.dtype, current_limits())
        strides, widths = common_strides(q, k), head_widths(head_dim)
        blocks = samples * triton.cdiv(rows, config.block_m)
        stages = copy_stages(config.num_stages)
        top, weight = torch.empty((2, samples, heads, rows), dtype=torch.float32, device=q.device)
        length = triton.next_power_of_2(2 + blocks)
        with counters(q.device, length) as zeros:
            propagate_kernel[(blocks * (heads + triton.cdiv(columns, sum(config.block_t))),)](
                q, k, x, out, top, weight, zeros, scale * LOG2E, samples, heads, rows, keys, columns, *strides.values,
                *x.stride(), HEAD_DIM=head_dim, ALIGN=strides.align, PRECISION=config.precision,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, MAP_N=config.map_n, BLOCK_T1=config.block_t[0],
                BLOCK_T2=config.block_t[1], COLUMNS_1=widths[0], COLUMNS_2=widths[1], LENGTH=length,
                STAGES=stages, num_warps=config.num_warps, num_stages=stages,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out
