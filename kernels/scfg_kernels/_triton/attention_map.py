r"""Head-mean attention maps from the rows' log-sum-exp, and a kernel that finds it where attention did not leave it.

    map_kernel   a tile of M[n, t] = 1/H sum_h 2^(c q_h[n] . k_h[t] + b[t] - lse_h[n]),   c = scale log2(e)
    lse_kernel   lse_h[n] for a block of rows of one head, by one pass over the keys

A program of `map_kernel` has a tile of one of up to two maps (self- and cross-attention of a block, or image and text
keys of a joint layer), loops over the heads in order and stores it once. Nothing is shared between programs. With a
pool of p, a column is a cell of p x p image tokens, whose probabilities are added up in registers. Rows, keys and heads
beyond the last are clamped to it, so that only what is stored needs a mask. Counts are not specialised: other sizes
compile nothing, other layouts and dtypes do.

Heads whose size is no power of two are up to three tiles side by side (160 = 128 + 32 columns). Products of fp32
operands are three TF32 ones on NVIDIA, `CHUNK` columns at a time, so that the registers hold a high and a low part.

Bytes of `map_kernel`: M once, q once per tile of keys, k once per block of rows; of `lse_kernel`: q once, k once per
block of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import DeviceLimits, device_guard, next_power_of_2, product_precision
from ._device import copy_stages, current_limits

LOG2E = math.log2(math.e)


@triton.jit
def _index(x, LARGE: tl.constexpr):
    """Rows as numbers whose products with strides do not overflow: 64 bits take twice the registers."""
    return x.to(tl.int64) if LARGE else x


@triton.jit
def _load(base, row, stride, FIRST, WIDTH: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr):
    """Columns FIRST .. FIRST + WIDTH of rows of one head. Strides come in units of ALIGN elements, which makes them
    provably divisible: vector loads depend on it."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = base + row[:, None] * (stride * ALIGN) + column
    return tl.load(pointers, mask=column < DIM, other=0.0) if MASK else tl.load(pointers)


@triton.jit
def _load_head(
    base, row, stride, DIM: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """All columns as three tiles; one without a width is the first."""
    tile0 = _load(base, row, stride, 0, W0, DIM, ALIGN, W0 > DIM)
    tile1 = tile0
    tile2 = tile0
    if W1 > 0:
        tile1 = _load(base, row, stride, W0, W1, DIM, ALIGN, W0 + W1 > DIM)
    if W2 > 0:
        tile2 = _load(base, row, stride, W0 + W1, W2, DIM, ALIGN, W0 + W1 + W2 > DIM)
    return tile0, tile1, tile2


@triton.jit
def _product(
    q0, q1, q2, k, key, stride, DIM: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T of one head, fp32."""
    k0, k1, k2 = _load_head(k, key, stride, DIM, W0, W1, W2, ALIGN)
    result = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if W1 > 0:
        result = tl.dot(q1, tl.trans(k1), result, input_precision=PRECISION)
    if W2 > 0:
        result = tl.dot(q2, tl.trans(k2), result, input_precision=PRECISION)
    return result


@triton.jit
def _product_by_chunks(
    q, row, q_stride, k, key, k_stride, DIM: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for operands that the registers do not hold whole."""
    result = tl.zeros([row.shape[0], key.shape[0]], tl.float32)
    for first in tl.range(0, DIM, CHUNK, num_stages=1):
        tile = _load(q, row, q_stride, first, CHUNK, DIM, ALIGN, DIM % CHUNK > 0)
        other = _load(k, key, k_stride, first, CHUNK, DIM, ALIGN, DIM % CHUNK > 0)
        result = tl.dot(tile, tl.trans(other), result, input_precision=PRECISION)
    return result


@triton.jit
def _store_tile(
    q, k, lse, bias, out, tile, rows, columns, heads, scale, share, q_h, q_n, k_h, k_n, lse_h, bias_t,
    out_n, out_t, height, width, across,
    DIM: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POOL: tl.constexpr, BIAS: tl.constexpr,
    LARGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of a map; pointers are at a sample's first elements, `across` is how many cells a row of them has."""
    tiles = tl.cdiv(columns, BLOCK_N)
    own_row = tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    own_column = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _index(tl.minimum(own_row, rows - 1), LARGE)
    column = tl.minimum(own_column, columns - 1)
    key = _index(column, LARGE)
    shift = tl.zeros([BLOCK_N], tl.float32)
    if BIAS:
        shift = tl.load(bias + key * bias_t) * 1.4426950408889634
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, heads * POOL * POOL, num_stages=STAGES):
        head = (step // (POOL * POOL)).to(tl.int64)
        if POOL > 1:
            place = step % (POOL * POOL)
            y = column // across * POOL + place // POOL
            x = column % across * POOL + place % POOL
            inside = (y < height) & (x < width)
            key = _index(tl.minimum(y, height - 1) * width + tl.minimum(x, width - 1), LARGE)
        q_head = q + head * (q_h * ALIGN)
        k_head = k + head * (k_h * ALIGN)
        if CHUNK > 0:
            p = _product_by_chunks(q_head, row, q_n, k_head, key, k_n, DIM, CHUNK, ALIGN, PRECISION)
        else:
            q0, q1, q2 = _load_head(q_head, row, q_n, DIM, W0, W1, W2, ALIGN)
            p = _product(q0, q1, q2, k_head, key, k_n, DIM, W0, W1, W2, ALIGN, PRECISION)
        own = tl.load(lse + head * lse_h + row) * 1.4426950408889634
        p = tl.exp2(p * scale + (shift[None, :] - own[:, None])) if BIAS else tl.exp2(p * scale - own[:, None])
        if POOL > 1:
            p = tl.where(inside[None, :], p, 0.0)
        total += p
    pointers = out + own_row.to(tl.int64)[:, None] * out_n + own_column.to(tl.int64)[None, :] * out_t
    tl.store(pointers, total * share, mask=(own_row[:, None] < rows) & (own_column[None, :] < columns))


@triton.jit(
    do_not_specialize=[
        "first_tiles", "second_tiles", "rows1", "columns1", "rows2", "columns2", "heads", "q1_b", "q1_h", "q1_n",
        "k1_b", "k1_h", "k1_n", "lse1_b", "lse1_h", "q2_b", "q2_h", "q2_n", "k2_b", "k2_h", "k2_n", "lse2_b", "lse2_h",
        "bias_b", "bias_t", "out_n", "out_t", "height", "width", "across",
    ]
)  # fmt: skip
def map_kernel(
    q1, k1, lse1, out1, q2, k2, lse2, out2, bias, first_tiles, second_tiles, rows1, columns1, rows2, columns2, heads,
    scale1, scale2, share, q1_b, q1_h, q1_n, k1_b, k1_h, k1_n, lse1_b, lse1_h,
    q2_b, q2_h, q2_n, k2_b, k2_h, k2_n, lse2_b, lse2_h, bias_b, bias_t, out_n, out_t, height, width, across,
    DIM: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POOL: tl.constexpr, BIAS: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, LARGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of the first map, which may have pooled keys, and of the second, which may have a bias and whose rows and
    columns may lie in memory in either order; of every sample."""
    tiles = first_tiles + second_tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if FIRST:  # noqa: SIM102
        if tile < first_tiles:
            _store_tile(
                q1 + sample * q1_b * ALIGN, k1 + sample * k1_b * ALIGN, lse1 + sample * lse1_b, bias,
                out1 + sample * rows1 * columns1, tile, rows1, columns1, heads, scale1, share,
                q1_h, q1_n, k1_h, k1_n, lse1_h, 0, columns1, 1, height, width, across,
                DIM, W0, W1, W2, CHUNK, ALIGN, PRECISION, BLOCK_M, BLOCK_N, POOL, False, LARGE, STAGES,
            )  # fmt: skip
    if SECOND:  # noqa: SIM102
        if tile >= first_tiles:
            _store_tile(
                q2 + sample * q2_b * ALIGN, k2 + sample * k2_b * ALIGN, lse2 + sample * lse2_b, bias + sample * bias_b,
                out2 + sample * rows2 * columns2, tile - first_tiles, rows2, columns2, heads, scale2, share,
                q2_h, q2_n, k2_h, k2_n, lse2_h, bias_t, out_n, out_t, height, width, across,
                DIM, W0, W1, W2, CHUNK, ALIGN, PRECISION, BLOCK_M, BLOCK_N, 1, BIAS, LARGE, STAGES,
            )  # fmt: skip


@triton.jit
def _sweep(
    top, total, q, row, q0, q1, q2, k, bias, begin, end, keys, scale, q_n, k_n, bias_t,
    DIM: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, TAIL: tl.constexpr,
    LARGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax statistics over tiles of keys begin .. end; in a TAIL some are beyond the last."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        own = start + tl.arange(0, BLOCK_N)
        key = _index(tl.minimum(own, keys - 1) if TAIL else own, LARGE)
        if CHUNK > 0:
            p = _product_by_chunks(q, row, q_n, k, key, k_n, DIM, CHUNK, ALIGN, PRECISION)
        else:
            p = _product(q0, q1, q2, k, key, k_n, DIM, W0, W1, W2, ALIGN, PRECISION)
        p *= scale
        if BIAS:
            p += tl.load(bias + key * bias_t)[None, :] * 1.4426950408889634
        if TAIL:
            p = tl.where(own[None, :] < keys, p, float("-inf"))
        previous = top
        top = tl.maximum(top, tl.max(p, 1))  # finite: a tile has a key
        total = total * tl.exp2(previous - top) + tl.sum(tl.exp2(p - top[:, None]), 1)
    return top, total


@triton.jit(
    do_not_specialize=[
        "rows", "keys1", "keys2", "heads", "blocks", "q_b", "q_h", "q_n", "k1_b", "k1_h", "k1_n", "k2_b", "k2_h",
        "k2_n", "bias_b", "bias_t",
    ]
)  # fmt: skip
def lse_kernel(
    q, k1, k2, bias, lse, rows, keys1, keys2, heads, blocks, scale, q_b, q_h, q_n, k1_b, k1_h, k1_n, k2_b, k2_h, k2_n,
    bias_b, bias_t,
    DIM: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, SECOND: tl.constexpr,
    LARGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """lse [B, H, rows] over two sets of keys, of which the second may have a bias."""
    program = tl.program_id(0)
    head = (program // blocks % heads).to(tl.int64)
    sample = (program // blocks // heads).to(tl.int64)
    own = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row = _index(tl.minimum(own, rows - 1), LARGE)
    q += (sample * q_b + head * q_h) * ALIGN
    k1 += (sample * k1_b + head * k1_h) * ALIGN
    q0, q1, q2 = _load_head(q, row, q_n, DIM, W0, W1, W2, ALIGN) if CHUNK == 0 else (row, row, row)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    full = keys1 // BLOCK_N * BLOCK_N
    top, total = _sweep(
        top, total, q, row, q0, q1, q2, k1, bias, 0, full, keys1, scale, q_n, k1_n, 0,
        DIM, W0, W1, W2, CHUNK, ALIGN, PRECISION, BLOCK_N, False, False, LARGE, STAGES,
    )  # fmt: skip
    top, total = _sweep(
        top, total, q, row, q0, q1, q2, k1, bias, full, keys1, keys1, scale, q_n, k1_n, 0,
        DIM, W0, W1, W2, CHUNK, ALIGN, PRECISION, BLOCK_N, False, True, LARGE, 1,
    )  # fmt: skip
    if SECOND:
        k2 += (sample * k2_b + head * k2_h) * ALIGN
        top, total = _sweep(
            top, total, q, row, q0, q1, q2, k2, bias + sample * bias_b, 0, keys2, keys2, scale, q_n, k2_n, bias_t,
            DIM, W0, W1, W2, CHUNK, ALIGN, PRECISION, BLOCK_N, BIAS, True, LARGE, 1,
        )  # fmt: skip
    lse += (sample * heads + head) * rows
    tl.store(lse + own, (top + tl.log2(total)) * 0.6931471805599453, mask=own < rows)


@dataclass(frozen=True)
class MapConfig:
    """Tiles of both kernels: rows, keys, columns of the head at a time (0 for all), warps, pipeline stages; and the
    `input_precision` of products of fp32 operands."""

    block_m: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int
    precision: str


def head_widths(size: int) -> tuple[int, int, int]:
    """Columns of a head as up to three tiles. A size like 40 stays whole: heads of 80 bytes begin in the middle of a
    32-byte sector, and two tiles would fetch the sectors between them twice."""
    widths: list[int] = []
    while size > 0 and len(widths) < 3:
        whole = max(16, next_power_of_2(size))
        small = (whole <= 64 and (size % 16 or whole == size)) or len(widths) == 2 or whole == size
        widths.append(whole if small else whole // 2)
        size -= widths[-1]
    first, second, third, *_ = *widths, 0, 0
    return first, second, third


def map_config(
    samples: int, tiled: list[tuple[int, int]], dim: int, dtype: torch.dtype, limits: DeviceLimits
) -> MapConfig:
    """Tiles of `map_kernel` for maps of rows x columns: the largest that give every multiprocessor a program, else the
    smallest. fp32 operands take small ones, for the registers.
    """
    precision = product_precision(limits)
    if dtype == torch.float32:
        return MapConfig(32, 32, 32, 2, 1, precision)
    choices = [(64, 64, 4), (32, 32, 2)]  # 16 rows for a warp: more would form products twice
    if dim <= 96:
        choices = [(128, 64, 8), *choices]
    for block_m, block_n, warps in choices:  # noqa: B007
        programs = samples * sum(-(-rows // block_m) * -(-columns // block_n) for rows, columns in tiled)
        if programs >= limits.multiprocessors:
            break
    return MapConfig(block_m, block_n, 0, warps, _stages(block_m, block_n, dim, dtype, limits), precision)


def lse_config(dim: int, dtype: torch.dtype, limits: DeviceLimits) -> MapConfig:
    """Tiles of `lse_kernel`."""
    precision = product_precision(limits)
    if dtype == torch.float32:
        return MapConfig(32, 32, 32, 2, 1, precision)
    block_n = 64 if dim <= 96 else 32
    return MapConfig(64, block_n, 0, 4, _stages(64, block_n, dim, dtype, limits), precision)


def _stages(block_m: int, block_n: int, dim: int, dtype: torch.dtype, limits: DeviceLimits) -> int:
    """2 where two pairs of tiles fit in shared memory: 96 KiB, on AMD 64, which has other things there too."""
    room = 48 * 1024 if limits.arch.startswith("gfx") else 96 * 1024
    return 2 if 2 * (block_m + block_n) * sum(head_widths(dim)) * dtype.itemsize <= room else 1


class Job(NamedTuple):
    """One map of a launch. `pool`: (rows of tokens, tokens in a row, tokens along a side of a cell)."""

    q: torch.Tensor
    k: torch.Tensor
    lse: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    pool: tuple[int, int, int] = (1, 1, 1)

    @property
    def across(self) -> int:
        return -(-self.pool[1] // self.pool[2])

    @property
    def columns(self) -> int:
        return self.k.shape[2] if self.pool[2] == 1 else -(-self.pool[0] // self.pool[2]) * self.across


def _alignment(*operands: torch.Tensor) -> int:
    """The widest vector, up to 16 bytes, that divides every stride of [B, H, N, d] operands."""
    align = 16 // operands[0].element_size()
    while any(stride % align for x in operands for stride in x.stride()[:3]):
        align //= 2
    return align


def _spans(*operands: torch.Tensor) -> bool:
    """Whether a head spans 2^31 elements or more."""
    return any(x.shape[2] * x.stride(2) >= 2**31 for x in operands)


def _strides(x: torch.Tensor, align: int) -> tuple[int, ...]:
    return tuple(stride // align for stride in x.stride()[:3])


def _run(first: Job | None, second: Job | None, config: MapConfig | None) -> list[torch.Tensor]:
    """The maps of one launch, of jobs with the same samples, heads, head size and dtype."""
    jobs = [job for job in (first, second) if job is not None]
    samples, heads, _, dim = jobs[0].q.shape
    maps = [x.q.new_empty((samples, x.q.shape[2], x.columns), dtype=torch.float32) for x in jobs]
    if sum(x.numel() for x in maps) == 0:
        return maps
    one, two = first or jobs[0], second or jobs[0]
    bias = two.lse if two.bias is None else two.bias
    align = _alignment(*(x for job in jobs for x in (job.q, job.k)))
    with device_guard(one.q.device):
        sizes = [(x.shape[1], x.shape[2]) for x in maps]
        config = config or map_config(samples, sizes, dim, one.q.dtype, current_limits())
        stages = copy_stages(config.num_stages)
        tiles = [-(-n // config.block_m) * -(-t // config.block_n) for n, t in sizes]
        counts = [tiles[0] if first else 0, tiles[-1] if second else 0]
        map_kernel[(samples * sum(counts),)](
            one.q, one.k, one.lse, maps[0], two.q, two.k, two.lse, maps[-1], bias, *counts, *sizes[0], *sizes[-1],
            heads, one.scale * LOG2E, two.scale * LOG2E, 1.0 / heads, *_strides(one.q, align), *_strides(one.k, align),
            *one.lse.stride()[:2], *_strides(two.q, align), *_strides(two.k, align), *two.lse.stride()[:2],
            *bias.stride()[:2], *maps[-1].stride()[1:], *one.pool[:2], one.across,
            dim, *head_widths(dim), config.chunk, align, config.precision, config.block_m, config.block_n, one.pool[2],
            two.bias is not None, first is not None, second is not None,
            _spans(*(x for job in jobs for x in (job.q, job.k))), stages,
            num_warps=config.num_warps, num_stages=stages,
        )  # fmt: skip
    return maps


def row_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    more: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    config: MapConfig | None = None,
) -> torch.Tensor:
    """lse [B, H, N] over the keys k, and `more` with a bias [B, T] or without."""
    samples, heads, rows, dim = q.shape
    lse = torch.empty((samples, heads, rows), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return lse
    other = k if more is None else more
    added = lse if bias is None else bias
    align = _alignment(q, k, other)
    with device_guard(q.device):
        config = config or lse_config(dim, q.dtype, current_limits())
        blocks, stages = -(-rows // config.block_m), copy_stages(config.num_stages)
        lse_kernel[(samples * heads * blocks,)](
            q, k, other, added, lse, rows, k.shape[2], other.shape[2], heads, blocks, scale * LOG2E,
            *_strides(q, align), *_strides(k, align), *_strides(other, align), *added.stride()[:2],
            dim, *head_widths(dim), config.chunk, align, config.precision, config.block_m, config.block_n,
            bias is not None, more is not None, _spans(q, k, other), stages,
            num_warps=config.num_warps, num_stages=stages,
        )  # fmt: skip
    return lse


def _job(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None, scale: float) -> Job:
    lse = row_lse(q, k, scale) if lse is None else lse
    return Job(q, k, lse if lse.shape[2] == 1 or lse.stride(2) == 1 else lse.contiguous(), scale)


def launch(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None, scale: float, config: MapConfig | None = None
) -> torch.Tensor:
    """The map of one layer; `config` overrides the choice."""
    return _run(_job(q, k, lse, scale), None, config)[0]


def launch_two(
    q1: torch.Tensor, k1: torch.Tensor, lse1: torch.Tensor | None, scale1: float,
    q2: torch.Tensor, k2: torch.Tensor, lse2: torch.Tensor | None, scale2: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The maps of two layers, in one launch where they have the same samples, heads, head size and dtype."""
    first, second = _job(q1, k1, lse1, scale1), _job(q2, k2, lse2, scale2)
    if (q1.shape[:2], q1.shape[3], q1.dtype) != (q2.shape[:2], q2.shape[3], q2.dtype):
        return _run(first, None, None)[0], _run(None, second, None)[0]
    own, cross = _run(first, second, None)
    return own, cross


def launch_joint(
    q: torch.Tensor, text: torch.Tensor | None, image: torch.Tensor | None, bias: torch.Tensor | None,
    pool: tuple[int, int, int], scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """own and cross of `joint_attention_maps`, not divided by their sums; empty where there are no such keys."""
    nothing = q[:, :, :0] if image is None else image
    lse = row_lse(q, nothing, scale, text, bias)
    own = None if image is None else Job(q, image[:, :, : pool[0] * pool[1]], lse, scale, None, pool)
    cross = None if text is None else Job(q, text, lse, scale, bias)
    maps = _run(own, cross, None)
    if own is not None and cross is not None:
        return maps[0], maps[1]
    empty = q.new_empty((q.shape[0], q.shape[2], 0), dtype=torch.float32)
    return (maps[0], empty) if cross is None else (empty, maps[0])
