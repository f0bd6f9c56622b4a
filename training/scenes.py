"""Captioned scenes made from sprites: one or two objects on a simple background, with exact masks.

A scene is a pure function of (sprites, seed, layout). Two layouts share one pixel scale, so that a network trained on
the cheap one can go on with the other:

* ``"full"``: 256 x 256 pixels. One object (72 to 208 px) or two (92 to 122 px).
* ``"close"``: 128 x 128 pixels. One object (76 to 118 px, nearly filling the canvas) or two small ones (48 to 60 px).

Every caption of two objects states how they lie. "A and B" always means A left of B, as one reads.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageFilter

from lab.scenes import RELATIONS, Scene, SceneObject, with_article
from scfg_fast.models.vocabulary import (
    CHECKERED_COLORS,
    COLORS,
    FILLERS,
    OBJECTS,
    PLAIN_BACKGROUNDS,
)
from training.sprites import Sprites

LAYOUTS: dict[str, int] = {"full": 256, "close": 128}
"""Layout name -> side of the canvas in pixels."""

CHECKER_PIXELS = 32

AUTOENCODER_SEED, JUDGE_SEED, HELD_OUT_SEED = 10_000_000, 20_000_000, 50_000_000
"""First scene seed of the autoencoder's data, the judge's data and the held-out scenes. Diffusion data starts at 0, so
the four never meet."""


def background_phrase(background: str) -> str:
    """The words that place a scene on a background, e.g. "on an orange background" or "in a meadow"."""
    if background == "meadow":
        return "in a meadow"
    if background == "beach":
        return "on a beach"
    return f"on {with_article(background)} background"


def relation_phrase(first: str, second: str, relation: str, rng: random.Random) -> str:
    """One of the wordings for "first lies <relation> of second"; both arguments come with their article."""
    if relation in ("left", "right"):
        other = "right" if relation == "left" else "left"
        wordings = [
            f"{first} {relation} of {second}",
            f"{first} to the {relation} of {second}",
            f"on the {relation} {first}, on the {other} {second}",
            f"{first} on the {relation} and {second} on the {other}",
        ]
        weights = [40, 20, 25, 15]
        if relation == "left":
            wordings.append(f"{first} and {second}")
            weights.append(40)
    else:
        ends = ("top", "bottom") if relation == "above" else ("bottom", "top")
        wordings = [f"{first} {relation} {second}", f"at the {ends[0]} {first}, at the {ends[1]} {second}"]
        weights = [70, 30]
    return rng.choices(wordings, weights)[0]


class SceneRenderer:
    """Draws scenes from a set of sprites.

    Args:
        sprites: as :func:`training.sprites.load_sprites` returns them. Nouns and paints are drawn from
            its keys only, so a test can pass a handful of synthetic pictures.
    """

    def __init__(self, sprites: Sprites) -> None:
        self._sprites = sprites
        self._names = sorted({name for name, _ in sprites}, key=list(OBJECTS).index)
        self._paints = {name: [color for color in COLORS if (name, color) in sprites] for name in self._names}
        if len(self._names) < 2:
            raise ValueError("a scene needs sprites of at least two different nouns")

    def render(self, seed: int, layout: str = "full") -> Scene:
        """Draw scene number ``seed``.

        Args:
            seed: any integer; equal seeds give equal scenes.
            layout: a key of :data:`LAYOUTS`.

        Raises:
            ValueError: for an unknown layout.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
        side = LAYOUTS[layout]
        rng = random.Random(f"{layout}:{seed}")
        background = _choose_background(rng)
        canvas, horizon = _draw_background(background, side, rng)

        count = 1 if rng.random() < (0.72 if layout == "close" else 0.35) else 2
        looks = self._choose_looks(count, background, rng)
        relation = rng.choice(RELATIONS) if count == 2 else None
        size_word, lengths = _choose_lengths(count, layout, rng)
        drawings = [
            _fit(self._sprites[name, paint], length) for (name, _, paint), length in zip(looks, lengths, strict=True)
        ]
        corners = _place(drawings, relation, side, horizon, rng)
        image, masks = _paste(canvas, drawings, corners)

        objects = tuple(
            SceneObject(name, word, paint, (x, y, x + drawing.width, y + drawing.height))
            for (name, word, paint), drawing, (x, y) in zip(looks, drawings, corners, strict=True)
        )
        caption, plain = _caption(objects, size_word, relation, background, rng)
        return Scene(image, caption, masks, objects, relation, background, plain)

    def _choose_looks(
        self, count: int, background: str, rng: random.Random
    ) -> list[tuple[str, str | None, str | None]]:
        """(noun, colour word, paint) of different nouns, none painted like the background, which would hide it."""
        looks: list[tuple[str, str | None, str | None]] = []
        for name in rng.sample(self._names, count):
            paints = [color for color in self._paints[name] if color != background]
            if paints and rng.random() < 0.88:
                paint = rng.choice(paints)
                looks.append((name, paint, paint))
            elif not self._paints[name] and OBJECTS[name].natural is not None and rng.random() < 0.3:
                looks.append((name, OBJECTS[name].natural, None))
            else:
                looks.append((name, None, None))
        return looks


def _choose_background(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.62:
        return rng.choice(list(PLAIN_BACKGROUNDS))
    if kind < 0.78:
        return "meadow"
    if kind < 0.92:
        return "beach"
    return f"checkered {rng.choice(CHECKERED_COLORS)}"


def _draw_background(background: str, side: int, rng: random.Random) -> tuple[np.ndarray, float | None]:
    """-> float32 [S, S, 3] in 0..255, and the height of the horizon in pixels where there is one."""
    y = np.arange(side, dtype=np.float32)[:, None]
    x = np.arange(side, dtype=np.float32)[None]
    if background in PLAIN_BACKGROUNDS:
        color = np.array(PLAIN_BACKGROUNDS[background], np.float32)
        color = color + np.array([rng.uniform(-6, 6) for _ in range(3)], np.float32)
        slope = rng.uniform(0, 18) * (2.0 * y / (side - 1) - 1.0)
        return np.broadcast_to(color, (side, side, 3)) - slope[..., None], None
    if background.startswith("checkered "):
        color = np.array(PLAIN_BACKGROUNDS[background.removeprefix("checkered ")], np.float32)
        odd = ((x // CHECKER_PIXELS + y // CHECKER_PIXELS) % 2)[..., None]
        return color * odd + 244.0 * (1.0 - odd), None
    if background == "meadow":
        horizon = rng.uniform(0.42, 0.62) * side
        far, near = ((120, 180, 240), (205, 228, 250)), ((120, 190, 90), (60, 130, 50))
    else:
        horizon = rng.uniform(0.38, 0.58) * side
        far, near = ((80, 170, 215), (40, 120, 190)), ((240, 215, 160), (215, 180, 120))
    wave = 4.0 * np.sin(x / rng.uniform(20, 42) + rng.uniform(0, 6))
    below = (0.5 + 0.5 * np.tanh((y - horizon + wave) / 2.4))[..., None]
    upper = _vertical_gradient(*far, y / horizon)
    lower = _vertical_gradient(*near, (y - horizon) / (side - horizon))
    return upper * (1.0 - below) + lower * below, horizon


def _vertical_gradient(top: tuple[int, ...], bottom: tuple[int, ...], fraction: np.ndarray) -> np.ndarray:
    start, end = np.array(top, np.float32), np.array(bottom, np.float32)
    return start + (end - start) * fraction.clip(0.0, 1.0)[..., None]


def _choose_lengths(count: int, layout: str, rng: random.Random) -> tuple[str | None, list[float]]:
    """-> the size word of the caption, and the longer side of every object in pixels."""
    if layout == "close":
        low, high = (76, 118) if count == 1 else (48, 60)
        return None, [rng.uniform(low, high) for _ in range(count)]
    if count == 2:
        return None, [rng.uniform(92, 122) for _ in range(2)]
    size = rng.choices(["small", "big", None], [15, 25, 60])[0]
    low, high = {"small": (72, 90), "big": (172, 208), None: (108, 156)}[size]
    return size, [rng.uniform(low, high)]


def _fit(sprite: Image.Image, length: float) -> Image.Image:
    scale = length / max(sprite.size)
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    return sprite.resize(size, Image.Resampling.LANCZOS)


def _place(
    drawings: list[Image.Image], relation: str | None, side: int, horizon: float | None, rng: random.Random
) -> list[tuple[int, int]]:
    """Top-left corner of every drawing. Two objects keep to their halves; on a landscape they stand on the ground."""
    margin = side // 64
    corners = []
    for index, drawing in enumerate(drawings):
        free_x, free_y = side - drawing.width, side - drawing.height
        x = free_x * rng.uniform(0.15, 0.85)
        y = free_y * rng.uniform(0.2, 0.8)
        if horizon is not None and relation not in ("above", "below"):
            lowest = side - margin - drawing.height
            y = rng.uniform(min(horizon + 0.12 * side - drawing.height, lowest), lowest)
        if relation is not None:
            leading = (relation in ("left", "above")) == (index == 0)
            extent = drawing.width if relation in ("left", "right") else drawing.height
            slack = max(side / 2 - extent - margin, 0.0)
            along = margin + rng.random() * slack if leading else side / 2 + rng.random() * slack
            if relation in ("left", "right"):
                x = along
            else:
                y = along
        corners.append((int(np.clip(x, 0, free_x)), int(np.clip(y, 0, free_y))))
    return corners


def _paste(
    canvas: np.ndarray, drawings: list[Image.Image], corners: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw soft shadows, then the objects. -> uint8 [S, S, 3] and bool masks [K, S, S]."""
    side = canvas.shape[0]
    masks = np.zeros((len(drawings), side, side), bool)
    shadow = np.zeros((side, side), np.uint8)
    for drawing, (x, y) in zip(drawings, corners, strict=True):
        alpha = np.asarray(drawing)[..., 3]
        below = shadow[y + 7 : y + 7 + alpha.shape[0], x + 3 : x + 3 + alpha.shape[1]]
        np.maximum(below, alpha[: below.shape[0], : below.shape[1]], out=below)
    blurred = np.asarray(Image.fromarray(shadow).filter(ImageFilter.GaussianBlur(5)), np.float32)
    canvas = canvas * (1.0 - blurred[..., None] * (0.3 / 255.0))

    for index, (drawing, (x, y)) in enumerate(zip(drawings, corners, strict=True)):
        box = (slice(y, y + drawing.height), slice(x, x + drawing.width))
        rgba = np.asarray(drawing, np.float32)
        alpha = rgba[..., 3:] / 255.0
        canvas[box] = canvas[box] * (1.0 - alpha) + rgba[..., :3] * alpha
        opaque = alpha[..., 0] > 0.5
        masks[(slice(index), *box)] &= ~opaque
        masks[(index, *box)] = opaque
    return canvas.clip(0, 255).astype(np.uint8), masks


def _caption(
    objects: tuple[SceneObject, ...],
    size_word: str | None,
    relation: str | None,
    background: str,
    rng: random.Random,
) -> tuple[str, bool]:
    """-> the caption, and whether it names the background and has no filler."""
    phrases = [" ".join(filter(None, (size_word, item.word, item.name))) for item in objects]
    named = rng.random() < 0.88
    filler = rng.random() < 0.05
    if filler:
        word = rng.choice(FILLERS) if rng.random() < 0.7 else "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3))
        phrases[0] = f"{word} {phrases[0]}"
    phrases = [with_article(phrase) for phrase in phrases]
    text = phrases[0] if relation is None else relation_phrase(phrases[0], phrases[1], relation, rng)
    if named:
        text = f"{text} {background_phrase(background)}"
    if relation is None and rng.random() < 0.03:
        text = f"{rng.choice(('a photo of', 'a picture of', 'a drawing of'))} {text}"
        filler = True
    return text, named and not filler
