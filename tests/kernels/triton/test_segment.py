"""The segmentation kernel, executed: ids and foreground against the fp64 torch implementation."""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import segment
from scfg_kernels.testing import guarded_copy

from tests.kernels.cases import by_name
from tests.kernels.triton.simulation import ARCHITECTURES, run

CASES = {
    # name: (batch, tokens, layer sizes, grid, blur_sigma, masked, dtype, channels of the start)
    "two-sizes": (2, 20, [(6, 7), (6, 7), (3, 4)], (6, 7), 0.5, False, torch.float32, 1),
    "two-channels": (2, 7, [(6, 7), (3, 4)], (6, 7), 0.5, False, torch.float32, 2),
    "masked-unsmoothed": (2, 7, [(6, 7)], (6, 7), 0.0, True, torch.float32, 1),
    "one-row": (1, 5, [(1, 4), (2, 2)], (1, 4), 0.5, False, torch.float32, 1),
    "finer-than-the-grid": (1, 5, [(7, 9)], (4, 5), 0.5, False, torch.float32, 1),
    "seventeen-layers": (2, 7, [(3, 4)] * 9 + [(6, 7)] * 8, (6, 7), 0.5, True, torch.float32, 2),
    "wide": (1, 5, [(3, 140), (2, 70)], (3, 140), 0.5, False, torch.float32, 1),
    "more-than-256-cells": (2, 11, [(17, 16), (9, 8)], (17, 16), 0.5, False, torch.float32, 1),
    "more-than-1024-cells": (1, 3, [(63, 66), (32, 33)], (63, 66), 0.5, False, torch.float32, 1),
    "half": (1, 5, [(4, 4)], (4, 4), 0.5, False, torch.float16, 1),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("batch", "tokens", "sizes", "size", "sigma", "masked", "dtype", "channels"), **by_name(CASES))
def test_regions(rng, arch, batch, tokens, sizes, size, sigma, masked, dtype, channels):
    shape = [(batch, tokens, h * w) for h, w in sizes]
    maps = [guarded_copy(torch.randn(s, generator=rng).softmax(1).to(dtype)).tensor for s in shape]
    lead = (batch,) if channels == 1 else (batch, channels)
    starts = [guarded_copy(torch.rand(*lead, h * w, generator=rng).to(dtype)).tensor for h, w in sizes]
    mask = torch.rand(batch, tokens, generator=rng) < 0.5 if masked else None
    options = {"blur_sigma": sigma, "token_mask": mask}
    actual, launches = run(arch, lambda: segment(maps, starts, sizes, size, **options, backend="triton"))
    expected = segment([x.double() for x in maps], [x.double() for x in starts], sizes, size, **options)
    assert len(launches) == 1
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_ties_go_to_the_lowest_token_and_a_flat_map_is_background():
    maps, starts = [torch.full((1, 6, 12), 1 / 6)], [torch.full((1, 12), 0.25)]
    (ids, foreground), _ = run(80, lambda: segment(maps, starts, [(3, 4)], (3, 4), backend="triton"))
    assert not ids.any() and not foreground.any()
