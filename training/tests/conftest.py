"""Synthetic sprites: the sprite package is not needed to test the renderer."""

import pytest
from PIL import Image, ImageDraw

from training.scenes import SceneRenderer

_PAINT = {"red": (220, 40, 40), "blue": (40, 80, 220)}


def _disc(color):
    image = Image.new("RGBA", (90, 70), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((0, 0, 89, 69), fill=(*color, 255))
    return image


@pytest.fixture(scope="session")
def sprites():
    pictures = {("apple", None): _disc((200, 30, 60)), ("cat", None): _disc((240, 160, 90))}
    pictures[("pizza", None)] = _disc((250, 210, 60))
    for name in ("apple", "car"):
        for color, value in _PAINT.items():
            pictures[(name, color)] = _disc(value)
    pictures[("car", None)] = _disc((120, 120, 120))
    return pictures


@pytest.fixture(scope="session")
def renderer(sprites):
    return SceneRenderer(sprites)
