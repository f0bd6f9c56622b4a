"""Random augmentation of loss guidance: what each change does, its gradient, its statistics, and its refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from scfg_fast.guidance.augment import Augment, Draw, _zoom_matrix

NONE = Augment(copies=1, translate=0.0, resize=0.0, color=0.0, cutout=0.0)


def uniform(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(*shape, generator=rng, dtype=dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("down, right", [(2, -3), (-1, 0), (0, 4), (-4, 5)])
def test_translation_moves_the_content_by_the_draw(rng: torch.Generator, down: int, right: int) -> None:
    images = uniform(rng, 2, 4, 9, 11) + 1.0
    moved = NONE.apply(images, Draw(shift=(down, right)), fill=0.25)
    for i in range(9):
        for j in range(11):
            inside = 0 <= i - down < 9 and 0 <= j - right < 11
            expected = images[:, :, i - down, j - right] if inside else torch.full((2, 4), 0.25).double()
            assert torch.equal(moved[:, :, i, j], expected)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 12), (64, 63), (224, 224)])
@pytest.mark.parametrize("zoom", [0.8, 0.93, 1.0, 1.19])
def test_the_zoom_resizes_to_whole_pixels_and_crops_or_pads(
    rng: torch.Generator, height: int, width: int, zoom: float
) -> None:
    """Against torch's bilinear resize to int(zoom n) pixels, then the middle, or a grey border around."""
    images = uniform(rng, 2, 3, height, width)
    sizes = [max(1, int(zoom * side)) for side in (height, width)]
    resized = F.interpolate(images, size=sizes, mode="bilinear")
    for axis, (size, side) in enumerate(zip(sizes, (height, width), strict=True), 2):
        if size >= side:
            resized = resized.narrow(axis, (size - side) // 2, side)
        else:
            border = [(side - size) // 2, side - size - (side - size) // 2]
            resized = F.pad(resized, [0, 0, *border] if axis == 2 else border, value=0.5)
    zoomed = NONE.apply(images, Draw(zoom=zoom))
    assert zoomed.shape == images.shape
    assert float((zoomed - resized).abs().max()) < 1e-13


def test_enlarging_keeps_a_constant_and_shrinking_leaves_a_grey_border() -> None:
    ones = torch.ones(1, 1, 20, 20, dtype=torch.float64)
    assert float((NONE.apply(ones, Draw(zoom=1.25)) - 1.0).abs().max()) < 1e-14
    small = NONE.apply(ones, Draw(zoom=0.5))
    assert torch.equal(small[:, :, 5:15, 5:15], ones[:, :, 5:15, 5:15])
    assert float(small.sum()) == pytest.approx(100.0 + 0.5 * 300.0)
    assert _zoom_matrix(20, 0.5, ones).sum(1).tolist() == [0.0] * 5 + [1.0] * 10 + [0.0] * 5


def test_color_is_brightness_then_saturation_then_contrast(rng: torch.Generator) -> None:
    images, augment = uniform(rng, 2, 3, 5, 6), Augment(color=1.0)
    assert torch.equal(augment.apply(images, Draw(brightness=0.2)), images + 0.2)
    grey = augment.apply(images, Draw(saturation=0.0))
    assert float((grey - images.mean(1, keepdim=True)).abs().max()) < 1e-15
    flat = augment.apply(images, Draw(contrast=0.0))
    assert float((flat - images.mean((1, 2, 3), keepdim=True)).abs().max()) < 1e-15
    changed = augment.apply(images, Draw(brightness=0.1, saturation=1.7, contrast=0.6))
    # Saturation keeps the mean over channels and contrast the mean over the picture; both scale the distance to them.
    assert changed.mean((1, 2, 3)).allclose(images.mean((1, 2, 3)) + 0.1, rtol=0, atol=1e-14)
    opponent = images[:, 0] - images[:, 1]
    assert (changed[:, 0] - changed[:, 1]).allclose(1.7 * 0.6 * opponent, rtol=0, atol=1e-14)


def test_cutout_fills_the_box_and_nothing_else(rng: torch.Generator) -> None:
    images = uniform(rng, 2, 4, 8, 9) + 1.0
    images[0, 0, 3, 4] = float("nan")
    cut = NONE.apply(images, Draw(box=(2, 5, 3, 9)))
    hole = torch.zeros(8, 9, dtype=torch.bool)
    hole[2:5, 3:9] = True
    assert bool((cut[:, :, hole] == 0.5).all())
    assert torch.equal(cut[:, :, ~hole], images[:, :, ~hole])
    assert float(images[0, 1, 3, 4]) > 0.0  # the input is not written to


def test_the_order_is_color_translation_zoom_cutout(rng: torch.Generator) -> None:
    images, augment = uniform(rng, 1, 3, 8, 8), Augment()
    draw = Draw(brightness=0.1, saturation=0.5, contrast=1.2, shift=(1, -2), zoom=1.1, box=(0, 4, 2, 6))
    step = augment.apply(images, Draw(brightness=0.1, saturation=0.5, contrast=1.2))
    step = augment.apply(step, Draw(shift=(1, -2)))
    step = augment.apply(step, Draw(zoom=1.1))
    assert torch.equal(augment.apply(images, draw), augment.apply(step, Draw(box=(0, 4, 2, 6))))


@pytest.mark.parametrize("draw", [
    Draw(brightness=-0.2, saturation=1.6, contrast=0.7), Draw(shift=(1, -2)), Draw(zoom=0.83), Draw(zoom=1.17),
    Draw(box=(1, 4, 0, 3)), Draw(0.1, 0.4, 1.3, (-1, 2), 1.09, (0, 2, 3, 6)),
], ids=["color", "translate", "shrink", "enlarge", "cutout", "all"])  # fmt: skip
def test_the_gradient_of_each_change(rng: torch.Generator, draw: Draw) -> None:
    images = uniform(rng, 2, 3, 5, 6).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: Augment().apply(x, draw), (images,))


def test_identity_is_the_picture_itself(rng: torch.Generator) -> None:
    images = uniform(rng, 2, 7, 5, 6)
    none = dataclasses.replace(NONE, copies=4)
    draws = none.draws(rng, 5, 6)
    assert draws == [Draw()] * 4
    assert none.apply(images, draws[0]) is images
    assert Augment().apply(images[:, :3], Draw()).equal(images[:, :3])


@pytest.mark.parametrize("channels, height, width", [(1, 1, 1), (4, 63, 1), (3, 520, 77), (16, 8, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_size_keeps_its_shape_and_dtype(
    rng: torch.Generator, channels: int, height: int, width: int, dtype: torch.dtype
) -> None:
    augment = Augment(copies=3, translate=0.5, resize=0.9, color=1.0 if channels == 3 else 0.0, cutout=0.9)
    images = uniform(rng, 1, channels, height, width).to(dtype)
    for draw in augment.draws(rng, height, width):
        out = augment.apply(images, draw)
        assert (out.shape, out.dtype) == (images.shape, dtype) and bool(out.isfinite().all())


def test_statistics_of_the_draws() -> None:
    """20000 draws at 64x48: every shift equally often, and the uniform ranges filled with their means."""
    count = 20_000
    draws = Augment(copies=count).draws(seeded(), 64, 48)
    for axis, most in ((0, 8), (1, 6)):
        shifts = torch.tensor([d.shift[axis] for d in draws])
        counts = torch.bincount(shifts + most)
        assert len(counts) == 2 * most + 1
        expected = count / len(counts)
        assert float((counts - expected).abs().max()) < 5.0 * expected**0.5
    zooms = torch.tensor([Augment(copies=1).draws(seeded(i), 64, 48)[0].zoom for i in range(2000)], dtype=torch.float64)
    assert float(zooms.min()) == pytest.approx(0.8, abs=2e-3) and float(zooms.max()) == pytest.approx(1.2, abs=2e-3)
    ranges = {"brightness": (-0.25, 0.25), "saturation": (0.0, 2.0), "contrast": (0.5, 1.5)}
    for name, (low, high) in ranges.items():
        values = torch.tensor([getattr(d, name) for d in draws], dtype=torch.float64)
        assert float(values.min()) == pytest.approx(low, abs=1e-3)
        assert float(values.max()) == pytest.approx(high, abs=1e-3)
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=5 * (high - low) / (12 * count) ** 0.5)


def test_statistics_of_the_boxes() -> None:
    """Half a side long, with the centre anywhere, so cut off at the border by up to half."""
    draws = Augment(copies=20_000).draws(seeded(1), 64, 10)
    boxes = [d.box for d in draws]
    assert all(b is not None and 0 <= b[0] < b[1] <= 64 and 0 <= b[2] < b[3] <= 10 for b in boxes)
    rows = torch.tensor([[b[0], b[1]] for b in boxes if b is not None], dtype=torch.float64)
    lengths = rows[:, 1] - rows[:, 0]
    # Centres 0..64 of an even box, cut off at both ends: mean 32 - 2 (1 + ... + 16) / 65.
    assert float(lengths.max()) == 32.0 and float(lengths.min()) == 16.0
    assert float(lengths.mean()) == pytest.approx(32.0 - 2 * 136 / 65, abs=0.2)
    columns = torch.tensor([[b[2], b[3]] for b in boxes if b is not None])
    assert sorted({(a, b) for a, b in columns.tolist()}) == [
        (0, 3), (0, 4), (0, 5), (1, 6), (2, 7), (3, 8), (4, 9), (5, 10), (6, 10), (7, 10),
    ]  # fmt: skip


def test_draws_repeat_and_leaving_one_out_changes_no_other() -> None:
    draws = Augment().draws(seeded(3), 32, 32)
    assert draws == Augment().draws(seeded(3), 32, 32) != Augment().draws(seeded(4), 32, 32)
    assert len(set(draws)) == 10
    without = Augment(resize=0.0).draws(seeded(3), 32, 32)
    assert without == [dataclasses.replace(d, zoom=1.0) for d in draws]
    assert len({d.zoom for d in draws}) == 1, "one zoom for all copies, as published"
    assert Augment(copies=3).draws(seeded(3), 32, 32) == draws[:3]


@pytest.mark.parametrize("side, most", [(64, 8), (20, 3), (28, 4), (30, 4), (3, 0)])
def test_the_largest_shift_is_rounded_as_published(side: int, most: int) -> None:
    """int(side / 8 + 1/2): 2.5 pixels are 3."""
    shifts = {d.shift[0] for d in Augment(copies=500).draws(seeded(), side, 8)}
    assert shifts == set(range(-most, most + 1))


def test_samples_share_the_draw_and_do_not_see_each_other(rng: torch.Generator) -> None:
    images, augment = uniform(rng, 3, 3, 16, 16, dtype=torch.float32), Augment()
    images[1, 0, 0, 0] = float("nan")
    for draw in augment.draws(rng, 16, 16):
        together = augment.apply(images, draw)
        for i in (0, 2):
            assert torch.equal(together[i : i + 1], augment.apply(images[i : i + 1], draw))


def test_averaging_over_translations_smooths_a_step_as_proposition_4_1_says() -> None:
    """l = C where a dot is right of the middle. Shifts of -16..16, each 1/33, turn the jump C into a slope of about
    C / 33 per pixel, below the bound C * sum |p(i + 1) - p(i)| = 2 C / 33; 0.0347 C measured, the bound is 0.0606 C."""
    augment, bound, size, copies = Augment(copies=4000, translate=0.25, resize=0, color=0, cutout=0), 3.0, 64, 4000
    shifts = augment.draws(seeded(), 1, size)
    dots = torch.eye(size)[:, None, None, :]  # [position, 1, 1, W]

    def loss(images: torch.Tensor) -> torch.Tensor:
        return bound * (images[..., size // 2 :].sum((1, 2, 3)) > 0.5).double()

    plain = loss(dots)
    smooth = sum(loss(augment.apply(dots, draw)) for draw in shifts) / copies
    inner = slice(16, 48)  # farther out the dot may leave the picture
    assert float(plain[inner].diff().abs().max()) == bound
    steepest = float(smooth[inner].diff().abs().max())
    assert steepest == pytest.approx(bound / 33, rel=0.25)
    assert steepest < 2.0 * bound / 33
    assert float(smooth[inner].diff().min()) >= -1e-12


@pytest.mark.parametrize("images, words", [
    (torch.zeros(1, 4, 8, 8), "3 channels, got 4"), (torch.zeros(3, 8, 8), r"\[B, C, H, W\]"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
])  # fmt: skip
def test_bad_images_are_refused(images: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Augment().apply(images, Draw())


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        Augment(copies=0, translate=0.6, resize=1.0, color=-0.1, cutout=float("nan"))
    for word in ("copies must", "translate must be a number in [0, 0.5]", "resize must be a number in [0, 1)", "color",
                 "cutout"):  # fmt: skip
        assert word in str(caught.value)


def test_a_generator_elsewhere_is_refused() -> None:
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="CPU generator"):
        Augment().draws(Elsewhere(), 8, 8)  # type: ignore[arg-type]
