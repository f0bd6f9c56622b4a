r"""Region rates and the guided prediction, one program per sample.

    n[x]      = ||cond[x] - uncond[x]||_2 over channels, summed over the pixels of a cell
    rate_i    = min( clamp( mean_F n / (mean_i n + 1e-8), rate_min, rate_max ), max_scale / g )
    rate[x]   = G rate_id(x)
    result[x] = u + weight d,     weight = g rate,  or  -g / (g - 1) (rate - 1)  for the rewritten unconditional half

Cells are reduced by region with a masked sum over [tokens, cells] in a fixed order: no atomics. The rates of the cells
go through memory (4 S bytes) because G needs neighbours. Products and sums are not fused, so that a rate of 1 gives the
bits of plain guidance. Bytes: uncond and cond twice (the second time from cache), result and rate once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import SegmentConfig, device_guard, segment_config
from ..segment import kernel_weights
from ._device import per_sample
from .segment import smoothed


@triton.jit
def guide_cells(
    uncond, cond, guidance_scale, result, rate_out, cell_rates, ids, foreground, sample, tokens, channels, edge,
    rate_min, rate_max, max_scale, scale_stride,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x,
    H: tl.constexpr, W: tl.constexpr, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Everything after the argmax; ids int32 and foreground int1 [BLOCK_S]; `cell_rates` is scratch [S]."""
    GRID_H: tl.constexpr = (H + CELL - 1) // CELL
    GRID_W: tl.constexpr = (W + CELL - 1) // CELL
    uncond += sample * u_stride_b
    cond += sample * c_stride_b
    result += sample * r_stride_b
    scale = tl.load(guidance_scale + sample * scale_stride).to(tl.float32)

    cell = tl.arange(0, BLOCK_S)
    valid = cell < GRID_H * GRID_W
    cell_y = cell // GRID_W
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

    fore_area = tl.sum(tl.where(foreground, area, 0.0), 0)
    fore_mean = tl.div_rn(tl.sum(tl.where(foreground & valid, norm, 0.0), 0), fore_area + 1e-8)
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
    tl.store(cell_rates + cell, rates, mask=valid)

    tl.debug_barrier()  # smoothing reads what other threads wrote
    for first in tl.range(0, H * W, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = pixel < H * W
        y = pixel // W
        x = pixel % W
        rate = smoothed(cell_rates, y, x, edge, inside, CELL, GRID_W, H, W)
        tl.store(rate_out + sample * (H * W) + pixel, rate, mask=inside)
        weight = tl.div_rn(-scale, scale - 1.0) * (rate - 1.0) if UNCONDITIONAL else scale * rate
        for channel in tl.range(0, channels):
            u = tl.load(uncond + channel * u_stride_c + y * u_stride_y + x * u_stride_x, mask=inside, other=0.0)
            c = tl.load(cond + channel * c_stride_c + y * c_stride_y + x * c_stride_x, mask=inside, other=0.0)
            u = u.to(tl.float32)
            guided = u + weight * (c.to(tl.float32) - u)
            target = result + channel * r_stride_c + y * r_stride_y + x * r_stride_x
            tl.store(target, guided.to(result.dtype.element_ty), mask=inside)


@triton.jit
def guide_kernel(
    uncond, cond, ids_in, foreground_in, guidance_scale, result, rate_out, cell_rates, tokens, channels, edge,
    rate_min, rate_max, max_scale, scale_stride, i_stride_b, i_stride_y, i_stride_x, f_stride_b, f_stride_y, f_stride_x,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x,
    H: tl.constexpr, W: tl.constexpr, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
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
        uncond, cond, guidance_scale, result, rate_out, cell_rates + sample * CELLS, ids.to(tl.int32), foreground,
        sample, tokens, channels, edge, rate_min, rate_max, max_scale, scale_stride,
        u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
        r_stride_b, r_stride_c, r_stride_y, r_stride_x,
        H, W, CELL, BLOCK_CELL, PAPER, UNCONDITIONAL, BLOCK_T, BLOCK_S, BLOCK_P,
    )  # fmt: skip


def empty_result_and_rate(cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction and the rate, not yet written."""
    batch, _, height, width = cond.shape
    return torch.empty_like(cond), torch.empty((batch, 1, height, width), dtype=torch.float32, device=cond.device)


def prediction_constants(
    cond: torch.Tensor, cell: int, fidelity: str, rewrite: str, config: SegmentConfig
) -> dict[str, Any]:
    """Constants of `guide_cells`, and the launch options."""
    return {
        "H": cond.shape[2],
        "W": cond.shape[3],
        "CELL": cell,
        "BLOCK_CELL": triton.next_power_of_2(cell),
        "PAPER": fidelity == "paper",
        "UNCONDITIONAL": rewrite == "unconditional",
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
    config: SegmentConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction (or rewritten unconditional one) and rate [B, 1, H, W]; `config` overrides the choice."""
    batch, channels = cond.shape[:2]
    cells = token_index[0].numel() if batch else 0
    result, rate = empty_result_and_rate(cond)
    if rate.numel() == 0:
        return result, rate
    cell_rates = torch.empty((batch, cells), dtype=torch.float32, device=cond.device)
    scale, scale_stride = per_sample(guidance_scale)
    config = config or segment_config(cells)
    with device_guard(cond.device):
        guide_kernel[(batch,)](
            uncond, cond, token_index, foreground, scale, result, rate, cell_rates, num_tokens, channels,
            kernel_weights(blur_sigma)[0], rate_min, rate_max, max_scale, scale_stride,
            *token_index.stride(), *foreground.stride(), *uncond.stride(), *cond.stride(), *result.stride(),
            **prediction_constants(cond, cell, fidelity, rewrite, config),
        )  # fmt: skip
    return result, rate
