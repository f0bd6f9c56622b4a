"""The guidance kernel, executed: rate and result against torch in the same dtype and against an fp64 truth."""

from __future__ import annotations

import functools

import pytest
import torch
from scfg_kernels import guide
from scfg_kernels._launch import GuideConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from lab.ptxsim import simulated
from tests.kernels.cases import by_name
from tests.kernels.triton.simulation import ARCHITECTURES, PoisonedMemory, assert_nothing_beside_is_touched, run

CASES = {
    # name: (shape [B, C, H, W], dtype, layout, guidance scale, options). Tokens are counted 16 and 128 at a time.
    "sd15": ((1, 4, 64, 64), torch.float16, "contiguous", 7.5, {"num_tokens": 77}),
    "sdxl": ((1, 4, 128, 128), torch.float16, "contiguous", 7.5, {"num_tokens": 77, "rescale": 0.7}),
    "two-samples": ((2, 4, 16, 24), torch.float16, "contiguous", 7.5, {}),
    "ragged-sliced": ((2, 4, 13, 18), torch.bfloat16, "sliced", torch.tensor([7.5, 3.0]), {"num_tokens": 63}),
    "expanded": ((3, 4, 13, 18), torch.float16, "expanded", torch.tensor([7.5, 3.0, 5.0]), {"num_tokens": 300}),
    "channels-last": ((1, 16, 8, 12), torch.float32, "channels_last", 5.0, {"rate_max": None, "max_scale": None}),
    "paper": ((1, 4, 8, 8), torch.float32, "contiguous", 7.5, {"fidelity": "paper", "blur_sigma": 0.0}),
    "unconditional": ((1, 4, 8, 8), torch.float16, "contiguous", 7.5, {"rewrite": "unconditional", "num_tokens": 78}),
    "whole-image": ((2, 3, 17, 22), torch.float32, "contiguous", 7.5, {"benchmark": "image"}),
    "one-cell": ((2, 3, 21, 26), torch.float32, "contiguous", 7.5, {"cell": 4096}),
    "cells-of-three": ((1, 3, 7, 10), torch.float32, "contiguous", 7.5, {"cell": 3}),
    "rescaled": ((3, 4, 16, 24), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "rescaled-ragged": ((2, 3, 29, 34), torch.float32, "sliced", torch.tensor([7.5, 3.0]), {"rescale": 1.0}),
    "rescaled-channels-last": ((1, 2, 36, 40), torch.bfloat16, "channels_last", 7.5, {"rescale": 0.3}),
    "more-than-registers": ((1, 4, 132, 60), torch.float32, "sliced", 7.5, {}),
    "more-than-registers-rescaled": ((1, 16, 65, 67), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "more-than-1024-cells": ((1, 1, 37, 66), torch.float32, "contiguous", 7.5, {"cell": 1}),
    "32-channels": ((1, 32, 13, 22), torch.bfloat16, "channels_last", 7.5, {}),
    "64-channels": ((2, 64, 12, 14), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "32-channels-in-tiles": ((1, 32, 5, 132), torch.float32, "contiguous", 7.5, {}),
    "64-channels-in-tiles": ((1, 64, 7, 68), torch.float16, "channels_last", 7.5, {"rescale": 0.7}),
}


def random_inputs(rng, shape, dtype, layout, cell, tokens=5):
    batch, _, height, width = shape
    u = torch.randn(shape, generator=rng)
    c = (u + torch.randn(shape, generator=rng)).to(dtype)
    grid = (batch, -(-height // cell), -(-width // cell))
    ids = torch.randint(0, tokens, grid, generator=rng)
    return as_layout(u.to(dtype), layout), as_layout(c, layout), ids, torch.rand(grid, generator=rng) < 0.5


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "dtype", "layout", "scale", "options"), **by_name(CASES))
def test_guided_prediction(rng, arch, shape, dtype, layout, scale, options):
    options = {"num_tokens": 7, **options}
    tokens = max(5, options["num_tokens"] - 2)  # the last two have no region
    u, c, ids, foreground = random_inputs(rng, shape, dtype, layout, options.get("cell", 4), tokens)
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


PARTS = {
    # name: (rows of cells of a program, options), of an image of five: its last part is one row, half of it absent
    "guided": (2, {}),
    "rescaled": (2, {"rescale": 0.7}),
    "unconditional": (1, {"rewrite": "unconditional"}),
    "paper": (1, {"fidelity": "paper", "rescale": 1.0}),
    "image": (2, {"benchmark": "image"}),
}


def in_parts(rows, u, c, ids, foreground, scale, num_tokens, rescale=0.0, **options):
    """`guide` with `rows` rows of eight cells per program, whose programs meet."""
    values = {"fidelity": "official", "rewrite": "guided", "benchmark": "foreground", **options}
    config = GuideConfig(2, 1, 16, rows, 8, held=True, block_c=4, rows=rows, lines=4)
    return KERNELS["guide"](
        u, c, ids, foreground, scale, num_tokens, 4, 0.8, 3.0, 15.0, 0.5, values["fidelity"], values["rewrite"],
        rescale, values["benchmark"], config,
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "options"), **by_name(PARTS))
def test_programs_that_share_an_image(rng, arch, rows, options):
    """Three samples, in guard zones. The second launch finds its counters as the first did: zero."""
    inputs = random_inputs(rng, (3, 4, 18, 25), torch.float16, "contiguous", 4, 21)
    inputs = *inputs, torch.tensor([7.5, 3.0, 5.0])
    actual, (launch,) = run(arch, lambda: in_parts(rows, *inputs, 23, **options))
    again, _ = run(arch, lambda: in_parts(rows, *inputs, 23, **options))
    assert launch.counters.ctas == 3 * -(-5 // rows) and launch.counters.float_atomics == 0
    naive = guide(*inputs, num_tokens=23, **options)
    truth = guide(inputs[0].double(), inputs[1].double(), *inputs[2:], num_tokens=23, **options)
    for name, x, x2, y, z in zip(("result", "rate"), actual, again, naive, truth, strict=True):
        assert torch.equal(x, x2)
        assert_as_accurate_as(x, y, z, name=name)


@pytest.mark.parametrize(("height", "parts"), [(64, 1), (128, 4)])
def test_both_predictions_are_read_once(rng, height, parts):
    """Of Stable Diffusion 1.5 by one program, of SDXL by four that meet."""
    u, c, ids, foreground = random_inputs(rng, (1, 4, height, height), torch.float16, "contiguous", 4, 77)
    _, (launch,) = run(80, lambda: guide(u, c, ids, foreground, 7.5, num_tokens=77, backend="triton"))
    assert launch.counters.ctas == parts
    assert all(launch.counters.traffic[name].load_bytes == u.nbytes for name in ("uncond", "cond"))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("shared", [False, True], ids=["one-program", "programs-that-meet"])
def test_the_order_of_the_warps_changes_nothing(rng, rescale, shared):
    """Cells and rates go from thread to thread through memory, which starts as NaN here.

    Races are not looked for: warps that share a row of few cells write the same sum to the same place.
    """
    inputs = random_inputs(rng, (1, 4, 20, 28), torch.float16, "contiguous", 4)
    results = []
    for order in ("lockstep", "forward", "backward"):
        with simulated(80, check_races=False, order=order), PoisonedMemory():
            if shared:
                results.append(in_parts(2, *inputs, torch.tensor(7.5), 5, rescale))
            else:
                results.append(guide(*inputs, 7.5, num_tokens=5, rescale=rescale, backend="triton"))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_beside_a_tensor_is_touched(rng, arch):
    """4 x 7 cells in a block of 4 x 8, 11 tokens in 16 and 13 x 25 pixels in 16 x 32. Idle pixels of a line would write
    to the next one, and those of a sample to the next sample."""
    inputs = random_inputs(rng, (3, 3, 13, 25), torch.float32, "contiguous", 4)
    scale = torch.tensor(7.5).expand(3)  # storage of one element
    call = functools.partial(guide, *inputs, scale, num_tokens=11, backend="triton")
    assert_nothing_beside_is_touched(arch, call, "out of bounds|different values|race")


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
