"""The guidance kernel, executed: rate and result against torch in the same dtype and against an fp64 truth."""

from __future__ import annotations

import functools

import pytest
import torch
from ptxsim import simulated
from scfg_kernels import guide
from scfg_kernels._launch import GuideConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from tests.kernels.cases import by_name
from tests.kernels.triton.simulation import ARCHITECTURES, PoisonedMemory, run

CASES = {
    # name: (shape [B, C, H, W], dtype, layout, guidance scale, options)
    "sd15": ((2, 4, 16, 24), torch.float16, "contiguous", 7.5, {}),
    "ragged-sliced": ((2, 4, 13, 18), torch.bfloat16, "sliced", torch.tensor([7.5, 3.0]), {}),
    "channels-last": ((1, 16, 8, 12), torch.float32, "channels_last", 5.0, {"rate_max": None, "max_scale": None}),
    "paper": ((1, 4, 8, 8), torch.float32, "contiguous", 7.5, {"fidelity": "paper", "blur_sigma": 0.0}),
    "unconditional": ((1, 4, 8, 8), torch.float16, "contiguous", 7.5, {"rewrite": "unconditional"}),
    "whole-image": ((2, 3, 17, 22), torch.float32, "contiguous", 7.5, {"benchmark": "image"}),
    "one-cell": ((2, 3, 21, 26), torch.float32, "contiguous", 7.5, {"cell": 4096}),
    "cells-of-three": ((1, 3, 7, 10), torch.float32, "contiguous", 7.5, {"cell": 3}),
    "rescaled": ((2, 4, 16, 24), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "rescaled-ragged": ((2, 3, 29, 34), torch.float32, "sliced", torch.tensor([7.5, 3.0]), {"rescale": 1.0}),
    "rescaled-channels-last": ((1, 2, 36, 40), torch.bfloat16, "channels_last", 7.5, {"rescale": 0.3}),
    "more-than-registers": ((1, 4, 132, 60), torch.float32, "sliced", 7.5, {}),
    "more-than-registers-rescaled": ((1, 16, 65, 67), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "more-than-1024-cells": ((1, 1, 37, 66), torch.float32, "contiguous", 7.5, {"cell": 1}),
}


def random_inputs(rng, shape, dtype, layout, cell):
    batch, _, height, width = shape
    u = torch.randn(shape, generator=rng)
    c = (u + torch.randn(shape, generator=rng)).to(dtype)
    grid = (batch, -(-height // cell), -(-width // cell))
    ids = torch.randint(0, 5, grid, generator=rng)
    return as_layout(u.to(dtype), layout), as_layout(c, layout), ids, torch.rand(grid, generator=rng) < 0.5


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "dtype", "layout", "scale", "options"), **by_name(CASES))
def test_guided_prediction(rng, arch, shape, dtype, layout, scale, options):
    u, c, ids, foreground = random_inputs(rng, shape, dtype, layout, options.get("cell", 4))
    options = {"num_tokens": 7, **options}
    actual, launches = run(arch, lambda: guide(u, c, ids, foreground, scale, **options, backend="triton"))
    naive = guide(u, c, ids, foreground, scale, **options)
    truth = guide(u.double(), c.double(), ids, foreground, scale, **options)
    assert len(launches) == 1
    for name, x, y, z in zip(("result", "rate"), actual, naive, truth, strict=True):
        assert (x.dtype, x.stride()) == (y.dtype, y.stride())
        assert_as_accurate_as(x, y, z, name=name)


@pytest.mark.parametrize(
    "scale", [torch.tensor(7.5).expand(3), torch.tensor([7.5, torch.nan, 3.0, torch.nan, 5.0, torch.nan])[::2]]
)
def test_scales_of_any_stride(rng, scale):
    """In tensors without guard zones: a scale expanded from one number has one element of storage."""
    inputs = random_inputs(rng, (3, 4, 13, 25), torch.float32, "contiguous", 4)
    with simulated(80):
        actual = guide(*inputs, scale, num_tokens=5, backend="triton")
    for x, y in zip(actual, guide(*inputs, scale, num_tokens=5), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_rate_of_one_has_the_bits_of_plain_guidance(rng):
    u, c, ids, foreground = random_inputs(rng, (1, 4, 8, 8), torch.float32, "contiguous", 4)
    options = {"num_tokens": 5, "rate_min": 1.0, "rate_max": 1.0, "max_scale": None}
    (result, rate), _ = run(80, lambda: guide(u, c, ids, foreground, 7.5, **options, backend="triton"))
    assert torch.equal(rate, torch.ones_like(rate))
    assert torch.equal(result, u + 7.5 * (c - u))
    options["rewrite"] = "unconditional"
    (same, _), _ = run(80, lambda: guide(u, c, ids, foreground, 7.5, **options, backend="triton"))
    assert torch.equal(same, u)


def test_a_spread_far_from_zero_is_as_accurate(rng):
    """Sums of squares would lose four digits to the mean."""
    u, c, ids, foreground = random_inputs(rng, (2, 4, 33, 40), torch.float32, "contiguous", 4)
    inputs = (u + 100.0, c + 100.0, ids, foreground, 7.5)
    options = {"num_tokens": 5, "rescale": 1.0}
    (actual, _), _ = run(80, lambda: guide(*inputs, **options, backend="triton"))
    truth = guide(inputs[0].double(), inputs[1].double(), *inputs[2:], **options)[0]
    assert_as_accurate_as(actual, guide(*inputs, **options)[0], truth)


@pytest.mark.parametrize("shape", [(2, 3, 13, 18), (1, 1, 1, 1)], ids=["constant", "one-element"])
def test_what_has_no_spread_is_not_rescaled(rng, shape):
    _, _, ids, foreground = random_inputs(rng, shape, torch.float32, "contiguous", 4)
    u, c = torch.full(shape, 0.3), torch.full(shape, 1.7)
    options = {"num_tokens": 5, "rate_min": 1.0, "rate_max": 1.0, "rescale": 0.7}
    (result, _), _ = run(80, lambda: guide(u, c, ids, foreground, 7.5, **options, backend="triton"))
    assert torch.equal(result, u + 7.5 * (c - u))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_order_of_the_warps_changes_nothing(rng, rescale):
    """Cells and rates go from thread to thread through memory, which starts as NaN here.

    Races are not looked for: warps that share a row of few cells write the same sum to the same place.
    """
    inputs = random_inputs(rng, (1, 4, 20, 28), torch.float16, "contiguous", 4)
    results = []
    for order in ("lockstep", "forward", "backward"):
        with simulated(80, check_races=False, order=order), PoisonedMemory():
            results.append(guide(*inputs, 7.5, num_tokens=5, rescale=rescale, backend="triton"))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


TILES = {
    # name: (channels, rows of cells, lines of each) of a tile
    "rows-of-cells": (4, 2, 4),
    "one-channel": (1, 1, 4),
    "some-lines": (2, 1, 2),
}


@pytest.mark.parametrize(("block_c", "rows", "lines"), **by_name(TILES))
@pytest.mark.parametrize(
    ("rewrite", "rescale", "times"), [("guided", 0.0, 2), ("guided", 0.7, 3), ("unconditional", 0.0, 2)]
)
def test_tiles_give_what_registers_give(rng, block_c, rows, lines, rewrite, rescale, times):
    """Predictions that fit in registers are read once; in tiles, once for the norms, once for the spreads, and once for
    the result."""
    inputs = random_inputs(rng, (1, 4, 14, 22), torch.float32, "contiguous", 4)
    options = (5, 4, 0.8, 3.0, 15.0, 0.5, "official", rewrite, rescale, "foreground")
    found = []
    for held, tile in ((True, (4, 4, 4)), (False, (block_c, rows, lines))):
        config = GuideConfig(1, 1, 4, 4, 8, held, *tile)
        call = functools.partial(KERNELS["guide"], *inputs, torch.tensor(7.5), *options, config)
        results, (launch,) = run(80, call)
        found.append(results)
        for name, x in zip(("uncond", "cond"), inputs, strict=False):
            assert launch.counters.traffic[name].load_bytes == (1 if held else times) * 4 * x.numel()
    (result, rate), (other_result, other_rate) = found
    torch.testing.assert_close(other_rate, rate, rtol=1e-6, atol=0)
    torch.testing.assert_close(other_result, result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_no_foreground_is_one_rate_which_smoothing_keeps_to_the_bit(rng, fidelity):
    u, c, ids, foreground = random_inputs(rng, (1, 4, 8, 8), torch.float32, "contiguous", 4)
    options = {"num_tokens": 5, "fidelity": fidelity}
    (_, rate), _ = run(80, lambda: guide(u, c, ids, foreground & False, 7.5, **options, backend="triton"))
    assert torch.equal(rate, torch.full_like(rate, 0.8 if fidelity == "official" else 1.0))
