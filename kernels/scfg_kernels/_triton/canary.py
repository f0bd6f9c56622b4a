"""A small kernel with what the others are made of: a product, exponentials, a sum, a gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._device import device_guard


@triton.jit
def canary_kernel(a, b, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    at = place[:, None] * SIZE + place[None, :]
    scores = tl.dot(tl.load(a + at), tl.trans(tl.load(b + at)))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    neighbours = tl.broadcast_to((SIZE - 1 - place)[None, :], [SIZE, SIZE])
    tl.store(out + at, weights + tl.gather(weights, neighbours, 1))


def disagreement(device: torch.device) -> str:
    """What differs from torch on a device; empty if nothing does."""
    size = 32
    a, b = (torch.linspace(-1, 1, size * size, device=device).mul(k).sin().view(size, size).half() for k in (37, 51))
    out = torch.full((size, size), float("nan"), device=device)
    with device_guard(device):
        canary_kernel[(1,)](a, b, out, SIZE=size, num_warps=4)
    expected = torch.softmax((a.double() @ b.double().T) * 0.6931471805599453, -1)
    off = (out.double() - (expected + expected.flip(1))).abs().max().item()
    return "" if off < 1e-4 else f"its result is {off:.1e} off"
