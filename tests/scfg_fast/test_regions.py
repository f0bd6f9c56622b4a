"""Regions as data, as a table, as pictures and as a file: real tensors, real pictures, real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab.tiny.unets import tiny_tokenizer
from scfg_fast.files import replacing
from scfg_fast.pictures.overlay import _place_labels, scaled
from scfg_fast.pictures.style import drawable, printable
from scfg_fast.regions import (
    RegionRow,
    Regions,
    contact_sheet,
    image_grid,
    overlay,
    rate_colors,
    rate_range,
    region_table,
    row_name,
    save_regions_npz,
    token_color,
    token_labels,
)

LABELS = ["<start>", "a", "red", "cat", "on", "a", "sea", "<end>", "<pad>", "<pad>"]


def quadrants(step: int = 0, size: tuple[int, int] = (16, 16), cell: int = 4, batch: int = 1) -> Regions:
    """Four regions, cat, sea, red and padding 9 clockwise from the left top, with the rates 2, 1, 0.8 and 1.25."""
    height, width = size
    h, w = -(-height // cell), -(-width // cell)
    ids = torch.empty(h, w, dtype=torch.int64)
    for (rows, columns), token in zip(
        [(slice(0, h // 2), slice(0, w // 2)), (slice(0, h // 2), slice(w // 2, w)),
         (slice(h // 2, h), slice(w // 2, w)), (slice(h // 2, h), slice(0, w // 2))],
        (3, 6, 2, 9), strict=True,
    ):  # fmt: skip
        ids[rows, columns] = token
    pixels = ids.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:height, :width]
    rate = torch.tensor([1.0, 1.0, 0.8, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.25])[pixels]
    return Regions(
        step,
        ids.expand(batch, h, w).clone(),
        (ids == 3).expand(batch, h, w).clone(),
        rate.expand(batch, 1, height, width).clone(),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), max_tokens=12)


@pytest.fixture
def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (64, 1))] * 3, -1))


def test_clone_is_independent_and_to_keeps_the_values() -> None:
    regions = quadrants(step=7)
    copy = regions.clone()
    regions.rate.fill_(9.0)
    regions.token_index.zero_()
    assert copy.step == 7 and copy.rate.max() == 2.0 and copy.token_index[0, 0, 0] == 3
    moved = copy.to("meta")
    assert {t.device.type for t in (moved.token_index, moved.foreground, moved.rate)} == {"meta"}
    assert copy.cpu().rate is copy.rate
    with pytest.raises(AttributeError):
        copy.step = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("latent", "cells", "cell"),
    [((64, 64), (16, 16), 4), ((65, 97), (17, 25), 4), ((9, 9), (3, 3), 4), ((16, 24), (2, 3), 8), ((5, 7), (5, 7), 1)],
)
def test_cell_is_the_power_of_two_between_the_two_grids(latent, cells, cell) -> None:
    regions = Regions(
        0, torch.zeros(1, *cells, dtype=torch.int64), torch.zeros(1, *cells).bool(), torch.ones(1, 1, *latent)
    )
    assert regions.cell == cell


def test_cell_refuses_grids_that_do_not_fit() -> None:
    regions = Regions(0, torch.zeros(1, 5, 5, dtype=torch.int64), torch.zeros(1, 5, 5).bool(), torch.ones(1, 1, 16, 16))
    with pytest.raises(ValueError, match="16x16 into 5x5"):
        _ = regions.cell


def test_labels_name_every_token(tokenizer) -> None:
    assert token_labels(tokenizer, "a red CAT on the sea", 10) == [
        "<start>", "a", "red", "cat", "on", "the", "sea", "<end>", "<pad>", "<pad>",
    ]  # fmt: skip
    assert token_labels(tokenizer, "", 4) == ["<start>", "<end>", "<pad>", "<pad>"]


def test_labels_of_pieces_of_a_cut_prompt_and_of_other_scripts(tokenizer) -> None:
    assert token_labels(tokenizer, "a zoo", 6) == ["<start>", "a", "z", "o", "o", "<end>"]
    assert token_labels(tokenizer, "red red red red red", 4) == ["<start>", "red", "red", "<end>"]
    assert token_labels(tokenizer, "é", 5) == ["<start>", "Ã", "©", "<end>", "<pad>"], (
        "half characters keep their spelling"
    )


def test_labels_need_a_length(tokenizer) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        token_labels(tokenizer, "a", 0)


def test_table_has_shares_mean_rates_and_foreground() -> None:
    rows = region_table(quadrants(), LABELS)
    assert [row.label for row in rows] == ["red", "cat", "sea", "<pad>"], "equal shares are in token order"
    assert rows[1] == RegionRow(3, "cat", 0.25, 2.0, 1.0)
    assert [round(row.rate, 4) for row in rows] == [0.8, 2.0, 1.0, 1.25]
    assert sum(row.share for row in rows) == 1.0
    assert [row.foreground for row in rows] == [0.0, 1.0, 0.0, 0.0]


def test_table_weighs_ragged_cells_by_their_pixels_and_reads_its_own_sample() -> None:
    regions = quadrants(size=(10, 10), batch=2)  # cells of 4, 4 and 2 pixels
    regions.token_index[1] = 3
    regions.rate[1] = 1.0
    regions.rate[1, 0, 8:, :] = 2.0
    (row,) = region_table(regions, LABELS, 1)
    assert (row.token, row.share) == (3, 1.0)
    assert row.rate == pytest.approx(1.2), "2 of 10 rows of pixels, though 1 of 3 rows of cells"
    assert len(region_table(regions, LABELS, 0)) == 4


@pytest.mark.parametrize(("sample", "labels", "match"), [(1, LABELS, "sample 1"), (0, LABELS[:5], "token 9")])
def test_table_refuses_what_does_not_fit(sample, labels, match) -> None:
    with pytest.raises(ValueError, match=match):
        region_table(quadrants(), labels, sample)


def test_row_names_number_the_labels_that_occur_twice() -> None:
    names = [row_name(row, LABELS) for row in region_table(quadrants(), LABELS)]
    assert names == ["red", "cat", "sea", "<pad> (9)"]


def test_words_have_colours_and_special_tokens_greys() -> None:
    colors = [token_color(index, "word") for index in range(1, 13)]
    assert len(set(colors)) == 12
    for label in ("<start>", "<end>", "<pad>"):
        assert max(token_color(5, label)) - min(token_color(5, label)) < 20


def test_rate_colours_are_white_at_one_and_symmetric_in_factors() -> None:
    below, one, above = rate_colors(np.array([0.5, 1.0, 2.0]), 2.0).astype(int)
    assert tuple(one) == (247, 247, 247)
    assert below[2] > below[0] + 100 and above[0] > above[2] + 100, "blue below, red above"
    assert (rate_colors(np.array([0.01, 9.0]), 2.0) == [below, above]).all(), "rates outside take the end's colour"


def test_rate_range_holds_all_steps_within_its_bounds() -> None:
    assert rate_range([quadrants(), quadrants()]) == pytest.approx(2.0)
    flat = quadrants()
    flat.rate.fill_(1.0)
    assert rate_range([flat]) == pytest.approx(1.25)
    flat.rate.fill_(0.0)
    assert rate_range([flat]) == pytest.approx(4.0)


def mean_color(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(image.convert("RGB").crop(box), dtype=float).reshape(-1, 3).mean(0)


def test_overlay_colours_each_region_with_its_token() -> None:
    flat = Image.new("RGB", (64, 64), (128, 128, 128))
    panel = overlay(flat, quadrants(), 0, LABELS, size=256, opacity=1.0, legend=False)
    assert panel.size == (256, 256)
    for box, token in (((2, 2, 30, 30), 3), ((226, 2, 254, 30), 6), ((226, 226, 254, 254), 2)):
        assert np.abs(mean_color(panel, box) - token_color(token, "word")).max() < 2


def test_overlay_draws_borders_and_names() -> None:
    flat = Image.new("RGB", (64, 64), (128, 128, 128))
    bare = np.asarray(overlay(flat, quadrants(), 0, LABELS, size=256, min_share=1.0, legend=False))
    assert (bare[4:40, 128] == 255).all() and (bare[128, 4:40] == 255).all(), "a white line between regions"
    named = np.asarray(overlay(flat, quadrants(), 0, LABELS, size=256, legend=False))
    changed = (bare != named).any(-1)
    for rows in (slice(0, 128), slice(128, 256)):
        for columns in (slice(0, 128), slice(128, 256)):
            assert 200 < changed[rows, columns].sum() < 3000, "a name in each quadrant"
    assert not changed[:, 126:131].any() and not changed[126:131, :].any(), "each inside its own region"
    assert (named[changed] > 200).all(-1).sum() > 100, "white letters"


def test_overlay_leaves_small_regions_to_the_legend() -> None:
    regions = quadrants(size=(64, 64))
    regions.token_index[0, 14:, 0] = 4  # two cells of 256
    flat = Image.new("RGB", (64, 64))
    with_small = np.asarray(overlay(flat, regions, 0, LABELS, size=512, legend=False))
    only_small = np.asarray(overlay(flat, regions, 0, LABELS, size=512, legend=False, min_share=0.002))
    assert (with_small != only_small)[400:, :80].any(), "named where asked for"
    assert not (with_small != only_small)[:256].any()
    legend = overlay(flat, regions, 0, LABELS, size=512)
    chip = np.asarray(legend)[:, 512:].reshape(-1, 3)
    assert (chip == token_color(4, "on")).all(-1).sum() > 100, "its colour is in the legend"


def test_label_places_never_overlap_and_stay_inside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, 6, (4, 5)).repeat(4, 0).repeat(4, 1)  # [16, 20] in blocks
        regions = Regions(
            0,
            torch.from_numpy(ids)[None],
            torch.ones(1, 16, 20).bool(),
            torch.from_numpy(rng.random((1, 1, 64, 80)) + 0.5),
        )
        rows = region_table(regions, LABELS)
        boxes = {row.token: (60, 30) for row in rows}
        places = _place_labels(ids, rows, boxes, (400, 320), 20.0)
        corners = list(places.values())
        assert rows[0].token in places, "the largest region has a name"
        for index, (x, y) in enumerate(corners):
            assert 0 <= x <= 400 - 60 and 0 <= y <= 320 - 30
            for x2, y2 in corners[index + 1 :]:
                assert abs(x - x2) >= 60 or abs(y - y2) >= 30


def test_labels_the_font_cannot_write_become_numbers(picture) -> None:
    regions = quadrants()
    labels = [*LABELS]
    labels[3] = "猫"
    assert printable("猫", 3) == "token 3"
    assert printable("écho?", 3) == "echo?"
    assert drawable("l\u2019été, 猫") == "l'ete, ?"
    drawn = np.asarray(overlay(picture, regions, 0, labels))
    labels[3] = "token 3"
    assert (drawn == np.asarray(overlay(picture, regions, 0, labels))).all()


@pytest.mark.parametrize("size", [(64, 96), (104, 64), (520, 776)])
def test_contact_sheet_has_a_column_for_every_step(size) -> None:
    image = Image.new("RGB", (size[1], size[0]), (10, 120, 200))
    steps = [quadrants(step, (size[0] // 8, size[1] // 8)) for step in (0, 4, 9)]
    sheet = contact_sheet(image, steps, LABELS, num_steps=10, title="a red cat on a sea", subtitle="seed 0")
    one = contact_sheet(image, steps[:1], LABELS, num_steps=10, title="a red cat on a sea", subtitle="seed 0")
    column = max(scaled_size(image, 288)[0], 208) + 20
    assert sheet.width - one.width == 2 * column
    assert sheet.height == one.height
    pixels = np.asarray(sheet)
    margins = [pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]]
    assert all((margin == 255).all() for margin in margins), "nothing is cut off at the border"


def scaled_size(image: Image.Image, longest: int) -> tuple[int, int]:
    return scaled(image, longest).size


def test_contact_sheet_wraps_long_titles_and_needs_a_step(picture) -> None:
    short = contact_sheet(picture, [quadrants(size=(8, 12))], LABELS, title="a cat")
    long = contact_sheet(picture, [quadrants(size=(8, 12))], LABELS, title="a cat on a sea " * 12)
    assert long.height > short.height and long.width == short.width
    assert (np.asarray(long)[:, -20:] == 255).all()
    with pytest.raises(ValueError, match="no regions"):
        contact_sheet(picture, [], LABELS)


def test_pictures_are_deterministic_and_leave_the_input_alone(picture) -> None:
    before = picture.tobytes()
    steps = [quadrants(size=(8, 12))]
    assert contact_sheet(picture, steps, LABELS).tobytes() == contact_sheet(picture, steps, LABELS).tobytes()
    assert picture.tobytes() == before


def test_grid_places_pictures_unscaled(picture) -> None:
    red = Image.new("RGB", picture.size, (255, 0, 0))
    grid = image_grid(
        [[picture, red, red], [red]], captions=[["one", "two", "three"], ["four"]], title="t", subtitle="s"
    )
    pixels = np.asarray(grid)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 3 * 96 * 64
    x, y = np.argwhere((pixels == (255, 0, 0)).all(-1))[0][::-1] - (96 + 16, 0)
    assert (pixels[y : y + 64, x : x + 96] == np.asarray(picture)).all()


def test_grid_refuses_no_pictures_and_unequal_ones(picture) -> None:
    with pytest.raises(ValueError, match="none"):
        image_grid([])
    with pytest.raises(ValueError, match="one size"):
        image_grid([[picture, picture.resize((8, 8))]])


def test_npz_round_trip_without_pickle(tmp_path: Path) -> None:
    steps = [quadrants(0, (10, 14), batch=2), quadrants(3, (10, 14), batch=2)]
    labels = [LABELS, [*LABELS[:6], "boat", *LABELS[7:]]]
    path = save_regions_npz(tmp_path / "regions.npz", steps, labels=labels, metadata={"prompt": "é", "seed": 3})
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    assert set(arrays) == {"step", "token_index", "foreground", "rate", "cell", "labels", "metadata"}
    assert arrays["step"].tolist() == [0, 3] and arrays["cell"] == 4
    for index, regions in enumerate(steps):
        assert (arrays["token_index"][index] == regions.token_index.numpy()).all()
        assert (arrays["foreground"][index] == regions.foreground.numpy()).all()
        assert (arrays["rate"][index] == regions.rate.numpy()).all()
    assert arrays["token_index"].dtype == np.int64 and arrays["rate"].dtype == np.float32
    assert arrays["labels"].tolist() == labels
    assert json.loads(str(arrays["metadata"])) == {"prompt": "é", "seed": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["regions.npz"]


def test_npz_holds_half_precision_rates_and_needs_no_labels(tmp_path: Path) -> None:
    regions = quadrants()
    half = Regions(0, regions.token_index, regions.foreground, regions.rate.to(torch.bfloat16))
    with np.load(save_regions_npz(tmp_path / "r.npz", [half]), allow_pickle=False) as file:
        assert "labels" not in file and json.loads(str(file["metadata"])) == {}
        assert np.abs(file["rate"][0] - regions.rate.numpy()).max() < 0.01


def test_npz_refuses_nothing_and_mixed_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no regions"):
        save_regions_npz(tmp_path / "r.npz", [])
    with pytest.raises(ValueError, match="differ in shape"):
        save_regions_npz(tmp_path / "r.npz", [quadrants(), quadrants(size=(8, 8))])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)), replacing(path) as file:
        file.write(b"half of the new")
        raise failure
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_a_file_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "x.png"):
        raise AssertionError("the block must not run")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError), replacing(tmp_path / "folder.png") as file:
        file.write(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
