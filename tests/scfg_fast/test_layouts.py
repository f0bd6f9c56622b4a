"""Predictions opened as latent images and closed again: nothing lost, everything where it belongs."""

from __future__ import annotations

import pytest
import torch

from scfg_fast.layouts import Geometry, Images, Lists, Packed, Videos, swapped_halves


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("view, prediction, geometry, opened", [
    (Images(), numbered(2, 4, 6, 8), Geometry(1, 6, 8), (2, 4, 6, 8)),
    (Images(4), numbered(2, 8, 6, 8), Geometry(1, 6, 8), (2, 4, 6, 8)),
    (Videos(), numbered(2, 4, 3, 6, 8), Geometry(3, 6, 8), (6, 4, 6, 8)),
    (Packed(2), numbered(2, 12, 16), Geometry(1, 6, 8), (2, 4, 6, 8)),
    (Packed(2), numbered(2, 12 + 5, 16), Geometry(1, 6, 8), (2, 4, 6, 8)),
    (Packed(1), numbered(2, 3 * 48, 4), Geometry(3, 6, 8), (6, 4, 6, 8)),
], ids=["images", "variance", "videos", "packed", "with a reference image", "packed videos"])  # fmt: skip
def test_closed_is_what_was_opened(view, prediction: torch.Tensor, geometry: Geometry, opened: tuple) -> None:
    images = view.open(prediction, geometry)
    assert images.shape == opened
    assert torch.equal(view.close(images, prediction, geometry), prediction)
    assert not torch.equal(view.close(images + 1.0, prediction, geometry), prediction)


def test_what_is_not_opened_stays() -> None:
    prediction = numbered(2, 8, 6, 8)
    closed = Images(4).close(Images(4).open(prediction, Geometry(1, 6, 8)) * 0.0, prediction, Geometry(1, 6, 8))
    assert not closed[:, :4].any() and torch.equal(closed[:, 4:], prediction[:, 4:])


def test_a_patch_is_four_neighbouring_pixels() -> None:
    """Row 0 of the tokens, channel 0: its four numbers are the upper left 2 x 2 pixels."""
    tokens = torch.zeros(1, 12, 16)
    tokens[0, 0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    image = Packed(2).open(tokens, Geometry(1, 6, 8))
    assert image[0, 0, :2, :2].tolist() == [[1.0, 2.0], [3.0, 4.0]] and image.sum() == 10.0


def test_frames_of_a_sample_lie_side_by_side() -> None:
    video = numbered(2, 4, 3, 6, 8)
    assert torch.equal(Videos().open(video, Geometry(3, 6, 8))[4], video[1, :, 1])


def test_lists_come_conditional_first() -> None:
    prediction = list(numbered(4, 4, 1, 6, 8).unbind())
    images = Lists().open(prediction, Geometry(1, 6, 8))
    assert torch.equal(images[0], prediction[2][:, 0]) and torch.equal(swapped_halves(images)[0], prediction[0][:, 0])
    closed = Lists().close(images, prediction, Geometry(1, 6, 8))
    assert all(torch.equal(a, b) for a, b in zip(closed, prediction, strict=True))
