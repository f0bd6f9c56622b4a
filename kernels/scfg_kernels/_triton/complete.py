r"""Completion of all layers of a call: one launch per product S x (columns), on tensor cores.

    official   Y = S C,    X = (Y + (R - 1) S Y) / R              2 products
    paper      Y_1 = S C,  Y_(r+1) = S (C + Y_r),  X = Y_R / R    R products

A program has BLOCK_M rows of one sample's S in one layer, and BLOCK_T text tokens; of an unconditional sample the start
token alone. It forms the transpose, Y^T = C^T S^T: X and every Y are stored token by token, and S is the operand whose
rows are contiguous along the sum, as tensor cores want it. One TF32 product, sums in fp32, one rounding at the end.
Bytes: S once per product and BLOCK_T tokens, C and each Y once per block of rows, X once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._results import completed, layers_by_size
from ._device import DeviceLimits, copy_stages, current_limits, device_guard


@triton.jit
def pointer_at(layers, index):
    """The index-th of a tuple of pointers."""
    chosen = layers[0]
    for other in tl.static_range(1, len(layers)):
        chosen = tl.where(index == other, layers[other], chosen)
    return chosen


@triton.jit
def _columns(
    self_map, cross_map, previous, current, out, row, first, n, columns, own, others, c_stride_n, c_stride_t,
    FIRST: tl.constexpr, LAST: tl.constexpr, PAPER: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One product for some rows and text tokens; the last one stores X, the others what the next one multiplies."""
    column = first + tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, row.shape[0]], tl.float32)
    for start in tl.range(0, n, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        mask = (column < columns)[:, None] & (inner < n)[None, :]
        if FIRST:
            at = cross_map + column[:, None] * c_stride_t + inner[None, :] * c_stride_n
        else:
            at = previous + column[:, None] * n + inner[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        inside = (row < n)[:, None] & (inner < n)[None, :]
        s = tl.load(self_map + row[:, None] * n + inner[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.dot(x, tl.trans(s), total, input_precision=PRECISION)
    mask = (column < columns)[:, None] & (row < n)[None, :]
    place = column[:, None] * n + row[None, :]
    if LAST:
        if not FIRST and not PAPER:
            total = own * tl.load(previous + place, mask=mask, other=0.0) + others * total
        else:
            total = others * total
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
    else:
        if PAPER:
            at = cross_map + column[:, None] * c_stride_t + row[None, :] * c_stride_n
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(current + place, total, mask=mask)


@triton.jit(do_not_specialize=["sizes", "tokens", "samples", "unconditional"])
def complete_kernel(
    self_maps, cross_maps, previous, current, token_out, start_out, sizes, tokens, samples, unconditional, own, others,
    c_row, FIRST: tl.constexpr, LAST: tl.constexpr, PAPER: tl.constexpr, COUNTS: tl.constexpr, ALIGN: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Layers of one size are neighbours in `self_maps` and `cross_maps`; COUNTS says how many there are of each size.
    `previous` and `current`: [layers of all sizes, samples, tokens, n], what a product multiplies and leaves."""
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    n = sizes[0] * ALIGN
    layer, before, between = block * 0, block * 0, sample * 0
    number, row_block = layer, block
    tokens_at, start_at = token_out[0], start_out[0]
    for size in tl.static_range(len(COUNTS)):
        length = sizes[size] * ALIGN
        row_blocks = tl.cdiv(length, BLOCK_M)
        here = block >= before
        n = tl.where(here, length, n)
        number = tl.where(here, (block - before) // row_blocks, number)
        row_block = tl.where(here, (block - before) % row_blocks, row_block)
        tokens_at = tl.where(here, token_out[size], tokens_at)
        start_at = tl.where(here, start_out[size], start_at)
        if size > 0:
            layer = tl.where(here, layer + COUNTS[size - 1], layer)
            between += tl.where(here, COUNTS[size - 1] * samples * tokens * (sizes[size - 1] * ALIGN), 0)
        before += COUNTS[size] * row_blocks
    between += (number * samples + sample) * tokens * n
    self_map = pointer_at(self_maps, layer + number) + sample * n * n
    cross_map = pointer_at(cross_maps, layer + number) + sample * n * c_row
    if TOKEN_MAJOR:
        cross_map = pointer_at(cross_maps, layer + number) + sample * n * tokens
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(2) * BLOCK_T
    if sample >= unconditional:
        out = tokens_at + (number * (samples - unconditional) + sample - unconditional) * tokens * n
        _columns(
            self_map, cross_map, previous + between, current + between, out, row, first, n, tokens, own, others,
            1 if TOKEN_MAJOR else c_row, n if TOKEN_MAJOR else 1, FIRST, LAST, PAPER, BLOCK_K, BLOCK_T,
            PRECISION,
        )  # fmt: skip
    elif first == 0:
        out = start_at + (number * unconditional + sample) * n
        _columns(
            self_map, cross_map, previous + between, current + between, out, row, first, n, 1, own, others,
            1 if TOKEN_MAJOR else c_row, n if TOKEN_MAJOR else 1, FIRST, LAST, PAPER, BLOCK_K, 16,
            PRECISION,
        )  # fmt: skip


@dataclass(frozen=True)
class CompleteConfig:
    """Tiles: rows of S, how many of its columns at a time, text tokens; how products are formed, on AMD in fp32: gfx950
    has no TF32; and the options of a launch."""

    block_m: int
    block_k: int
    block_t: int
    num_warps: int
    num_stages: int
    precision: str = "tf32"


def complete_config(rows: int, tokens: int, limits: DeviceLimits) -> CompleteConfig:
    """Tiles for `rows` of all samples and layers: 64, if that leaves every multiprocessor a program, else 32."""
    amd = limits.arch.startswith("gfx")
    return CompleteConfig(
        block_m=64 if rows >= 64 * limits.multiprocessors else 32,
        block_k=32,
        block_t=max(16, min(128, triton.next_power_of_2(tokens))),
        num_warps=4,
        num_stages=2 if amd else 3,
        precision="ieee" if amd else "tf32",
    )


def factors(fidelity: str, powers: int) -> tuple[int, float, float]:
    """Products, and the factors of Y and S Y in the last one."""
    if fidelity == "paper":
        return powers, 0.0, 1.0 / powers
    return (2 if powers > 1 else 1), 1.0 / powers, (powers - 1.0) / powers if powers > 1 else 1.0


def launch(
    self_maps: Sequence[torch.Tensor],
    cross_maps: Sequence[torch.Tensor],
    unconditional: int,
    fidelity: str,
    powers: int,
    config: CompleteConfig | None = None,
) -> list[torch.Tensor]:
    """Completed token maps of every size, then start maps of every size; `config` overrides the choice."""
    groups = layers_by_size(self_maps)
    results = completed(self_maps, cross_maps, unconditional)
    batch, _, tokens = cross_maps[0].shape
    order = [index for _, group in groups for index in group]
    sizes, counts = tuple(n for n, _ in groups), tuple(len(group) for _, group in groups)
    if batch == 0 or 0 in sizes:
        return results
    own = tuple(self_maps[i].contiguous() for i in order)
    cross = tuple(cross_maps[i] for i in order)
    token_major = all(c.mT.is_contiguous() for c in cross) and tokens > 1
    c_row = cross[0].stride(1)
    rows = all(c.stride() == (c.shape[1] * c_row, c_row, 1) for c in cross)
    if not token_major and not (rows and c_row >= tokens):
        cross, c_row = tuple(c.contiguous() for c in cross), tokens
    products, first, second = factors(fidelity, powers)
    total = sum(n * count for n, count in zip(sizes, counts, strict=True))
    with device_guard(own[0].device):
        config = config or complete_config(total * batch, tokens, current_limits())
        align = math.gcd(16, *sizes)
        blocks = sum(count * triton.cdiv(n, config.block_m) for n, count in zip(sizes, counts, strict=True))
        scratch = [
            torch.empty(total * batch * tokens, dtype=torch.float32, device=own[0].device)
            for _ in range(min(products - 1, 2))
        ]
        for product in range(products):
            previous = scratch[(product + 1) % 2] if product and len(scratch) > 1 else scratch[0] if scratch else own[0]
            complete_kernel[(blocks, batch, triton.cdiv(tokens, config.block_t))](
                own, cross, previous, scratch[product % len(scratch)] if scratch else own[0],
                tuple(results[: len(sizes)]), tuple(results[len(sizes) :]), tuple(n // align for n in sizes), tokens,
                batch, unconditional, first, second, c_row, FIRST=product == 0, LAST=product == products - 1,
                PAPER=fidelity == "paper", COUNTS=counts, ALIGN=align, TOKEN_MAJOR=token_major,
                BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_T=config.block_t, PRECISION=config.precision,
                num_warps=config.num_warps, num_stages=copy_stages(config.num_stages),
            )  # fmt: skip
    return results
