r"""Per-pixel rates and the guided prediction, one program per sample, or several that each hold a share of it.

    E[x]      = 1/C sum_c d[c, x]^2,     Ehat = (E - min E) / (max E - min E + 1e-8)
    rate[x]   = rate_max - Ehat (rate_max - rate_min)
    result[x] = u + weight d,  rescaled or not, as in the `guide` kernel, whose device code this is

The least and the greatest energy are known only after all pixels; both are exact in any order. Up to `HELD_VALUES` u
and c stay in registers meanwhile. Larger samples are shared by programs that hold BLOCK_P pixels each and meet, as in
the `guide` kernel; or one program passes over them in tiles of [all channels, BLOCK_P pixels], twice, which form the
same energies twice; or four times if rescaled. Where the bounds are equal and nothing is rescaled, no energies are
formed and no program needs another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import PixelConfig, device_guard, pixel_config, refuse, resident_programs
from ._device import current_limits, per_sample
from ._order import leave_meeting, meet
from .guide import (
    combined,
    empty_result_and_rate,
    energy,
    load_predictions,
    meeting_counters,
    power_of_2,
    quarter,
    rescaled,
    scale_of,
    store_prediction,
    store_rescaled,
    weight_of,
)
from .segment import alignment


@triton.jit
def _rates(square, channels, least, span, rate_min, rate_max):
    """From the sum of squares over the channels."""
    share = tl.div_rn(tl.div_rn(square, channels * 1.0) - least, span)
    width = rate_max - rate_min
    # From the nearer bound, so that both are met to the bit.
    return tl.where(share < 0.5, rate_max - share * width, rate_min + (1.0 - share) * width)


@triton.jit(do_not_specialize=["height", "width"])
def guide_pixels_kernel(
    uncond, cond, guidance_scale, result, rate_out, scratch, meeting, channels, rate_min, rate_max, rescale,
    scale_stride,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x, copy_stride, height, width,
    UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, HELD: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, COPIES: tl.constexpr, ALONE: tl.constexpr,
    PARTS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    width *= ALIGN
    sample = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    uncond += sample * u_stride_b
    cond += sample * c_stride_b
    result += sample * r_stride_b
    rate_out += sample * (height * width)
    scale = scale_of(guidance_scale, sample, scale_stride)
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    if HELD:
        inside = pixel < height * width
        u, c, mask = load_predictions(
            uncond, cond, 0, pixel // width, pixel % width, inside, channels,
            u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
        )  # fmt: skip
        if not ALONE:
            square = energy(u, c)
            least = tl.min(tl.where(inside, square, float("inf")), 0)
            most = tl.max(square, 0)
            if PARTS > 1:  # their bounds and moments, 7 words each, in `scratch`
                bounds = scratch + sample * (PARTS * 7)
                tl.store(bounds + part, least)
                tl.store(bounds + PARTS + part, most)
                meet(meeting + sample, PARTS)
                every = tl.arange(0, power_of_2(PARTS))
                least = tl.min(tl.load(bounds + every, mask=every < PARTS, other=float("inf")), 0)
                most = tl.max(tl.load(bounds + PARTS + every, mask=every < PARTS, other=0.0), 0)
    else:
        lowest = tl.full([BLOCK_P], float("inf"), tl.float32)
        highest = tl.zeros([BLOCK_P], tl.float32)
        for start in tl.range(0, height * width, BLOCK_P):
            inside = start + pixel < height * width
            u, c, _ = load_predictions(
                uncond, cond, 0, (start + pixel) // width, (start + pixel) % width, inside, channels,
                u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
            )  # fmt: skip
            square = energy(u, c)
            lowest = tl.minimum(lowest, tl.where(inside, square, float("inf")))
            highest = tl.maximum(highest, square)
        least = tl.min(lowest, 0)
        most = tl.max(highest, 0)
    if ALONE:
        rate = tl.full([BLOCK_P], 0.0, tl.float32) + rate_max
    else:
        least = tl.div_rn(least, channels * 1.0)
        span = tl.div_rn(most, channels * 1.0) - least + 1e-8
    if HELD:
        if not ALONE:
            rate = _rates(square, channels, least, span, rate_min, rate_max)
        tl.store(rate_out + pixel, rate, mask=inside)
        guided = combined(u, c, weight_of(rate, scale, UNCONDITIONAL))
        if RESCALE:
            guided = rescaled(
                guided, c, mask, rescale, scratch, (sample * 7 + 2) * PARTS, part, meeting, sample, 2 * PARTS, PARTS
            )  # fmt: skip
        store_prediction(
            result, guided, 0, pixel // width, pixel % width, mask, r_stride_c, r_stride_y, r_stride_x,
            copy_stride, COPIES,
        )  # fmt: skip
        if PARTS > 1 and not ALONE:
            leave_meeting(meeting + sample, 3 * PARTS if RESCALE else 2 * PARTS)
    else:
        for start in tl.range(0, height * width, BLOCK_P):
            y = (start + pixel) // width
            x = (start + pixel) % width
            inside = start + pixel < height * width
            u, c, mask = load_predictions(
                uncond, cond, 0, y, x, inside, channels,
                u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x, BLOCK_C,
            )  # fmt: skip
            rate = _rates(energy(u, c), channels, least, span, rate_min, rate_max)
            tl.store(rate_out + start + pixel, rate, mask=inside)
            if not RESCALE:
                store_prediction(
                    result, combined(u, c, weight_of(rate, scale, UNCONDITIONAL)), 0, y, x, mask,
                    r_stride_c, r_stride_y, r_stride_x, copy_stride, COPIES,
                )  # fmt: skip
        if RESCALE:
            tl.debug_barrier()  # the rates that other threads wrote
            store_rescaled(
                uncond, cond, rate_out, result, scale, rescale, channels,
                u_stride_c, u_stride_y, u_stride_x, c_stride_c, c_stride_y, c_stride_x,
                r_stride_c, r_stride_y, r_stride_x, copy_stride, height, width, COPIES, BLOCK_C, quarter(BLOCK_P),
            )  # fmt: skip


def launch(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    rate_min: float,
    rate_max: float,
    rewrite: str,
    rescale: float,
    config: PixelConfig | None = None,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction (or rewritten unconditional one) and rate [B, 1, H, W]; `config` overrides the choice."""
    batch, channels, height, width = cond.shape
    result, rate, copy_stride = empty_result_and_rate(cond, copies)
    if rate.numel() == 0:
        return result, rate
    scale, scale_stride = per_sample(guidance_scale)
    if config is not None:
        refuse("guide_pixels", config, config.reasons(channels))
    with device_guard(cond.device):
        alone = rate_min == rate_max and rescale == 0.0
        programs = resident_programs(batch, current_limits())
        config = config or pixel_config(channels, height * width, cond.element_size(), programs, alone)
        alone = alone and config.held
        parts = triton.cdiv(height * width, config.block_p) if config.held else 1
        sharing = parts > 1 and not alone
        scratch = torch.empty((batch, parts * 7), dtype=torch.float32, device=cond.device) if sharing else None
        with meeting_counters(parts if sharing else 1, batch, cond.device) as meeting:
            guide_pixels_kernel[(batch * parts,)](
                uncond, cond, scale, result, rate, scratch, meeting, channels, rate_min, rate_max, rescale,
                scale_stride, *uncond.stride(), *cond.stride(), *result.stride(), copy_stride,
                height, width // alignment(width), ALIGN=alignment(width),
                UNCONDITIONAL=rewrite == "unconditional", RESCALE=rescale > 0.0,
                HELD=config.held, BLOCK_C=config.block_c, BLOCK_P=config.block_p, COPIES=copies, ALONE=alone,
                PARTS=parts, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
                launch_cooperative_grid=sharing,
            )  # fmt: skip
    return result, rate
