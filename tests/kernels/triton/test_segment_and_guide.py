"""Segmentation and guidance in one launch: the same regions as the two launches, and the same rates up to rounding."""

from __future__ import annotations

import functools

import pytest
import torch
from scfg_kernels import guide, segment, segment_and_guide
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from tests.kernels.cases import TOKENS, assert_agrees_with_reference, by_name, random_layers
from tests.kernels.triton.simulation import ARCHITECTURES, assert_nothing_beside_is_touched, run

STRIDED = torch.tensor([7.5, torch.nan, 9.5, torch.nan, 3.0, torch.nan])[::2]
CASES = {
    # name: (latent, batch, channels, dtype, layout, guidance scale, token mask, options); 11 tokens if not said
    "plain": ((24, 28), 1, 4, torch.float16, "contiguous", 7.5, False, {}),
    "sliced": ((23, 28), 2, 4, torch.bfloat16, "sliced", torch.tensor([7.5, 4.0]), False, {"rewrite": "unconditional"}),
    "ragged": ((13, 25), 3, 3, torch.float32, "channels_last", STRIDED, True, {}),
    "paper": ((13, 25), 1, 4, torch.float32, "contiguous", 5.0, True, {"fidelity": "paper", "blur_sigma": 0.0}),
    "rescaled": ((13, 25), 2, 4, torch.float16, "contiguous", torch.tensor([7.5, 4.0]), False, {"rescale": 0.7}),
    "deepfloyd": ((9, 7), 2, 3, torch.float32, "contiguous", 7.0, False, {"benchmark": "image", "rate_min": None}),
    "many-cells": ((66, 63), 1, 4, torch.float16, "contiguous", 7.5, False, {}),
    "cells-of-three": ((7, 10), 2, 1, torch.float32, "contiguous", torch.tensor(5.0).expand(2), False, {"cell": 3}),
    "63-tokens": ((13, 25), 1, 4, torch.float16, "contiguous", 7.5, False, {"tokens": 63, "rewrite": "unconditional"}),
    "78-tokens": ((13, 25), 1, 3, torch.float32, "channels_last", 7.5, True, {"tokens": 78}),
    "expanded-300-tokens": ((13, 25), 3, 4, torch.float16, "expanded", STRIDED, False, {"tokens": 300}),
    "64-channels": ((12, 14), 1, 64, torch.bfloat16, "contiguous", 7.5, False, {"rescale": 0.7}),
    "1089-cells": ((132, 130), 1, 2, torch.float16, "contiguous", 7.5, False, {"tokens": 3}),
}


def random_inputs(rng, latent, batch, channels, dtype, layout, masked, cell=4, paired=False, tokens=11):
    """Positional arguments but for the scale, and the token mask. Every tensor but a sliced one has exact storage.

    `paired` start maps have the sum of all other tokens beside them.
    """
    h, w = (-(-length // cell) for length in latent)
    sizes = [(h, w), (h, w), (-(-h // 2), -(-w // 2))]
    maps = [torch.randn(batch, tokens, lh * lw, generator=rng).softmax(1) for lh, lw in sizes]
    starts = [torch.rand(batch, *(2,) * paired, lh * lw, generator=rng) for lh, lw in sizes]
    u, c = (torch.randn(batch, channels, *latent, generator=rng).to(dtype) for _ in range(2))
    mask = torch.rand(batch, tokens, generator=rng) < 0.5 if masked else None
    return (maps, starts, sizes, (h, w), as_layout(u, layout), as_layout(c, layout)), mask


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("latent", "batch", "channels", "dtype", "layout", "scale", "masked", "options"), **by_name(CASES)
)
def test_one_launch_gives_what_two_give(rng, arch, latent, batch, channels, dtype, layout, scale, masked, options):
    tokens = options.get("tokens", 11)
    options = {name: value for name, value in options.items() if name != "tokens"}
    cell, paired = options.get("cell", 4), "benchmark" in options  # DeepFloyd IF has both
    inputs, mask = random_inputs(rng, latent, batch, channels, dtype, layout, masked, cell, paired, tokens)
    call = {**options, "token_mask": mask, "backend": "triton"}
    (result, rate, ids, foreground), launches = run(arch, lambda: segment_and_guide(*inputs, scale, **call))
    assert len(launches) == 1

    def two_launches():
        *maps, u, c = inputs
        sigma = {"blur_sigma": options.get("blur_sigma", 0.5)}
        regions = segment(*maps, **sigma, token_mask=mask, backend="triton")
        return (*guide(u, c, *regions, scale, num_tokens=tokens, **options, backend="triton"), *regions)

    (result2, rate2, ids2, foreground2), launches = run(arch, two_launches)
    assert len(launches) == 2
    assert torch.equal(ids, ids2) and torch.equal(foreground, foreground2)
    # Sums over cells may run in another order in another kernel.
    torch.testing.assert_close(rate, rate2, rtol=1e-6, atol=0)
    precision = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, result2, rtol=precision, atol=precision)
    assert result.stride() == result2.stride()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_real_step(rng, arch, rescale):
    """Of Stable Diffusion 1.5: regions as the reference's, then what `guide` makes of them."""
    sizes = [(16, 16)] * 5 + [(8, 8)]
    tokens, start, cond, uncond = random_layers(rng, sizes, batch=1)
    u, c = torch.randn(2, 1, 4, 64, 64, generator=rng).half()
    call = functools.partial(segment_and_guide, tokens, start, sizes, (16, 16), u, c, 7.5, rescale=rescale)
    (result, rate, ids, foreground), launches = run(arch, lambda: call(backend="triton"))
    assert len(launches) == 1
    assert_agrees_with_reference(ids, foreground, cond, uncond, sizes, (16, 16))
    options = {"num_tokens": TOKENS, "rescale": rescale}
    naive = guide(u, c, ids, foreground, 7.5, **options)
    truth = guide(u.double(), c.double(), ids, foreground, 7.5, **options)
    for name, x, y, z in zip(("result", "rate"), (result, rate), naive, truth, strict=True):
        assert_as_accurate_as(x, y, z, name=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_beside_a_tensor_is_touched(rng, arch, batch):
    """4 x 7 cells in a block of 4 x 8, 11 tokens in blocks of 16 and 13 x 25 pixels in a tile of 16 x 32 leave idle
    lanes everywhere. Those of a row of cells would write to the next row, and those of a sample to the next one."""
    inputs, mask = random_inputs(rng, (13, 25), batch, 4, torch.float32, "contiguous", masked=True)
    scale = torch.tensor(7.5).expand(batch)  # storage of one element
    call = functools.partial(segment_and_guide, *inputs, scale, token_mask=mask, backend="triton")
    assert_nothing_beside_is_touched(arch, call, "out of bounds|different values|race")
