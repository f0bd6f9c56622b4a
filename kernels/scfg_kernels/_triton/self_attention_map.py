r"""Attention with its head-mean map, one launch in two parts: self-attention, or T > 96 text tokens.

The first tickets (`_order`) are flash attention of one head and a block of rows each (part 1 of `_flash`): O, and m and
w of the softmax to scratch. Each of the others is a tile of S (part 2), sums over the heads and stores it once; it
waits for all heads of its rows.

Bytes: O and S once; K and V once per block of rows, and K once more in part 2; Q once, and once more per tile of keys;
m and w are 8 B H N bytes, written once and read once per tile of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import FlashConfig, head_widths
from ._attention import LOG2E, common_strides
from ._device import copy_stages
from ._flash import attend_rows, map_tile, store_columns
from ._order import announce, counters, leave, take_ticket, wait


@triton.jit
def self_attention_map_kernel(
    q, k, v, out, mean, top, weight, counters, scale, samples, heads, rows, keys,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, o_stride_b, o_stride_h, o_stride_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WITH_OUTPUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAP_N: tl.constexpr,
    COLUMNS_1: tl.constexpr, COLUMNS_2: tl.constexpr, VALUES_1: tl.constexpr, VALUES_2: tl.constexpr,
    LENGTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ticket = take_ticket(counters)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    attention = samples * row_blocks * heads
    tiles = tl.cdiv(keys, MAP_N)
    is_attention = ticket < attention
    block = ticket // heads if is_attention else (ticket - attention) // tiles  # of rows, of all samples
    batch = (block // row_blocks).to(tl.int64)
    row = block % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q += batch * q_stride_b * ALIGN
    k += batch * k_stride_b * ALIGN
    top += batch * heads * rows
    weight += batch * heads * rows
    if is_attention:
        head = ticket % heads
        own_top, own_weight, out1, out2 = attend_rows(
            q + head * (q_stride_h * ALIGN), k + head * (k_stride_h * ALIGN),
            v + (batch * v_stride_b + head * v_stride_h) * ALIGN,
            row, rows, keys, scale, q_stride_n, k_stride_n, v_stride_n, HEAD_DIM, VALUE_DIM, ALIGN, PRECISION,
            WITH_OUTPUT, BLOCK_N, COLUMNS_1, COLUMNS_2, VALUES_1, VALUES_2,
        )  # fmt: skip
        tl.store(top + head * rows + row, own_top, mask=row < rows)
        tl.store(weight + head * rows + row, own_weight / heads, mask=row < rows)
        announce(counters + 2 + block)
        if WITH_OUTPUT:
            out += (batch * o_stride_b + head * o_stride_h) * ALIGN
            store_columns(out, out1 * own_weight[:, None], row, rows, o_stride_n, 0, VALUES_1, VALUE_DIM, ALIGN)
            if VALUES_2 > 0:
                store_columns(
                    out, out2 * own_weight[:, None], row, rows, o_stride_n, VALUES_1, VALUES_2, VALUE_DIM, ALIGN
                )
    else:
        key = (ticket - attention) % tiles * MAP_N + tl.arange(0, MAP_N)
        wait(counters + 2 + block, heads)
        tile = map_tile(
            q, k, top, weight, row, key, heads, rows, keys, scale, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
            HEAD_DIM, ALIGN, PRECISION, COLUMNS_1, COLUMNS_2, STAGES,
        )  # fmt: skip
        pointers = mean + (batch * rows + row[:, None]) * keys + key[None, :]
        tl.store(pointers, tile, mask=(row[:, None] < rows) & (key[None, :] < keys))
    leave(counters, counters + 1, attention + samples * row_blocks * tiles, LENGTH)


def run_two_parts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    out: torch.Tensor | None,
    mean: torch.Tensor,
    scale: float,
    config: FlashConfig,
) -> None:
    """Fill `mean` [B, N, T], and `out` [B, H, N, dv] unless it is None."""
    samples, heads, rows, head_dim = q.shape
    keys = k.shape[2]
    values, result = (k, q) if v is None or out is None else (v, out)  # placeholders, not read
    strides = common_strides(q, k, values, result)
    columns, widths = head_widths(head_dim), head_widths(values.shape[3])
    blocks = samples * triton.cdiv(rows, config.block_m)
    stages = copy_stages(config.num_stages)
    top, weight = torch.empty((2, samples, heads, rows), dtype=torch.float32, device=q.device)
    length = triton.next_power_of_2(2 + blocks)
    with counters(q.device, length) as zeros:
        self_attention_map_kernel[(blocks * (heads + triton.cdiv(keys, config.map_n)),)](
            q, k, values, result, mean, top, weight, zeros, scale * LOG2E, samples, heads, rows, keys, *strides.values,
            HEAD_DIM=head_dim, VALUE_DIM=values.shape[3], ALIGN=strides.align, PRECISION=config.precision,
            WITH_OUTPUT=out is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n, MAP_N=config.map_n,
            COLUMNS_1=columns[0], COLUMNS_2=columns[1], VALUES_1=widths[0], VALUES_2=widths[1], LENGTH=length,
            STAGES=stages, num_warps=config.num_warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
