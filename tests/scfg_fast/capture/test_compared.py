"""Maps on the grid of cells from queries and keys of finer tokens; what the pipelines' own layers compare is tested in
`tests/pipelines/test_transformers.py`."""

from __future__ import annotations

import pytest
import torch

from scfg_fast.capture.compared import MASKED, QueriesAndKeys, capture_maps, key_bias, start_column
from scfg_fast.layouts import Geometry


def compared(tokens: int, text: int, bias: torch.Tensor | None = None) -> QueriesAndKeys:
    generator = torch.Generator().manual_seed(0)
    query, image = (torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(2))
    return QueriesAndKeys(query, torch.randn(2, 2, text, 8, generator=generator), image, bias)


def test_a_picture_of_1024_pixels_has_maps_of_1024_rows() -> None:
    """4,096 tokens; the rows of both maps sum to 1."""
    own, cross = capture_maps(compared(4096, 77), Geometry(1, 128, 128), level=2, cell=4, backend="auto")
    assert own.shape == (2, 1024, 1024) and cross.shape == (2, 1024, 77)
    for part in (own, cross):
        torch.testing.assert_close(part.sum(-1), torch.ones(2, 1024))


def test_equal_tokens_in_a_cell_are_as_one() -> None:
    """Queries and keys that are constant over a cell give the maps of one token per cell with four times the weight."""
    coarse = compared(6, 5)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (2, 3)).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2, 3)

    fine = QueriesAndKeys(spread(coarse.query), coarse.text, spread(coarse.image))
    own, cross = capture_maps(fine, Geometry(1, 8, 12), level=2, cell=4, backend="auto")
    scores = torch.cat([coarse.query @ key.transpose(2, 3) for key in (coarse.text, coarse.image)], 3) * 8**-0.5
    weights = scores.exp() * torch.tensor([1.0] * 5 + [4.0] * 6)
    mean = (weights / weights.sum(-1, keepdim=True)).mean(1)
    torch.testing.assert_close(cross, mean[..., :5] / mean[..., :5].sum(-1, keepdim=True))
    torch.testing.assert_close(own, mean[..., 5:] / mean[..., 5:].sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_text_gets_nothing(dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    plain = compared(24, 5, key_bias(mask, 5))
    half = QueriesAndKeys(*(x.to(dtype) for x in (plain.query, plain.text, plain.image)), plain.bias)
    _, cross = capture_maps(half, Geometry(1, 8, 12), level=2, cell=4, backend="auto")
    assert not cross[~mask[:, None].expand_as(cross)].any() and cross.isfinite().all()


def test_masks_of_every_shape_say_the_same() -> None:
    mask = torch.tensor([[True, True, False, True, True]])
    expected = torch.tensor([[0.0, 0.0, MASKED, 0.0]])
    additive = torch.zeros(1, 5).masked_fill(~mask, MASKED)
    for given in (mask, mask[:, None, None].expand(1, 1, 7, 5), additive, additive[:, None], additive[:, None, None]):
        torch.testing.assert_close(key_bias(given, 4), expected)
    torch.testing.assert_close(key_bias(mask.float(), 4), torch.tensor([[0.0, 0.0, -1.0, 0.0]]))  # numbers are added
    assert key_bias(None, 4) is None


def test_the_start_token_is_the_first_or_the_last_that_is_attended() -> None:
    left = key_bias(torch.tensor([[False, True, True], [True, True, True]]), 3)
    right = key_bias(torch.tensor([[True, True, False], [True, False, False]]), 3)
    assert start_column(left, 3, "first").tolist() == [1, 0] and start_column(right, 3, "last").tolist() == [1, 0]
    assert start_column(None, 3, "first") == 0 and start_column(None, 3, "last") == 2
