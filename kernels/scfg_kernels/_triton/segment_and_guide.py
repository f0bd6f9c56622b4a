"""`segment` and `guide` in one launch: the last of a sample's programs goes on to its rates and its prediction.

Device code and bytes are those of the two modules; ids and foreground are written once, for the caller to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._checks import cell_grid
from .._launch import SegmentConfig, device_guard, segment_config
from ..segment import kernel_weights
from ._device import per_sample
from ._order import counters
from .guide import empty_result_and_rate, guide_cells, prediction_constants
from .segment import empty_neighbours, empty_parts, empty_regions, grouped, map_constants, segment_cells, winners


@triton.jit
def segment_and_guide_kernel(
    maps, starts, counts, token_mask, best_parts, id_parts, ids_out, foreground_out, scratch, counters, uncond, cond,
    guidance_scale, result, rate_out, rate_scratch, tokens, layers, channels, edge,
    rate_min, rate_max, max_scale, rescale, scale_stride,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x,
    GROUPS: tl.constexpr, SIZES: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, IMAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    GRID_H: tl.constexpr = (H + CELL - 1) // CELL
    GRID_W: tl.constexpr = (W + CELL - 1) // CELL
    sample = tl.program_id(1).to(tl.int64)
    if segment_cells(
        maps, starts, counts, token_mask, best_parts, id_parts, foreground_out, scratch, counters, sample,
        tl.program_id(0), tokens, layers, edge, GROUPS, SIZES, GRID_H, GRID_W, PAIRED, MASKED, BLOCK_T, BLOCK_S,
    ):  # fmt: skip
        ids, foreground = winners(
            best_parts, id_parts, ids_out, foreground_out, counters, sample, tokens, GRID_H * GRID_W, BLOCK_T, BLOCK_S
        )
        guide_cells(
            uncond, cond, guidance_scale, result, rate_out, rate_scratch + sample * (BLOCK_S * BLOCK_CELL), ids,
            foreground, sample, tokens, channels, edge,
            rate_min, rate_max, max_scale, rescale, scale_stride,
            u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
            r_stride_b, r_stride_c, r_stride_y, r_stride_x,
            H, W, CELL, BLOCK_CELL, PAPER, UNCONDITIONAL, RESCALE, IMAGE, BLOCK_T, BLOCK_S, BLOCK_P,
        )  # fmt: skip


def launch(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    token_mask: torch.Tensor | None,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction, rate, ids and foreground; `config` overrides the choice."""
    batch, h, w = cell_grid(cond, cell)
    count, channels = tokens[0].shape[1], cond.shape[1]
    result, rate = empty_result_and_rate(cond)
    ids, foreground = empty_regions(batch, h, w, cond.device)
    if rate.numel() == 0:
        return result, rate, ids, foreground
    scale, scale_stride = per_sample(guidance_scale)
    config = config or segment_config(h * w)
    groups = grouped(tokens, start, sizes)
    constants = prediction_constants(cond, cell, fidelity, rewrite, rescale, benchmark, config)
    constants |= map_constants(start, groups.sizes, token_mask, config)
    best, winner, scratch, parts = empty_parts(batch, count, h * w, config, cond.device)
    rate_scratch = empty_neighbours(batch, triton.next_power_of_2(cell), config, cond.device)
    with device_guard(cond.device), counters(cond.device, batch) as zeros:
        segment_and_guide_kernel[(parts + 1, batch)](
            *groups.arguments, token_mask, best, winner, ids, foreground, scratch, zeros, uncond, cond, scale, result,
            rate, rate_scratch, count, groups.layers, channels, kernel_weights(blur_sigma)[0], rate_min, rate_max,
            max_scale, rescale, scale_stride,
            *uncond.stride(), *cond.stride(), *result.stride(), **constants,
        )  # fmt: skip
    return result, rate, ids, foreground
