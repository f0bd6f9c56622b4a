"""`segment` and `guide` in one launch: the ids of a sample never leave its program's registers on the way to the rates.

Device code and bytes are those of the two modules; ids and foreground are written once, for the caller to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._launch import SegmentConfig, device_guard, segment_config
from ..segment import kernel_weights
from .guide import guide_cells
from .segment import segment_cells


@triton.jit
def segment_and_guide_kernel(
    maps, starts, token_mask, scores, ids_out, foreground_out, uncond, cond, guidance_scale, result, rate_out,
    tokens, channels, edge, rate_min, rate_max, max_scale, scale_stride,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x,
    LAYERS: tl.constexpr, SIZES: tl.constexpr, MASKED: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, PAPER: tl.constexpr,
    UNCONDITIONAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    GRID_H: tl.constexpr = (H + CELL - 1) // CELL
    GRID_W: tl.constexpr = (W + CELL - 1) // CELL
    sample = tl.program_id(0).to(tl.int64)
    scores += sample * (tokens + 2) * (GRID_H * GRID_W)
    ids, foreground = segment_cells(
        maps, starts, token_mask, scores, sample, tokens, edge,
        LAYERS, SIZES, GRID_H, GRID_W, MASKED, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    cell = tl.arange(0, BLOCK_S)
    at = sample * (GRID_H * GRID_W) + cell
    tl.store(ids_out + at, ids.to(tl.int64), mask=cell < GRID_H * GRID_W)
    tl.store(foreground_out + at, foreground, mask=cell < GRID_H * GRID_W)
    cell_rates = scores + (tokens + 1) * (GRID_H * GRID_W)  # a row of its own: others still read their scores
    guide_cells(
        uncond, cond, guidance_scale, result, rate_out, cell_rates, ids, foreground, sample, tokens, channels, edge,
        rate_min, rate_max, max_scale, scale_stride,
        u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
        r_stride_b, r_stride_c, r_stride_y, r_stride_x,
        H, W, CELL, BLOCK_CELL, PAPER, UNCONDITIONAL, BLOCK_T, BLOCK_S, BLOCK_P,
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
    config: SegmentConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction, rate, ids and foreground; `config` overrides the choice."""
    batch, channels, height, width = cond.shape
    count = tokens[0].shape[1]
    h, w = -(-height // cell), -(-width // cell)
    result = torch.empty_like(cond)
    rate = torch.empty((batch, 1, height, width), dtype=torch.float32, device=cond.device)
    ids = torch.empty((batch, h, w), dtype=torch.int64, device=cond.device)
    foreground = torch.empty((batch, h, w), dtype=torch.bool, device=cond.device)
    if rate.numel() == 0:
        return result, rate, ids, foreground
    scores = torch.empty((batch, count + 2, h * w), dtype=torch.float32, device=cond.device)
    config = config or segment_config(h * w)
    with device_guard(cond.device):
        segment_and_guide_kernel[(batch,)](
            tuple(tokens), tuple(start), token_mask, scores, ids, foreground, uncond, cond, guidance_scale, result,
            rate, count, channels, kernel_weights(blur_sigma)[0], rate_min, rate_max, max_scale,
            int(guidance_scale.numel() > 1), *uncond.stride(), *cond.stride(), *result.stride(),
            LAYERS=len(tokens), SIZES=tuple(sizes), MASKED=token_mask is not None, H=height, W=width, CELL=cell,
            BLOCK_CELL=triton.next_power_of_2(cell), PAPER=fidelity == "paper",
            UNCONDITIONAL=rewrite == "unconditional", BLOCK_T=config.block_t, BLOCK_S=config.block_s,
            BLOCK_P=config.block_p, num_warps=config.num_warps, num_stages=config.num_stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return result, rate, ids, foreground
