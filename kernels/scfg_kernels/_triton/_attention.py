"""What the attention kernels share: the tile of scores of several heads, and the operands' strides.

A program works on `HEADS` heads of one sample at once, one warp each: every product is a batch of small ones, softmax
rows stay inside a warp, and the sum over heads that the map needs is a sum across the warps of one program. So no head
is handed to another program, nothing is accumulated in memory, and 16 query rows are enough to keep a program busy,
which matters because the captured layers are small (256 rows).
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
    """Pointers [HEADS, rows, columns]. Strides come in units of ALIGN elements, which makes them provably divisible:
    vector loads depend on it."""
    return base + head * (stride_h * ALIGN) + row * (stride_n * ALIGN) + column


@triton.jit
def load_tile(base, head, row, column, rows, inside, stride_h, stride_n, ALIGN: tl.constexpr):
    """[HEADS, rows, columns], zero beyond `rows` and outside `inside`."""
    return tl.load(head_tile(base, head, row, column, stride_h, stride_n, ALIGN), mask=inside & (row < rows), other=0.0)


@triton.jit
def head_scores(
    q, k, head, row, key, heads, rows, keys, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T of a tile, unscaled, fp32. head [HEADS, 1, 1], row [1, BLOCK_M, 1], key [1, BLOCK_N, 1]."""
    scores = tl.zeros([HEADS, BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, HEAD_DIM, BLOCK_D):  # at run time: any head size, and few live registers
        column = start + tl.arange(0, BLOCK_D)[None, None, :]
        inside = (head < heads) & ((column < HEAD_DIM) | (HEAD_DIM % BLOCK_D == 0))
        q_tile = load_tile(q, head, row, column, rows, inside, q_stride_h, q_stride_n, ALIGN)
        k_tile = load_tile(k, head, key, column, keys, inside, k_stride_h, k_stride_n, ALIGN)
        scores = tl.dot(q_tile, tl.trans(k_tile, 0, 2, 1), scores, input_precision=PRECISION)
    return scores


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
