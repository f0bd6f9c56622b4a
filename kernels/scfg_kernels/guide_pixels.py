r"""Per-pixel guidance rates from the energy of the guidance alone, and the guided prediction: no attention is needed.

The rule of SAMG ("Delta Score Matters! Spatial Adaptive Multi Guidance in Diffusion Models", arXiv 2604.26503). With
d = cond - uncond and g = guidance_scale, per sample:

    E[x]    = 1/C  sum_c d[c, x]^2
    Ehat[x] = ( E[x] - min E ) / ( max E - min E + 1e-8 )              min and max over all pixels
    rate[x] = rate_max - Ehat[x] ( rate_max - rate_min )               high energy gets the low rate
    guided  = uncond + g rate d

The paper writes g rate as w in [w_min, w_max]; its ranges are [5, 12] for a base scale of 7.5 (Stable Diffusion 1.5 and
SDXL), the default here, and [3, 7.5] for Stable Diffusion 3.5 Medium.

The rate lies within its bounds. It is rate_max to the bit at the pixel of least energy, and rate_min to the bit at that
of most where 1e-8 is lost beside max E - min E (above 0.17 in fp32). It does not depend on the length of d, up to that
1e-8. Where E is the same everywhere, 0 included, the rate is rate_max everywhere. With rate_min = rate_max = 1 this is
plain guidance, of whatever weight: a schedule's, or that of CFG++.

`rewrite` and `rescale` are those of `guide`, with its formulas. All arithmetic is fp32 (fp64 for fp64 inputs), rounded
once to the dtype of the prediction; nothing is summed over pixels but for `rescale`, no atomics: the result is
deterministic. Bytes that must move: uncond and cond once, guided and rate once.
"""

from __future__ import annotations

import math

import torch

from ._checks import Reasons, check_copies, check_predictions
from ._launch import backend_for, pixel_limits
from ._triton import KERNELS
from ._trust import run
from .guide import combine, empty_result, scale_tensor, tensor_and_number
from .segment import EPSILON


@torch.library.custom_op("scfg_kernels::guide_pixels", mutates_args=())
def _guide_pixels(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: torch.Tensor | None,
    rate_min: float,
    rate_max: float,
    rewrite: str,
    backend: str,
    rescale: float = 0.0,
    number: float = 0.0,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale, ways = number if guidance_scale is None else guidance_scale, (rate_min, rate_max, rewrite, rescale)
    return run(
        "guide_pixels", backend, cond.device,
        lambda: KERNELS["guide_pixels"](uncond, cond, scale, *ways, None, copies),
        lambda: guide_pixels_torch(uncond, cond, scale_tensor(guidance_scale, number, cond), *ways, copies),
    )  # fmt: skip


def guide_pixels_torch(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: torch.Tensor,
    rate_min: float,
    rate_max: float,
    rewrite: str,
    rescale: float,
    copies: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(cond.dtype, torch.float32)
    u = uncond.to(dtype)
    d = cond.to(dtype) - u
    if rate_min == rate_max:
        rate = torch.full((cond.shape[0], 1, *cond.shape[2:]), rate_min, dtype=dtype, device=cond.device)
        return combine(u, d, cond, rate, guidance_scale, rewrite, rescale, copies), rate
    energy = d.square().mean(1, keepdim=True)  # [B, 1, H, W]
    least = energy.amin((2, 3), keepdim=True)
    share = (energy - least) / (energy.amax((2, 3), keepdim=True) - least + EPSILON)
    # From the nearer bound, so that both are met to the bit.
    width = rate_max - rate_min
    rate = torch.where(share < 0.5, rate_max - share * width, rate_min + (1.0 - share) * width)
    return combine(u, d, cond, rate, guidance_scale, rewrite, rescale, copies), rate.contiguous()


@_guide_pixels.register_fake
def _(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: torch.Tensor | None,
    rate_min: float,
    rate_max: float,
    rewrite: str,
    backend: str,
    rescale: float = 0.0,
    number: float = 0.0,
    copies: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, height, width = cond.shape
    rate = cond.new_empty((batch, 1, height, width), dtype=torch.promote_types(cond.dtype, torch.float32))
    return empty_result(cond, copies), rate


def guide_pixels(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    *,
    rate_min: float = 5.0 / 7.5,
    rate_max: float = 12.0 / 7.5,
    rewrite: str = "guided",
    rescale: float = 0.0,
    copies: int = 1,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the guidance of every pixel by how little energy it has among the pixels of its sample, and combine.

    Args:
        uncond: unconditional prediction [B, C, H, W] (noise, v or x0), fp16, bf16, fp32 or fp64, any strides.
        cond: conditional prediction, same shape, dtype and device.
        guidance_scale: g, a number, or a tensor of shape [] or [B] (one scale per sample).
        rate_min: rate of the pixel with the most energy; w_min / g of the paper.
        rate_max: rate of the pixel with the least energy; w_max / g of the paper.
        rewrite: `"guided"` or `"unconditional"`, see the formulas of `guide`.
        rescale: phi in 0..1, `guidance_rescale` of diffusers; 0 for none, the only one that `"unconditional"` takes.
        copies: 1, or 2 to write the result twice, one batch after the other: both halves of a pipeline's batch.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        result [copies B, C, H, W] in the dtype and memory format of `cond`, and rate [B, 1, H, W] in fp32 (fp64 for
        fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or options do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.

    Source: arXiv 2604.26503 for the rate, 2305.08891 section 3.4 for `rescale`.
    """
    reasons = Reasons("guide_pixels")
    if not (-math.inf < rate_min < math.inf and -math.inf < rate_max < math.inf):
        reasons.unless(False, f"rate_min and rate_max must be finite, got {rate_min} and {rate_max}")
    check_copies(reasons, copies)
    if check_predictions(reasons, uncond, cond, guidance_scale, rate_min, rate_max, rewrite, rescale):
        reasons.unless(0 not in cond.shape[1:], f"C, H and W must not be 0, got {tuple(cond.shape)}")
    scale = [guidance_scale] if isinstance(guidance_scale, torch.Tensor) else []
    reasons.same_device(uncond, cond, *scale)
    reasons.raise_if_any()
    chosen = backend_for("guide_pixels", backend, cond.device, pixel_limits(uncond, cond))
    tensor, number = tensor_and_number(guidance_scale)
    return _guide_pixels(
        uncond, cond, tensor, float(rate_min), float(rate_max), rewrite, chosen, float(rescale), number, copies
    )
