"""The sprites behind the nouns of the bundled model.

The 40 nouns are drawn with Microsoft's Fluent Emoji (3-D style, MIT licence) as packaged on npm. The pictures are
needed for training only and are not part of this repository::

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz        # gives package/assets/*.webp

Pass the folder that holds the ``.webp`` files (or the ``package`` folder above it) as ``--sprites``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from scfg_fast.models.vocabulary import COLORS, HUES, OBJECTS

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
