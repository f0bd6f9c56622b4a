"""What another processor would compute: the same run with every weight one rounding away; how far two runs are apart.

A comparison of two runs must come out alike on every processor. One that another order of sums can turn over compares
near ties. `otherwise_rounded` moves one of the two runs by what an order of sums moves it, so that such a comparison
fails on every processor, not on some.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest expected value; in fp64."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@contextlib.contextmanager
def otherwise_rounded(*owners: Any, seed: int = 0) -> Iterator[None]:
    """Every weight is the next number above or below, at random; at the end each is what it was, bit by bit.

    Args:
        owners: modules, or pipelines with modules among their components.
        seed: of the choice.

    Raises:
        ValueError: no owner has a floating-point weight.
    """
    modules = [
        part
        for owner in owners
        for part in ([owner] if isinstance(owner, torch.nn.Module) else owner.components.values())
        if isinstance(part, torch.nn.Module)
    ]
    weights = {id(weight): weight for module in modules for weight in module.parameters()}
    moved = [weight for weight in weights.values() if weight.dtype in (torch.float32, torch.float64)]
    if not moved:
        raise ValueError("otherwise_rounded: no owner has a weight in fp32 or fp64")
    generator = torch.Generator().manual_seed(seed)
    before = [weight.detach().clone() for weight in moved]
    with torch.no_grad():
        for weight in moved:
            up = torch.rand(weight.shape, generator=generator) < 0.5
            weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf).to(weight.dtype)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(moved, before, strict=True):
                weight.copy_(kept)
