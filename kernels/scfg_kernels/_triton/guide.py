r"""Region rates and the guided prediction, one program per sample.

    n[x]      = ||cond[x] - uncond[x]||_2 over channels, summed over the pixels of a cell
    rate_i    = min( clamp( mean_F n / (mean_i n + 1e-8), rate_min, rate_max ), max_scale / g )
    rate[x]   = G rate_id(x)
    result[x] = u + weight d,     weight = g rate,  or  -g / (g - 1) (rate - 1)  for the rewritten unconditional half
    result    = f (phi std(cond) / std(f) + 1 - phi)  with f = u + weight d, if it is rescaled

Cells are reduced by region with a masked sum over [tokens, cells] in a fixed order: no atomics. The rates of the cells
go through memory (4 S bytes) because G needs neighbours. Products and sums are not fused, so that a rate of 1 gives the
bits of plain guidance. Spreads are Welford's, per lane and then merged: exactly 0 for a constant. Bytes: uncond and
cond twice (three times if rescaled; from cache but for the first), result and rate once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import SegmentConfig, device_guard, segment_config
from ..segment import kernel_weights
from ._device import per_sample
from .segment import beside, empty_neighbours, reflect, three_taps


@triton.jit
def combined(uncond, cond, weight, mask):
    """cond, and uncond + weight d, of one channel at these pointers, in fp32."""
    u = tl.load(uncond, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cond, mask=mask, other=0.0).to(tl.float32)
    return c, u + weight * (c - u)


@triton.jit
def store_combined(
    uncond, cond, result, weight, factor, y, x, mask, channels,
    u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, r_stride_c, r_stride_y, r_stride_x,
    RESCALE: tl.constexpr,
):  # fmt: skip
    """All channels of the pixels (y, x) of a sample; `factor` counts only if RESCALE."""
    for channel in tl.range(0, channels):
        _, guided = combined(
            uncond + channel * u_stride_c + y * u_stride_y + x * u_stride_x,
            cond + channel * c_stride_c + y * c_stride_y + x * c_stride_x,
            weight, mask,
        )  # fmt: skip
        if RESCALE:
            guided *= factor
        target = result + channel * r_stride_c + y * r_stride_y + x * r_stride_x
        tl.store(target, guided.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _with_sample(mean, squares, value, count, mask):
    """Welford's step: mean, and squares about it, with the `count`-th value."""
    before = tl.where(mask, value - mean, 0.0)
    mean += tl.div_rn(before, count)
    return mean, squares + before * (value - mean)


@triton.jit
def _squares_of_all(mean, squares, count):
    """Squares about the mean of all lanes, from those about the mean of each."""
    # Sums alone: they commute to the bit, so every thread of a reduction has one result. From the lowest mean, so that
    # those of a constant differ by exactly 0.
    apart = mean - tl.min(tl.where(count > 0.0, mean, float("inf")), 0)
    apart -= tl.div_rn(tl.sum(count * apart, 0), tl.sum(count, 0))
    return tl.sum(squares + count * apart * apart, 0)


@triton.jit
def store_rescaled(
    uncond, cond, rates, result, scale, rescale, channels,
    u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, r_stride_c, r_stride_y, r_stride_x,
    H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The rescaled prediction of a sample from its rates [H, W] in memory."""
    count = tl.zeros([BLOCK_P], tl.float32)
    mean_c = tl.zeros([BLOCK_P], tl.float32)
    squares_c = tl.zeros([BLOCK_P], tl.float32)
    mean_f = tl.zeros([BLOCK_P], tl.float32)
    squares_f = tl.zeros([BLOCK_P], tl.float32)
    for first in tl.range(0, H * W, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = pixel < H * W
        y = pixel // W
        x = pixel % W
        weight = scale * tl.load(rates + pixel, mask=inside, other=0.0)
        for channel in tl.range(0, channels):
            c, f = combined(
                uncond + channel * u_stride_c + y * u_stride_y + x * u_stride_x,
                cond + channel * c_stride_c + y * c_stride_y + x * c_stride_x,
                weight, inside,
            )  # fmt: skip
            count += tl.where(inside, 1.0, 0.0)
            number = tl.maximum(count, 1.0)
            mean_c, squares_c = _with_sample(mean_c, squares_c, c, number, inside)
            mean_f, squares_f = _with_sample(mean_f, squares_f, f, number, inside)
    spread = _squares_of_all(mean_f, squares_f, count)
    ratio = tl.sqrt_rn(tl.div_rn(_squares_of_all(mean_c, squares_c, count), spread))
    factor = tl.where(spread == 0.0, 1.0, rescale * ratio + (1.0 - rescale))

    for first in tl.range(0, H * W, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = pixel < H * W
        weight = scale * tl.load(rates + pixel, mask=inside, other=0.0)
        store_combined(
            uncond, cond, result, weight, factor, pixel // W, pixel % W, inside, channels,
            u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, r_stride_c, r_stride_y, r_stride_x,
            True,
        )  # fmt: skip


@triton.jit
def guide_cells(
    uncond, cond, guidance_scale, result, rate_out, scratch, ids, foreground, sample, tokens, channels, edge,
    rate_min, rate_max, max_scale, rescale, scale_stride,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x,
    H: tl.constexpr, W: tl.constexpr, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, IMAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All after the argmax; ids int32, foreground int1 [BLOCK_S]; `scratch` [BLOCK_S, BLOCK_CELL] for `beside`."""
    GRID_H: tl.constexpr = (H + CELL - 1) // CELL
    GRID_W: tl.constexpr = (W + CELL - 1) // CELL
    uncond += sample * u_stride_b
    cond += sample * c_stride_b
    result += sample * r_stride_b
    rate_out += sample * (H * W)
    scale = tl.load(guidance_scale + sample * scale_stride).to(tl.float32)

    cell = tl.arange(0, BLOCK_S)
    valid = cell < GRID_H * GRID_W
    cell_y = tl.minimum(cell // GRID_W, GRID_H - 1)
    cell_x = cell % GRID_W
    rows = tl.minimum(H - cell_y * CELL, CELL)
    area = tl.where(valid, (rows * tl.minimum(W - cell_x * CELL, CELL)).to(tl.float32), 0.0)
    norm = tl.zeros([BLOCK_S], tl.float32)
    along = tl.arange(0, BLOCK_CELL)[None, :]
    px = cell_x[:, None] * CELL + along  # [BLOCK_S, BLOCK_CELL], neighbours in memory
    for dy in tl.range(0, CELL):
        py = (cell_y * CELL + dy)[:, None]
        inside = valid[:, None] & (along < CELL) & (px < W) & (py < H)
        square = tl.zeros([BLOCK_S, BLOCK_CELL], tl.float32)
        for channel in tl.range(0, channels):
            u = tl.load(uncond + channel * u_stride_c + py * u_stride_y + px * u_stride_x, mask=inside, other=0.0)
            c = tl.load(cond + channel * c_stride_c + py * c_stride_y + px * c_stride_x, mask=inside, other=0.0)
            d = c.to(tl.float32) - u.to(tl.float32)
            square += d * d
        norm += tl.sum(tl.sqrt_rn(square), 1)

    benchmark = valid if IMAGE else foreground & valid
    fore_area = tl.sum(tl.where(benchmark, area, 0.0), 0)
    fore_mean = tl.div_rn(tl.sum(tl.where(benchmark, norm, 0.0), 0), fore_area + 1e-8)
    rates = tl.zeros([BLOCK_S], tl.float32)
    for first in tl.range(0, tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)[:, None]
        member = (ids[None, :] == token) & valid[None, :]  # [BLOCK_T, BLOCK_S]
        region_norm = tl.sum(tl.where(member, norm[None, :], 0.0), 1)
        region_area = tl.sum(tl.where(member, area[None, :], 0.0), 1)
        region_rate = tl.div_rn(fore_mean, tl.div_rn(region_norm, region_area + 1e-8) + 1e-8)  # [BLOCK_T]
        if PAPER:
            region_rate = tl.where(fore_area > 0.0, region_rate, 1.0)
        region_rate = tl.minimum(tl.maximum(region_rate, rate_min), rate_max)
        region_rate = tl.minimum(region_rate, tl.div_rn(max_scale, scale))
        rates += tl.sum(tl.where(member, region_rate[:, None], 0.0), 0)  # a cell has one region

    # The rate of a pixel: smoothed along x within the cells [BLOCK_S, BLOCK_CELL], then between rows of cells.
    last_x = tl.minimum(cell_x * CELL + CELL, W) - 1
    last_y = tl.minimum(cell_y * CELL + CELL, H) - 1
    row = cell_y * GRID_W
    here = rates[:, None]  # [BLOCK_S, 1]
    left, right = beside(
        here, (row + reflect(cell_x * CELL - 1, W) // CELL)[:, None], (row + reflect(last_x + 1, W) // CELL)[:, None],
        scratch, 0,
    )  # fmt: skip
    level = three_taps(tl.where(along == 0, left, here), here, tl.where(px == last_x[:, None], right, here), edge)
    above, below = beside(
        level, (reflect(cell_y * CELL - 1, H) // CELL * GRID_W + cell_x)[:, None],
        (reflect(last_y + 1, H) // CELL * GRID_W + cell_x)[:, None], scratch, 0,
    )  # fmt: skip
    for dy in tl.range(0, CELL):
        py = (cell_y * CELL + dy)[:, None]
        inside = valid[:, None] & (along < CELL) & (px < W) & (py < H)
        rate = three_taps(
            tl.where(dy == 0, above, level), level, tl.where(py == last_y[:, None], below, level), edge
        )  # fmt: skip
        tl.store(rate_out + py * W + px, rate, mask=inside)
        if not RESCALE:
            weight = tl.div_rn(-scale, scale - 1.0) * (rate - 1.0) if UNCONDITIONAL else scale * rate
            store_combined(
                uncond, cond, result, weight, 1.0, py, px, inside, channels,
                u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x,
                r_stride_c, r_stride_y, r_stride_x, False,
            )  # fmt: skip
    if RESCALE:
        tl.debug_barrier()  # the rates that other threads wrote
        store_rescaled(
            uncond, cond, rate_out, result, scale, rescale, channels,
            u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, r_stride_c, r_stride_y, r_stride_x,
            H, W, BLOCK_P,
        )  # fmt: skip


@triton.jit
def guide_kernel(
    uncond, cond, ids_in, foreground_in, guidance_scale, result, rate_out, scratch, tokens, channels, edge,
    rate_min, rate_max, max_scale, rescale, scale_stride,
    i_stride_b, i_stride_y, i_stride_x, f_stride_b, f_stride_y, f_stride_x,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x,
    H: tl.constexpr, W: tl.constexpr, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, IMAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    GRID_W: tl.constexpr = (W + CELL - 1) // CELL
    CELLS: tl.constexpr = GRID_W * ((H + CELL - 1) // CELL)
    sample = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, BLOCK_S)
    y = cell // GRID_W
    x = cell % GRID_W
    ids = tl.load(ids_in + sample * i_stride_b + y * i_stride_y + x * i_stride_x, mask=cell < CELLS, other=0)
    at = foreground_in + sample * f_stride_b + y * f_stride_y + x * f_stride_x
    foreground = tl.load(at, mask=cell < CELLS, other=0).to(tl.int1)
    guide_cells(
        uncond, cond, guidance_scale, result, rate_out,
        scratch + sample * (BLOCK_S * BLOCK_CELL), ids.to(tl.int32), foreground,
        sample, tokens, channels, edge, rate_min, rate_max, max_scale, rescale, scale_stride,
        u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
        r_stride_b, r_stride_c, r_stride_y, r_stride_x,
        H, W, CELL, BLOCK_CELL, PAPER, UNCONDITIONAL, RESCALE, IMAGE, BLOCK_T, BLOCK_S, BLOCK_P,
    )  # fmt: skip


def empty_result_and_rate(cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction and the rate, not yet written."""
    batch, _, height, width = cond.shape
    return torch.empty_like(cond), torch.empty((batch, 1, height, width), dtype=torch.float32, device=cond.device)


def prediction_constants(
    cond: torch.Tensor, cell: int, fidelity: str, rewrite: str, rescale: float, benchmark: str, config: SegmentConfig
) -> dict[str, Any]:
    """Constants of `guide_cells`, and the launch options."""
    return {
        "H": cond.shape[2],
        "W": cond.shape[3],
        "CELL": cell,
        "BLOCK_CELL": triton.next_power_of_2(cell),
        "PAPER": fidelity == "paper",
        "UNCONDITIONAL": rewrite == "unconditional",
        "RESCALE": rescale > 0.0,
        "IMAGE": benchmark == "image",
        "BLOCK_T": config.block_t,
        "BLOCK_S": config.block_s,
        "BLOCK_P": config.block_p,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }


def launch(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    token_index: torch.Tensor,
    foreground: torch.Tensor,
    guidance_scale: torch.Tensor,
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
    config: SegmentConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction (or rewritten unconditional one) and rate [B, 1, H, W]; `config` overrides the choice."""
    batch, channels = cond.shape[:2]
    cells = token_index[0].numel() if batch else 0
    result, rate = empty_result_and_rate(cond)
    if rate.numel() == 0:
        return result, rate
    scale, scale_stride = per_sample(guidance_scale)
    config = config or segment_config(cells)
    scratch = empty_neighbours(batch, triton.next_power_of_2(cell), config, cond.device)
    with device_guard(cond.device):
        guide_kernel[(batch,)](
            uncond, cond, token_index, foreground, scale, result, rate, scratch, num_tokens, channels,
            kernel_weights(blur_sigma)[0], rate_min, rate_max, max_scale, rescale, scale_stride,
            *token_index.stride(), *foreground.stride(), *uncond.stride(), *cond.stride(), *result.stride(),
            **prediction_constants(cond, cell, fidelity, rewrite, rescale, benchmark, config),
        )  # fmt: skip
    return result, rate
