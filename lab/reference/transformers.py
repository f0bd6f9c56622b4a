"""S-CFG in a transformer, written out: what the layers really compare, and every step of the method in full.

Queries and keys are those that reach `scaled_dot_product_attention` while a pipeline runs, positions, norms and masks
included, however the model made them. From there on: full probabilities of all tokens, then cells, then the published
maths of `official`.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lab.reference import official

LISTED_LINE = re.compile(r"pos \+ current_guidance_scale \* \(pos - neg\)")
GUIDANCE_LINE = re.compile(r"(\w+) \+ ((?:self\.)?\w*guidance_scale|true_cfg_scale) \* \((\w+) - \1\)")


@dataclass(frozen=True)
class Layout:
    """How a family arranges things.

    Attributes:
        grid: (frames, h, w) tokens.
        pool: tokens per side of a cell.
        text_first: whether text keys come before image keys in a joint softmax.
        joint: whether there is one, or self- and cross-attention apart.
        start: column of the token that stands for the start token in each sample of one half; None for the first.
        foreground: "unconditional" or "conditional".
        two_pass: whether there are two runs per step, conditional first.
        images: prediction -> [B * frames, C, H, W]; `back` is its inverse.
        completes: False where self-attention has no map.
        conditional_first: whether the conditional half of a batch comes first, as lists of samples (Z-Image).
    """

    grid: tuple[int, int, int]
    pool: int
    joint: bool = True
    text_first: bool = True
    start: Sequence[int] | None = None
    foreground: str = "unconditional"
    two_pass: bool = False
    images: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    back: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda x, prediction: x
    completes: bool = True
    conditional_first: bool = False


class _Call(NamedTuple):
    """What `scaled_dot_product_attention` was called with."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None


def _attention_arguments(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """The signature of `scaled_dot_product_attention`, a built-in that has none."""


class _Watch(TorchFunctionMode):
    """Records every attention call made inside of a watched module."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: str | None = None
        self.seen: dict[str, list[_Call]] = {}
        self.guided = torch.empty(0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.inside is not None:
            bound = inspect.signature(_attention_arguments).bind(*args, **kwargs)
            bound.apply_defaults()
            call = bound.arguments
            recorded = _Call(call["query"], call["key"], call["attn_mask"], call["scale"])
            self.seen.setdefault(self.inside, []).append(recorded)
        return function(*args, **kwargs)


def replaced(function: Callable) -> Callable:
    """The same function, with `self._guidance(uncond, cond, scale)` for the guidance line."""
    source = textwrap.dedent(inspect.getsource(function))
    source = LISTED_LINE.sub("self._listed(j, neg_out, pos_out, current_guidance_scale + 1.0)", source)
    source, count = GUIDANCE_LINE.subn(r"self._guidance(\1, \3, \2)", source)
    count += source.count("self._listed(")
    if count != 1:
        raise ValueError(f"{function.__qualname__} has {count} guidance lines, expected one")
    scope = dict(vars(sys.modules[function.__module__]))
    exec(compile(source, inspect.getsourcefile(function) or "<source>", "exec"), scope)
    return scope[function.__name__]


def cells(query: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[B * frames, H, h w, d] -> the mean query of every cell, one by one."""
    _, height, width = layout.grid
    pool = layout.pool
    grid = query.unflatten(2, (height, width))
    rows = []
    for top in range(0, height, pool):
        for left in range(0, width, pool):
            rows.append(grid[:, :, top : top + pool, left : left + pool].mean((2, 3)))
    return torch.stack(rows, 2)


def summed_columns(probabilities: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[B * frames, n, h w] -> [B * frames, n, n]."""
    _, height, width = layout.grid
    pool = layout.pool
    grid = probabilities.unflatten(2, (height, width))
    columns = []
    for top in range(0, height, pool):
        for left in range(0, width, pool):
            columns.append(grid[:, :, top : top + pool, left : left + pool].sum((2, 3)))
    return torch.stack(columns, 2)


def literal_maps(recorded: _Call, layout: Layout, text_tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(self map, cross map) on the grid of cells of one attention call."""
    query, key, mask, scale = recorded
    frames, height, width = layout.grid
    image_tokens = frames * height * width
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if layout.joint:
        text_tokens = min(text_tokens, key.shape[2] - image_tokens)  # an empty prompt may be shorter
        # images filled up with more tokens
        filled = key.shape[2] - text_tokens if layout.conditional_first else image_tokens
        text = slice(0, text_tokens) if layout.text_first else slice(filled, filled + text_tokens)
        image = slice(text_tokens, text_tokens + image_tokens) if layout.text_first else slice(0, image_tokens)
        query = query[:, :, image]
        bias = None if mask is None else mask.expand(-1, -1, mask.shape[2], -1)[:, :, -1:]
    else:
        text, image, bias = slice(0, text_tokens), slice(0, image_tokens), mask
        if text_tokens == 0 and frames > 1:
            key = key.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)
    if frames > 1:
        query = query.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)
        if text_tokens:
            key = key.repeat_interleave(frames, 0)
            bias = None if bias is None else bias.repeat_interleave(frames, 0)
    scores = cells(query, layout) @ key.transpose(-1, -2) * scale
    if bias is not None:
        bias = (
            torch.zeros_like(bias, dtype=scores.dtype).masked_fill(~bias, -torch.inf)
            if bias.dtype == torch.bool
            else bias
        )
        scores = scores + bias
    mean = scores.softmax(-1).mean(1)
    if layout.joint:
        own, cross = summed_columns(mean[:, :, image], layout), mean[:, :, text]
        return own / own.sum(-1, keepdim=True), cross / cross.sum(-1, keepdim=True)
    return (None, mean) if text_tokens else (summed_columns(mean, layout), None)


def reference_run(
    pipe: Any, arguments: dict[str, Any], layers: Sequence[tuple[str, ...]], layout: Layout, text_tokens: int
) -> Any:
    """Call a copy of the pipeline whose guidance line is the method, written out.

    Args:
        pipe: a stock pipeline with a transformer; left as it was.
        arguments: of the call.
        layers: per captured block, the names of its attention modules: (self, cross), or one for both.
        layout: see there.
        text_tokens: text keys of a joint softmax.
    """
    watch = _Watch()
    handles = []
    models = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
    for model in models:
        if not layout.two_pass:  # what a run before left is of no interest: a run with skipped layers comes last
            handles.append(model.register_forward_pre_hook(lambda *_: watch.seen.clear()))
        for block in layers:
            for name in block:
                module = model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: setattr(watch, "inside", name)))
                handles.append(module.register_forward_hook(lambda *_: setattr(watch, "inside", None)))

    def completed_maps() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per layer, completed maps of the conditional half, and of the half that decides the foreground."""
        cond_maps, ground_maps = [], []
        for block in layers:
            calls = [watch.seen[name] for name in block]
            own_parts, cross_parts = [], []
            for number in range(2 if layout.two_pass else 1):
                tokens = [0, text_tokens] if len(calls) == 2 else [text_tokens]  # self-attention comes first
                maps = [literal_maps(call[number], layout, t) for call, t in zip(calls, tokens, strict=True)]
                own_parts.append(next((own for own, _ in maps if own is not None), None))
                cross_parts.append(next(cross for _, cross in maps if cross is not None))
            completed = [
                official.official_completion(own, cross) if layout.completes else cross
                for own, cross in zip(own_parts, cross_parts, strict=True)
            ]
            order = 1 if layout.conditional_first else -1
            cond, uncond = completed if layout.two_pass else completed[0].chunk(2)[::order]
            cond_maps.append(cond)
            ground = cond if layout.foreground == "conditional" else uncond
            if layout.start is not None:
                starts = torch.tensor(layout.start).repeat_interleave(layout.grid[0])
                order = torch.arange(ground.shape[2]).expand(len(starts), -1).clone()
                order[torch.arange(len(starts)), starts] = 0
                order[:, 0] = starts
                ground = torch.stack([g[:, o] for g, o in zip(ground, order, strict=True)])
            ground_maps.append(ground)
        watch.seen.clear()
        return cond_maps, ground_maps

    def guidance(self: Any, uncond: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
        tokens, ground = completed_maps()
        _, height, width = layout.grid
        size = (-(-height // layout.pool), -(-width // layout.pool))
        masks = official.token_masks(official.smoothed_normalised(tokens, [size] * len(tokens), size))
        foreground = official.foreground_mask(ground, [size] * len(ground), size)
        u, t = layout.images(uncond), layout.images(cond)
        cell = -(-u.shape[-2] // size[0])
        rate = official.rates(u, t, masks, foreground, float(scale), cell=cell)
        return layout.back(u + float(scale) * rate * (t - u), uncond + float(scale) * (cond - uncond))

    def listed(self: Any, number: int, uncond: list, cond: list, scale: float) -> torch.Tensor:
        """Of one sample; all are guided at the first."""
        if number == 0:
            parts = (torch.stack(list(part)).squeeze(2) for part in (uncond, cond))
            watch.guided = guidance(self, *parts, scale)
        return watch.guided[number].unsqueeze(1)

    cls = type(pipe)
    reference = copy.copy(pipe)
    reference.__class__ = type(
        cls.__name__, (cls,), {"_guidance": guidance, "_listed": listed, "__call__": replaced(cls.__call__)}
    )
    try:
        with watch:
            return reference(**arguments)
    finally:
        for handle in handles:
            handle.remove()
