"""The per-pixel guidance kernel, executed: rate and result against torch in the same dtype and an fp64 truth."""

from __future__ import annotations

import functools

import pytest
import torch
from scfg_kernels import guide_pixels
from scfg_kernels._launch import PixelConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from lab.ptxsim import simulated
from tests.kernels.cases import by_name
from tests.kernels.triton.simulation import ARCHITECTURES, PoisonedMemory, assert_nothing_beside_is_touched, run

STRIDED = torch.tensor([7.5, torch.nan, 3.0, torch.nan, 5.0, torch.nan])[::2]
CASES = {
    # name: (shape [B, C, H, W], dtype, layout, guidance scale, options)
    "sd15": ((1, 4, 64, 64), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "sdxl": ((1, 4, 128, 128), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "two-samples": ((2, 4, 16, 24), torch.float16, "contiguous", 7.5, {}),
    "expanded": ((3, 4, 13, 18), torch.bfloat16, "expanded", STRIDED, {"rate_min": 0.5, "rate_max": 1.5}),
    "ragged-sliced": ((2, 4, 13, 18), torch.bfloat16, "sliced", torch.tensor([7.5, 3.0]), {}),
    "channels-last": ((3, 16, 8, 12), torch.float32, "channels_last", STRIDED, {"rate_min": 0.4, "rate_max": 1.0}),
    "unconditional": ((1, 4, 8, 8), torch.float16, "contiguous", 7.5, {"rewrite": "unconditional"}),
    "one-channel": ((2, 1, 7, 9), torch.float32, "strided", torch.tensor(7.5).expand(2), {}),
    "several-blocks": ((1, 3, 65, 67), torch.float32, "contiguous", 7.5, {}),
    "rescaled": ((2, 4, 16, 24), torch.float16, "contiguous", 7.5, {"rescale": 0.7}),
    "rescaled-several-blocks": ((1, 3, 65, 67), torch.float32, "contiguous", 7.5, {"rescale": 1.0}),
}


def random_inputs(rng, shape, dtype=torch.float32, layout="contiguous"):
    """Two predictions whose difference varies in strength over the picture."""
    u = torch.randn(shape, generator=rng)
    strength = torch.randn(shape[0], 1, *shape[2:], generator=rng).exp()
    c = (u + strength * torch.randn(shape, generator=rng)).to(dtype)
    return as_layout(u.to(dtype), layout), as_layout(c, layout)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "dtype", "layout", "scale", "options"), **by_name(CASES))
def test_guided_prediction(rng, arch, shape, dtype, layout, scale, options):
    u, c = random_inputs(rng, shape, dtype, layout)
    actual, launches = run(arch, lambda: guide_pixels(u, c, scale, **options, backend="triton"))
    naive = guide_pixels(u, c, scale, **options)
    truth = guide_pixels(u.double(), c.double(), scale, **options)
    assert len(launches) == 1
    for name, x, y, z in zip(("result", "rate"), actual, naive, truth, strict=True):
        assert (x.dtype, x.stride()) == (y.dtype, y.stride())
        assert_as_accurate_as(x, y, z, name=name)


IN_PARTS = PixelConfig(2, 1, True, 4, 64)
"""Programs of 64 pixels that meet; of 13 x 25 pixels the last one has 5."""


@pytest.mark.parametrize(("rewrite", "rescale"), [("guided", 0.0), ("guided", 0.7), ("unconditional", 0.0)])
def test_fewer_pixels_at_a_time_give_the_same(rng, rewrite, rescale):
    u, c = random_inputs(rng, (2, 4, 13, 25))
    scale, options = torch.tensor([7.5, 3.0]), (0.5, 1.5, rewrite, rescale)
    expected = guide_pixels(u, c, scale, rate_min=0.5, rate_max=1.5, rewrite=rewrite, rescale=rescale)
    tiles = PixelConfig(4, 1, False, 4, 128), PixelConfig(1, 2, False, 8, 256), PixelConfig(8, 1, True, 4, 512)
    for config in (*tiles, IN_PARTS):
        call = functools.partial(KERNELS["guide_pixels"], u, c, scale, *options, config)
        (result, rate), (launch,) = run(80, call)
        assert launch.counters.ctas == (2 * 6 if config is IN_PARTS else 2)
        torch.testing.assert_close(rate, expected[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("rewrite", "rescale"), [("guided", 0.7), ("unconditional", 0.0)])
def test_programs_that_share_an_image(rng, arch, rewrite, rescale):
    """The second launch finds its counters as the first did: zero."""
    u, c = random_inputs(rng, (3, 4, 13, 25), torch.float16)
    scale = torch.tensor([7.5, 3.0, 5.0])
    options = {"rate_min": 0.5, "rate_max": 1.5, "rewrite": rewrite, "rescale": rescale}
    found = []
    for _ in range(2):
        call = functools.partial(KERNELS["guide_pixels"], u, c, scale, 0.5, 1.5, rewrite, rescale, IN_PARTS)
        found.append(run(arch, call)[0])
    naive = guide_pixels(u, c, scale, **options)
    truth = guide_pixels(u.double(), c.double(), scale, **options)
    for name, x, x2, y, z in zip(("result", "rate"), *found, naive, truth, strict=True):
        assert torch.equal(x, x2)
        assert_as_accurate_as(x, y, z, name=name)


def test_both_bounds_are_met_to_the_bit_and_no_guidance_is_the_upper_one(rng):
    u, c = random_inputs(rng, (2, 4, 13, 18))
    c[1] = u[1]
    (result, rate), _ = run(80, lambda: guide_pixels(u, c, 7.5, rate_min=0.7, rate_max=1.6, backend="triton"))
    energy = (c[0] - u[0]).square().mean(0).flatten()
    rates = rate[0].flatten()
    assert rates[energy.argmin()] == rates.max() == torch.tensor(1.6)
    assert rates[energy.argmax()] == rates.min() == torch.tensor(0.7)
    assert torch.equal(rate[1], torch.full_like(rate[1], 1.6)) and torch.equal(result[1], u[1])


def test_a_rate_of_one_has_the_bits_of_plain_guidance(rng):
    u, c = random_inputs(rng, (1, 4, 13, 18))
    options = {"rate_min": 1.0, "rate_max": 1.0, "backend": "triton"}
    (result, rate), _ = run(80, lambda: guide_pixels(u, c, 7.5, **options))
    assert torch.equal(rate, torch.ones_like(rate)) and torch.equal(result, u + 7.5 * (c - u))
    (same, _), _ = run(80, lambda: guide_pixels(u, c, 7.5, **options, rewrite="unconditional"))
    assert torch.equal(same, u)


@pytest.mark.parametrize("shape", [(2, 3, 13, 18), (1, 1, 1, 1)], ids=["constant", "one-element"])
def test_what_has_no_spread_is_not_rescaled(shape):
    u, c = torch.full(shape, 0.3), torch.full(shape, 1.7)
    call = functools.partial(guide_pixels, u, c, 5.0, rate_max=1.5, rescale=0.7, backend="triton")
    (result, rate), _ = run(80, call)
    assert torch.equal(rate, torch.full_like(rate, 1.5)) and torch.equal(result, u + 5.0 * 1.5 * (c - u))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("config", [None, IN_PARTS], ids=["one-program", "programs-that-meet"])
def test_the_order_of_the_warps_changes_nothing(rng, rescale, config):
    """Energies and rates may go from thread to thread through memory, which starts as NaN here."""
    u, c = random_inputs(rng, (1, 4, 24, 28), torch.float16)
    results = []
    for order in ("lockstep", "forward", "backward"):
        with simulated(80, order=order), PoisonedMemory():
            results.append(KERNELS["guide_pixels"](u, c, torch.tensor(7.5), 0.5, 1.5, "guided", rescale, config))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("rescale", "tiles", "times"),
    [(0.0, None, 1), (0.7, None, 1), (0.0, (False, 4, 64), 2), (0.7, (False, 4, 64), 4)],
)
def test_bytes_and_no_atomics(rng, rescale, tiles, times):
    """Predictions that fit in registers are read once."""
    u, c = random_inputs(rng, (1, 4, 16, 24), torch.float16)
    config = PixelConfig(1, 1, *tiles) if tiles else None
    call = functools.partial(
        KERNELS["guide_pixels"], u, c, torch.tensor(7.5), 0.5, 1.5, "guided", rescale, config
    )  # fmt: skip
    _, (launch,) = run(80, call)
    traffic = launch.counters.traffic
    assert traffic["uncond"].load_bytes == traffic["cond"].load_bytes == times * 2 * u.numel()
    assert traffic["result"].store_bytes == 2 * u.numel() and traffic["rate_out"].store_bytes == u.numel()
    assert launch.counters.atomics == 0


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_nothing_beside_a_tensor_is_touched(rng, rescale):
    u, c = random_inputs(rng, (3, 4, 13, 25))
    scale = torch.tensor(7.5).expand(3)  # storage of one element
    call = functools.partial(guide_pixels, u, c, scale, rescale=rescale, backend="triton")
    assert_nothing_beside_is_touched(80, call)
