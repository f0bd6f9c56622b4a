"""The published S-CFG code's mathematics for DeepFloyd IF, and IF's pipelines with only their guidance line replaced.

An oracle like `official`, from which it takes what both paths share: completion, smoothing, the two channels of the
foreground, equality masks. What the IF path has of its own:

- A layer attends to text and picture in one softmax, keys [text; picture]. The first n_keys - n_queries columns are
  "cross", the others "self"; neither is renormalised, so the rows of both sum to less than 1. 1e-20 is added to all.
- Of every resolution the last three layers are used; a resolution without layers is skipped, and the next is resized
  all the same to the grid of the first.
- Stage I compares a region with the mean norm over the whole picture, stage II with the foreground's.
- The only clamp is 15 / g.
- The variance that the model predicts beside the noise is split off first, and the text half's is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from lab.reference import official
from lab.reference.replaced import replace_guidance_line

EPSILON = 1e-8


def split_joint_map(head_mean_probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N, T + N] -> cross map [B, N, T] and self map [B, N, N], as they are but for 1e-20."""
    rows, columns = head_mean_probabilities.shape[1:]
    cross, own = (head_mean_probabilities + 1e-20).split([columns - rows, rows], dim=-1)
    return cross, own


class LiteralJointProcessor:
    """Attention with added keys and values by explicit probabilities, whose head mean goes to the store.

    Layers that attend to the text alone have no self map, and leave nothing.

    Args:
        store: where maps go.
        inner: computes the output instead, if given: then a run differs from the stock pipeline by the guidance alone.
    """

    def __init__(self, store: official.LiteralStore, inner: Any = None) -> None:
        self.store = store
        self.inner = inner

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert encoder_hidden_states is not None and attention_mask is None
        residual = hidden_states
        picture = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        text = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
        key, value = attn.add_k_proj(text), attn.add_v_proj(text)
        if not attn.only_cross_attention:
            key = torch.cat([key, attn.to_k(picture)], dim=1)
            value = torch.cat([value, attn.to_v(picture)], dim=1)
        query, key, value = (attn.head_to_batch_dim(x) for x in (attn.to_q(picture), key, value))
        probabilities = attn.get_attention_scores(query, key)
        if not attn.only_cross_attention:
            cross, own = split_joint_map(official.head_mean(probabilities, attn.heads))
            self.store.add("self", own)
            self.store.add("cross", cross)
        if self.inner is not None:
            return self.inner(attn, hidden_states, encoder_hidden_states)
        out = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        out = attn.to_out[1](attn.to_out[0](out))
        return out.transpose(1, 2).reshape(residual.shape) + residual


def region_rates(
    uncond: torch.Tensor, cond: torch.Tensor, masks: torch.Tensor, foreground: torch.Tensor | None, cell: int = 4
) -> torch.Tensor:
    """Rate of every pixel [B, 1, H, W] before clamp and smoothing; no foreground means the whole picture's mean."""
    hw = (cond.shape[-2], cond.shape[-1])
    norm = (cond - uncond).norm(dim=1, keepdim=True)
    if foreground is None:
        up = norm.mean(dim=(2, 3), keepdim=True)
    else:
        inside = official.nearest_upsampled(foreground, hw, cell)
        up = (norm * inside).sum(dim=(2, 3), keepdim=True) / (inside.sum(dim=(2, 3), keepdim=True) + EPSILON)
    masks = official.nearest_upsampled(masks, hw, cell)
    area = masks.sum(dim=(2, 3), keepdim=True)
    down = (norm * masks).sum(dim=(2, 3), keepdim=True) / (area + EPSILON)
    return (up * (area > 0) / (down + EPSILON) * masks).sum(dim=1, keepdim=True)


def segmentation(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    sigma: float = 0.5,
    foreground_half: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token masks [B, T, h, w] of the conditional half and foreground [B, 1, h, w] of the unconditional one.

    Args:
        layers: (self map, cross map) of [uncond; cond].
        sizes: (h_l, w_l) of each layer.
        size: the mask grid.
        sigma: smoothing parameter.
        foreground_half: 0 for the unconditional one, as published.
    """
    halves = [official.official_completion(own, cross).chunk(2) for own, cross in layers]
    masks = official.token_masks(official.smoothed_normalised([cond for _, cond in halves], sizes, size, sigma))
    return masks, official.foreground_mask([half[foreground_half] for half in halves], sizes, size, sigma)


def literal_guidance(
    store: official.LiteralStore,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: float,
    *,
    stage: int,
    cell: int = 4,
    last: int = 3,
    max_scale: float = 15.0,
    foreground_half: int = 0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Guided noise of one step from the maps of the same step; also "ids", "foreground" and "rate".

    Args:
        store: maps of one pass on [uncond; cond].
        uncond, cond: the noise alone, [B, 3, H, W].
        guidance_scale: g.
        stage: 1 or 2.
        cell: pixels per mask cell.
        last: how many layers of a resolution are used, from the end.
        max_scale: the clamp.
        foreground_half: see `segmentation`.
    """
    layers, sizes = [], []
    for factor in (cell, 2 * cell):
        if f"r{factor}_self" in store.maps:
            layers += store.layers(factor)[-last:]
            sizes += [store.grid(factor)] * (len(layers) - len(sizes))
    masks, foreground = segmentation(layers, sizes, store.grid(cell), foreground_half=foreground_half)
    rate = region_rates(uncond, cond, masks, None if stage == 1 else foreground, cell)
    rate = official.smooth(rate.clamp(max=max_scale / guidance_scale))
    guided = uncond + guidance_scale * rate * (cond - uncond)
    return guided, {"ids": official.token_ids(masks), "foreground": foreground, "rate": rate}


def replaced_run(pipe: Any, arguments: dict[str, Any], *, stage: int, **options: Any) -> tuple[Any, list[dict]]:
    """Call a copy of the pipeline whose guidance line is `literal_guidance`; its output, and the stages of every step.

    The layers' outputs are those of the pipeline's own processors, the maps are computed beside them.

    Args:
        pipe: a stock pipeline; left as it was.
        arguments: of the call.
        stage: 1 or 2.
        options: further keyword arguments of `literal_guidance`.
    """
    store = official.LiteralStore((1, 1))
    history: list[dict] = []

    def start_step(module: torch.nn.Module, args: tuple) -> None:
        store.reset()
        store.latent_hw = (args[0].shape[-2], args[0].shape[-1])

    def guidance(self, uncond: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
        guided, stages = literal_guidance(store, uncond, cond, scale, stage=stage, **options)
        history.append(stages)
        return guided

    cls = type(pipe)
    reference = copy.copy(pipe)
    namespace = {"_guidance": guidance, "__call__": replace_guidance_line(cls.__call__)}
    reference.__class__ = type(cls.__name__, (cls,), namespace)
    layers = [module for module in pipe.unet.modules() if isinstance(module, Attention)]
    originals = [layer.processor for layer in layers]
    hook = pipe.unet.register_forward_pre_hook(start_step)
    try:
        for layer in layers:
            layer.processor = LiteralJointProcessor(store, layer.processor)
        return reference(**arguments), history
    finally:
        hook.remove()
        for layer, original in zip(layers, originals, strict=True):
            layer.processor = original
