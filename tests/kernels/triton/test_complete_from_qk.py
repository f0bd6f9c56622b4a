"""Completion from queries and keys with the kernel of `propagate`, executed: two launches, equal bits of two runs."""

from __future__ import annotations

import pytest
import torch
from ptxsim import simulated
from scfg_kernels import complete_from_qk
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from tests.kernels.cases import by_name, random_maps, random_qkv
from tests.kernels.triton.simulation import run

CASES = {
    # name: (arch, shape [batch, heads, queries, keys, head_dim], columns, dtype, fidelity, launches)
    "both-halves-in-one": (80, (2, 2, 20, 20, 40), 77, torch.float16, "official", 2),
    "sm90": (90, (2, 2, 20, 20, 64), 77, torch.bfloat16, "official", 2),
    "halves-apart": (80, (2, 2, 20, 20, 40), 140, torch.float16, "official", 4),
    "paper": (80, (2, 2, 20, 20, 40), 5, torch.float16, "paper", 4),
}


@pytest.mark.parametrize(("arch", "shape", "columns", "dtype", "fidelity", "launched"), **by_name(CASES))
def test_result(rng, arch, shape, columns, dtype, fidelity, launched):
    q, k, _ = (as_layout(x, "projection") for x in random_qkv(rng, shape, dtype))
    c = random_maps(rng, shape[0], shape[2], columns)
    options = dict(unconditional=1, fidelity=fidelity)
    results, launches = run(arch, lambda: complete_from_qk(q, k, c, backend="triton", **options))
    assert len(launches) == launched and sum(launch.counters.float_atomics for launch in launches) == 0
    naive = complete_from_qk(q, k, c, **options)
    truth = complete_from_qk(q.double(), k.double(), c.double(), **options)
    for name, result, expected, exact in zip(("tokens", "start"), results, naive, truth, strict=True):
        assert_as_accurate_as(result, expected, exact, name=name)


def test_two_runs_are_equal_to_the_bit(rng):
    q, k, _ = random_qkv(rng, (2, 2, 17, 17, 16), torch.float16)
    c = random_maps(rng, 2, 17, 5)
    found = []
    for order in ("lockstep", "backward"):
        with simulated(80, order=order, check_races=order == "lockstep"):
            found.append(complete_from_qk(q, k, c, unconditional=1, backend="triton"))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
