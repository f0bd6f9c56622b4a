"""The guidance kernel, executed: rate and result against torch in the same dtype and against an fp64 truth."""

from __future__ import annotations

import pytest
import torch
from ptxsim import simulated
from scfg_kernels import guide
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from tests.kernels.cases import by_name
from tests.kernels.triton.simulation import ARCHITECTURES, run

CASES = {
    # name: (shape [B, C, H, W], dtype, layout, guidance scale, options)
    "sd15": ((2, 4, 16, 24), torch.float16, "contiguous", 7.5, {}),
    "ragged-sliced": ((2, 4, 13, 18), torch.bfloat16, "sliced", torch.tensor([7.5, 3.0]), {}),
    "channels-last": ((1, 16, 8, 12), torch.float32, "channels_last", 5.0, {"rate_max": None, "max_scale": None}),
    "paper": ((1, 4, 8, 8), torch.float32, "contiguous", 7.5, {"fidelity": "paper", "blur_sigma": 0.0}),
    "unconditional": ((1, 4, 8, 8), torch.float16, "contiguous", 7.5, {"rewrite": "unconditional"}),
    "cells-of-three": ((1, 3, 7, 10), torch.float32, "contiguous", 7.5, {"cell": 3}),
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


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_no_foreground_is_one_rate_which_smoothing_keeps_to_the_bit(rng, fidelity):
    u, c, ids, foreground = random_inputs(rng, (1, 4, 8, 8), torch.float32, "contiguous", 4)
    options = {"num_tokens": 5, "fidelity": fidelity}
    (_, rate), _ = run(80, lambda: guide(u, c, ids, foreground & False, 7.5, **options, backend="triton"))
    assert torch.equal(rate, torch.full_like(rate, 0.8 if fidelity == "official" else 1.0))
