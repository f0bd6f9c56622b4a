import numpy as np
import pytest

from scfg_fast.models.vocabulary import vocabulary
from training import scenes
from training.sprites import MissingSpritesError, load_sprites, recolor

SEEDS = range(60)


def _centre(mask):
    rows, columns = np.nonzero(mask)
    return columns.mean(), rows.mean()


@pytest.mark.parametrize("layout, side", [("full", 256), ("close", 128)])
def test_a_seed_decides_the_whole_scene(renderer, layout, side):
    first, again, other = renderer.render(5, layout), renderer.render(5, layout), renderer.render(6, layout)
    assert first.image.shape == (side, side, 3) and first.image.dtype == np.uint8
    assert np.array_equal(first.image, again.image) and np.array_equal(first.masks, again.masks)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("layout", scenes.LAYOUTS)
def test_masks_lie_where_the_caption_says(renderer, layout):
    relations = set()
    for seed in SEEDS:
        scene = renderer.render(seed, layout)
        assert not (scene.masks.sum(0) > 1).any()
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            left, top, right, bottom = item.box
            inside = np.zeros_like(mask)
            inside[top:bottom, left:right] = True
            assert mask.any() and not (mask & ~inside).any()
            assert item.name in scene.caption and (item.word is None or f"{item.word} {item.name}" in scene.caption)
        if scene.relation is None:
            assert len(scene.objects) == 1
            continue
        (x0, y0), (x1, y1) = map(_centre, scene.masks)
        assert {"left": x0 < x1, "right": x0 > x1, "above": y0 < y1, "below": y0 > y1}[scene.relation]
        first, second = (scene.caption.index(item.name) for item in scene.objects)
        assert first < second
        relations.add(scene.relation)
    assert relations == set(scenes.RELATIONS)


def test_object_pixels_carry_the_paint(renderer, sprites):
    for seed in SEEDS:
        scene = renderer.render(seed)
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            sprite = np.asarray(sprites[item.name, item.paint])
            color = sprite[sprite.shape[0] // 2, sprite.shape[1] // 2, :3].astype(float)
            assert np.abs(np.median(scene.image[mask], axis=0) - color).max() < 2


def test_no_object_is_painted_like_its_plain_background(renderer):
    assert all(item.paint != s.background for s in map(renderer.render, SEEDS) for item in s.objects)


def test_caption_words_are_in_the_vocabulary(renderer):
    words = set(vocabulary())
    for seed in SEEDS:
        scene = renderer.render(seed)
        if scene.plain_caption:
            assert set(scene.caption.replace(",", "").split()) <= words


def test_articles():
    assert scenes.background_phrase("orange") == "on an orange background"
    assert scenes.background_phrase("checkered red") == "on a checkered red background"
    assert scenes.background_phrase("meadow") == "in a meadow"


def test_recolor_turns_the_dominant_hue_and_keeps_alpha(sprites):
    red = sprites["apple", None]
    blue = np.asarray(recolor(red, "blue")).astype(int)
    assert np.array_equal(blue[..., 3], np.asarray(red)[..., 3])
    assert blue[35, 45, 2] > blue[35, 45, 0] + 80


def test_errors_name_the_cause(renderer, sprites, tmp_path):
    with pytest.raises(ValueError, match="unknown layout"):
        renderer.render(0, "wide")
    with pytest.raises(ValueError, match="at least two"):
        scenes.SceneRenderer({("apple", None): sprites["apple", None]})
    with pytest.raises(ValueError, match="unknown colour"):
        recolor(sprites["apple", None], "mauve")
    with pytest.raises(MissingSpritesError, match="npm pack"):
        load_sprites(tmp_path)
