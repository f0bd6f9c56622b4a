"""Segmentation and guidance in one launch: the same regions as the two launches, and the same rates up to rounding."""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import guide, segment
from scfg_kernels._triton import KERNELS

from tests.kernels.triton.simulation import ARCHITECTURES, run

SIZES = [(6, 7), (6, 7), (3, 4)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rewrite", ["guided", "unconditional"])
def test_one_launch_gives_what_two_give(rng, arch, rewrite):
    batch, tokens = 2, 11
    maps = [torch.randn(batch, tokens, h * w, generator=rng).softmax(1) for h, w in SIZES]
    starts = [torch.rand(batch, h * w, generator=rng) for h, w in SIZES]
    u, c = (torch.randn(batch, 4, 23, 28, generator=rng).half() for _ in range(2))
    scale = torch.tensor([7.5, 4.0])
    flat = [length for size in SIZES for length in size]
    (result, rate, ids, foreground), launches = run(
        arch,
        lambda: KERNELS["segment_and_guide"](
            maps, starts, flat, None, u, c, scale, 4, 0.8, 3.0, 15.0, 0.5, "official", rewrite
        ),
    )
    assert len(launches) == 1

    def two_launches():
        regions = segment(maps, starts, SIZES, (6, 7), backend="triton")
        guided = guide(u, c, *regions, scale, num_tokens=tokens, rewrite=rewrite, backend="triton")
        return (*guided, *regions)

    (result2, rate2, ids2, foreground2), launches = run(arch, two_launches)
    assert len(launches) == 2
    assert torch.equal(ids, ids2) and torch.equal(foreground, foreground2)
    # Sums over cells may run in another order in another kernel.
    torch.testing.assert_close(rate, rate2, rtol=1e-6, atol=0)
    torch.testing.assert_close(result, result2, rtol=2e-3, atol=2e-3)
