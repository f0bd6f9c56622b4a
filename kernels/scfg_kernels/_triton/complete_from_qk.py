r"""Completion of the cross-attention maps from queries and keys: one launch, and no N x N map.

The products of `complete`, with tiles of S as in `propagate`. The first tickets (`_order`) find m and w of the softmax,
for one head and a block of rows each (part 1 of `_flash`). The others are the products, one after another: a block of
rows of S, formed a tile at a time (part 2), times up to 128 columns, or the start column alone of an unconditional
sample. The first product waits for all heads of its rows, a later one for all rows of the one before, of its sample. So
the scores are formed once for the softmax and once per product.

Results between products are fp32 [N, T], rows padded to whole sectors. Bytes: K once per block of rows and once more
per product; Q once, and per product once per tile of keys; C and each Y once per block of rows, X once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import PropagateConfig, device_guard, head_widths, propagate_config, refuse
from ..attention_map import map_dtype
from ._attention import LOG2E, common_strides
from ._columns import store_product
from ._device import copy_stages, current_limits
from ._flash import map_product, store_statistics
from ._order import announce, counters, leave, take_ticket, wait
from .complete import factors


@triton.jit
def _stage(
    q, k, cross_map, top, weight, previous, current, out, row, first, product, products, heads, n, columns, y_columns,
    scale, own, others, q_stride_h, q_stride_n, k_stride_h, k_stride_n, c_stride_n, c_stride_t, y_stride,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, COLUMNS_1: tl.constexpr,
    COLUMNS_2: tl.constexpr, STAGES: tl.constexpr, MAP_N: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    PAPER: tl.constexpr,
):  # fmt: skip
    """One product for some rows and columns, of C or of what the product before it left."""
    if product == 0:
        total1, total2 = map_product(
            q, k, cross_map, top, weight, row, first, heads, n, n, columns, scale,
            q_stride_h, q_stride_n, k_stride_h, k_stride_n, c_stride_n, c_stride_t,
            HEAD_DIM, ALIGN, PRECISION, COLUMNS_1, COLUMNS_2, STAGES, MAP_N, BLOCK_T1, BLOCK_T2, True,
        )  # fmt: skip
    else:
        total1, total2 = map_product(
            q, k, previous, top, weight, row, first, heads, n, n, y_columns, scale,
            q_stride_h, q_stride_n, k_stride_h, k_stride_n, y_stride, 1,
            HEAD_DIM, ALIGN, PRECISION, COLUMNS_1, COLUMNS_2, STAGES, MAP_N, BLOCK_T1, BLOCK_T2, False,
        )  # fmt: skip
    store_product(
        total1, total2, cross_map, previous, current, out, row, first, product, products, n, columns, y_columns,
        own, others, c_stride_n, c_stride_t, y_stride, PAPER, BLOCK_T1, BLOCK_T2,
    )  # fmt: skip


@triton.jit
def complete_from_qk_kernel(
    q, k, cross_map, between, token_out, start_out, top, weight, counters, products, heads, n, tokens, samples,
    unconditional, scale, own, others, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    c_stride_b, c_stride_n, c_stride_t, y_stride,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MAP_N: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr, COLUMNS_1: tl.constexpr,
    COLUMNS_2: tl.constexpr, PAPER: tl.constexpr, LENGTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`between` and the result are those of `complete_kernel`. Counters: the ticket, who has left, heads with
    statistics per block of rows, programs done per product and sample."""
    row_blocks = tl.cdiv(n, BLOCK_M)
    token_blocks = tl.cdiv(tokens, BLOCK_T1 + BLOCK_T2)
    statistics = samples * row_blocks * heads
    start_jobs = row_blocks * unconditional
    jobs = start_jobs + row_blocks * (samples - unconditional) * token_blocks
    ticket = take_ticket(counters)
    is_statistics = ticket < statistics
    product = (ticket - statistics) // jobs
    job = (ticket - statistics) % jobs
    is_start = job < start_jobs
    block = job if is_start else start_jobs + (job - start_jobs) // token_blocks  # of rows, of all samples
    block = ticket // heads if is_statistics else block
    sample = (block // row_blocks).to(tl.int64)
    row = block % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q += sample * q_stride_b * ALIGN
    k += sample * k_stride_b * ALIGN
    top += sample * heads * n
    weight += sample * heads * n
    if is_statistics:
        store_statistics(
            q, k, top, weight, row, ticket % heads, heads, n, n, scale, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
            HEAD_DIM, ALIGN, PRECISION, BLOCK_N, COLUMNS_1, COLUMNS_2,
        )  # fmt: skip
        announce(counters + 2 + block)
    else:
        cross_map += sample * c_stride_b
        previous = between + ((product + 1) % 2 * samples + sample) * n * y_stride
        current = between + (product % 2 * samples + sample) * n * y_stride
        done = counters + 2 + samples * row_blocks + sample
        if product == 0:
            wait(counters + 2 + block, heads)
        else:
            wait(done + (product - 1) * samples, row_blocks if is_start else row_blocks * token_blocks)
        if is_start:  # one column
            _stage(
                q, k, cross_map, top, weight, previous, current, start_out + sample * n, row, 0, product, products,
                heads, n, 1, 1, scale, own, others, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
                c_stride_n, c_stride_t, y_stride, HEAD_DIM, ALIGN, PRECISION, COLUMNS_1, COLUMNS_2, STAGES, MAP_N,
                16, 0, PAPER,
            )  # fmt: skip
        else:
            first = (job - start_jobs) % token_blocks * (BLOCK_T1 + BLOCK_T2)
            _stage(
                q, k, cross_map, top, weight, previous, current, token_out + (sample - unconditional) * tokens * n,
                row, first, product, products, heads, n, tokens, y_stride, scale, own, others,
                q_stride_h, q_stride_n, k_stride_h, k_stride_n, c_stride_n, c_stride_t, y_stride, HEAD_DIM, ALIGN,
                PRECISION, COLUMNS_1, COLUMNS_2, STAGES, MAP_N, BLOCK_T1, BLOCK_T2, PAPER,
            )  # fmt: skip
        if product < products - 1:
            announce(done + product * samples)
    leave(counters, counters + 1, statistics + products * jobs, LENGTH)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cross_map: torch.Tensor,
    unconditional: int,
    fidelity: str,
    powers: int,
    scale: float,
    config: PropagateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Completed token maps [B, T, N] and start maps [U, N] in fp32; `config` overrides the choice."""
    batch, heads, n, head_dim = q.shape
    tokens = cross_map.shape[2]
    conditional = batch - unconditional
    token_out = q.new_empty((conditional, tokens, n), dtype=map_dtype(q.dtype))
    start_out = q.new_empty((unconditional, n), dtype=map_dtype(q.dtype))
    if batch == 0 or n == 0:
        return token_out, start_out
    products, own, others = factors(fidelity, powers)
    if config is not None:
        refuse("complete_from_qk", config, config.reasons())
    with device_guard(q.device):
        config = config or propagate_config(batch, heads, n, tokens, head_dim, q.dtype, current_limits())
        strides, widths = common_strides(q, k), head_widths(head_dim)
        row_blocks = triton.cdiv(n, config.block_m)
        jobs = row_blocks * (unconditional + conditional * triton.cdiv(tokens, sum(config.block_t)))
        stages = copy_stages(config.num_stages)
        padded = -(-tokens // 16) * 16
        between = torch.empty((2, batch, n, padded), dtype=torch.float32, device=q.device)
        top, weight = torch.empty((2, batch, heads, n), dtype=torch.float32, device=q.device)
        length = triton.next_power_of_2(2 + batch * (row_blocks + products - 1))
        with counters(q.device, length) as zeros:
            complete_from_qk_kernel[(batch * row_blocks * heads + products * jobs,)](
                q, k, cross_map, between, token_out, start_out, top, weight, zeros, products, heads, n, tokens, batch,
                unconditional, scale * LOG2E, own, others, *strides.values, *cross_map.stride(), padded,
                HEAD_DIM=head_dim, ALIGN=strides.align, PRECISION=config.precision, BLOCK_M=config.block_m,
                BLOCK_N=config.block_n, MAP_N=config.map_n, BLOCK_T1=config.block_t[0], BLOCK_T2=config.block_t[1],
                COLUMNS_1=widths[0], COLUMNS_2=widths[1], PAPER=fidelity == "paper", LENGTH=length, STAGES=stages,
                num_warps=config.num_warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
    return token_out, start_out
