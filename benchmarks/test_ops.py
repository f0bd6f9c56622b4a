"""The cases as pytest-benchmark tests, one group per case: `python -m pytest benchmarks --benchmark-only`.

pytest-benchmark times one provider after the other; for paired ratios with a control use `python -m benchmarks.run`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import registry
from benchmarks.report import environment
from lab.measure import fresh_compiler, seconds

SECONDS_PER_CASE = 1.0
RUNS = [
    pytest.param(case, provider, id=f"{case.name}-{provider}")
    for case in registry.CASES
    for provider in registry.PROVIDERS
    if not case.unavailable(provider)
]


@functools.lru_cache(maxsize=1)
def prepared_case(case: registry.Case) -> registry.Prepared:
    """Inputs and reference, kept for the providers of one case, which run one after the other."""
    fresh_compiler()
    with torch.no_grad():
        return registry.prepare(case)


@pytest.mark.parametrize(("case", "provider"), RUNS)
def test_op(benchmark, case: registry.Case, provider: str) -> None:
    prepared = prepared_case(case)
    with torch.no_grad():
        prepared.check(provider)
        call = prepared.call(provider)
        rounds = max(3, min(30, int(SECONDS_PER_CASE / seconds(call))))
        benchmark.group = case.name
        benchmark.name = provider
        benchmark.extra_info.update(flops=case.operator.flops(case), bytes=case.operator.bytes(case), **environment())
        benchmark.pedantic(call, rounds=rounds, iterations=1)
