"""The guidance kernel, executed: rate and result against torch in the same dtype and against an fp64 truth."""

from __future__ import annotations

import functools

import pytest
import torch
from ptxsim import simulated
from scfg_kernels import guide
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
    "whole-image": ((1, 3, 5, 10), torch.float32, "contiguous", 7.5, {"benchmark": "image"}),
    "cells-of-three": ((1, 3, 7, 10), torch.float32, "contiguous", 7.5, {"cell": 3}),
    "rescaled": ((2, 4, 16, 24), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "rescaled-ragged": ((2, 3, 13, 18), torch.float32, "sliced", torch.tensor([7.5, 3.0]), {"rescale": 1.0}),
    "rescaled-several-blocks": ((1, 2, 36, 40), torch.bfloat16, "channels_last", 7.5, {"rescale": 0.3}),
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


def test_only_rescaling_reads_the_predictions_a_third_time(rng):
    inputs = random_inputs(rng, (1, 4, 16, 24), torch.float16, "contiguous", 4)
    for rescale, times in ((0.0, 2), (0.7, 3)):
        call = functools.partial(guide, *inputs, 7.5, num_tokens=5, rescale=rescale, backend="triton")
        _, (launch,) = run(80, call)
        for name, x in zip(("uncond", "cond"), inputs, strict=False):
            assert launch.counters.traffic[name].load_bytes == times * x.numel() * x.element_size()


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_no_foreground_is_one_rate_which_smoothing_keeps_to_the_bit(rng, fidelity):
    u, c, ids, foreground = random_inputs(rng, (1, 4, 8, 8), torch.float32, "contiguous", 4)
    options = {"num_tokens": 5, "fidelity": fidelity}
    (_, rate), _ = run(80, lambda: guide(u, c, ids, foreground & False, 7.5, **options, backend="triton"))
    assert torch.equal(rate, torch.full_like(rate, 0.8 if fidelity == "official" else 1.0))
