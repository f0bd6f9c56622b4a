r"""Regions: resize, renormalise, add up layers, smooth, argmax over tokens.

With r_l the bilinear resize of X_l[t] to the grid of S cells and G the 3x3 Gaussian with reflected border:

    score[t] = sum_l r_l / ( <w, r_l> / S + 1e-8 )       w: how often a cell counts in the mean of G r
    id       = argmax_t (G score[t])                     lowest index on a tie
    a        = sum_l (r_l - m_l) / (m_l (1 - m_l))       of the start token;  foreground: G a < -1e-6 L
               or, where the sum r' of all others is given, sum_l (r_l - m_l) / m_l - (r'_l - m'_l) / m'_l

G and the resize are linear and keep constants, so a layer's mean after G is a weighted mean before it, and G runs once
for all layers. A program has BLOCK_T tokens of a sample at all cells, one more the start token: it reads its maps of
all layers once, and neighbours come from its own registers (`tl.gather`). The last of a sample's programs to finish
(`_order`) takes the best of all. Everything is fp32 in a fixed order. Bytes: every X_l, ids and foreground once; 6
bytes a cell for every BLOCK_T tokens, written and read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import MAX_ARGUMENTS, SegmentConfig, device_guard, segment_config
from ..segment import kernel_weights
from ._order import announce, counters

SHUFFLED = tl.constexpr(256)
"""Places along an axis up to which neighbours come from registers: beyond, a thread holds too many for shuffles."""


@triton.jit
def reflect(index, LENGTH: tl.constexpr):
    """-1 -> 1 and LENGTH -> LENGTH - 2; a single sample stays where it is."""
    index = tl.abs(index)
    return tl.maximum(tl.where(index > LENGTH - 1, 2 * (LENGTH - 1) - index, index), 0)


@triton.jit
def three_taps(before, here, after, edge):
    """edge before + (1 - 2 edge) here + edge after, with the neighbours as differences: a constant keeps its bits."""
    return here + 2.0 * edge * (0.5 * (before + after) - here)


@triton.jit
def beside(values, before, after, scratch, AXIS: tl.constexpr):
    """values [A, B] at two other places along AXIS, index [1, B] or [A, 1]: from registers up to `SHUFFLED` places,
    else through `scratch` [A, B], this program's own."""
    if values.shape[AXIS] <= SHUFFLED:
        first = tl.gather(values, tl.broadcast_to(before, values.shape), AXIS)
        second = tl.gather(values, tl.broadcast_to(after, values.shape), AXIS)
    else:
        row = tl.arange(0, values.shape[0])[:, None]
        column = tl.arange(0, values.shape[1])[None, :]
        width: tl.constexpr = values.shape[1]
        tl.debug_barrier()  # others may still read what was there before
        tl.store(scratch + row * width + column, values)
        tl.debug_barrier()
        if AXIS == 1:
            first = tl.load(scratch + row * width + before)
            second = tl.load(scratch + row * width + after)
        else:
            first = tl.load(scratch + before * width + column)
            second = tl.load(scratch + after * width + column)
    return first, second


@triton.jit
def smoothed_cells(values, y, x, edge, scratch, GRID_H: tl.constexpr, GRID_W: tl.constexpr):
    """3x3 Gaussian of maps [T, S] at the cells y, x [1, S]: along x first, as the torch implementation does it."""
    last: tl.constexpr = values.shape[1] - 1  # beyond the last cell any other one will do
    row = y * GRID_W
    left, right = beside(
        values, tl.minimum(row + reflect(x - 1, GRID_W), last), tl.minimum(row + reflect(x + 1, GRID_W), last),
        scratch, 1,
    )  # fmt: skip
    level = three_taps(left, values, right, edge)
    above, below = beside(
        level, tl.minimum(reflect(y - 1, GRID_H) * GRID_W + x, last),
        tl.minimum(reflect(y + 1, GRID_H) * GRID_W + x, last), scratch, 1,
    )  # fmt: skip
    return three_taps(above, level, below, edge)


@triton.jit
def _mean_weight(index, edge, LENGTH: tl.constexpr):
    """Column sum of the smoothing matrix of one axis: the weight of a sample in the mean after smoothing."""
    if LENGTH == 1:
        weight = index * 0.0 + 1.0
    else:
        before = tl.where(index >= 1, tl.where(index == 1, 2.0, 1.0), 0.0)
        after = tl.where(index <= LENGTH - 2, tl.where(index == LENGTH - 2, 2.0, 1.0), 0.0)
        weight = (1.0 - 2.0 * edge) + edge * (before + after)
    return weight


@triton.jit
def _source(index, LENGTH: tl.constexpr, TARGET: tl.constexpr):
    """Bilinear taps of one axis, align_corners=False: lower index, upper index, weight of the upper one."""
    position = tl.maximum((index.to(tl.float32) + 0.5) * (LENGTH / TARGET) - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), LENGTH - 1)
    return low, tl.minimum(low + 1, LENGTH - 1), position - low.to(tl.float32)


@triton.jit
def _resized(
    maps, index, y, x, used, valid, H: tl.constexpr, W: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr
):  # fmt: skip
    """Numbers `index` [T, 1] of the H x W maps at the grid's cells y, x [1, S]: [T, S] in fp32, 0 where not `used`
    [T, 1]. A map smaller than a grid of up to `SHUFFLED` cells is read once; of others, four neighbours are read."""
    base = maps + index * (H * W)
    mask = used & valid  # [T, S]
    if H == GRID_H and W == GRID_W:
        value = tl.load(base + y * W + x, mask=mask, other=0.0).to(tl.float32)
    else:
        y0, y1, fy = _source(y, H, GRID_H)
        x0, x1, fx = _source(x, W, GRID_W)
        if H * W <= mask.shape[1] and mask.shape[1] <= SHUFFLED:  # noqa: SIM300
            place = tl.arange(0, mask.shape[1])[None, :]
            whole = tl.load(base + place, mask=used & (place < H * W), other=0.0).to(tl.float32)
            a, b = beside(whole, y0 * W + x0, y0 * W + x1, maps, 1)
            c, d = beside(whole, y1 * W + x0, y1 * W + x1, maps, 1)
        else:
            a = tl.load(base + y0 * W + x0, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(base + y0 * W + x1, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(base + y1 * W + x0, mask=mask, other=0.0).to(tl.float32)
            d = tl.load(base + y1 * W + x1, mask=mask, other=0.0).to(tl.float32)
        value = (1.0 - fy) * ((1.0 - fx) * a + fx * b) + fy * ((1.0 - fx) * c + fx * d)
    return value


@triton.jit
def _start_contrast(
    starts, counts, sample, y, x, valid, weight,
    GROUPS: tl.constexpr, SIZES: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """a of the module's formula at all cells, before G: [1, S]."""
    contrast = tl.zeros(x.shape, tl.float32)
    channels: tl.constexpr = 2 if PAIRED else 1
    for group in tl.static_range(GROUPS):
        for layer in tl.range(0, counts[group]):
            image = (layer * tl.num_programs(1) + sample) * channels + tl.arange(0, 1)[:, None]
            a = _resized(
                starts[group], image, y, x, image >= 0, valid, SIZES[2 * group], SIZES[2 * group + 1], GRID_H, GRID_W
            )
            m = tl.sum(a * weight, 1)[:, None]
            if PAIRED:
                b = _resized(
                    starts[group], image + 1, y, x, image >= 0, valid, SIZES[2 * group], SIZES[2 * group + 1],
                    GRID_H, GRID_W,
                )  # fmt: skip
                n = tl.sum(b * weight, 1)[:, None]
                contrast += (a - m) / m - (b - n) / n
            else:
                contrast += (a - m) / (m * (1.0 - m))
    return contrast


@triton.jit
def segment_cells(
    maps, starts, counts, token_mask, best_parts, id_parts, foreground_out, scratch, counters, sample, part,
    tokens, layers, edge,
    GROUPS: tl.constexpr, SIZES: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr, PAIRED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Part `part` of a sample: the best of BLOCK_T tokens at every cell, to scratch [parts, S]; beyond the last token,
    the foreground. Returns whether all other programs of the sample are done: then `winners` can be asked."""
    CELLS: tl.constexpr = GRID_H * GRID_W
    cell = tl.arange(0, BLOCK_S)
    valid = cell[None, :] < CELLS  # [1, BLOCK_S]
    y = tl.minimum(cell // GRID_W, GRID_H - 1)[None, :]
    x = (cell % GRID_W)[None, :]
    weight = _mean_weight(y, edge, GRID_H) * _mean_weight(x, edge, GRID_W) / CELLS
    weight = tl.where(valid, weight, 0.0)
    parts = tl.cdiv(tokens, BLOCK_T)
    scratch += (sample * (parts + 1) + part) * (BLOCK_T * BLOCK_S)
    if part == parts:
        contrast = _start_contrast(starts, counts, sample, y, x, valid, weight, GROUPS, SIZES, GRID_H, GRID_W, PAIRED)
        contrast = smoothed_cells(contrast, y, x, edge, scratch, GRID_H, GRID_W)
        tl.store(foreground_out + sample * CELLS + cell[None, :], contrast < -1e-6 * layers, mask=valid)
    else:
        token = part * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [BLOCK_T, 1]
        allowed = token < tokens
        score = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for group in tl.static_range(GROUPS):
            for layer in tl.range(0, counts[group]):
                image = (layer * tl.num_programs(1) + sample) * tokens + token
                r = _resized(
                    maps[group], image, y, x, allowed, valid, SIZES[2 * group], SIZES[2 * group + 1], GRID_H, GRID_W
                )  # [BLOCK_T, BLOCK_S]
                score += r / (tl.sum(r * weight, 1)[:, None] + 1e-8)
        score = smoothed_cells(score, y, x, edge, scratch, GRID_H, GRID_W)
        if MASKED:
            allowed = allowed & tl.load(token_mask + sample * tokens + token, mask=allowed, other=0).to(tl.int1)
        score = tl.where(allowed, score, float("-inf"))
        best = tl.max(score, 0)
        # Lowest index of the maximum: the same on every device, unlike the order of an argmax reduction.
        winner = tl.min(tl.where(score == best[None, :], token, tokens), 0)
        at = (sample * parts + part) * CELLS + cell
        tl.store(best_parts + at, best, mask=cell < CELLS)
        tl.store(id_parts + at, winner.to(id_parts.dtype.element_ty), mask=cell < CELLS)
    return announce(counters + sample) == parts


@triton.jit
def winners(
    best_parts, id_parts, ids_out, foreground_out, counters, sample, tokens,
    CELLS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """ids int32 and foreground int1 of all cells of a sample, both [BLOCK_S], from all parts; the lowest token wins a
    tie. Stores the ids and sets the counter back."""
    cell = tl.arange(0, BLOCK_S)
    valid = cell < CELLS
    parts = tl.cdiv(tokens, BLOCK_T)
    best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    ids = tl.zeros([BLOCK_S], tl.int32)
    for part in tl.range(0, parts):
        at = (sample * parts + part) * CELLS + cell
        score = tl.load(best_parts + at, mask=valid, other=0.0)
        ids = tl.where(score > best, tl.load(id_parts + at, mask=valid, other=0).to(tl.int32), ids)
        best = tl.maximum(best, score)
    tl.store(ids_out + sample * CELLS + cell, ids.to(tl.int64), mask=valid)
    tl.store(counters + sample, 0)
    foreground = tl.load(foreground_out + sample * CELLS + cell, mask=valid, other=0).to(tl.int1)
    return ids, foreground


@triton.jit
def segment_kernel(
    maps, starts, counts, token_mask, best_parts, id_parts, ids_out, foreground_out, scratch, counters, tokens, layers,
    edge,
    GROUPS: tl.constexpr, SIZES: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr, PAIRED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    if segment_cells(
        maps, starts, counts, token_mask, best_parts, id_parts, foreground_out, scratch, counters, sample,
        tl.program_id(0), tokens, layers, edge, GROUPS, SIZES, GRID_H, GRID_W, PAIRED, MASKED, BLOCK_T, BLOCK_S,
    ):  # fmt: skip
        winners(
            best_parts, id_parts, ids_out, foreground_out, counters, sample, tokens, GRID_H * GRID_W, BLOCK_T, BLOCK_S
        )


@dataclass(frozen=True)
class Groups:
    """Layers as the kernel takes them: the maps of every group one after another in memory, their number and size."""

    tokens: tuple[torch.Tensor, ...]
    start: tuple[torch.Tensor, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.tokens, self.start, self.counts

    @property
    def layers(self) -> int:
        return sum(self.counts)


def grouped(tokens: Sequence[torch.Tensor], start: Sequence[torch.Tensor], sizes: Sequence[int]) -> Groups:
    """Every layer is a group, up to `MAX_ARGUMENTS`; more are put together in memory, those of one size and dtype: a
    copy, and a loop in the place of more arguments and unrolled code."""
    if len(tokens) <= MAX_ARGUMENTS:
        return Groups(tuple(tokens), tuple(start), (1,) * len(tokens), tuple(sizes))
    members: dict[Any, list[int]] = {}
    for index, (layer, own) in enumerate(zip(tokens, start, strict=True)):
        key = (sizes[2 * index], sizes[2 * index + 1], layer.dtype, own.dtype)
        members.setdefault(key, []).append(index)
    return Groups(
        tuple(torch.stack([tokens[index] for index in group]) for group in members.values()),
        tuple(torch.stack([start[index] for index in group]) for group in members.values()),
        tuple(map(len, members.values())),
        tuple(length for key in members for length in key[:2]),
    )


def empty_regions(batch: int, h: int, w: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and foreground, not yet written."""
    ids = torch.empty((batch, h, w), dtype=torch.int64, device=device)
    return ids, torch.empty((batch, h, w), dtype=torch.bool, device=device)


def empty_neighbours(programs: int, width: int, config: SegmentConfig, device: torch.device) -> torch.Tensor:
    """Scratch of `beside` for `width` values of every cell; one element where registers will do."""
    size = programs * width * config.block_s if config.block_s > SHUFFLED.value else 1
    return torch.empty(size, dtype=torch.float32, device=device)


def empty_parts(
    batch: int, tokens: int, cells: int, config: SegmentConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Scratch: best score and token of every part and cell, and what `beside` needs. And how many parts there are."""
    parts = triton.cdiv(tokens, config.block_t)
    best = torch.empty((batch, parts, cells), dtype=torch.float32, device=device)
    winner = torch.empty((batch, parts, cells), dtype=torch.int16, device=device)
    return best, winner, empty_neighbours(batch * (parts + 1), config.block_t, config, device), parts


def map_constants(
    start: Sequence[torch.Tensor], sizes: Sequence[int], token_mask: torch.Tensor | None, config: SegmentConfig
) -> dict[str, Any]:
    """Constants of `segment_cells` but for the grid, and the launch options."""
    return {
        "GROUPS": len(sizes) // 2,
        "SIZES": tuple(sizes),
        "PAIRED": start[0].dim() == 3,
        "MASKED": token_mask is not None,
        "BLOCK_T": config.block_t,
        "BLOCK_S": config.block_s,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
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
    config = config or segment_config(h * w)
    groups = grouped(tokens, start, sizes)
    best, winner, scratch, parts = empty_parts(batch, count, h * w, config, device)
    with device_guard(device), counters(device, batch) as zeros:
        segment_kernel[(parts + 1, batch)](
            *groups.arguments, token_mask, best, winner, ids, foreground, scratch, zeros, count, groups.layers,
            kernel_weights(blur_sigma)[0], GRID_H=h, GRID_W=w, **map_constants(start, groups.sizes, token_mask, config),
        )  # fmt: skip
    return ids, foreground
