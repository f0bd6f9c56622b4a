"""The published S-CFG code's mathematics, stage by stage, written to be obvious and slow.

This module is an oracle: it shares no code with `scfg_kernels` or `scfg_fast`, and it forms all that those avoid:
the probability tensors [B*H, N, T], the N x N products of the completion, one mask per token. It follows the formulas
of the Stable Diffusion path of the authors' released code (CVPR 2024), re-derived; where the paper differs it says so.

Symbols: B samples, H heads, N = h w image tokens of a layer, T text tokens, R the latent pixels per mask cell,
d = conditional minus unconditional prediction, g the guidance scale. Two things are generalised, nothing else: a map's
height and width are given instead of taken as sqrt(N), and a latent pixel belongs to mask cell (row // R, column // R),
which is nearest upsampling by R where the sizes divide.

Every function keeps the dtype it is given (smoothing and later stages are at least fp32), so fp64 inputs give an fp64
truth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

EPSILON = 1e-8


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _column(guidance_scale: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The guidance scale as [B or 1, 1, 1, 1], in at least fp32."""
    scale = torch.as_tensor(guidance_scale, device=like.device)
    return scale.to(torch.promote_types(like.dtype, torch.float32)).reshape(-1, 1, 1, 1)


# Attention maps ------------------------------------------------------------------------------------------------------


def fold_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, d] -> [B*H, N, d], the layout of the released processor (heads fastest)."""
    return x.reshape(-1, *x.shape[2:])


def attention_probabilities(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Full probabilities [B*H, N, T] from q [B*H, N, d] and k [B*H, T, d] (paper section 4.1, S and C per head)."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    return scores.softmax(dim=-1)


def head_mean(probabilities: torch.Tensor, heads: int) -> torch.Tensor:
    """Mean over heads, [B*H, N, T] -> [B, N, T]: what the released processor stores for every layer."""
    rows, tokens = probabilities.shape[1:]
    return probabilities.reshape(-1, heads, rows, tokens).mean(dim=1)


# Completion ----------------------------------------------------------------------------------------------------------


def official_completion_matrix(self_map: torch.Tensor, powers: int = 4) -> torch.Tensor:
    """(S + (powers - 1) S S) / powers: the released mask code's loop squares the original S each time."""
    total = self_map
    for _ in range(powers - 1):
        total = total + self_map @ self_map
    return total / powers


def paper_completion_matrix(self_map: torch.Tensor, powers: int = 4) -> torch.Tensor:
    """Mean of the powers S^1 .. S^powers (paper section 4.1.2)."""
    power = self_map
    total = self_map
    for _ in range(powers - 1):
        power = power @ self_map
        total = total + power
    return total / powers


def official_completion(self_map: torch.Tensor, cross_map: torch.Tensor, powers: int = 4) -> torch.Tensor:
    """Completed cross-attention [B, N, T] of the released code."""
    return official_completion_matrix(self_map, powers) @ cross_map


def paper_completion(self_map: torch.Tensor, cross_map: torch.Tensor, powers: int = 4) -> torch.Tensor:
    """Completed cross-attention [B, N, T] of the paper, section 4.1.2."""
    return paper_completion_matrix(self_map, powers) @ cross_map


# Smoothing and masks -------------------------------------------------------------------------------------------------


@functools.cache
def gaussian_kernel_3x3(sigma: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Kernel of the released smoothing module: the product over axes of exp(-((x - mean) / (2 sigma))^2), sum 1."""
    kernel = torch.ones(3, 3, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            for x in (row, column):
                kernel[row, column] *= math.exp(-(((x - 1) / (2 * sigma)) ** 2))
    return (kernel / kernel.sum()).to(dtype)


def smooth(x: torch.Tensor, sigma: float = 0.5) -> torch.Tensor:
    """3x3 smoothing of [B, K, h, w] with the border reflected by one sample; sigma = 0 means none.

    A dimension of one sample has no neighbour to reflect and repeats itself.
    """
    if sigma == 0:
        return x
    height, width = x.shape[-2:]
    rows = torch.tensor([min(1, height - 1), *range(height), max(height - 2, 0)], device=x.device)
    columns = torch.tensor([min(1, width - 1), *range(width), max(width - 2, 0)], device=x.device)
    padded = x[..., rows, :][..., columns]
    channels = x.shape[1]
    kernel = gaussian_kernel_3x3(sigma, x.dtype).to(x.device).expand(channels, 1, 3, 3)
    return F.conv2d(padded, kernel, groups=channels)


def as_image(tokens_last: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, N, K] -> [B, K, h, w]."""
    return tokens_last.transpose(1, 2).reshape(tokens_last.shape[0], tokens_last.shape[2], *size)


def resized_and_smoothed(image: torch.Tensor, size: tuple[int, int], sigma: float = 0.5) -> torch.Tensor:
    """Bilinear resize of [B, K, h, w] to the mask grid (half-pixel centres), then 3x3 smoothing in at least fp32."""
    image = _at_least_fp32(image)
    if tuple(image.shape[-2:]) != tuple(size):
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return smooth(image, sigma)


def smoothed_normalised(
    completed: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    sigma: float = 0.5,
) -> torch.Tensor:
    """Scores [B, T, h, w] of every token: resize, smooth, divide by the spatial mean, mean over layers.

    The paper renormalises over space (section 4.1.1) by the sum; the released code divides by (mean + 1e-8), which is
    N times that, and takes the mean over layers.

    Args:
        completed: per layer, the completed maps [B, N_l, T] of the conditional half.
        sizes: per layer, (h_l, w_l).
        size: the mask grid (h, w).
        sigma: smoothing parameter.
    """
    total: torch.Tensor | None = None
    for layer, layer_size in zip(completed, sizes, strict=True):
        image = resized_and_smoothed(as_image(layer, layer_size), size, sigma)
        image = image / (image.mean(dim=(-2, -1), keepdim=True) + EPSILON)
        total = image if total is None else total + image
    return total / len(completed)


def token_masks(scores: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """One 0/1 mask per token [B, T, h, w]: equality with the maximum over tokens, so a tie is hot in several masks.

    `token_mask` [B, T] (bool) is not in the released code: tokens that are off may not own a cell.
    """
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask[:, :, None, None], -torch.inf)
    return (scores == scores.amax(dim=1, keepdim=True)).to(scores.dtype)


def token_ids(masks: torch.Tensor) -> torch.Tensor:
    """[B, h, w]: the lowest hot token of every cell."""
    return masks.argmax(dim=1)


def foreground_scores(
    completed: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    sigma: float = 0.5,
) -> torch.Tensor:
    """Two channels [B, 2, h, w]: the start token, and the sum of all others, each over its own spatial mean.

    The mean over layers. Follows the released mask code, which takes them from the completed maps of the
    *unconditional* half and uses no epsilon here.
    """
    total: torch.Tensor | None = None
    for layer, layer_size in zip(completed, sizes, strict=True):
        image = resized_and_smoothed(as_image(layer, layer_size), size, sigma)
        two = torch.cat([image[:, :1], image[:, 1:].sum(dim=1, keepdim=True)], dim=1)
        two = two / two.mean(dim=(-2, -1), keepdim=True)
        total = two if total is None else total + two
    return total / len(completed)


def foreground_mask(
    completed: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    sigma: float = 0.5,
) -> torch.Tensor:
    """0/1 foreground [B, 1, h, w]: where the start channel is not the maximum; a tie is background."""
    two = foreground_scores(completed, sizes, size, sigma)
    return 1 - (two == two.amax(dim=1, keepdim=True))[:, :1].to(two.dtype)


# Rates and guidance --------------------------------------------------------------------------------------------------


def nearest_upsampled(masks: torch.Tensor, latent_hw: tuple[int, int], cell: int) -> torch.Tensor:
    """[B, K, h, w] -> [B, K, H, W]: latent pixel (y, x) takes cell (y // cell, x // cell)."""
    rows = torch.arange(latent_hw[0], device=masks.device) // cell
    columns = torch.arange(latent_hw[1], device=masks.device) // cell
    return masks[..., rows, :][..., columns]


def region_rates(
    uncond: torch.Tensor, cond: torch.Tensor, masks: torch.Tensor, foreground: torch.Tensor, cell: int = 4
) -> torch.Tensor:
    """Rate of every latent pixel [B, 1, H, W] before clamping and smoothing; tied tokens add up.

    Paper equation 13, with the released code's quantities: the norm of d over channels per pixel, and region means of
    it, rate_i = mean over the foreground / mean over region i.
    """
    latent_hw = (cond.shape[-2], cond.shape[-1])
    masks = nearest_upsampled(masks, latent_hw, cell)
    foreground = nearest_upsampled(foreground, latent_hw, cell)
    norm = _at_least_fp32((cond - uncond).norm(dim=1, keepdim=True))

    up = (norm * foreground).sum(dim=(2, 3), keepdim=True) / (foreground.sum(dim=(2, 3), keepdim=True) + EPSILON)
    area = masks.sum(dim=(2, 3), keepdim=True)
    down = (norm * masks).sum(dim=(2, 3), keepdim=True) / (area + EPSILON)
    rate_of_token = up * (area > 0) / (down + EPSILON)
    return (rate_of_token * masks).sum(dim=1, keepdim=True)


def rates(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    masks: torch.Tensor,
    foreground: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    *,
    cell: int = 4,
    rate_min: float | None = 0.8,
    rate_max: float | None = 3.0,
    max_scale: float | None = 15.0,
    sigma: float = 0.5,
) -> torch.Tensor:
    """Rate map [B, 1, H, W] of the released sampling loop: region rates, clamp to [0.8, 3] and to 15 / g, smoothing.

    Args:
        uncond, cond: predictions [B, C, H, W].
        masks: token masks [B, T, h, w].
        foreground: foreground mask [B, 1, h, w].
        guidance_scale: g, or one per sample.
        cell: R.
        rate_min, rate_max, max_scale: the clamps; None for none.
        sigma: smoothing parameter; 0 for none.
    """
    rate = region_rates(uncond, cond, masks, foreground, cell)
    if rate_min is not None:
        rate = rate.clamp(min=rate_min)
    if rate_max is not None:
        rate = rate.clamp(max=rate_max)
    if max_scale is not None:
        rate = torch.minimum(rate, max_scale / _column(guidance_scale, rate))
    return smooth(rate, sigma)


def guided(
    uncond: torch.Tensor, cond: torch.Tensor, rate: torch.Tensor, guidance_scale: float | torch.Tensor
) -> torch.Tensor:
    """uncond + g rate (cond - uncond) (paper section 4.2, the released loop's last line), in the prediction's dtype."""
    return (uncond + _column(guidance_scale, rate) * rate * (cond - uncond)).to(cond.dtype)


def rescaled(noise: torch.Tensor, cond: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """Guidance rescale as in "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4."""
    dims = (1, 2, 3)
    matched = noise * (cond.std(dim=dims, keepdim=True) / noise.std(dim=dims, keepdim=True))
    return guidance_rescale * matched + (1 - guidance_rescale) * noise


# Capture in a diffusers model ----------------------------------------------------------------------------------------


class LiteralStore:
    """Head-mean probabilities of one UNet pass, keyed by resolution as in the released store ("r4_self", "r8_cross").

    The released code takes r = int(sqrt(latent side^2 / N)) and assumes squares; here r is the power of two whose grid
    (ceil(H / r), ceil(W / r)) has N tokens. Only r >= `smallest_factor` is kept: 2 in the released code.

    Args:
        latent_hw: height and width of the latent.
        smallest_factor: the finest resolution that is kept.
    """

    def __init__(self, latent_hw: tuple[int, int], smallest_factor: int = 2) -> None:
        self.latent_hw = latent_hw
        self.smallest_factor = smallest_factor
        self.maps: dict[str, list[torch.Tensor]] = {}

    def grid(self, factor: int) -> tuple[int, int]:
        """(h, w) of the token grid at a factor below the latent's."""
        return math.ceil(self.latent_hw[0] / factor), math.ceil(self.latent_hw[1] / factor)

    def factor(self, tokens: int) -> int:
        """The r of a layer with `tokens` image tokens."""
        factor = 1
        while math.prod(self.grid(factor)) > tokens:
            factor *= 2
        if math.prod(self.grid(factor)) != tokens:
            raise ValueError(f"{tokens} image tokens are not a power-of-two fraction of the latent {self.latent_hw}")
        return factor

    def add(self, kind: str, head_mean_probabilities: torch.Tensor) -> None:
        """Append one layer's map; kind is "self" or "cross". A cross map whose block left no self map is dropped."""
        factor = self.factor(head_mean_probabilities.shape[1])
        if kind == "cross" and len(self.maps.get(f"r{factor}_self", [])) == len(self.maps.get(f"r{factor}_cross", [])):
            return
        if factor >= self.smallest_factor:
            self.maps.setdefault(f"r{factor}_{kind}", []).append(head_mean_probabilities)

    def layers(self, factor: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(self map, cross map) of every layer at one factor."""
        return list(zip(self.maps[f"r{factor}_self"], self.maps[f"r{factor}_cross"], strict=True))

    def reset(self) -> None:
        """Forget everything; call it before each UNet pass."""
        self.maps.clear()


class LiteralCaptureProcessor:
    """Attention processor that computes all probabilities, stores their head mean, and multiplies them by the values.

    What the released processor does: explicit scores instead of a fused kernel, in every layer.
    """

    def __init__(self, store: LiteralStore) -> None:
        self.store = store

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        context, kind = hidden_states, "self"
        if encoder_hidden_states is not None:
            context, kind = encoder_hidden_states, "cross"
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], hidden_states.shape[0])

        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self.store.add(kind, head_mean(probabilities, attn.heads))

        hidden_states = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


# One step, and a whole run -------------------------------------------------------------------------------------------


def literal_guidance(
    store: LiteralStore,
    noise_pred: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    latent_hw: tuple[int, int],
    *,
    factors: Sequence[int] = (4, 8),
    completion: str = "official",
    powers: int = 4,
    cell: int | None = None,
    rate_min: float | None = 0.8,
    rate_max: float | None = 3.0,
    max_scale: float | None = 15.0,
    sigma: float = 0.5,
    token_mask: torch.Tensor | None = None,
    groups: int = 2,
    foreground_half: int = 0,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Guided noise of one step from the maps of the same step, with every intermediate stage.

    Follows the released mask function (token masks from the conditional half of the batch, foreground from the
    unconditional half, layers at r = 4 and r = 8 with equal weight) and the released sampling loop's guidance lines.

    Args:
        store: maps of one UNet pass on [uncond; cond].
        noise_pred: the UNet's output on [uncond; cond].
        guidance_scale: g, or one per sample.
        latent_hw: height and width of the latent; must be the store's.
        factors: which resolutions are used, the finest first; their finest is the mask grid.
        completion: "official" or "paper".
        powers: R of the completion, 4.
        cell: latent pixels per mask cell; the finest factor unless given.
        rate_min, rate_max, max_scale, sigma, token_mask: see `rates` and `token_masks`.
        groups: how many groups of B samples the maps have; the first two are unconditional and conditional.
        foreground_half: which group the foreground is taken from: 0 in the released code.

    Returns:
        guided noise [B, C, H, W], and a dict with "completed", "sizes", "size", "scores", "masks", "ids",
        "foreground_scores", "foreground", "region_rates", "rate", "uncond", "cond" and "guided".
    """
    if tuple(latent_hw) != tuple(store.latent_hw) or tuple(latent_hw) != tuple(noise_pred.shape[-2:]):
        raise ValueError(f"latent {latent_hw}, store {store.latent_hw} and prediction {tuple(noise_pred.shape)} differ")
    complete = {"official": official_completion, "paper": paper_completion}[completion]
    cell = factors[0] if cell is None else cell
    size = store.grid(factors[0])

    completed, sizes = [], []
    for factor in factors:
        for self_map, cross_map in store.layers(factor):
            completed.append(complete(self_map, cross_map, powers))
            sizes.append(store.grid(factor))
    foreground_maps = [layer.chunk(groups)[foreground_half] for layer in completed]
    cond_maps = [layer.chunk(groups)[1] for layer in completed]

    scores = smoothed_normalised(cond_maps, sizes, size, sigma)
    masks = token_masks(scores, token_mask)
    foreground = foreground_mask(foreground_maps, sizes, size, sigma)
    uncond, cond = noise_pred.chunk(2)
    rate = rates(
        uncond,
        cond,
        masks,
        foreground,
        guidance_scale,
        cell=cell,
        rate_min=rate_min,
        rate_max=rate_max,
        max_scale=max_scale,
        sigma=sigma,
    )
    result = guided(uncond, cond, rate, guidance_scale)
    stages = {
        "completed": completed,
        "sizes": sizes,
        "size": size,
        "scores": scores,
        "masks": masks,
        "ids": token_ids(masks),
        "foreground_scores": foreground_scores(foreground_maps, sizes, size, sigma),
        "foreground": foreground,
        "region_rates": region_rates(uncond, cond, masks, foreground, cell),
        "rate": rate,
        "uncond": uncond,
        "cond": cond,
        "guided": result,
    }
    return result, stages


@torch.no_grad()
def literal_denoise(
    pipe: Any,
    prompt_embeds: torch.Tensor,
    latents: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float | torch.Tensor,
    generators: Sequence[torch.Generator] | None = None,
    guidance_rescale: float = 0.0,
    smallest_factor: int = 2,
    unet_kwargs: Mapping[str, Any] | None = None,
    guidance_options: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The released sampling loop over a pipeline's own UNet and scheduler; processors are restored at the end.

    Args:
        pipe: a pipeline with `unet` and `scheduler`.
        prompt_embeds: [2B, T, C], the unconditional half first.
        latents: starting latents [B, C, H, W], already scaled by the scheduler's initial sigma.
        steps: number of denoising steps.
        guidance_scale: g, or one per sample.
        generators: for schedulers that add noise.
        guidance_rescale: see `rescaled`.
        smallest_factor: see `LiteralStore`.
        unet_kwargs: further arguments of the UNet, for example `added_cond_kwargs`.
        guidance_options: keyword arguments of `literal_guidance`, for example `factors`.

    Returns:
        final latents, and one dict of stages per step (with "timestep", "model_output" and "latents" added).
    """
    latent_hw = (latents.shape[-2], latents.shape[-1])
    store = LiteralStore(latent_hw, smallest_factor)
    originals = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(LiteralCaptureProcessor(store))
    history = []
    try:
        pipe.scheduler.set_timesteps(steps, device=latents.device)
        step_kwargs = pipe.prepare_extra_step_kwargs(list(generators) if generators else None, 0.0)
        for timestep in pipe.scheduler.timesteps:
            store.reset()
            doubled = pipe.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            output = pipe.unet(doubled, timestep, encoder_hidden_states=prompt_embeds, **(unet_kwargs or {})).sample
            noise, stages = literal_guidance(store, output, guidance_scale, latent_hw, **(guidance_options or {}))
            if guidance_rescale > 0:
                noise = rescaled(noise, stages["cond"], guidance_rescale)
            latents = pipe.scheduler.step(noise, timestep, latents, **step_kwargs).prev_sample
            history.append({**stages, "timestep": timestep, "model_output": output, "latents": latents})
    finally:
        pipe.unet.set_attn_processor(originals)
    return latents, history


@torch.no_grad()
def literal_run(
    pipe: Any,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    steps: int = 50,
    guidance_scale: float | torch.Tensor = 7.5,
    seeds: Sequence[int] | None = None,
    latents: torch.Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_rescale: float = 0.0,
    smallest_factor: int = 2,
    **guidance_options: Any,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Prompts to final latents with a Stable Diffusion 1.x / 2.x pipeline's own components.

    Args:
        pipe: a StableDiffusionPipeline.
        prompts: one prompt per image.
        negative_prompts: one per image; empty strings if not given.
        steps, guidance_scale, guidance_rescale, smallest_factor: see `literal_denoise`.
        seeds: one seed per image; the starting noise is what the pipeline draws from CPU generators with these seeds.
        latents: unit-variance starting noise instead of `seeds`, as the pipeline's own `latents` argument.
        height, width: of the image in pixels; the model's default if not given.
        guidance_options: keyword arguments of `literal_guidance`.

    Returns:
        final latents (as the pipeline's `output_type="latent"`), and one dict of stages per step.
    """
    if (seeds is None) == (latents is None):
        raise ValueError("give either seeds or latents")
    prompts = list(prompts)
    device = pipe.unet.device
    negatives = list(negative_prompts) if negative_prompts is not None else [""] * len(prompts)
    cond, uncond = pipe.encode_prompt(prompts, device, 1, True, negative_prompt=negatives)
    generators = None if seeds is None else [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    sample_size = pipe.unet.config.sample_size
    default_height, default_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    pipe.scheduler.set_timesteps(steps, device=device)  # the initial noise's sigma depends on the steps
    latents = pipe.prepare_latents(
        len(prompts),
        pipe.unet.config.in_channels,
        height or default_height * pipe.vae_scale_factor,
        width or default_width * pipe.vae_scale_factor,
        cond.dtype,
        device,
        generators,
        latents,
    )
    return literal_denoise(
        pipe,
        torch.cat([uncond, cond]),
        latents,
        steps=steps,
        guidance_scale=guidance_scale,
        generators=generators,
        guidance_rescale=guidance_rescale,
        smallest_factor=smallest_factor,
        guidance_options=guidance_options,
    )
