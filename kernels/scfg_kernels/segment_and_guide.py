"""`segment` and `guide` as one operator: from completed maps and predictions to the guided prediction.

The formulas are those of the two modules, with one `blur_sigma` for both: in cells for the maps, in latent pixels for
the rate, as in the published code. In torch it is the two implementations one after the other, to the bit. In Triton it
is one launch, in which the ids of a sample stay in registers on their way to the rates; ids and foreground are
results, not intermediates. Bytes that must move: every X_l once, uncond and cond once, guided, rate, ids and foreground
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._checks import (
    Reasons,
    cell_grid,
    check_benchmark,
    check_cell,
    check_copies,
    check_fidelity,
    check_maps,
    check_predictions,
    check_smoothing,
    rate_bounds,
)
from ._launch import backend_for, guide_limits, outside_autocast, segment_limits
from ._triton import KERNELS
from ._trust import run
from .guide import empty_result, guide_torch, scale_tensor, tensor_and_number
from .segment import segment_torch


@torch.library.custom_op("scfg_kernels::segment_and_guide", mutates_args=())
def _segment_and_guide(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    token_mask: torch.Tensor | None,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: torch.Tensor | None,
    cell: int,
    rate_min: float,
    rate_max: float,
    max_scale: float,
    blur_sigma: float,
    fidelity: str,
    rewrite: str,
    backend: str,
    rescale: float = 0.0,
    benchmark: str = "foreground",
    number: float = 0.0,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    maps = tokens, start, sizes
    rates, ways = (cell, rate_min, rate_max, max_scale, blur_sigma), (fidelity, rewrite, rescale, benchmark)
    scale = number if guidance_scale is None else guidance_scale

    def twin() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        _, h, w = cell_grid(cond, cell)
        ids, foreground = segment_torch(*maps, h, w, blur_sigma, token_mask)
        scales, count = scale_tensor(guidance_scale, number, cond), tokens[0].shape[1]
        result, rate = guide_torch(uncond, cond, ids, foreground, scales, count, *rates, *ways, copies)
        return result, rate, ids, foreground

    with outside_autocast(cond.device):
        return run(
            "segment_and_guide", backend, cond.device,
            lambda: KERNELS["segment_and_guide"](*maps, token_mask, uncond, cond, scale, *rates, *ways, None, copies),
            twin,
        )  # fmt: skip


@_segment_and_guide.register_fake
def _(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    token_mask: torch.Tensor | None,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: torch.Tensor | None,
    cell: int,
    rate_min: float,
    rate_max: float,
    max_scale: float,
    blur_sigma: float,
    fidelity: str,
    rewrite: str,
    backend: str,
    rescale: float = 0.0,
    benchmark: str = "foreground",
    number: float = 0.0,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, height, width = cond.shape
    grid = cell_grid(cond, cell)
    rate = cond.new_empty((batch, 1, height, width), dtype=torch.promote_types(cond.dtype, torch.float32))
    ids, foreground = cond.new_empty(grid, dtype=torch.int64), cond.new_empty(grid, dtype=torch.bool)
    return empty_result(cond, copies), rate, ids, foreground


def segment_and_guide(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    *,
    cell: int = 4,
    rate_min: float | None = 0.8,
    rate_max: float | None = 3.0,
    max_scale: float | None = 15.0,
    blur_sigma: float = 0.5,
    fidelity: str = "official",
    rewrite: str = "guided",
    rescale: float = 0.0,
    benchmark: str = "foreground",
    token_mask: torch.Tensor | None = None,
    copies: int = 1,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the regions of every sample and guide each of them: `segment`, then `guide`, with the same arguments.

    Args:
        tokens: per captured layer, the completed maps of the conditional samples [B, T, N_l].
        start: per captured layer, the completed start-token map of the unconditional samples [B, N_l], or [B, 2, N_l]
            with the sum of all other tokens', see `segment`.
        sizes: per captured layer, (h_l, w_l) with h_l w_l = N_l.
        size: (h, w) of the grid of cells, (ceil(H / cell), ceil(W / cell)).
        uncond: unconditional prediction [B, C, H, W] (noise, v or x0), fp16, bf16, fp32 or fp64, any strides.
        cond: conditional prediction, same shape, dtype and device.
        guidance_scale: g, a number, or a tensor of shape [] or [B] (one scale per sample).
        cell: latent pixels per cell side, 4 in the published code.
        rate_min, rate_max: clamps of the rate; None for no bound.
        max_scale: bound on rate * guidance_scale, applied last, so it wins over `rate_min`; None for no bound.
        blur_sigma: smoothing of the maps, in cells, and of the rate map, in latent pixels; 0 for none.
        fidelity: `"official"` or `"paper"`; they differ here only for an empty foreground.
        rewrite: `"guided"` or `"unconditional"`, see the formulas of `guide`.
        rescale: phi in 0..1, `guidance_rescale` of diffusers; 0 for none, the only one that `"unconditional"` takes.
        benchmark: `"foreground"` or `"image"`, see `guide`.
        token_mask: [B, T] bool, which tokens may own a region; None means all.
        copies: 1, or 2 to write the result twice, one batch after the other: both halves of a pipeline's batch.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        result [copies B, C, H, W] in the dtype and memory format of `cond`, rate [B, 1, H, W] in fp32 (fp64 for fp64
        predictions), token_index [B, h, w] int64 and foreground [B, h, w] bool.

    Raises:
        ValueError: shapes, dtypes or options do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    reasons = Reasons("segment_and_guide")
    check_smoothing(reasons, blur_sigma)
    check_maps(reasons, tokens, start, sizes, size, token_mask)
    check_fidelity(reasons, fidelity)
    check_benchmark(reasons, benchmark)
    check_copies(reasons, copies)
    shaped = check_predictions(reasons, uncond, cond, guidance_scale, rate_min, rate_max, rewrite, rescale)
    if check_cell(reasons, cell) and shaped:
        batch, *cells = cell_grid(cond, cell)
        reasons.unless(list(size) == cells, f"size must be {tuple(cells)}, the grid of the predictions, got {size}")
        if len(tokens) > 0 and tokens[0].dim() == 3:
            samples = tokens[0].shape[0]
            reasons.unless(samples == batch, f"maps and predictions differ in batch: {samples}, {batch}")
    optional = [x for x in (token_mask, guidance_scale) if isinstance(x, torch.Tensor)]
    reasons.same_device(*tokens, *start, uncond, cond, *optional)
    reasons.raise_if_any()
    limits = segment_limits(tokens, start, token_mask, *size) + guide_limits(uncond, cond, cell)
    chosen = backend_for("segment_and_guide", backend, cond.device, list(dict.fromkeys(limits)))
    low, high = rate_bounds(rate_min, rate_max)
    limit = math.inf if max_scale is None else float(max_scale)
    tensor, number = tensor_and_number(guidance_scale)
    return _segment_and_guide(
        list(tokens), list(start), [length for pair in sizes for length in pair], token_mask, uncond, cond,
        tensor, cell, low, high, limit, float(blur_sigma), fidelity, rewrite, chosen, float(rescale), benchmark, number,
        copies,
    )  # fmt: skip
