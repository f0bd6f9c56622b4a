"""Scenes that the bundled model's pictures are measured against: objects, their relation, a background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

RELATIONS: tuple[str, ...] = ("left", "right", "above", "below")
"""Where the first object of a caption lies, seen from the second."""


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: its noun, the colour word of the caption (or None), the repaint colour (or None for the
    sprite's own look), and its box (left, top, right, bottom) in pixels, right and bottom exclusive."""

    name: str
    word: str | None
    paint: str | None
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        image: uint8 [S, S, 3], sRGB.
        caption: the prompt that describes it.
        masks: bool [K, S, S], the visible pixels (alpha above one half) of each object; disjoint.
        objects: K records, in the order in which the caption names them.
        relation: one of :data:`RELATIONS` for two objects, None for one.
        background: one of :data:`BACKGROUNDS`.
        plain_caption: True if the caption names the background and carries no filler, as evaluation prompts do.
    """

    image: np.ndarray
    caption: str
    masks: np.ndarray
    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str
    plain_caption: bool


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def to_model_range(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).movedim(-1, -3).float() / 127.5 - 1.0
