r"""Per-region guidance rates and the guided prediction.

With d = cond - uncond, n[x] = ||d[x]||_2 over channels, region of cell s = id[s], F = foreground cells, g =
guidance_scale:

    mean_i  = sum_{x in region i} n[x] / ( |region i| + 1e-8 )         over latent pixels
    mean_F  = sum_{x in F} n[x] / ( |F| + 1e-8 )
    rate_i  = mean_F / ( mean_i + 1e-8 )                               paper eq. 13, with the region mean of norms
    rate[x] = G * clamp_max( clamp( rate_{id(x)}, rate_min, rate_max ), max_scale / g )
    guided  = uncond + g rate d

A latent pixel belongs to cell (row // cell, column // cell): sums run over cells first, then over regions, which is the
nearest upsampling of the masks by `cell` at 1/cell^2 of the work. G is the 3x3 Gaussian of `segment`, after the clamps:
a convex mean, so the bounds still hold. Region sums are one small product with the masks, no atomics: the result is
deterministic. With benchmark = "image" F is every cell, which is the published choice for DeepFloyd IF's first stage.

Two outputs are possible, chosen by `rewrite`:

    "guided"          guided = uncond + g rate d                    return it in both halves of the batch
    "unconditional"   u'     = uncond - g/(g-1) (rate - 1) d        then  u' + g (cond - u') = guided; cond stays

"unconditional" is bit-identical to plain guidance where rate = 1 and needs g > 1. All arithmetic is fp32 (fp64 for fp64
inputs), rounded once to the dtype of the prediction. An empty foreground gives rate 0 before the clamps in `"official"`
(as the published code does) and rate 1 in `"paper"`, which has no clamps to catch it. Bytes that must move: uncond and
cond once, guided and rate once.

phi = rescale > 0, for "guided" alone, brings the spread of the guided prediction f back towards that of cond ("Common
Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891 section 3.4; diffusers' `guidance_rescale`):

    f' = f ( phi std(cond) / std(f) + 1 - phi )                        std of a sample over C, H and W

with f before its rounding. Whether a std divides by n or, as published, by n - 1 cancels. Where std(f) = 0, f' = f: a
constant, or a single element, has no spread to scale. The rate is that before rescaling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ._checks import (
    Reasons,
    cell_grid,
    check_benchmark,
    check_cell,
    check_copies,
    check_fidelity,
    check_predictions,
    check_smoothing,
    rate_bounds,
)
from ._launch import backend_for, guide_limits, kept
from ._triton import KERNELS
from ._trust import run
from .segment import EPSILON, smooth


def _cell_sums(x: torch.Tensor, cell: int) -> torch.Tensor:
    """[B, H, W] -> [B, ceil(H/cell) * ceil(W/cell)], ragged cells at the far edges sum what they have."""
    pooled = F.avg_pool2d(x.unsqueeze(1), cell, ceil_mode=True, divisor_override=1)
    return pooled.flatten(1)


@kept
def _cell_areas(height: int, width: int, cell: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Latent pixels in each cell, [1, ceil(H/cell) * ceil(W/cell)]."""
    return _cell_sums(torch.ones((1, height, width), dtype=dtype, device=device), cell)


def tensor_and_number(guidance_scale: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """A guidance scale as operators take it: a tensor, or a number, which costs no launch of its own."""
    if isinstance(guidance_scale, torch.Tensor):
        return guidance_scale, 0.0
    return None, float(guidance_scale)


def scale_tensor(guidance_scale: torch.Tensor | None, number: float, cond: torch.Tensor) -> torch.Tensor:
    """The same as a tensor in the dtype that `cond` is computed in."""
    dtype = torch.promote_types(cond.dtype, torch.float32)
    if guidance_scale is None:
        return torch.full((), number, dtype=dtype, device=cond.device)
    return guidance_scale.to(dtype)


def empty_result(cond: torch.Tensor, copies: int) -> torch.Tensor:
    """A prediction like `cond` for `copies` batches of it, not yet written."""
    if copies == 1:
        return torch.empty_like(cond)
    last = not cond.is_contiguous() and cond.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (copies * cond.shape[0], *cond.shape[1:]), dtype=cond.dtype, device=cond.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


def combine(
    u: torch.Tensor,
    d: torch.Tensor,
    cond: torch.Tensor,
    rate: torch.Tensor,
    scale: torch.Tensor,
    rewrite: str,
    rescale: float,
    copies: int,
) -> torch.Tensor:
    """The result, like `cond`, from uncond and d in the dtype of the arithmetic; rate [B, 1, H, W], scale [B or 1]."""
    scale = scale.reshape(-1, 1, 1, 1)
    weight = scale * rate if rewrite == "guided" else -scale / (scale - 1.0) * (rate - 1.0)
    result = u + weight * d
    if rescale > 0.0 and cond.numel() > 0:
        result = result * _rescale_factor(result, cond.to(result.dtype), rescale)
    whole = empty_result(cond, copies)
    whole.view(copies, *cond.shape).copy_(result)
    return whole


def _rescale_factor(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """phi std(cond) / std(guided) + 1 - phi per sample, [B, 1, 1, 1]; 1 where `guided` has no spread."""
    # Divided by n, not n - 1, which cancels: the spread of a single element is then 0 and not NaN.
    spread, target = (x.std((1, 2, 3), correction=0, keepdim=True) for x in (guided, cond))
    return torch.where(spread == 0.0, 1.0, rescale * (target / spread) + (1.0 - rescale))


@torch.library.custom_op("scfg_kernels::guide", mutates_args=())
def _guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    token_index: torch.Tensor,
    foreground: torch.Tensor,
    guidance_scale: torch.Tensor | None,
    num_tokens: int,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = number if guidance_scale is None else guidance_scale

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        return KERNELS["guide"](
            uncond, cond, token_index, foreground, scale, num_tokens, cell, rate_min, rate_max, max_scale, blur_sigma,
            fidelity, rewrite, rescale, benchmark, None, copies,
        )  # fmt: skip

    def twin() -> tuple[torch.Tensor, torch.Tensor]:
        return guide_torch(
            uncond, cond, token_index, foreground, scale_tensor(guidance_scale, number, cond), num_tokens, cell,
            rate_min, rate_max, max_scale, blur_sigma, fidelity, rewrite, rescale, benchmark, copies,
        )  # fmt: skip

    return run("guide", backend, cond.device, launch, twin)


def guide_torch(
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
    copies: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(cond.dtype, torch.float32)
    batch, _, height, width = cond.shape
    u = uncond.to(dtype)
    d = cond.to(dtype) - u
    scale = guidance_scale.reshape(-1, 1)  # [B or 1, 1]

    # Not vector_norm: over four channels that are not adjacent in memory it takes ten times as long on a CPU.
    cell_norm = _cell_sums(d.square().sum(1).sqrt(), cell)  # [B, S]
    cell_area = _cell_areas(height, width, cell, dtype, cond.device).expand(batch, -1)
    ids = token_index.flatten(1)  # [B, S]
    # Norm and area [B, S, 2] in fp64: as accurate as a pairwise sum, and no TF32 setting of the user's reaches it.
    cells = torch.stack([cell_norm, cell_area], -1).double()
    members = ids.unsqueeze(1) == torch.arange(num_tokens, device=ids.device).view(1, -1, 1)  # [B, T, S]
    region = (members.double() @ cells).to(dtype)  # [B, T, 2]
    if benchmark == "image":
        foreground = torch.ones_like(foreground)
    fore = (foreground.flatten(1).unsqueeze(1).double() @ cells).to(dtype)  # [B, 1, 2]
    fore_mean = fore[..., 0] / (fore[..., 1] + EPSILON)  # [B, 1]

    region_rate = fore_mean / (region[..., 0] / (region[..., 1] + EPSILON) + EPSILON)  # only occupied ones are read
    if fidelity == "paper":
        region_rate = torch.where(fore[..., 1] > 0, region_rate, 1.0)
    region_rate = torch.minimum(region_rate.clamp(rate_min, rate_max), max_scale / scale)
    h, w = token_index.shape[1:]
    rate = region_rate.gather(1, ids).view(batch, 1, h, 1, w, 1).expand(-1, -1, -1, cell, -1, cell)
    rate = smooth(rate.reshape(batch, 1, h * cell, w * cell)[..., :height, :width], blur_sigma)
    return combine(u, d, cond, rate, scale, rewrite, rescale, copies), rate.contiguous()


@_guide.register_fake
def _(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    token_index: torch.Tensor,
    foreground: torch.Tensor,
    guidance_scale: torch.Tensor | None,
    num_tokens: int,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, height, width = cond.shape
    rate = cond.new_empty((batch, 1, height, width), dtype=torch.promote_types(cond.dtype, torch.float32))
    return empty_result(cond, copies), rate


def guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    token_index: torch.Tensor,
    foreground: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    *,
    num_tokens: int,
    cell: int = 4,
    rate_min: float | None = 0.8,
    rate_max: float | None = 3.0,
    max_scale: float | None = 15.0,
    blur_sigma: float = 0.5,
    fidelity: str = "official",
    rewrite: str = "guided",
    rescale: float = 0.0,
    benchmark: str = "foreground",
    copies: int = 1,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the guidance of every region to the foreground's level and combine.

    Args:
        uncond: unconditional prediction [B, C, H, W] (noise, v or x0), fp16, bf16, fp32 or fp64, any strides.
        cond: conditional prediction, same shape, dtype and device.
        token_index: [B, h, w] int64 from `segment`, h = ceil(H / cell), w = ceil(W / cell), values below num_tokens.
        foreground: [B, h, w] bool.
        guidance_scale: g, a number, or a tensor of shape [] or [B] (one scale per sample).
        num_tokens: T, the number of text tokens.
        cell: latent pixels per cell side, 4 in the published code.
        rate_min, rate_max: clamps of the rate; None for no bound.
        max_scale: bound on rate * guidance_scale, applied last, so it wins over `rate_min`; None for no bound.
        blur_sigma: smoothing of the rate map, in latent pixels; 0 for none.
        fidelity: `"official"` or `"paper"`; they differ here only for an empty foreground.
        rewrite: `"guided"` or `"unconditional"`, see the module's formulas.
        rescale: phi in 0..1, `guidance_rescale` of diffusers; 0 for none, the only one that `"unconditional"` takes.
        benchmark: whose mean norm every region is brought to: `"foreground"`, or `"image"` for the whole image's.
        copies: 1, or 2 to write the result twice, one batch after the other: both halves of a pipeline's batch.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        result [copies B, C, H, W] in the dtype and memory format of `cond`, and rate [B, 1, H, W] in fp32 (fp64 for
        fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or options do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    reasons = Reasons("guide")
    reasons.unless(num_tokens >= 1, f"num_tokens must be at least 1, got {num_tokens}")
    check_smoothing(reasons, blur_sigma)
    check_fidelity(reasons, fidelity)
    check_benchmark(reasons, benchmark)
    check_copies(reasons, copies)
    shaped = check_predictions(reasons, uncond, cond, guidance_scale, rate_min, rate_max, rewrite, rescale)
    if check_cell(reasons, cell) and shaped:
        grid = cell_grid(cond, cell)
        fits = tuple(token_index.shape) == grid and tuple(foreground.shape) == grid
        shapes = f"{tuple(token_index.shape)} and {tuple(foreground.shape)}"
        reasons.unless(fits, f"token_index and foreground must be {grid}, got {shapes}")
    reasons.unless(token_index.dtype == torch.int64, f"token_index must be int64, got {token_index.dtype}")
    reasons.unless(foreground.dtype == torch.bool, f"foreground must be bool, got {foreground.dtype}")
    scale = [guidance_scale] if isinstance(guidance_scale, torch.Tensor) else []
    reasons.same_device(uncond, cond, token_index, foreground, *scale)
    reasons.raise_if_any()
    low, high = rate_bounds(rate_min, rate_max)
    limit = math.inf if max_scale is None else float(max_scale)
    chosen = backend_for("guide", backend, cond.device, guide_limits(uncond, cond, cell))
    tensor, number = tensor_and_number(guidance_scale)
    return _guide(
        uncond, cond, token_index, foreground, tensor, num_tokens, cell, low, high, limit, float(blur_sigma), fidelity,
        rewrite, chosen, float(rescale), benchmark, number, copies,
    )  # fmt: skip
