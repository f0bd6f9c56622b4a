"""Vocabulary of the bundled model and the sprites behind it.

The 40 nouns are drawn with Microsoft's Fluent Emoji (3-D style, MIT licence) as packaged on npm. The pictures are
needed for training only and are not part of this repository::

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz        # gives package/assets/*.webp

Pass the folder that holds the ``.webp`` files (or the ``package`` folder above it) as ``--sprites``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HUES: dict[str, float] = {
    "red": 0.0,
    "orange": 26.0,
    "yellow": 50.0,
    "green": 125.0,
    "blue": 218.0,
    "purple": 272.0,
    "pink": 328.0,
}
"""Hue in degrees of every chromatic colour word."""

COLORS: tuple[str, ...] = (*HUES, "white", "black")
"""Colour words that an object can carry."""

_NO_BLACK = tuple(c for c in COLORS if c != "black")
_CHROMATIC = tuple(HUES)


@dataclass(frozen=True)
class ObjectSpec:
    """One noun of the vocabulary.

    Attributes:
        codepoint: Unicode code point of the emoji in lower-case hex, which is the sprite's file name.
        natural: colour word that describes a sprite that is never repainted, or None where no single word does.
        recolors: colour words the sprite is repainted in; empty where repainting looks wrong.
    """

    codepoint: str
    natural: str | None = None
    recolors: tuple[str, ...] = ()


OBJECTS: dict[str, ObjectSpec] = {
    "apple": ObjectSpec("1f34e", recolors=_CHROMATIC),
    "pear": ObjectSpec("1f350", "green"),
    "lemon": ObjectSpec("1f34b", "yellow"),
    "watermelon": ObjectSpec("1f349"),
    "strawberry": ObjectSpec("1f353", "red"),
    "carrot": ObjectSpec("1f955", "orange"),
    "mushroom": ObjectSpec("1f344", recolors=_CHROMATIC),
    "burger": ObjectSpec("1f354"),
    "pizza": ObjectSpec("1f355"),
    "donut": ObjectSpec("1f369"),
    "cat": ObjectSpec("1f408", "orange"),
    "pig": ObjectSpec("1f416", "pink"),
    "panda": ObjectSpec("1f43c"),
    "fox": ObjectSpec("1f98a", "orange"),
    "frog": ObjectSpec("1f438", "green"),
    "penguin": ObjectSpec("1f427"),
    "owl": ObjectSpec("1f989"),
    "duck": ObjectSpec("1f986"),
    "fish": ObjectSpec("1f41f", recolors=_CHROMATIC),
    "whale": ObjectSpec("1f433", "blue"),
    "butterfly": ObjectSpec("1f98b", recolors=_CHROMATIC),
    "car": ObjectSpec("1f697", recolors=COLORS),
    "bus": ObjectSpec("1f68c"),
    "rocket": ObjectSpec("1f680"),
    "house": ObjectSpec("1f3e0"),
    "tree": ObjectSpec("1f333", "green"),
    "sunflower": ObjectSpec("1f33b", "yellow"),
    "tulip": ObjectSpec("1f337", recolors=_NO_BLACK),
    "cactus": ObjectSpec("1f335", "green"),
    "basketball": ObjectSpec("1f3c0", "orange"),
    "balloon": ObjectSpec("1f388", recolors=COLORS),
    "gift": ObjectSpec("1f381", recolors=_CHROMATIC),
    "umbrella": ObjectSpec("2602", recolors=COLORS),
    "book": ObjectSpec("1f4d5", recolors=COLORS),
    "star": ObjectSpec("2b50", recolors=COLORS),
    "heart": ObjectSpec("2764", recolors=COLORS),
    "teapot": ObjectSpec("1fad6", recolors=COLORS),
    "bell": ObjectSpec("1f514", recolors=COLORS),
    "robot": ObjectSpec("1f916"),
    "snowman": ObjectSpec("26c4"),
}
"""The nouns, in the order that class indices use."""

Sprites = Mapping[tuple[str, str | None], Image.Image]
"""(noun, colour word or None for the natural look) -> tightly cropped RGBA picture."""


class MissingSpritesError(FileNotFoundError):
    """The sprite folder does not hold the pictures that training needs."""


def load_sprites(folder: str | Path) -> dict[tuple[str, str | None], Image.Image]:
    """Read every sprite of the vocabulary and repaint the recolourable ones.

    Args:
        folder: folder with ``<codepoint>.webp`` files, or a folder that has them in ``assets`` or ``package/assets``.

    Returns:
        (noun, None) and (noun, colour) for every colour in the noun's ``recolors``; RGBA, cropped to the visible part.

    Raises:
        MissingSpritesError: naming every missing sprite and how to get the package.
    """
    root = Path(folder)
    candidates = [root, root / "assets", root / "package" / "assets"]
    assets = next((c for c in candidates if (c / f"{OBJECTS['apple'].codepoint}.webp").is_file()), root)
    paths = {name: _sprite_path(assets, spec.codepoint) for name, spec in OBJECTS.items()}
    missing = [f"{name} ({OBJECTS[name].codepoint}.webp)" for name, path in paths.items() if path is None]
    if missing:
        raise MissingSpritesError(
            f"{len(missing)} of {len(OBJECTS)} sprites are not in {root}: {', '.join(missing)}. Get them with "
            "`npm pack @lobehub/fluent-emoji-3d@1.1.0`, unpack the archive, and pass its package/assets folder."
        )
    sprites: dict[tuple[str, str | None], Image.Image] = {}
    for name, path in paths.items():
        assert path is not None  # else it was missing
        with Image.open(path) as file:
            image = file.convert("RGBA")
        image = image.crop(image.getbbox())
        sprites[name, None] = image
        for color in OBJECTS[name].recolors:
            sprites[name, color] = recolor(image, color)
    return sprites


def _sprite_path(assets: Path, codepoint: str) -> Path | None:
    for stem in (codepoint, f"{codepoint}-fe0f"):
        path = assets / f"{stem}.webp"
        if path.is_file():
            return path
    return None


def recolor(image: Image.Image, color: str) -> Image.Image:
    """Repaint the dominant hue of a sprite and leave all other hues alone.

    A pixel takes part by how near its hue is to the dominant one (full within 40 degrees, none beyond 60) and by how
    saturated it is, so outlines, wheels, leaves and highlights stay as they are.

    Args:
        image: RGBA picture.
        color: one of :data:`COLORS`.

    Returns:
        RGBA picture of the same size and alpha.

    Raises:
        ValueError: for a colour word outside :data:`COLORS`.
    """
    if color not in COLORS:
        raise ValueError(f"unknown colour {color!r}; known are {', '.join(COLORS)}")
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
    rgb, alpha = rgba[..., :3] / 255.0, rgba[..., 3:]
    hue, saturation, value = _rgb_to_hsv(rgb)

    weight = (alpha[..., 0] > 128) * saturation * (value > 0.15)
    histogram, _ = np.histogram(hue, bins=36, range=(0.0, 360.0), weights=weight)
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    dominant = (float(smooth.argmax()) + 0.5) * 10.0

    offset = (hue - dominant + 180.0) % 360.0 - 180.0
    strength = np.clip((60.0 - np.abs(offset)) / 20.0, 0.0, 1.0) * np.clip((saturation - 0.12) / 0.15, 0.0, 1.0)
    if color in HUES:
        new_hue = (HUES[color] + np.clip(offset, -25.0, 25.0) * 0.5) % 360.0
        new_saturation = saturation * (0.6 if color == "pink" else 1.0)
        gain = {"pink": 1.25, "yellow": 1.3, "orange": 1.3}.get(color, 1.0)
        new_value = np.clip(value * gain, 0.0, 1.0)
    elif color == "white":
        new_hue, new_saturation, new_value = hue, saturation * 0.06, np.clip(value * 0.35 + 0.65, 0.0, 1.0)
    else:
        new_hue, new_saturation, new_value = hue, saturation * 0.15, value * 0.28
    painted = _hsv_to_rgb(new_hue, new_saturation, new_value)
    mixed = rgb * (1.0 - strength[..., None]) + painted * strength[..., None]
    out = np.concatenate([mixed * 255.0, alpha], axis=-1)
    return Image.fromarray(out.clip(0, 255).astype(np.uint8), "RGBA")


def _rgb_to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[..., 3] in [0, 1] -> hue in degrees, saturation and value in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    safe = np.maximum(spread, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        high == red,
        ((green - blue) / safe) % 6.0,
        np.where(high == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    return sector * 60.0, spread / np.maximum(high, 1e-6), high


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Inverse of :func:`_rgb_to_hsv`: channel n is v - v*s*max(0, min(k, 4-k, 1)) with k = (n + hue/60) mod 6."""
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = (n + hue / 60.0) % 6.0
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))
    return np.stack(channels, axis=-1)
