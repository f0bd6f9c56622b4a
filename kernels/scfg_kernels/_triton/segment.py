r"""Regions: resize, renormalise, add up layers, smooth, argmax over tokens.

With r_l the bilinear resize of X_l[t] to the grid of S cells and G the 3x3 Gaussian with reflected border:

    score[t] = sum_l r_l / ( <w, r_l> / S + 1e-8 )       w: how often a cell counts in the mean of G r
    id       = argmax_t (G score[t])                     lowest index on a tie
    a        = sum_l (r_l - m_l) / (m_l (1 - m_l))       of the start token;  foreground: G a < -1e-6 L
               or, where the sum r' of all others is given, sum_l (r_l - m_l) / m_l - (r'_l - m'_l) / m'_l

G and the resize are linear and keep constants, so a layer's mean after G is a weighted mean before it, and G runs once
for all layers. A program has BLOCK_T tokens of a sample at all cells, one more the start token: it reads its maps of
all layers once. Tiles are [tokens, rows, columns] of the grid, both padded to powers of two: neighbours along an axis
come from registers (`tl.gather`). The last of a sample's programs to finish (`_order`) takes the best of all.
Everything is fp32 in a fixed order. Bytes: every X_l (a map finer than the grid twice), ids and foreground once; 6
bytes a cell for every BLOCK_T tokens, written and read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import SegmentConfig, device_guard, refuse, segment_config
from ..segment import kernel_weights
from ._order import announce, counters


@triton.jit
def reflect(index, length):
    """-1 -> 1 and length -> length - 2; a single sample stays where it is."""
    index = tl.abs(index)
    return tl.maximum(tl.where(index > length - 1, 2 * (length - 1) - index, index), 0)


@triton.jit
def three_taps(before, here, after, edge):
    """edge before + (1 - 2 edge) here + edge after, with the neighbours as differences: a constant keeps its bits."""
    return here + 2.0 * edge * (0.5 * (before + after) - here)


@triton.jit
def _along(SIZE: tl.constexpr, AXIS: tl.constexpr):
    """0, 1, ... along one axis of three."""
    place = tl.arange(0, SIZE)
    return place[None, :, None] if AXIS == 1 else place[None, None, :]


@triton.jit
def _taken(values, index, AXIS: tl.constexpr):
    """values [T, H, W] at `index` along AXIS, which has one index for every place there: shuffles within a warp."""
    return tl.gather(values, tl.broadcast_to(tl.minimum(index, values.shape[AXIS] - 1), values.shape), AXIS)


@triton.jit
def _smoothed(values, edge, length, AXIS: tl.constexpr):
    """values [T, H, W], `length` of which count along AXIS, with their neighbours there."""
    place = _along(values.shape[AXIS], AXIS)
    before = _taken(values, reflect(place - 1, length), AXIS)
    after = _taken(values, reflect(place + 1, length), AXIS)
    return three_taps(before, values, after, edge)


@triton.jit
def _mean_weight(index, edge, length):
    """Column sum of the smoothing matrix of one axis: the weight of a sample in the mean after smoothing."""
    before = tl.where(index >= 1, tl.where(index == 1, 2.0, 1.0), 0.0)
    after = tl.where(index <= length - 2, tl.where(index == length - 2, 2.0, 1.0), 0.0)
    return tl.where(length == 1, 1.0, (1.0 - 2.0 * edge) + edge * (before + after))


@triton.jit
def _source(index, length, target):
    """Bilinear taps of one axis, align_corners=False: lower index, upper index, weight of the upper one."""
    # A length of 1 may be a constant of the kernel, and no tensor.
    ratio = tl.div_rn(tl.full([], length, tl.int32).to(tl.float32), target.to(tl.float32))
    position = tl.maximum((index.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), length - 1)
    return low, tl.minimum(low + 1, length - 1), position - low.to(tl.float32)


@triton.jit
def _between(values, index, length, target, AXIS: tl.constexpr):
    """values [T, H, W], `length` of which count along AXIS, resized to `target`."""
    low, high, upper = _source(index, length, target)
    lower = _taken(values, low, AXIS)
    return lower + upper * (_taken(values, high, AXIS) - lower)


@triton.jit
def _resized(
    maps, number, used, height, width, grid_h, grid_w,
    SAME: tl.constexpr, FITS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Maps `number` [T, 1, 1] of the height x width ones at the grid's cells: [T, BLOCK_H, BLOCK_W] in fp32, 0 where
    not `used` [T, 1, 1] or beyond the grid. A map that FITS in a block is read once; of others, four neighbours are
    read. SAME: it has the grid's size."""
    y = _along(BLOCK_H, 1)
    x = _along(BLOCK_W, 2)
    base = maps + number * (height * width)
    if FITS:
        value = tl.load(base + y * width + x, mask=used & (y < height) & (x < width), other=0.0).to(tl.float32)
        if not SAME:
            value = _between(_between(value, x, width, grid_w, 2), y, height, grid_h, 1)
    else:
        inside = used & (y < grid_h) & (x < grid_w)
        y0, y1, fy = _source(y, height, grid_h)
        x0, x1, fx = _source(x, width, grid_w)
        a = tl.load(base + y0 * width + x0, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(base + y0 * width + x1, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(base + y1 * width + x0, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(base + y1 * width + x1, mask=inside, other=0.0).to(tl.float32)
        value = (1.0 - fy) * ((1.0 - fx) * a + fx * b) + fy * ((1.0 - fx) * c + fx * d)
    return value


@triton.jit
def _mean(values, weight):
    """[T, 1, 1]; `weight` [1, H, W] is 0 beyond the grid."""
    return tl.sum(tl.sum(values * weight, 2), 1)[:, None, None]


@triton.jit
def _pointer(layers, index, COUNT: tl.constexpr):
    """The index-th of COUNT pointers: a loop over layers in the place of unrolled code. Two selects a pointer: half as
    many instructions again as the rest of the loop for 60 layers of 32x32."""
    chosen = layers[0]
    for other in tl.static_range(1, COUNT):
        chosen = tl.where(index == other, layers[other], chosen)
    return chosen


@triton.jit
def _start_contrast(
    starts, sizes, sample, weight, grid_h, grid_w, GROUPS: tl.constexpr, COUNTS: tl.constexpr, SAME: tl.constexpr,
    FITS: tl.constexpr, ALIGNS: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """a of the module's formula at all cells, before G: [1, H, W]."""
    contrast = tl.zeros(weight.shape, tl.float32)
    channels: tl.constexpr = 2 if PAIRED else 1
    number = sample * channels + tl.arange(0, 1)[:, None, None]
    for group in tl.static_range(GROUPS):
        for layer in tl.range(0, COUNTS[group]):
            maps = _pointer(starts[group], layer, COUNTS[group])
            a = _resized(
                maps, number, number >= 0, sizes[2 * group], sizes[2 * group + 1] * ALIGNS[group], grid_h, grid_w,
                SAME[group], FITS[group], weight.shape[1], weight.shape[2],
            )  # fmt: skip
            m = _mean(a, weight)
            if PAIRED:
                b = _resized(
                    maps, number + 1, number >= 0, sizes[2 * group], sizes[2 * group + 1] * ALIGNS[group],
                    grid_h, grid_w, SAME[group], FITS[group], weight.shape[1], weight.shape[2],
                )  # fmt: skip
                n = _mean(b, weight)
                contrast += (a - m) / m - (b - n) / n
            else:
                contrast += (a - m) / (m * (1.0 - m))
    return contrast


@triton.jit
def segment_cells(
    maps, starts, sizes, token_mask, best_parts, id_parts, foreground_out, counters, sample, part, tokens, layers, edge,
    grid_h, grid_w, GROUPS: tl.constexpr, COUNTS: tl.constexpr, SAME: tl.constexpr, FITS: tl.constexpr,
    ALIGNS: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part `part` of a sample: the best of BLOCK_T tokens at every cell, to scratch [parts, S]; beyond the last token,
    the foreground. Returns whether all other programs of the sample are done: then `winners` can be asked."""
    cells = grid_h * grid_w
    y = _along(BLOCK_H, 1)
    x = _along(BLOCK_W, 2)
    valid = (y < grid_h) & (x < grid_w)  # [1, BLOCK_H, BLOCK_W]
    cell = y * grid_w + x
    weight = _mean_weight(y, edge, grid_h) * _mean_weight(x, edge, grid_w)
    weight = tl.where(valid, tl.div_rn(weight, cells * 1.0), 0.0)
    parts = tl.cdiv(tokens, BLOCK_T)
    if part == parts:
        contrast = _start_contrast(
            starts, sizes, sample, weight, grid_h, grid_w, GROUPS, COUNTS, SAME, FITS, ALIGNS, PAIRED
        )
        contrast = _smoothed(_smoothed(contrast, edge, grid_w, 2), edge, grid_h, 1)
        tl.store(foreground_out + sample * cells + cell, contrast < -1e-6 * layers, mask=valid)
    else:
        token = part * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
        allowed = token < tokens
        score = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_W], tl.float32)
        for group in tl.static_range(GROUPS):
            for layer in tl.range(0, COUNTS[group]):
                r = _resized(
                    _pointer(maps[group], layer, COUNTS[group]), sample * tokens + token, allowed,
                    sizes[2 * group], sizes[2 * group + 1] * ALIGNS[group], grid_h, grid_w, SAME[group], FITS[group],
                    BLOCK_H, BLOCK_W,
                )  # fmt: skip
                score += r / (_mean(r, weight) + 1e-8)
        score = _smoothed(_smoothed(score, edge, grid_w, 2), edge, grid_h, 1)
        if MASKED:
            allowed = allowed & tl.load(token_mask + sample * tokens + token, mask=allowed, other=0).to(tl.int1)
        score = tl.where(allowed, score, float("-inf"))
        best = tl.max(score, 0, keep_dims=True)
        # Lowest index of the maximum: the same on every device, unlike the order of an argmax reduction.
        winner = tl.min(tl.where(score == best, token, tokens), 0, keep_dims=True)
        at = (sample * parts + part) * cells + cell
        tl.store(best_parts + at, best, mask=valid)
        tl.store(id_parts + at, winner.to(id_parts.dtype.element_ty), mask=valid)
    return announce(counters + sample) == parts


@triton.jit
def winners(
    best_parts, id_parts, ids_out, foreground_out, counters, sample, tokens, grid_h, grid_w,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """ids int32 and foreground int1 of all cells of a sample, both [BLOCK_H, BLOCK_W], from all parts; the lowest token
    wins a tie. Stores the ids and sets the counter back."""
    cells = grid_h * grid_w
    y = tl.arange(0, BLOCK_H)[:, None]
    x = tl.arange(0, BLOCK_W)[None, :]
    valid = (y < grid_h) & (x < grid_w)
    cell = y * grid_w + x
    parts = tl.cdiv(tokens, BLOCK_T)
    best = tl.full([BLOCK_H, BLOCK_W], float("-inf"), tl.float32)
    ids = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    for part in tl.range(0, parts):
        at = (sample * parts + part) * cells + cell
        score = tl.load(best_parts + at, mask=valid, other=0.0)
        ids = tl.where(score > best, tl.load(id_parts + at, mask=valid, other=0).to(tl.int32), ids)
        best = tl.maximum(best, score)
    tl.store(ids_out + sample * cells + cell, ids.to(tl.int64), mask=valid)
    tl.store(counters + sample, 0)
    foreground = tl.load(foreground_out + sample * cells + cell, mask=valid, other=0).to(tl.int1)
    return ids, foreground


@triton.jit(do_not_specialize=["grid_h", "grid_w"])
def segment_kernel(
    maps, starts, sizes, token_mask, best_parts, id_parts, ids_out, foreground_out, counters, tokens, layers, edge,
    grid_h, grid_w, GROUPS: tl.constexpr, COUNTS: tl.constexpr, SAME: tl.constexpr, FITS: tl.constexpr,
    ALIGNS: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, GRID_ALIGN: tl.constexpr,
):  # fmt: skip
    grid_w *= GRID_ALIGN
    sample = tl.program_id(1).to(tl.int64)
    if segment_cells(
        maps, starts, sizes, token_mask, best_parts, id_parts, foreground_out, counters, sample, tl.program_id(0),
        tokens, layers, edge, grid_h, grid_w, GROUPS, COUNTS, SAME, FITS, ALIGNS, PAIRED, MASKED,
        BLOCK_T, BLOCK_H, BLOCK_W,
    ):  # fmt: skip
        winners(
            best_parts, id_parts, ids_out, foreground_out, counters, sample, tokens, grid_h, grid_w,
            BLOCK_T, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """Layers as the kernel takes them, those of one size and dtype together, and the size of each group."""

    tokens: tuple[tuple[torch.Tensor, ...], ...]
    start: tuple[tuple[torch.Tensor, ...], ...]
    sizes: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.tokens))


def grouped(tokens: Sequence[torch.Tensor], start: Sequence[torch.Tensor], sizes: Sequence[int]) -> Groups:
    """Every layer is an argument of its own; the kernel loops over the layers of a group."""
    members: dict[Any, list[int]] = {}
    for index, (layer, own) in enumerate(zip(tokens, start, strict=True)):
        key = (sizes[2 * index], sizes[2 * index + 1], layer.dtype, own.dtype)
        members.setdefault(key, []).append(index)
    return Groups(
        tuple(tuple(tokens[index] for index in group) for group in members.values()),
        tuple(tuple(start[index] for index in group) for group in members.values()),
        tuple(length for key in members for length in key[:2]),
    )


def empty_regions(batch: int, h: int, w: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and foreground, not yet written."""
    ids = torch.empty((batch, h, w), dtype=torch.int64, device=device)
    return ids, torch.empty((batch, h, w), dtype=torch.bool, device=device)


def empty_parts(
    batch: int, tokens: int, cells: int, block_t: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scratch: best score and token of every part and cell. And how many parts there are."""
    parts = triton.cdiv(tokens, block_t)
    best = torch.empty((batch, parts, cells), dtype=torch.float32, device=device)
    return best, torch.empty((batch, parts, cells), dtype=torch.int16, device=device), parts


def alignment(width: int) -> int:
    """The largest of 1, 2, 4, 8 that divides a width. Sizes are arguments of a launch, so that images of many sizes
    share a compiled kernel; this factor of a width alone is a constant, so that rows are read in vectors."""
    return math.gcd(width, 8)


def map_arguments(groups: Groups) -> tuple[int, ...]:
    """`sizes` of `segment_cells`."""
    pairs = zip(groups.sizes[::2], groups.sizes[1::2], strict=True)
    return tuple(length for height, width in pairs for length in (height, width // alignment(width)))


def map_constants(
    groups: Groups, token_mask: torch.Tensor | None, h: int, w: int, config: SegmentConfig
) -> dict[str, Any]:
    """Constants of `segment_cells` but for its tiles."""
    pairs = list(zip(groups.sizes[::2], groups.sizes[1::2], strict=True))
    return {
        "GROUPS": len(groups.counts),
        "COUNTS": groups.counts,
        "SAME": tuple(pair == (h, w) for pair in pairs),
        "FITS": tuple(height <= config.block_h and width <= config.block_w for height, width in pairs),
        "ALIGNS": tuple(alignment(width) for _, width in pairs),
        "PAIRED": groups.start[0][0].dim() == 3,
        "MASKED": token_mask is not None,
        "GRID_ALIGN": alignment(w),
    }


def launch(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    h: int,
    w: int,
    blur_sigma: float,
    token_mask: torch.Tensor | None,
    config: SegmentConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and foreground [B, h, w]; `config` overrides the choice."""
    batch, count, _ = tokens[0].shape
    device = tokens[0].device
    ids, foreground = empty_regions(batch, h, w, device)
    if batch == 0:
        return ids, foreground
    if config is not None:
        refuse("segment", config, config.reasons(h, w))
    config = config or segment_config(h, w)
    groups = grouped(tokens, start, sizes)
    best, winner, parts = empty_parts(batch, count, h * w, config.block_t, device)
    with device_guard(device), counters(device, batch) as zeros:
        segment_kernel[(parts + 1, batch)](
            groups.tokens, groups.start, map_arguments(groups), token_mask, best, winner, ids, foreground, zeros, count,
            len(tokens), kernel_weights(blur_sigma)[0], h, w // alignment(w), BLOCK_T=config.block_t,
            BLOCK_H=config.block_h, BLOCK_W=config.block_w, num_warps=config.num_warps, num_stages=config.num_stages,
            enable_fp_fusion=False, **map_constants(groups, token_mask, h, w, config),
        )  # fmt: skip
    return ids, foreground
