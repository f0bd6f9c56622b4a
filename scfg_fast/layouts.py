"""Predictions of denoisers, looked at as latent images.

S-CFG works on [G, C, H, W]: G samples, C channels of the latent. Denoisers return that, or more channels (a learned
variance), or tokens of packed patches, or videos. A view opens a prediction and puts a result of the same shape back; a
value that was not changed comes back bit by bit. Everything is a permutation, so nothing is read from the device.

Frames of a video are images of their own: G = samples * frames, the frames of a sample side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Geometry:
    """Size of the latents of one call: (frames, height, width); one frame for images."""

    frames: int
    height: int
    width: int


class View(Protocol):
    """Opens predictions of one kind and closes them again."""

    def open(self, prediction: Any, geometry: Geometry) -> torch.Tensor:
        """-> [samples * frames, C, H, W], unconditional samples first where there are both."""

    def close(self, result: torch.Tensor, prediction: Any, geometry: Geometry) -> Any:
        """The inverse, with everything that `open` left out taken from `prediction`."""


@dataclass(frozen=True)
class Images:
    """[B, C', H, W], of which the first C channels are the prediction; the rest is a learned variance.

    Attributes:
        channels: C, or 0 for all.
    """

    channels: int = 0

    def open(self, prediction: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        return prediction[:, : self.channels] if self.channels else prediction

    def close(self, result: torch.Tensor, prediction: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        if result.shape[1] == prediction.shape[1]:
            return result
        return torch.cat([result, prediction[:, result.shape[1] :]], 1)


@dataclass(frozen=True)
class Videos:
    """[B, C, frames, H, W]."""

    def open(self, prediction: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        return prediction.transpose(1, 2).flatten(0, 1)

    def close(self, result: torch.Tensor, prediction: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        return result.unflatten(0, (-1, geometry.frames)).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """[B, frames * h * w, C p p]: patches of p x p latent pixels in rows, the channels of a pixel apart by p p.

    Attributes:
        patch: p.
    """

    patch: int

    def open(self, prediction: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        height, width = geometry.height // self.patch, geometry.width // self.patch
        rows = prediction[:, : geometry.frames * height * width]  # what follows are reference images
        patches = rows.unflatten(1, (geometry.frames, height, width)).flatten(0, 1).movedim(3, 1)
        return F.pixel_shuffle(patches, self.patch)

    def close(self, result: torch.Tensor, prediction: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        patches = F.pixel_unshuffle(result, self.patch).movedim(1, 3)
        rows = patches.unflatten(0, (-1, geometry.frames)).flatten(1, 3)
        if rows.shape[1] == prediction.shape[1]:
            return rows
        return torch.cat([rows, prediction[:, rows.shape[1] :]], 1)


@dataclass(frozen=True)
class Lists:
    """A list of [C, 1, H, W], one per sample, the conditional ones first."""

    def open(self, prediction: list[torch.Tensor], geometry: Geometry) -> torch.Tensor:
        return swapped_halves(torch.stack(prediction).squeeze(2))

    def close(self, result: torch.Tensor, prediction: list[torch.Tensor], geometry: Geometry) -> list[torch.Tensor]:
        return list(swapped_halves(result).unsqueeze(2).unbind())


def swapped_halves(batch: torch.Tensor) -> torch.Tensor:
    """The halves of a batch exchanged."""
    first, second = batch.chunk(2)
    return torch.cat([second, first])
