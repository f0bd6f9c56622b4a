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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from scfg_kernels import joint_attention_maps

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

    def of(self, samples: slice) -> QueriesAndKeys:
        """Of some samples alone."""
        text, image, bias = (None if x is None else x[samples] for x in (self.text, self.image, self.bias))
        return QueriesAndKeys(self.query[samples], text, image, bias, self.scale)


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
    options: Any = dict(
        grid=(geometry.height // level, geometry.width // level), pool=max(1, cell // level), scale=compared.scale,
        backend=backend,
    )  # fmt: skip
    if geometry.frames == 1:
        return joint_attention_maps(compared.query, compared.text, compared.image, bias=compared.bias, **options)
    # Frames are samples of their own, of one sample after another, so that keys are not copied.
    maps = []
    for sample in range(compared.query.shape[0]):
        query, image = (
            None if x is None else x[sample].unflatten(1, (geometry.frames, -1)).transpose(0, 1)
            for x in (compared.query, compared.image)
        )
        text, bias = (
            None if x is None else x[sample].expand(geometry.frames, *x.shape[1:])
            for x in (compared.text, compared.bias)
        )
        maps.append(joint_attention_maps(cast(torch.Tensor, query), text, image, bias=bias, **options))
    own, cross = (None if parts[0] is None else torch.cat(cast(list, parts)) for parts in zip(*maps, strict=True))
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
