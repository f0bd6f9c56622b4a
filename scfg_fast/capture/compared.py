"""Queries and keys of a layer -> its attention maps on the grid of cells.

There is no published S-CFG for transformers. The rules here are ours:

* Maps are made on the grid of cells, as in UNets. Where tokens are finer, the query of a cell is the mean of those of
  its tokens, and the keys' probabilities are added up over a cell. No map of all tokens ever exists.
* In a joint softmax every query has one sum over text and image; both maps are divided by their own, so that all rows
  sum to 1 as they do in a UNet.
* Frames of a video are images of their own: image keys are those of the query's frame.
* Text without a start token (T5) has the last attended token in its place, the end token or padding: the only ones
  without content (`start_column`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from scfg_kernels import attention_map

from ..layouts import Geometry

MASKED = -1e4
"""Added to scores instead of minus infinity: finite in fp16, and zero after any softmax."""


@dataclass(frozen=True)
class QueriesAndKeys:
    """Queries of image tokens and the keys that they are compared with.

    Attributes:
        query: [B, H, frames * N, d].
        text: [B, H, T, d], or None.
        image: [B, H, frames * N, d], or None. With `text`, in one softmax.
        bias: [B, T], added to the scores of text keys, or None.
        scale: factor on the scores; None for 1 / sqrt(d).
    """

    query: torch.Tensor
    text: torch.Tensor | None = None
    image: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float | None = None


Reader = Callable[..., QueriesAndKeys]
"""(attention module, and the arguments of its processor) -> QueriesAndKeys."""


def capture_maps(
    compared: QueriesAndKeys, geometry: Geometry, level: int, cell: int, backend: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Head-mean maps on the grid of cells, every row summing to 1.

    Args:
        compared: queries and keys of a layer.
        geometry: of the latents.
        level: latent pixels per side of a token.
        cell: latent pixels per side of a cell, at least `level`.
        backend: see `SCFGConfig.backend`.

    Returns:
        self map [B * frames, n, n] and cross map [B * frames, n, T], n cells per frame; None for keys that are not
        there.
    """
    if geometry.frames > 1:
        frames = [
            capture_maps(frame, Geometry(1, geometry.height, geometry.width), level, cell, backend)
            for frame in _frames(compared, geometry.frames)
        ]
        own, cross = (
            None if parts[0] is None else torch.stack(cast(list, parts), 1).flatten(0, 1)
            for parts in zip(*frames, strict=True)
        )
        return own, cross
    height, width = geometry.height // level, geometry.width // level
    count, pool = height * width, max(1, cell // level)
    query = compared.query[:, :, :count]  # what follows are reference images: keys, but not what is drawn
    if pool > 1:
        query = _pooled(query, height, width, pool)
    keys = [part for part in (compared.text, compared.image) if part is not None]
    key = torch.cat(keys, 2) if len(keys) > 1 else keys[0]
    scale = compared.scale if compared.scale is not None else query.shape[-1] ** -0.5
    if compared.bias is not None:
        query, key = _with_bias(query, key, compared.bias, scale)
    probabilities = attention_map(query, key, scale=scale, backend=backend)
    tokens = 0 if compared.text is None else compared.text.shape[2]
    cross = probabilities[:, :, :tokens] if tokens else None
    columns = probabilities[:, :, tokens : tokens + count]
    own = None if compared.image is None else _pooled_columns(columns, height, width, pool)
    if cross is not None and own is not None:
        cross, own = _stochastic(cross), _stochastic(own)
    return own, cross


def start_column(bias: torch.Tensor | None, tokens: int, which: str) -> torch.Tensor | int:
    """Column of the start token, or of what stands for it: `"first"` or `"last"` of the attended text tokens.

    Returns:
        A number, or [B] int64 where a mask decides.
    """
    if bias is None:
        return 0 if which == "first" else tokens - 1
    attended = (bias > 0.5 * MASKED).to(torch.int32)
    if which == "first":
        return attended.argmax(1)
    return tokens - 1 - attended.flip(1).argmax(1)


def _frames(compared: QueriesAndKeys, frames: int) -> Iterator[QueriesAndKeys]:
    """Frame by frame, one after another, so that keys are never copied for all of them at once."""
    queries = compared.query.unflatten(2, (frames, -1)).unbind(2)
    images = [None] * frames if compared.image is None else compared.image.unflatten(2, (frames, -1)).unbind(2)
    for query, image in zip(queries, images, strict=True):
        yield dataclasses.replace(compared, query=query, image=image)


def _pooled(query: torch.Tensor, height: int, width: int, pool: int) -> torch.Tensor:
    """[B, H, h * w, d] -> [B, H, n, d], means over pool x pool tokens; cells at the far edges may be ragged."""
    grid = query.transpose(2, 3).unflatten(3, (height, width)).flatten(0, 1)
    mean = F.avg_pool2d(grid, pool, ceil_mode=True, count_include_pad=False)
    return mean.unflatten(0, query.shape[:2]).flatten(3).transpose(2, 3)


def _pooled_columns(probabilities: torch.Tensor, height: int, width: int, pool: int) -> torch.Tensor:
    """[B, n, h * w] -> [B, n, n]: sums over the tokens of a cell."""
    if pool == 1:
        return probabilities.contiguous()
    grid = probabilities.unflatten(2, (height, width))
    return F.avg_pool2d(grid, pool, ceil_mode=True, divisor_override=1).flatten(2)


def _with_bias(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A bias of the first keys as one more component of queries and keys; eight, to keep vectors aligned."""
    query, key = F.pad(query, (0, 8)), F.pad(key, (0, 8))
    query[..., -1] = 1.0 / scale
    key[:, :, : bias.shape[1], -1] = bias[:, None].clamp(min=MASKED).to(key.dtype)
    return query, key


def _stochastic(part: torch.Tensor) -> torch.Tensor:
    """Rows divided by their sums; contiguous."""
    return part / part.sum(-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)


def key_bias(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The bias [B, T] of text keys in any mask that attention functions take: bool or additive, [B, K], [B, 1, K] or
    [B, heads, Q, K] of which all rows of image queries are alike; text keys first."""
    if mask is None:
        return None
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
    elif mask.ndim == 3:
        mask = mask[:, -1]
    text = mask[:, :tokens]
    if mask.dtype == torch.bool:
        return torch.zeros(text.shape, device=mask.device).masked_fill(~text, MASKED)
    return text if mask.shape[1] == tokens else text - mask[:, -1:]  # what image keys get too makes no difference
