"""S-CFG in transformer pipelines, against their own `__call__` with its guidance line alone replaced."""

from __future__ import annotations

import pytest
import torch

import scfg_fast
from scfg_fast import SCFGConfig
from tests.pipelines.tiny_transformers import BATCH, TINY, Tiny
from tests.reference.transformers import reference_run

TOLERANCE = 5e-6
EVERYONE = list(range(BATCH))


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return TINY[request.param]


def run(pipe, call: dict) -> torch.Tensor:
    result = pipe(**call)[0]
    return result if isinstance(result, torch.Tensor) else torch.stack(list(result))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_it_is_the_method_and_stock_again_afterwards(tiny: Tiny) -> None:
    pipe = tiny.pipeline()
    stock = run(pipe, tiny.call(EVERYONE))
    handle = scfg_fast.enable(pipe)
    guided = run(pipe, tiny.call(EVERYONE))
    layers = [tuple(f"{name}.{part}" for part in tiny.layers) for name in dict.fromkeys(handle.stats.layers)]
    assert len(layers) >= 3 and handle.stats.steps_applied == 3 and not handle.stats.steps_skipped
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe, tiny.call(EVERYONE)), stock)
    expected = reference_run(pipe, tiny.call(EVERYONE), layers, tiny.layout, tiny.text_tokens)[0]
    expected = expected if isinstance(expected, torch.Tensor) else torch.stack(list(expected))
    assert distance(stock, expected) > 1e-3, "the effect must be visible"
    assert distance(guided, expected) <= TOLERANCE


def test_rates_of_one_are_stock_to_the_bit(tiny: Tiny) -> None:
    pipe = tiny.pipeline()
    stock = run(pipe, tiny.call(EVERYONE))
    handle = scfg_fast.enable(pipe, SCFGConfig(rate_min=1.0, rate_max=1.0, max_scale=None))
    ones = run(pipe, tiny.call(EVERYONE))
    assert handle.stats.steps_applied == 3
    if tiny.layout.two_pass:
        assert torch.equal(ones, stock)
    else:
        assert distance(ones, stock) <= TOLERANCE
