"""The segmentation kernel, executed: ids and foreground against the fp64 torch implementation."""

from __future__ import annotations

import functools

import pytest
import torch
from scfg_kernels import segment
from scfg_kernels._launch import SegmentConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.testing import guarded_copy

from tests.kernels.cases import assert_agrees_with_reference, by_name, random_layers
from tests.kernels.triton.simulation import ARCHITECTURES, assert_nothing_beside_is_touched, run

CASES = {
    # name: (batch, tokens, layer sizes, grid, blur_sigma, masked, dtype, channels of the start)
    "two-sizes": (3, 63, [(6, 7), (6, 7), (3, 4)], (6, 7), 0.5, False, torch.float32, 1),
    "two-channels": (2, 77, [(6, 7), (3, 4)], (6, 7), 0.5, False, torch.float32, 2),
    "masked-unsmoothed": (2, 78, [(6, 7)], (6, 7), 0.0, True, torch.float32, 1),
    "one-row": (1, 5, [(1, 4), (2, 2)], (1, 4), 0.5, False, torch.float32, 1),
    "finer-than-the-grid": (1, 5, [(7, 9)], (4, 5), 0.5, False, torch.float32, 1),
    "seventeen-layers": (2, 7, [(3, 4)] * 9 + [(6, 7)] * 8, (6, 7), 0.5, True, torch.float32, 2),
    "wide": (1, 5, [(3, 140), (2, 70)], (3, 140), 0.5, False, torch.float32, 1),
    "more-than-256-cells": (2, 11, [(17, 16), (9, 8)], (17, 16), 0.5, False, torch.float32, 1),
    "more-than-1024-cells": (1, 3, [(63, 66), (32, 33)], (63, 66), 0.5, False, torch.float32, 1),
    "half": (1, 5, [(4, 4)], (4, 4), 0.5, False, torch.float16, 1),
    "bf16-many-tokens": (3, 300, [(4, 4)], (4, 4), 0.5, False, torch.bfloat16, 1),
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


REAL_STEPS = {
    # name: sizes of the layers; three of SDXL's 60
    "sd15": [(16, 16)] * 5 + [(8, 8)],
    "sdxl": [(32, 32)] * 3,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("sizes", **by_name(REAL_STEPS))
def test_regions_of_a_real_step(rng, arch, sizes):
    tokens, start, cond, uncond = random_layers(rng, sizes, batch=1)
    (ids, foreground), launches = run(arch, lambda: segment(tokens, start, sizes, sizes[0], backend="triton"))
    assert len(launches) == 1
    assert_agrees_with_reference(ids, foreground, cond, uncond, sizes, sizes[0])


def test_other_tiles_give_the_same_regions(rng):
    sizes = [(6, 7), (6, 7), (3, 4)]
    maps = [torch.randn(2, 21, h * w, generator=rng).softmax(1) for h, w in sizes]
    starts = [torch.rand(2, h * w, generator=rng) for h, w in sizes]
    flat = [length for size in sizes for length in size]
    chosen, _ = run(80, lambda: segment(maps, starts, sizes, (6, 7), backend="triton"))
    forced = SegmentConfig(num_warps=2, num_stages=1, block_t=4, block_h=8, block_w=16)
    other, (launch,) = run(80, lambda: KERNELS["segment"](maps, starts, flat, 6, 7, 0.5, None, forced))
    assert launch.counters.ctas == 2 * (6 + 1)
    assert all(torch.equal(x, y) for x, y in zip(other, chosen, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_tie_between_tokens_of_two_programs_goes_to_the_lower_one(rng, arch):
    maps = 1.0 + torch.rand(2, 77, 16, generator=rng)
    maps[:, 3] = maps[:, 40] = torch.tensor([1e-3, 0.5]).repeat(8)  # the best of every second cell
    start = torch.rand(2, 16, generator=rng)
    options = {"blur_sigma": 0.0, "backend": "triton"}
    (ids, _), _ = run(arch, lambda: segment([maps], [start], [(4, 4)], (4, 4), **options))
    assert (ids.flatten(1)[:, 1::2] == 3).all() and not (ids.flatten(1)[:, ::2] == 3).any()
    assert not (ids == 40).any()
    (ids, _), _ = run(arch, lambda: segment([maps.flip(1)], [start], [(4, 4)], (4, 4), **options))
    assert (ids.flatten(1)[:, 1::2] == 76 - 40).all() and not (ids == 76 - 3).any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_beside_a_map_is_touched(rng, arch):
    """4 x 7 cells in a block of 4 x 8, and 21 tokens in two programs of 16. Idle cells would be the next row's."""
    sizes = [(4, 7), (2, 4)]
    maps = [torch.randn(3, 21, h * w, generator=rng).softmax(1) for h, w in sizes]
    starts = [torch.rand(3, h * w, generator=rng) for h, w in sizes]
    call = functools.partial(segment, maps, starts, sizes, sizes[0], backend="triton")
    assert_nothing_beside_is_touched(arch, call, "out of bounds|different values|race")


def test_ties_go_to_the_lowest_token_and_a_flat_map_is_background():
    maps, starts = [torch.full((1, 6, 12), 1 / 6)], [torch.full((1, 12), 0.25)]
    (ids, foreground), _ = run(80, lambda: segment(maps, starts, [(3, 4)], (3, 4), backend="triton"))
    assert not ids.any() and not foreground.any()
