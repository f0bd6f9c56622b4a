"""What the bundled model can draw, and every word that it knows.

The 40 nouns are drawn with Microsoft's Fluent Emoji (3-D style, MIT licence).
"""

from __future__ import annotations

from dataclasses import dataclass

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

PLAIN_BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (200, 60, 60),
    "orange": (235, 150, 70),
    "yellow": (240, 215, 100),
    "green": (110, 180, 100),
    "blue": (90, 150, 225),
    "purple": (150, 110, 200),
    "pink": (240, 170, 195),
    "white": (244, 244, 244),
    "black": (28, 28, 32),
    "gray": (140, 140, 145),
    "brown": (140, 100, 70),
}
"""Colour word -> mean sRGB value of a plain background."""

CHECKERED_COLORS: tuple[str, ...] = ("red", "blue", "green", "pink", "yellow", "gray")

BACKGROUNDS: tuple[str, ...] = (
    *PLAIN_BACKGROUNDS,
    "meadow",
    "beach",
    *(f"checkered {color}" for color in CHECKERED_COLORS),
)
"""Background names, in the order that class indices use."""

FILLERS: tuple[str, ...] = ("photo", "picture", "drawing", "nice", "cute", "beautiful", "shiny", "toy", "very", "with")
"""Words that mean nothing to the scene; a few captions carry one so that they stay harmless at inference."""

_GRAMMAR = (
    "a an on in the to of and at left right above below top bottom small big background meadow beach checkered".split()
)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted; each is one token of the bundled tokenizer."""
    return sorted({*OBJECTS, *COLORS, *PLAIN_BACKGROUNDS, *FILLERS, *_GRAMMAR})
