r"""Per-pixel rates and the guided prediction, one program per sample.

    E[x]      = 1/C sum_c d[c, x]^2,     Ehat = (E - min E) / (max E - min E + 1e-8)
    rate[x]   = rate_max - Ehat (rate_max - rate_min)
    result[x] = u + weight d,  rescaled or not, as in the `guide` kernel, whose device code this is

The energies of a sample go through memory (4 H W bytes): the least and the greatest are known only after all of them.
Both are exact in any order. Bytes: uncond and cond twice (three times if rescaled; from cache but for the first),
result and rate once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import PixelConfig, device_guard, pixel_config
from ._device import per_sample
from .guide import empty_result_and_rate, store_combined, store_rescaled


@triton.jit
def guide_pixels_kernel(
    uncond, cond, guidance_scale, result, rate_out, energies, channels, rate_min, rate_max, rescale, scale_stride,
    u_stride_b, u_stride_c, u_stride_y, u_stride_x, c_stride_b, c_stride_c, c_stride_y, c_stride_x,
    r_stride_b, r_stride_c, r_stride_y, r_stride_x,
    H: tl.constexpr, W: tl.constexpr, UNCONDITIONAL: tl.constexpr, RESCALE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    uncond += sample * u_stride_b
    cond += sample * c_stride_b
    result += sample * r_stride_b
    rate_out += sample * (H * W)
    energies += sample * (H * W)
    scale = tl.load(guidance_scale + sample * scale_stride).to(tl.float32)

    lowest = tl.full([BLOCK_P], float("inf"), tl.float32)
    highest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for first in tl.range(0, H * W, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = pixel < H * W
        y = pixel // W
        x = pixel % W
        square = tl.zeros([BLOCK_P], tl.float32)
        for channel in tl.range(0, channels):
            u = tl.load(uncond + channel * u_stride_c + y * u_stride_y + x * u_stride_x, mask=inside, other=0.0)
            c = tl.load(cond + channel * c_stride_c + y * c_stride_y + x * c_stride_x, mask=inside, other=0.0)
            d = c.to(tl.float32) - u.to(tl.float32)
            square += d * d
        energy = tl.div_rn(square, tl.full([BLOCK_P], channels, tl.float32))
        tl.store(energies + pixel, energy, mask=inside)
        lowest = tl.minimum(lowest, tl.where(inside, energy, float("inf")))
        highest = tl.maximum(highest, tl.where(inside, energy, float("-inf")))
    least = tl.min(lowest, 0)
    span = tl.max(highest, 0) - least + 1e-8
    width = rate_max - rate_min

    tl.debug_barrier()  # the energies that other threads wrote
    for first in tl.range(0, H * W, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = pixel < H * W
        share = tl.div_rn(tl.load(energies + pixel, mask=inside, other=0.0) - least, span)
        # From the nearer bound, so that both are met to the bit.
        rate = tl.where(share < 0.5, rate_max - share * width, rate_min + (1.0 - share) * width)
        tl.store(rate_out + pixel, rate, mask=inside)
        if not RESCALE:
            weight = tl.div_rn(-scale, scale - 1.0) * (rate - 1.0) if UNCONDITIONAL else scale * rate
            store_combined(
                uncond, cond, result, weight, 1.0, pixel // W, pixel % W, inside, channels,
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


def launch(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: torch.Tensor,
    rate_min: float,
    rate_max: float,
    rewrite: str,
    rescale: float,
    config: PixelConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction (or rewritten unconditional one) and rate [B, 1, H, W]; `config` overrides the choice."""
    batch, channels, height, width = cond.shape
    result, rate = empty_result_and_rate(cond)
    if rate.numel() == 0:
        return result, rate
    energies = torch.empty((batch, height * width), dtype=torch.float32, device=cond.device)
    scale, scale_stride = per_sample(guidance_scale)
    config = config or pixel_config(height * width)
    with device_guard(cond.device):
        guide_pixels_kernel[(batch,)](
            uncond, cond, scale, result, rate, energies, channels, rate_min, rate_max, rescale, scale_stride,
            *uncond.stride(), *cond.stride(), *result.stride(),
            H=height, W=width, UNCONDITIONAL=rewrite == "unconditional", RESCALE=rescale > 0.0,
            BLOCK_P=config.block_p, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return result, rate
