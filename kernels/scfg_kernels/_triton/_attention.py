"""Loads and stores of tiles of several heads, for attention in one sweep, and the strides of all attention kernels.

A program works on `HEADS` heads of one sample at once, one warp each: every product is a batch of small ones, softmax
rows stay inside a warp, and the sum over heads that the map needs is a sum across the warps of one program. So no head
is handed to another program, and 16 query rows are enough to keep a program busy, which matters because the captured
layers are small (256 rows).

Operands go from memory to registers and through shared memory into the layout that the tensor cores take, without bank
conflicts. Asynchronous copies would save the registers, but Triton 3.6 to 3.9 swizzles them for a batch of products as
if the batch were the row, or not at all, and every read is an 8-way conflict: 2.2 to 2.8 times the wavefronts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = math.log2(math.e)


@triton.jit
def head_tile(base, head, row, column, stride_h, stride_n, ALIGN: tl.constexpr):
    """Pointers to elements of [H, N, d]. Strides come in units of ALIGN elements, which makes them provably divisible:
    vector loads depend on it."""
    return base + head * (stride_h * ALIGN) + row * (stride_n * ALIGN) + column


@triton.jit
def load_tile(
    base, head, row, first, heads, rows, stride_h, stride_n,
    WIDTH: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + WIDTH of an operand with DIM columns: [row, head, column], zero outside; head and row
    are vectors.

    The head is the *middle* axis, and callers permute it to the front. A tile whose first axis is the head is put into
    shared memory with a swizzle that counts heads instead of rows, and every `ldmatrix` has an 8-way bank conflict.
    """
    column = first + tl.arange(0, WIDTH)[None, None, :]
    inside = (head[None, :, None] < heads) & (row[:, None, None] < rows) & (column < DIM)
    pointers = head_tile(base, head[None, :, None], row[:, None, None], column, stride_h, stride_n, ALIGN)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(
    base, values, head, row, first, heads, rows, stride_h, stride_n,
    WIDTH: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + WIDTH of an operand with DIM columns, from [head, row, column] in any dtype."""
    column = first + tl.arange(0, WIDTH)[None, None, :]
    inside = (head[:, None, None] < heads) & (row[None, :, None] < rows) & (column < DIM)
    target = head_tile(base, head[:, None, None], row[None, :, None], column, stride_h, stride_n, ALIGN)
    tl.store(target, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def rows_first(tile):
    """[row, head, column] -> [head, row, column]: the queries of a score, or the values."""
    return tl.permute(tile, 1, 0, 2)


@triton.jit
def columns_first(tile):
    """[row, head, column] -> [head, column, row]: the keys of a score."""
    return tl.permute(tile, 1, 2, 0)


@dataclass(frozen=True)
class Strides:
    """Batch, head and row strides of [B, H, N, d] operands in units of `align` elements."""

    align: int
    values: tuple[int, ...]


def common_strides(*operands: torch.Tensor) -> Strides:
    """The strides of all operands, divided by the widest vector (up to 16 bytes) that divides every one of them."""
    align = 16 // operands[0].element_size()
    strides = [stride for x in operands for stride in x.stride()[:3]]
    while any(stride % align for stride in strides):
        align //= 2
    return Strides(align, tuple(stride // align for stride in strides))
