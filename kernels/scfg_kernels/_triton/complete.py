r"""Completion of the cross-attention maps: products S x (columns), on tensor cores, all in one launch.

    official   Y = S C,    X = (Y + (R - 1) S Y) / R              2 products
    paper      Y_1 = S C,  Y_(r+1) = S (C + Y_r),  X = Y_R / R    R products

A program has BLOCK_M rows of S of one sample and up to 128 columns as two tiles side by side (77 = 64 + 16), or, for an
unconditional sample, its start column alone. A product needs all rows of the one before, so the products are stages of
one launch: tickets (`_order`) of a later product are higher, and wait for the row blocks of their sample. Where one
program has all rows (N <= 64), nobody waits and S stays in registers.

Products are three TF32 products each, as accurate as fp32: the argmax reads the last bits; those of the start column
alone are sums in fp32. Loads are one tile ahead, in registers: an asynchronous copy of fp32 is read from shared memory
with three-way bank conflicts. One rounding, to the dtype of S, at the end. Results between products are fp32, [N, T]
with rows padded to whole sectors, or [N]. Bytes: S once per product and 128 columns, C and each Y once per block of
rows, X once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import CompleteConfig, complete_config, device_guard, refuse
from ._columns import column_tiles, load_matrix, load_operand, row_sums, store_matrix, store_product
from ._device import current_limits
from ._order import announce, counters, leave, take_ticket, wait


@triton.jit
def _product(
    self_map, operand, row, first, n, columns, s_stride, stride,
    BLOCK_K: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr, PRECISION: tl.constexpr,
    SCALAR: tl.constexpr,
):  # fmt: skip
    """Rows of S times columns first .. of `operand` [n, columns], in two tiles (zeros if the second has no width). The
    wide tile is multiplied last: Triton spreads the warps over the columns if that product has more of them than rows,
    and over the rows otherwise, and the other product follows. A few rows in every warp would be computed by each."""
    BLOCK_M: tl.constexpr = row.shape[0]
    AHEAD_2: tl.constexpr = BLOCK_M != 32  # there the registers do not hold another tile
    column1, column2 = column_tiles(first, BLOCK_T1, BLOCK_T2)
    total1 = tl.zeros([BLOCK_M, BLOCK_T1], tl.float32)
    total2 = tl.zeros([BLOCK_M, column2.shape[0]], tl.float32)
    inner = tl.arange(0, BLOCK_K)
    s = load_matrix(self_map, row, inner, s_stride, 1, n, n)
    x1 = load_operand(operand, inner, column1, stride, 1, n, columns, SCALAR)
    if AHEAD_2:
        x2 = load_operand(operand, inner, column2, stride, 1, n, columns, SCALAR)
    for start in tl.range(BLOCK_K, n + BLOCK_K, BLOCK_K):  # the loads of the next tile are under way meanwhile
        inner = start + tl.arange(0, BLOCK_K)
        next_s = load_matrix(self_map, row, inner, s_stride, 1, n, n)
        next_x1 = load_operand(operand, inner, column1, stride, 1, n, columns, SCALAR)
        if AHEAD_2:
            next_x2 = load_operand(operand, inner, column2, stride, 1, n, columns, SCALAR)
        if BLOCK_T2 > 0:
            if not AHEAD_2:
                x2 = load_operand(operand, inner - BLOCK_K, column2, stride, 1, n, columns, SCALAR)
            total2 = tl.dot(s, x2, total2, input_precision=PRECISION)
        total1 = tl.dot(s, x1, total1, input_precision=PRECISION)
        s = next_s
        x1 = next_x1
        if AHEAD_2:
            x2 = next_x2
    return total1, total2


@triton.jit
def _column_product(self_map, operand, row, n, s_stride, stride, BLOCK_K: tl.constexpr):
    """Rows of S times one column, [BLOCK_M, 1], in fp32: a tensor core would multiply 15 columns of zeros beside it.
    BLOCK_K is at least the number of threads, else every warp loads the column."""
    BLOCK_M: tl.constexpr = row.shape[0]
    parts = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, n, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        s = load_matrix(self_map, row, inner, s_stride, 1, n, n)
        x = tl.load(operand + inner * stride, mask=inner < n, other=0.0).to(tl.float32)
        parts += s * x[None, :]
    return row_sums(parts)[:, None]


@triton.jit
def _start_stage(
    self_map, cross_map, previous, current, out, row, product, products, n, own, others, s_stride, c_stride,
    PAPER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_stage` of the start column alone, whose Y is a vector."""
    if product == 0:
        total = _column_product(self_map, cross_map, row, n, s_stride, c_stride, BLOCK_K)
    else:
        total = _column_product(self_map, previous, row, n, s_stride, 1, BLOCK_K)
    store_product(
        total, total, cross_map, previous, current, out, row, 0, product, products, n, 1, 1, own, others,
        c_stride, 1, 1, PAPER, 1, 0,
    )  # fmt: skip


@triton.jit
def _stage(
    self_map, cross_map, previous, current, out, row, first, product, products, n, columns, y_columns, own, others,
    s_stride, c_stride, y_stride,
    PAPER: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One product for some rows and columns; the last one stores X, the others what the next one multiplies."""
    if product == 0:
        total1, total2 = _product(
            self_map, cross_map, row, first, n, columns, s_stride, c_stride,
            BLOCK_K, BLOCK_T1, BLOCK_T2, PRECISION, True,
        )  # fmt: skip
    else:
        total1, total2 = _product(
            self_map, previous, row, first, n, y_columns, s_stride, y_stride,
            BLOCK_K, BLOCK_T1, BLOCK_T2, PRECISION, False,
        )  # fmt: skip
    store_product(
        total1, total2, cross_map, previous, current, out, row, first, product, products, n, columns, y_columns,
        own, others, c_stride, 1, y_stride, PAPER, BLOCK_T1, BLOCK_T2,
    )  # fmt: skip


@triton.jit
def complete_kernel(
    self_map, cross_map, between, token_out, start_out, counters, products, n, tokens, samples, unconditional,
    own, others, s_stride_b, s_stride_n, c_stride_b, c_stride_n, y_stride,
    PAPER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    PRECISION: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """`between`: [2, samples, n, y_stride], what the next product multiplies. X = own Y_previous + others S Y_previous
    in the last product."""
    row_blocks = tl.cdiv(n, BLOCK_M)
    token_blocks = tl.cdiv(tokens, BLOCK_T1 + BLOCK_T2)
    start_jobs = row_blocks * unconditional
    jobs = start_jobs + row_blocks * (samples - unconditional) * token_blocks
    ticket = take_ticket(counters)
    product = ticket // jobs
    job = ticket % jobs
    is_start = job < start_jobs
    sample = job // row_blocks if is_start else unconditional + (job - start_jobs) // (row_blocks * token_blocks)
    first = (job - start_jobs) // row_blocks % token_blocks * (BLOCK_T1 + BLOCK_T2)
    row = job % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = sample.to(tl.int64)
    self_map += sample * s_stride_b
    cross_map += sample * c_stride_b
    previous = between + ((product + 1) % 2 * samples + sample) * n * y_stride
    current = between + (product % 2 * samples + sample) * n * y_stride
    if product > 0:
        wait(counters + 2 + (product - 1) * samples + sample, row_blocks if is_start else row_blocks * token_blocks)
    if is_start:
        _start_stage(
            self_map, cross_map, previous, current, start_out + sample * n, row, product, products, n,
            own, others, s_stride_n, c_stride_n, PAPER, 4 * BLOCK_K,
        )  # fmt: skip
    else:
        _stage(
            self_map, cross_map, previous, current, token_out + (sample - unconditional) * tokens * n, row, first,
            product, products, n, tokens, y_stride, own, others, s_stride_n, c_stride_n, y_stride,
            PAPER, BLOCK_K, BLOCK_T1, BLOCK_T2, PRECISION,
        )  # fmt: skip
    if product < products - 1:
        announce(counters + 2 + product * samples + sample)
    leave(counters, counters + 1, products * jobs, LENGTH)


@triton.jit
def _whole_product(s, y, PRECISION: tl.constexpr, SWAPPED: tl.constexpr):
    """S y, or its transpose from that of y."""
    return tl.dot(y, tl.trans(s), input_precision=PRECISION) if SWAPPED else tl.dot(s, y, input_precision=PRECISION)


@triton.jit
def _completed(
    s, cross_map, out, first, products, n, columns, own, others, c_stride,
    PAPER: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """X at all rows and BLOCK_T columns of a sample. SWAPPED: as X^T = Y^T S^T, where what a product leaves is the left
    operand of the next one, which `wgmma` takes from registers."""
    row = tl.arange(0, s.shape[0])
    column = first + tl.arange(0, BLOCK_T)
    if SWAPPED:
        c = load_matrix(cross_map, column, row, 1, c_stride, columns, n)
    else:
        c = load_operand(cross_map, row, column, c_stride, 1, n, columns, True)
    y = tl.zeros_like(c)
    total = _whole_product(s, c, PRECISION, SWAPPED)
    for _ in tl.range(1, products):
        y = total + c if PAPER else total
        total = _whole_product(s, y, PRECISION, SWAPPED)
    result = own * y + others * total
    if SWAPPED:
        store_matrix(out, column, row, result, n, 1, columns, n)
    else:
        # As [columns, n], like the other case: stores share the layout of loads that have their shape and order, and C,
        # [row, column] in memory, would be loaded with four columns of a row a thread, a sector each.
        store_matrix(out, column, row, tl.trans(result), n, 1, columns, n)


@triton.jit
def _completed_start(s, cross_map, out, products, n, own, others, c_stride, PAPER: tl.constexpr):
    """X at all rows of the start column, in fp32 sums. Not by `tl.sum`: with fused multiply-adds, the copies of a sum
    that lanes hold differ in the last bit."""
    row = tl.arange(0, s.shape[0])
    c = tl.load(cross_map + row * c_stride, mask=row < n, other=0.0).to(tl.float32)
    y = tl.zeros_like(c)
    total = row_sums(s * c[None, :])
    for _ in tl.range(1, products):
        y = total + c if PAPER else total
        total = row_sums(s * y[None, :])
    tl.store(out + row, (own * y + others * total).to(out.dtype.element_ty), mask=row < n)


@triton.jit
def complete_whole_kernel(
    self_map, cross_map, token_out, start_out, products, n, tokens, unconditional, own, others,
    s_stride_b, s_stride_n, c_stride_b, c_stride_n,
    PAPER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    PRECISION: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """All rows and all products in one program: S, C and every Y stay in registers."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    s = load_matrix(self_map + sample * s_stride_b, row, row, s_stride_n, 1, n, n)
    cross_map += sample * c_stride_b
    if sample < unconditional:
        if tl.program_id(1) == 0:
            _completed_start(s, cross_map, start_out + sample * n, products, n, own, others, c_stride_n, PAPER)
    else:
        out = token_out + (sample - unconditional) * tokens * n
        first = tl.program_id(1) * (BLOCK_T1 + BLOCK_T2)
        _completed(
            s, cross_map, out, first, products, n, tokens, own, others, c_stride_n, PAPER, BLOCK_T1, PRECISION, SWAPPED,
        )  # fmt: skip
        if BLOCK_T2 > 0:
            _completed(
                s, cross_map, out, first + BLOCK_T1, products, n, tokens, own, others, c_stride_n, PAPER, BLOCK_T2,
                PRECISION, SWAPPED,
            )  # fmt: skip


def factors(fidelity: str, powers: int) -> tuple[int, float, float]:
    """Products, and the factors of Y and S Y in the last one. Official with one power is S C itself: 1 Y + 0 S Y."""
    if fidelity == "paper":
        return powers, 0.0, 1.0 / powers
    return 2, 1.0 / powers, (powers - 1.0) / powers


def launch(
    self_map: torch.Tensor,
    cross_map: torch.Tensor,
    unconditional: int,
    fidelity: str,
    powers: int,
    config: CompleteConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Completed token maps [B, T, N] and start maps [U, N]; `config` overrides the choice."""
    batch, n, tokens = cross_map.shape
    conditional = batch - unconditional
    token_out = self_map.new_empty((conditional, tokens, n))
    start_out = self_map.new_empty((unconditional, n))
    if batch == 0 or n == 0:
        return token_out, start_out
    products, own, others = factors(fidelity, powers)
    if config is not None:
        refuse("complete", config, config.reasons(n))
    with device_guard(self_map.device):
        config = config or complete_config(conditional, n, tokens, current_limits())
        token_blocks = triton.cdiv(tokens, sum(config.block_t))
        shape: dict[str, Any] = {
            "PAPER": fidelity == "paper", "BLOCK_M": config.block_m,
            "BLOCK_T1": config.block_t[0], "BLOCK_T2": config.block_t[1], "PRECISION": config.precision,
            "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip
        strides = self_map.stride(0), self_map.stride(1), cross_map.stride(0), cross_map.stride(1)
        if n <= config.block_m:
            complete_whole_kernel[(batch, token_blocks)](
                self_map, cross_map, token_out, start_out, products, n, tokens, unconditional, own, others, *strides,
                SWAPPED=config.swapped, **shape,
            )  # fmt: skip
            return token_out, start_out
        padded = -(-tokens // 16) * 16
        between = torch.empty((2, batch, n, padded), dtype=torch.float32, device=self_map.device)
        row_blocks = triton.cdiv(n, config.block_m)
        length = triton.next_power_of_2(2 + products * batch)
        with counters(self_map.device, length) as zeros:
            complete_kernel[(products * row_blocks * (unconditional + conditional * token_blocks),)](
                self_map, cross_map, between, token_out, start_out, zeros, products, n, tokens, batch, unconditional,
                own, others, *strides, padded, BLOCK_K=config.block_k, LENGTH=length, **shape,
            )  # fmt: skip
    return token_out, start_out
