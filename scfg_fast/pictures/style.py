"""Colours and text of all pictures."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import ImageFont

from ..regions import Regions, sample_arrays

INK, MUTED, RULE, PAPER = (27, 31, 36), (106, 115, 125), (216, 222, 228), (255, 255, 255)

_PALETTE = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (23, 190, 207),
    (227, 119, 194), (188, 189, 34), (140, 86, 75), (0, 114, 178), (230, 171, 2), (102, 166, 30),
)  # fmt: skip

_SPECIAL = {"<start>": (70, 78, 88), "<end>": (120, 128, 138), "<pad>": (168, 175, 183)}

_COLD_TO_WARM = np.array(
    [(33, 102, 172), (103, 169, 207), (209, 229, 240), (247, 247, 247), (253, 219, 199), (239, 138, 98), (178, 24, 43)],
    dtype=np.float64,
)

_WIDEST_RATE = 4.0

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def token_color(token: int, label: str) -> tuple[int, int, int]:
    """The colour of a token in every picture: greys for start, end and padding, a colour of its own for a word."""
    if label in _SPECIAL:
        return _SPECIAL[label]
    return _PALETTE[(token - 1) % len(_PALETTE)]


def rate_range(steps: Sequence[Regions], sample: int = 0) -> float:
    """The m whose [1/m, m] holds the rates of all steps, at least 1.25 and at most 4: the ends of the colour bar."""
    rates = np.concatenate([sample_arrays(regions, sample)[2].ravel() for regions in steps])
    return float(np.exp(np.abs(np.log(np.clip(rates, 1 / _WIDEST_RATE, _WIDEST_RATE))).max()).clip(1.25))


def rate_colors(rate: np.ndarray, limit: float) -> np.ndarray:
    """Rates [...] -> colours [..., 3] uint8: blue below 1, white at 1, red above; equal factors are equally strong.

    Args:
        rate: any shape, not negative.
        limit: m > 1; rates outside [1/m, m] take the colour of the end.
    """
    place = np.log(np.clip(rate, 1 / limit, limit)) / np.log(limit)  # [-1, 1]
    stops = np.linspace(-1.0, 1.0, len(_COLD_TO_WARM))
    channels = [np.interp(place, stops, _COLD_TO_WARM[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def default_font(size: float) -> Font:
    return ImageFont.load_default(size)


@functools.cache
def _has_glyph(character: str) -> bool:
    """Whether the built-in font can draw the character; U+FFFF is one that no font has."""
    font = default_font(16)
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def drawable(text: str) -> str:
    """The text in characters that the built-in font has: accents are dropped where it must be, the rest becomes `?`."""
    characters = []
    for character in text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"):
        base = character if _has_glyph(character) else unicodedata.normalize("NFKD", character)[0]
        characters.append(base if _has_glyph(base) else "?")
    return "".join(characters)


def printable(label: str, token: int) -> str:
    """A label for a picture; one in another script shows as the token's number."""
    text = drawable(label)
    return text if text.count("?") == label.count("?") else f"token {token}"


def percent(share: float) -> str:
    """A share of at least 0 as text, the smallest ones as `<1 %`."""
    return f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"


def fit_text(text: str, font: Font, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def wrap_text(text: str, font: Font, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces."""
    lines: list[str] = []
    for word in drawable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fit_text(word, font, width))
    return lines
