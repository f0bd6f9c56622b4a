"""The regions of S-CFG as data and as a table.

At every guided step each cell of the latent belongs to one token of the prompt, its region, and each latent pixel has a
rate, the factor by which S-CFG multiplies the guidance scale there. This module names, tabulates and saves them;
`scfg_fast.pictures` draws them, and its functions can be imported from here too. It needs torch and numpy.

A latent pixel (row, column) lies in the cell (row // cell, column // cell); the cells at the far edges may be ragged.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .files import replacing

_DRAWN = {
    "contact_sheet": "sheets",
    "image_grid": "sheets",
    "overlay": "overlay",
    "rate_colors": "style",
    "rate_range": "style",
    "scaled": "overlay",
    "token_color": "style",
}
"""Function that draws -> its module in `scfg_fast.pictures`."""


def __getattr__(name: str) -> Any:
    if name not in _DRAWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".pictures.{_DRAWN[name]}", __package__), name)


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions and rates of one denoising step.

    Attributes:
        step: index of the step in its pipeline call, from 0.
        token_index: [B, h, w] int64, the token that owns each cell.
        foreground: [B, h, w] bool, the cells whose mean guidance is the reference of all regions.
        rate: [B, 1, H, W] floating point, the factor on the guidance scale at each latent pixel.
    """

    step: int
    token_index: torch.Tensor
    foreground: torch.Tensor
    rate: torch.Tensor

    @property
    def cell(self) -> int:
        """Latent pixels per side of a cell: the power of two that divides H x W into h x w."""
        (h, w), (height, width) = self.token_index.shape[-2:], self.rate.shape[-2:]
        cell = 1
        while (-(-height // cell), -(-width // cell)) != (h, w):
            cell *= 2
            if cell > 2 * max(height, width):
                raise ValueError(f"no power of two divides a latent of {height}x{width} into {h}x{w} cells")
        return cell

    def clone(self) -> Regions:
        """A copy that later steps cannot change."""
        return replace(
            self, token_index=self.token_index.clone(), foreground=self.foreground.clone(), rate=self.rate.clone()
        )

    def to(self, device: torch.device | str) -> Regions:
        """The same regions on another device; tensors that are there already are shared, not copied."""
        return replace(
            self,
            token_index=self.token_index.to(device),
            foreground=self.foreground.to(device),
            rate=self.rate.to(device),
        )

    def cpu(self) -> Regions:
        """The same regions in host memory."""
        return self.to("cpu")


class RegionRow(NamedTuple):
    """One region of one sample.

    Attributes:
        token: index of the token.
        label: its name.
        share: share of all cells, in (0, 1].
        rate: mean rate over the region's latent pixels.
        foreground: share of the region's cells that are foreground, in [0, 1].
    """

    token: int
    label: str
    share: float
    rate: float
    foreground: float


def token_labels(tokenizer: Any, prompt: str, num_tokens: int) -> list[str]:
    """Human names of the tokens that a prompt becomes.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text.
        num_tokens: length that the prompt is padded and cut to, T.

    Returns:
        T names: `<start>`, the words and word pieces as text, `<end>`, then `<pad>`.

    Raises:
        ValueError: num_tokens is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    encoded = tokenizer(prompt, padding="max_length", max_length=num_tokens, truncation=True)
    labels: list[str] = []
    for position, token in enumerate(encoded["input_ids"]):
        if labels and labels[-1] in ("<end>", "<pad>"):
            labels.append("<pad>")
        elif position == 0 and token == tokenizer.bos_token_id:
            labels.append("<start>")
        elif token == tokenizer.eos_token_id:
            labels.append("<end>")
        else:
            labels.append(_token_text(tokenizer, token))
    return labels


def _token_text(tokenizer: Any, token: int) -> str:
    """A token as text; pieces that are not whole characters keep the vocabulary's spelling."""
    text = tokenizer.decode([token]).strip()
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token)).removesuffix("</w>")


def sample_arrays(regions: Regions, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_index [h, w], foreground [h, w], rate [H, W]) of one sample in host memory."""
    batch = regions.token_index.shape[0]
    if not 0 <= sample < batch:
        raise ValueError(f"sample {sample} does not exist, these regions have {batch} (counted from 0)")
    return (
        regions.token_index[sample].cpu().numpy(),
        regions.foreground[sample].cpu().numpy(),
        regions.rate[sample, 0].float().cpu().numpy(),
    )


def per_pixel(cells: np.ndarray, cell: int, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> [H, W]: every latent pixel takes the value of its cell."""
    return cells.repeat(cell, 0).repeat(cell, 1)[: size[0], : size[1]]


def region_table(regions: Regions, labels: Sequence[str], sample: int = 0) -> list[RegionRow]:
    """The regions of one sample, largest first, equal sizes by token index.

    Args:
        regions: of one step.
        labels: T names, see `token_labels`.
        sample: index into the batch.

    Raises:
        ValueError: the sample does not exist, or a region's token has no label.
    """
    ids, foreground, rate = sample_arrays(regions, sample)
    if ids.max() >= len(labels):
        raise ValueError(f"token {ids.max()} owns a region, but only {len(labels)} labels were given")
    pixel_ids = per_pixel(ids, regions.cell, rate.shape)
    rows = []
    for token in np.unique(ids):
        cells = ids == token
        rows.append(
            RegionRow(
                token=int(token),
                label=labels[token],
                share=float(cells.mean()),
                rate=float(rate[pixel_ids == token].mean()),
                foreground=float(foreground[cells].mean()),
            )
        )
    return sorted(rows, key=lambda row: (-row.share, row.token))


def row_name(row: RegionRow, labels: Sequence[str]) -> str:
    """The label of a region, with the token's number where several tokens have that label."""
    return row.label if labels.count(row.label) == 1 else f"{row.label} ({row.token})"


def save_regions_npz(
    path: str | os.PathLike,
    steps: Sequence[Regions],
    *,
    labels: Sequence[Sequence[str]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Save the regions of several steps, whole or not at all. `numpy.load(path)` reads them, without pickle.

    The file holds, for S steps of B samples:

        step         [S] int64            index of each step, from 0
        token_index  [S, B, h, w] int64   the token that owns each cell
        foreground   [S, B, h, w] bool    the cells that are the reference
        rate         [S, B, 1, H, W] f32  the factor on the guidance scale
        cell         [] int64             latent pixels per side of a cell
        labels       [B, T] text          names of the tokens, if given
        metadata     [] text              a JSON object, `{}` if none was given

    Args:
        path: of the file; its folder must exist.
        steps: at least one, all of the same shapes.
        labels: for each sample, the names of its T tokens.
        metadata: anything that JSON can hold.

    Returns:
        The path.

    Raises:
        ValueError: no steps, or steps of different shapes.
    """
    if not steps:
        raise ValueError("there are no regions to save")
    shapes = {(tuple(r.token_index.shape), tuple(r.rate.shape)) for r in steps}
    if len(shapes) > 1:
        raise ValueError(f"the steps differ in shape: {sorted(shapes)}")
    arrays: dict[str, Any] = {
        "step": np.array([regions.step for regions in steps], dtype=np.int64),
        "token_index": np.stack([regions.token_index.cpu().numpy() for regions in steps]),
        "foreground": np.stack([regions.foreground.cpu().numpy() for regions in steps]),
        "rate": np.stack([regions.rate.float().cpu().numpy() for regions in steps]),
        "cell": np.array(steps[0].cell, dtype=np.int64),
        "metadata": np.array(json.dumps(dict(metadata or {}), sort_keys=True)),
    }
    if labels is not None:
        arrays["labels"] = np.array([list(names) for names in labels])
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
    return Path(path)
