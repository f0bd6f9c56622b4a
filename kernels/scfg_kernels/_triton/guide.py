r"""Region rates and the guided prediction, one program per sample, or several that each hold a share of it.

    n[x]      = ||cond[x] - uncond[x]||_2 over channels, summed over the pixels of a cell
    rate_i    = min( clamp( mean_F n / (mean_i n + 1e-8), rate_min, rate_max ), max_scale / g )
    rate[x]   = G rate_id(x)
    result[x] = u + weight d,     weight = g rate,  or  -g / (g - 1) (rate - 1)  for the rewritten unconditional half
    result    = f (phi std(cond) / std(f) + 1 - phi)  with f = u + weight d, if it is rescaled

Tiles are [channels, pixels], whose pixels are those of some rows of cells. Up to `HELD_VALUES` u and c stay in
registers from the norms to the prediction. Larger samples are shared by programs that each hold some rows of cells and
meet (`_order`) when they have their sums, in a cooperative launch; or where there are not enough of those, one program
passes over u and c in tiles, twice, or three times if rescaled. Sums and rates of regions go through memory (T words
each), norms too where tiles pass.

Cells are reduced by region with masked sums, and parts in their order: no floating-point atomics. Products and sums are
not fused, so that a rate of 1 gives the bits of plain guidance. Spreads are Welford's, per lane and then merged:
exactly 0 for a constant.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import GuideConfig, device_guard, guide_config, refuse, resident_programs
from ..guide import empty_result
from ..segment import kernel_weights
from ._device import current_limits, per_sample
from ._order import counters, leave_meeting, meet
from .segment import alignment, reflect, three_taps


@triton.jit
def load_predictions(
    uncond, cond, first, y, x, inside, channels,
    u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of channels `first` .. and the pixels y, x [P]: u and c [BLOCK_C, P], 0 where there is none, and where one is."""
    channel = first + tl.arange(0, BLOCK_C)[:, None]
    mask = inside[None, :] & (channel < channels)
    u = uncond + channel * u_stride_c + y[None, :] * u_stride_y + x[None, :] * u_stride_x
    c = cond + channel * c_stride_c + y[None, :] * c_stride_y + x[None, :] * c_stride_x
    return tl.load(u, mask=mask, other=0.0), tl.load(c, mask=mask, other=0.0), mask


@triton.jit
def store_prediction(
    result, guided, first, y, x, mask, r_stride_c, r_stride_y, r_stride_x, copy_stride, COPIES: tl.constexpr
):  # fmt: skip
    """guided [BLOCK_C, P] as channels `first` .. of the pixels y, x [P], COPIES times."""
    channel = first + tl.arange(0, guided.shape[0])[:, None]
    target = result + channel * r_stride_c + y[None, :] * r_stride_y + x[None, :] * r_stride_x
    for copy in tl.static_range(COPIES):
        tl.store(target + copy * copy_stride, guided.to(result.dtype.element_ty), mask=mask)


@triton.jit
def scale_of(guidance_scale, sample, scale_stride):
    """A sample's guidance scale, fp32: one number for all, or read from memory."""
    if guidance_scale.dtype.is_ptr():
        scale = tl.load(guidance_scale + sample * scale_stride).to(tl.float32)
    else:
        scale = guidance_scale
    return scale


@triton.jit
def energy(u, c):
    """Sum of squares of c - u over the channels, fp32 [P]."""
    d = c.to(tl.float32) - u.to(tl.float32)
    return tl.sum(d * d, 0)


@triton.jit
def combined(u, c, weight):
    """u + weight d, fp32 [BLOCK_C, P]; weight [P]."""
    u = u.to(tl.float32)
    return u + weight[None, :] * (c.to(tl.float32) - u)


@triton.jit
def weight_of(rate, scale, UNCONDITIONAL: tl.constexpr):
    return tl.div_rn(-scale, scale - 1.0) * (rate - 1.0) if UNCONDITIONAL else scale * rate


@triton.jit
def _with_sample(mean, squares, value, count, mask):
    """Welford's step: mean, and squares about it, with the `count`-th value."""
    before = tl.where(mask, value - mean, 0.0)
    mean += tl.div_rn(before, count)
    return mean, squares + before * (value - mean)


@triton.jit
def _moments_of_all(mean, squares, count):
    """Mean of all lanes and squares about it, from those of each."""
    # Sums alone: they commute to the bit, so every thread of a reduction has one result. From the lowest mean, so that
    # those of a constant differ by exactly 0.
    lowest = tl.min(tl.where(count > 0.0, mean, float("inf")))
    apart = mean - lowest
    shift = tl.div_rn(tl.sum(count * apart), tl.sum(count))
    apart -= shift
    return lowest + shift, tl.sum(squares + count * apart * apart)


@triton.jit
def _factor(squares_c, squares_f, rescale):
    """What f is multiplied by; a constant stays as it is."""
    ratio = tl.sqrt_rn(tl.div_rn(squares_c, squares_f))
    return tl.where(squares_f == 0.0, 1.0, rescale * ratio + (1.0 - rescale))


@triton.jit
def rescaled(
    guided, c, mask, rescale, scratch, offset, part, meeting, sample, announcements, PARTS: tl.constexpr
):  # fmt: skip
    """A program's f [C, P] times its sample's factor. Where the sample has several PARTS, their moments [PARTS, 5] meet
    at `offset` of `scratch`."""
    count = mask.to(tl.float32)
    mean_c, squares_c = _moments_of_all(c.to(tl.float32), 0.0, count)
    mean_f, squares_f = _moments_of_all(guided, 0.0, count)
    if PARTS > 1:
        moments = scratch + offset
        own = moments + part * 5
        tl.store(own, tl.sum(count))
        tl.store(own + 1, mean_c)
        tl.store(own + 2, squares_c)
        tl.store(own + 3, mean_f)
        tl.store(own + 4, squares_f)
        meet(meeting + sample, announcements)
        every = tl.arange(0, power_of_2(PARTS))
        at = moments + every * 5
        counts = tl.load(at, mask=every < PARTS, other=0.0)
        means_c = tl.load(at + 1, mask=every < PARTS, other=0.0)
        means_f = tl.load(at + 3, mask=every < PARTS, other=0.0)
        _, squares_c = _moments_of_all(means_c, tl.load(at + 2, mask=every < PARTS, other=0.0), counts)
        _, squares_f = _moments_of_all(means_f, tl.load(at + 4, mask=every < PARTS, other=0.0), counts)
    return guided * _factor(squares_c, squares_f, rescale)


@triton.constexpr_function
def power_of_2(number):
    """The least one that is not less."""
    return triton.next_power_of_2(number)


@triton.constexpr_function
def quarter(pixels):
    """Pixels of a tile of `store_rescaled`, which has four statistics of each."""
    return max(1, pixels // 4)


@triton.jit
def store_rescaled(
    uncond, cond, rates, result, scale, rescale, channels,
    u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, r_stride_c, r_stride_y, r_stride_x,
    copy_stride, height, width, COPIES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The rescaled prediction of a sample in tiles, from its rates [height, width] in memory."""
    count = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    mean_c = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares_c = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    mean_f = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares_f = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in tl.range(0, height * width, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < height * width
        weight = scale * tl.load(rates + pixel, mask=inside, other=0.0)
        for first in tl.range(0, channels, BLOCK_C):
            u, c, mask = load_predictions(
                uncond, cond, first, pixel // width, pixel % width, inside, channels,
                u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
            )  # fmt: skip
            count += mask.to(tl.float32)
            number = tl.maximum(count, 1.0)
            mean_c, squares_c = _with_sample(mean_c, squares_c, c.to(tl.float32), number, mask)
            mean_f, squares_f = _with_sample(mean_f, squares_f, combined(u, c, weight), number, mask)
    _, all_squares_c = _moments_of_all(mean_c, squares_c, count)
    _, all_squares_f = _moments_of_all(mean_f, squares_f, count)
    factor = _factor(all_squares_c, all_squares_f, rescale)

    for start in tl.range(0, height * width, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < height * width
        weight = scale * tl.load(rates + pixel, mask=inside, other=0.0)
        for first in tl.range(0, channels, BLOCK_C):
            u, c, mask = load_predictions(
                uncond, cond, first, pixel // width, pixel % width, inside, channels,
                u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
            )  # fmt: skip
            store_prediction(
                result, combined(u, c, weight) * factor, first, pixel // width, pixel % width, mask,
                r_stride_c, r_stride_y, r_stride_x, copy_stride, COPIES,
            )  # fmt: skip


@triton.jit
def _sum_again(values, chosen):
    """Sum of the chosen values, with what was rounded away: sums of what they differ from their mean are small."""
    total = tl.sum(tl.where(chosen, values, 0.0))
    mean = tl.div_rn(total, tl.maximum(tl.sum(chosen.to(tl.float32)), 1.0))
    return total + tl.sum(tl.where(chosen, values - mean, 0.0))


@triton.jit
def _store_sums(
    sums, ids, foreground, norm, area, valid, tokens, IMAGE: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Norm and area of every region and, after the last one, of the benchmark, [2, tokens + 1] at `sums`. Of cells [R,
    BLOCK_W], norm and area 0 where there is none."""
    benchmark = valid if IMAGE else foreground & valid
    areas = sums + tokens + 1
    tl.store(sums + tokens, _sum_again(norm, benchmark))
    tl.store(areas + tokens, tl.sum(tl.where(benchmark, area, 0.0)))
    for first in tl.range(0, tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        member = (ids[None, :, :] == token[:, None, None]) & valid[None, :, :]  # [BLOCK_T, R, BLOCK_W]
        region_norm = tl.sum(tl.sum(tl.where(member, norm[None, :, :], 0.0), 2), 1)
        region_area = tl.sum(tl.sum(tl.where(member, area[None, :, :], 0.0), 2), 1)
        tl.store(sums + token, region_norm, mask=token < tokens)
        tl.store(areas + token, region_area, mask=token < tokens)


@triton.jit
def _store_rates(
    rates, sums, tokens, scale, rate_min, rate_max, max_scale,
    PAPER: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rate of every region, from the sums of all parts, [PARTS, 2, tokens + 1], BLOCK at a time."""
    between = 2 * (tokens + 1)  # one part and the next
    fore_norm = tl.load(sums + tokens)
    fore_area = tl.load(sums + 2 * tokens + 1)
    for other in tl.range(1, PARTS):
        fore_norm += tl.load(sums + other * between + tokens)
        fore_area += tl.load(sums + other * between + 2 * tokens + 1)
    fore_mean = tl.div_rn(fore_norm, fore_area + 1e-8)
    for first in tl.range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        known = token < tokens
        norm = tl.load(sums + token, mask=known, other=0.0)
        area = tl.load(sums + tokens + 1 + token, mask=known, other=0.0)
        for other in tl.range(1, PARTS):
            norm += tl.load(sums + other * between + token, mask=known, other=0.0)
            area += tl.load(sums + other * between + tokens + 1 + token, mask=known, other=0.0)
        rate = tl.div_rn(fore_mean, tl.div_rn(norm, area + 1e-8) + 1e-8)
        if PAPER:
            rate = tl.where(fore_area > 0.0, rate, 1.0)
        rate = tl.minimum(tl.maximum(rate, rate_min), rate_max)
        tl.store(rates + token, tl.minimum(rate, tl.div_rn(max_scale, scale)), mask=known)


@triton.jit
def _smoothed_row(
    rates, ids_in, row, tokens, edge, i_stride_y, i_stride_x, width,
    CELL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_CELL: tl.constexpr,
):  # fmt: skip
    """Rates of rows of cells, row [R, 1], smoothed along x: at the pixels of a line, [R, 1, BLOCK_W, BLOCK_CELL]."""
    column = tl.minimum(tl.arange(0, BLOCK_W)[None, :], tl.cdiv(width, CELL) - 1)
    first = column * CELL
    last = tl.minimum(first + CELL, width) - 1
    token = tl.load(ids_in + row * i_stride_y + column * i_stride_x)
    here = tl.load(rates + token, mask=(token >= 0) & (token < tokens), other=0.0)
    left = tl.gather(here, tl.broadcast_to(reflect(first - 1, width) // CELL, here.shape), 1)[:, None, :, None]
    right = tl.gather(here, tl.broadcast_to(reflect(last + 1, width) // CELL, here.shape), 1)[:, None, :, None]
    here = here[:, None, :, None]
    x = tl.arange(0, BLOCK_CELL)[None, None, None, :]
    return three_taps(
        tl.where(x == 0, left, here), here, tl.where(x == (last - first)[:, None, :, None], right, here), edge
    )  # fmt: skip


@triton.jit
def _pixel_rates(
    rates, ids_in, first_row, first_line, tokens, edge, i_stride_y, i_stride_x, height, width, CELL: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_CELL: tl.constexpr,
):  # fmt: skip
    """Smoothed rates of the pixels of `_pixels`, from those of regions, in memory, and the regions of cells."""
    row = tl.minimum(first_row + tl.arange(0, ROWS), tl.cdiv(height, CELL) - 1)[:, None]
    first = row * CELL
    last = tl.minimum(first + CELL, height) - 1
    above = reflect(first - 1, height) // CELL
    below = reflect(last + 1, height) // CELL
    here = _smoothed_row(rates, ids_in, row, tokens, edge, i_stride_y, i_stride_x, width, CELL, BLOCK_W, BLOCK_CELL)
    above = _smoothed_row(rates, ids_in, above, tokens, edge, i_stride_y, i_stride_x, width, CELL, BLOCK_W, BLOCK_CELL)
    below = _smoothed_row(rates, ids_in, below, tokens, edge, i_stride_y, i_stride_x, width, CELL, BLOCK_W, BLOCK_CELL)
    y = first_line + tl.arange(0, LINES)[None, :, None, None]
    rate = three_taps(
        tl.where(y == 0, above, here), here, tl.where(y == (last - first)[:, :, None, None], below, here), edge
    )  # fmt: skip
    return tl.reshape(rate, [ROWS * LINES * BLOCK_W * BLOCK_CELL])


@triton.jit
def _pixels(
    first_row, first_line, height, width, CELL: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_CELL: tl.constexpr,
):  # fmt: skip
    """y and x of a tile of pixels, and which are in the picture: LINES lines, from `first_line`, of each of ROWS rows
    of cells, from `first_row`. The tile is [ROWS, LINES, BLOCK_W, BLOCK_CELL], flattened."""
    place = tl.arange(0, ROWS * LINES * BLOCK_W * BLOCK_CELL)
    x_in_cell = place % BLOCK_CELL
    y_in_cell = first_line + place // (BLOCK_CELL * BLOCK_W) % LINES
    x = place // BLOCK_CELL % BLOCK_W * CELL + x_in_cell
    y = (first_row + place // (BLOCK_CELL * BLOCK_W * LINES)) * CELL + y_in_cell
    return y, x, (x_in_cell < CELL) & (x < width) & (y_in_cell < CELL) & (y < height)


@triton.jit
def _cell_sums(
    values, ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_CELL: tl.constexpr
):  # fmt: skip
    """Sums over the pixels of a tile that lie in a cell: [ROWS, BLOCK_W]."""
    return tl.sum(tl.sum(tl.reshape(values, [ROWS, LINES, BLOCK_W, BLOCK_CELL]), 3), 1)


@triton.jit
def guide_cells(
    uncond, cond, guidance_scale, result, rate_out, scratch, meeting, ids_in, ids, foreground, sample, part,
    tokens, channels, edge, rate_min, rate_max, max_scale, rescale, scale_stride, scratch_stride,
    i_stride_b, i_stride_y, i_stride_x,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x, copy_stride, height, width,
    grid_h, grid_w, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, IMAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, HELD: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    LINES: tl.constexpr, COPIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All after the argmax, for a part of a sample: BLOCK_H rows of cells, which are all of them unless HELD. ids int32
    and foreground int1 [BLOCK_H, BLOCK_W] are the part's, `ids_in` all of the batch in memory; `meeting`: a counter per
    sample, if it has several parts."""
    uncond += sample * u_stride_b
    cond += sample * c_stride_b
    result += sample * r_stride_b
    rate_out += sample * (height * width)
    ids_in += sample * i_stride_b
    scale = scale_of(guidance_scale, sample, scale_stride)
    sums = scratch + sample * scratch_stride
    moments = sums + PARTS * 2 * (tokens + 1)
    norms = moments + PARTS * 5
    rates = norms + grid_h * grid_w + part * tokens  # of every region: each part makes its own

    first_row = part * BLOCK_H
    cell_y = first_row + tl.arange(0, BLOCK_H)[:, None]
    cell_x = tl.arange(0, BLOCK_W)[None, :]
    valid = (cell_y < grid_h) & (cell_x < grid_w)
    lines = tl.minimum(height - cell_y * CELL, CELL)
    area = tl.where(valid, (lines * tl.minimum(width - cell_x * CELL, CELL)).to(tl.float32), 0.0)
    if HELD:
        y, x, inside = _pixels(first_row, 0, height, width, CELL, ROWS, LINES, BLOCK_W, BLOCK_CELL)
        u, c, mask = load_predictions(
            uncond, cond, 0, y, x, inside, channels,
            u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
        )  # fmt: skip
        norm = _cell_sums(tl.sqrt_rn(energy(u, c)), ROWS, LINES, BLOCK_W, BLOCK_CELL)
    else:
        for tile_row in tl.range(0, grid_h, ROWS):
            row = tile_row + tl.arange(0, ROWS)[:, None]
            total = tl.zeros([ROWS, BLOCK_W], tl.float32)
            for first_line in tl.range(0, CELL, LINES):
                y, x, inside = _pixels(tile_row, first_line, height, width, CELL, ROWS, LINES, BLOCK_W, BLOCK_CELL)
                square = tl.zeros(y.shape, tl.float32)
                for first in tl.range(0, channels, BLOCK_C):
                    u, c, _ = load_predictions(
                        uncond, cond, first, y, x, inside, channels,
                        u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
                    )  # fmt: skip
                    square += energy(u, c)
                total += _cell_sums(tl.sqrt_rn(square), ROWS, LINES, BLOCK_W, BLOCK_CELL)
            tl.store(norms + row * grid_w + cell_x, total, mask=(row < grid_h) & (cell_x < grid_w))
        tl.debug_barrier()  # the norms that other threads wrote
        norm = tl.load(norms + cell_y * grid_w + cell_x, mask=valid, other=0.0)

    _store_sums(
        sums + part * 2 * (tokens + 1), ids, foreground, norm, area, valid, tokens, IMAGE, BLOCK_T
    )  # fmt: skip
    if PARTS > 1:
        meet(meeting + sample, PARTS)
    else:
        tl.debug_barrier()  # the sums that other threads wrote
    _store_rates(rates, sums, tokens, scale, rate_min, rate_max, max_scale, PAPER, PARTS, 128)
    tl.debug_barrier()  # the rates that other threads wrote
    if HELD:
        rate = _pixel_rates(
            rates, ids_in, first_row, 0, tokens, edge, i_stride_y, i_stride_x,
            height, width, CELL, ROWS, LINES, BLOCK_W, BLOCK_CELL,
        )  # fmt: skip
        tl.store(rate_out + y * width + x, rate, mask=inside)
        guided = combined(u, c, weight_of(rate, scale, UNCONDITIONAL))
        if RESCALE:
            guided = rescaled(guided, c, mask, rescale, moments, 0, part, meeting, sample, 2 * PARTS, PARTS)
        store_prediction(
            result, guided, 0, y, x, mask, r_stride_c, r_stride_y, r_stride_x, copy_stride, COPIES
        )  # fmt: skip
        if PARTS > 1:
            leave_meeting(meeting + sample, 3 * PARTS if RESCALE else 2 * PARTS)
    else:
        for tile_row in tl.range(0, grid_h, ROWS):
            for first_line in tl.range(0, CELL, LINES):
                y, x, inside = _pixels(tile_row, first_line, height, width, CELL, ROWS, LINES, BLOCK_W, BLOCK_CELL)
                rate = _pixel_rates(
                    rates, ids_in, tile_row, first_line, tokens, edge, i_stride_y, i_stride_x,
                    height, width, CELL, ROWS, LINES, BLOCK_W, BLOCK_CELL,
                )  # fmt: skip
                tl.store(rate_out + y * width + x, rate, mask=inside)
                if not RESCALE:
                    weight = weight_of(rate, scale, UNCONDITIONAL)
                    for first in tl.range(0, channels, BLOCK_C):
                        u, c, mask = load_predictions(
                            uncond, cond, first, y, x, inside, channels,
                            u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
                        )  # fmt: skip
                        store_prediction(
                            result, combined(u, c, weight), first, y, x, mask,
                            r_stride_c, r_stride_y, r_stride_x, copy_stride, COPIES,
                        )  # fmt: skip
        if RESCALE:
            tl.debug_barrier()  # the rates that other threads wrote
            store_rescaled(
                uncond, cond, rate_out, result, scale, rescale, channels,
                u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x,
                r_stride_c, r_stride_y, r_stride_x, copy_stride, height, width, COPIES, BLOCK_C,
                quarter(ROWS * LINES * BLOCK_W * BLOCK_CELL),
            )  # fmt: skip


@triton.jit(do_not_specialize=["height", "width", "grid_h", "grid_w"])
def guide_kernel(
    uncond, cond, ids_in, foreground_in, guidance_scale, result, rate_out, scratch, meeting, tokens, channels, edge,
    rate_min, rate_max, max_scale, rescale, scale_stride, scratch_stride,
    i_stride_b, i_stride_y, i_stride_x, f_stride_b, f_stride_y, f_stride_x,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x, copy_stride, height, width,
    grid_h, grid_w, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, IMAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, HELD: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    LINES: tl.constexpr, COPIES: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, GRID_ALIGN: tl.constexpr,
):  # fmt: skip
    width *= ALIGN
    grid_w *= GRID_ALIGN
    sample = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    y = part * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    x = tl.arange(0, BLOCK_W)[None, :]
    valid = (y < grid_h) & (x < grid_w)
    ids = tl.load(ids_in + sample * i_stride_b + y * i_stride_y + x * i_stride_x, mask=valid, other=0)
    at = foreground_in + sample * f_stride_b + y * f_stride_y + x * f_stride_x
    foreground = tl.load(at, mask=valid, other=0).to(tl.int1)
    guide_cells(
        uncond, cond, guidance_scale, result, rate_out, scratch, meeting, ids_in, ids.to(tl.int32), foreground, sample,
        part, tokens, channels, edge, rate_min, rate_max, max_scale, rescale, scale_stride, scratch_stride,
        i_stride_b, i_stride_y, i_stride_x,
        u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
        r_stride_b, r_stride_c, r_stride_y, r_stride_x, copy_stride,
        height, width, grid_h, grid_w, CELL, BLOCK_CELL, PAPER, UNCONDITIONAL, RESCALE, IMAGE,
        BLOCK_T, BLOCK_H, BLOCK_W, HELD, BLOCK_C, ROWS, LINES, COPIES, PARTS,
    )  # fmt: skip


def empty_result_and_rate(cond: torch.Tensor, copies: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The prediction and the rate, not yet written, and how far one copy of the prediction is from the next."""
    batch, _, height, width = cond.shape
    result = empty_result(cond, copies)
    rate = torch.empty((batch, 1, height, width), dtype=torch.float32, device=cond.device)
    return result, rate, batch * result.stride(0)


def empty_scratch(batch: int, parts: int, tokens: int, cells: int, device: torch.device) -> torch.Tensor:
    """Scratch: sums and moments of every part, norms of cells, rates of regions of every part."""
    words = parts * (2 * (tokens + 1) + 5) + cells + parts * tokens
    return torch.empty((batch, words), dtype=torch.float32, device=device)


def meeting_counters(parts: int, batch: int, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A counter per sample, where it has several parts; none otherwise."""
    return counters(device, batch) if parts > 1 else contextlib.nullcontext()


def prediction_constants(
    cell: int, fidelity: str, rewrite: str, rescale: float, benchmark: str, copies: int,
    parts: int, config: GuideConfig,
) -> dict[str, Any]:  # fmt: skip
    """Constants of `guide_cells`, and the launch options."""
    return {
        "CELL": cell,
        "BLOCK_CELL": triton.next_power_of_2(cell),
        "PAPER": fidelity == "paper",
        "UNCONDITIONAL": rewrite == "unconditional",
        "RESCALE": rescale > 0.0,
        "IMAGE": benchmark == "image",
        "BLOCK_T": config.block_t,
        "BLOCK_H": config.block_h,
        "BLOCK_W": config.block_w,
        "HELD": config.held,
        "BLOCK_C": config.block_c,
        "ROWS": config.rows,
        "LINES": config.lines,
        "COPIES": copies,
        "PARTS": parts,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }


def launch(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    token_index: torch.Tensor,
    foreground: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    num_tokens: int,
    cell: int,
    rate_min: float,
    rate_max: float,
    max_scale: float,
    blur_sigma: float,
    fidelity: str,
    rewrite: str,
    rescale: float,
    benchmark: str,
    config: GuideConfig | None = None,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction (or rewritten unconditional one) and rate [B, 1, H, W]; `config` overrides the choice."""
    batch, channels, height, width = cond.shape
    result, rate, copy_stride = empty_result_and_rate(cond, copies)
    if rate.numel() == 0:
        return result, rate
    scale, scale_stride = per_sample(guidance_scale)
    cell = min(cell, max(height, width))  # which covers the image as well
    h, w = token_index.shape[1:]
    if config is not None:
        refuse("guide", config, config.reasons(h, w, channels, cell, shared=True))
    with device_guard(cond.device):
        config = config or guide_config(
            channels, height, width, cell, cond.element_size(), resident_programs(batch, current_limits())
        )
        parts = triton.cdiv(h, config.block_h)
        scratch = empty_scratch(batch, parts, num_tokens, h * w, cond.device)
        with meeting_counters(parts, batch, cond.device) as meeting:
            guide_kernel[(batch * parts,)](
                uncond, cond, token_index, foreground, scale, result, rate, scratch, meeting, num_tokens, channels,
                kernel_weights(blur_sigma)[0], rate_min, rate_max, max_scale, rescale, scale_stride, scratch.stride(0),
                *token_index.stride(), *foreground.stride(), *uncond.stride(), *cond.stride(), *result.stride(),
                copy_stride, height, width // alignment(width), h, w // alignment(w),
                ALIGN=alignment(width), GRID_ALIGN=alignment(w),
                **prediction_constants(cell, fidelity, rewrite, rescale, benchmark, copies, parts, config),
                launch_cooperative_grid=parts > 1,
            )  # fmt: skip
    return result, rate
