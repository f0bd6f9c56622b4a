"""`segment` and `guide` in one launch: the last of a sample's programs goes on to its rates and its prediction.

Device code and bytes are those of the two modules; ids and foreground are written once, for the caller to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._checks import cell_grid
from .._launch import GuideConfig, device_guard, guide_config, refuse
from ..segment import kernel_weights
from ._device import per_sample
from ._order import counters
from .guide import empty_result_and_rate, empty_scratch, guide_cells, prediction_constants
from .segment import (
    alignment,
    empty_parts,
    empty_regions,
    grouped,
    map_arguments,
    map_constants,
    segment_cells,
    winners,
)


@triton.jit(do_not_specialize=["height", "width", "grid_h", "grid_w"])
def segment_and_guide_kernel(
    maps, starts, sizes, token_mask, best_parts, id_parts, ids_out, foreground_out, counters, uncond, cond,
    guidance_scale, result, rate_out, scratch, tokens, layers, channels, edge,
    rate_min, rate_max, max_scale, rescale, scale_stride, scratch_stride,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x, copy_stride,
    height, width, grid_h, grid_w, GROUPS: tl.constexpr, COUNTS: tl.constexpr, SAME: tl.constexpr, FITS: tl.constexpr,
    ALIGNS: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr,
    CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, IMAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, HELD: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    LINES: tl.constexpr, COPIES: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, GRID_ALIGN: tl.constexpr,
):  # fmt: skip
    width *= ALIGN
    grid_w *= GRID_ALIGN
    sample = tl.program_id(1).to(tl.int64)
    if segment_cells(
        maps, starts, sizes, token_mask, best_parts, id_parts, foreground_out, counters, sample, tl.program_id(0),
        tokens, layers, edge, grid_h, grid_w, GROUPS, COUNTS, SAME, FITS, ALIGNS, PAIRED, MASKED,
        BLOCK_T, BLOCK_H, BLOCK_W,
    ):  # fmt: skip
        ids, foreground = winners(
            best_parts, id_parts, ids_out, foreground_out, counters, sample, tokens, grid_h, grid_w,
            BLOCK_T, BLOCK_H, BLOCK_W,
        )  # fmt: skip
        guide_cells(
            uncond, cond, guidance_scale, result, rate_out, scratch, None, ids_out, ids, foreground, sample, 0, tokens,
            channels, edge, rate_min, rate_max, max_scale, rescale, scale_stride, scratch_stride,
            grid_h * grid_w, grid_w, 1,
            u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
            r_stride_b, r_stride_c, r_stride_y, r_stride_x, copy_stride,
            height, width, grid_h, grid_w, CELL, BLOCK_CELL, PAPER, UNCONDITIONAL, RESCALE, IMAGE,
            BLOCK_T, BLOCK_H, BLOCK_W, HELD, BLOCK_C, ROWS, LINES, COPIES, 1,
        )  # fmt: skip


def launch(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    token_mask: torch.Tensor | None,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: float | torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction, rate, ids and foreground; `config` overrides the choice."""
    batch, h, w = cell_grid(cond, cell)
    count, (channels, height, width) = tokens[0].shape[1], cond.shape[1:]
    result, rate, copy_stride = empty_result_and_rate(cond, copies)
    ids, foreground = empty_regions(batch, h, w, cond.device)
    if rate.numel() == 0:
        return result, rate, ids, foreground
    scale, scale_stride = per_sample(guidance_scale)
    cell = min(cell, max(height, width))  # which covers the image as well
    if config is not None:
        refuse("segment_and_guide", config, config.reasons(h, w, channels, cell))
    config = config or guide_config(channels, height, width, cell, cond.element_size())
    groups = grouped(tokens, start, sizes)
    best, winner, parts = empty_parts(batch, count, h * w, config.block_t, cond.device)
    scratch = empty_scratch(batch, 1, count, h * w, cond.device)
    with device_guard(cond.device), counters(cond.device, batch) as zeros:
        segment_and_guide_kernel[(parts + 1, batch)](
            groups.tokens, groups.start, map_arguments(groups), token_mask, best, winner, ids, foreground, zeros,
            uncond, cond, scale, result, rate, scratch, count, len(tokens), channels, kernel_weights(blur_sigma)[0],
            rate_min, rate_max, max_scale, rescale, scale_stride, scratch.stride(0), *uncond.stride(), *cond.stride(),
            *result.stride(), copy_stride, height, width // alignment(width), h, w // alignment(w),
            **map_constants(groups, token_mask, h, w, config), ALIGN=alignment(width),
            **prediction_constants(cell, fidelity, rewrite, rescale, benchmark, copies, 1, config),
        )  # fmt: skip
    return result, rate, ids, foreground
