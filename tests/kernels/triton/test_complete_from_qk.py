"""Completion from queries and keys, executed: one launch, against torch in the same dtype and an fp64 truth."""

from __future__ import annotations

import functools

import pytest
import torch
from scfg_kernels import attention_map, complete, complete_from_qk
from scfg_kernels._launch import PropagateConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from lab.ptxsim import simulated
from tests.kernels.cases import by_name, random_maps, random_qkv
from tests.kernels.triton.simulation import ARCHITECTURES, assert_nothing_beside_is_touched, run

CASES = {
    # name: (shape [batch, heads, queries, keys, head_dim], columns, unconditional, dtype, layout, options)
    "sdxl": ((3, 2, 70, 70, 64), 77, 2, torch.float16, "projection", {}),
    "sd15": ((3, 2, 37, 37, 40), 78, 2, torch.bfloat16, "projection", {}),
    "paper": ((2, 2, 37, 37, 40), 5, 1, torch.float16, "projection", {"fidelity": "paper"}),
    "more-columns-than-a-program-takes": ((2, 2, 20, 20, 40), 300, 1, torch.float16, "projection", {}),
    "paper-more-columns": ((3, 1, 33, 33, 16), 140, 2, torch.float16, "sliced", {"fidelity": "paper", "powers": 3}),
    "fp32": ((2, 2, 33, 33, 80), 63, 1, torch.float32, "projection", {}),
    "conditional-alone": ((1, 3, 17, 17, 160), 9, 0, torch.float16, "sliced", {"scale": 0.2}),
    "unconditional-alone": ((2, 2, 33, 33, 16), 20, 2, torch.float16, "expanded", {}),
    "one-power": ((2, 2, 20, 20, 16), 3, 1, torch.float16, "contiguous", {"powers": 1}),
}
# One architecture each: the other head sizes, and a real layer with fewer heads.
MORE_CASES = {
    "head-72": (80, (2, 2, 17, 17, 72), 5, 1, torch.bfloat16, "sliced"),
    "head-96": (90, (2, 2, 17, 17, 96), 5, 1, torch.float16, "projection"),
    "head-128": (80, (2, 2, 17, 17, 128), 5, 1, torch.bfloat16, "projection"),
    "sd15-32x32-of-one-head": (80, (1, 1, 1024, 1024, 80), 77, 0, torch.float16, "projection"),
    "sdxl-32x36-of-one-head": (90, (1, 1, 1152, 1152, 64), 9, 0, torch.float16, "projection"),
}


def check(rng, arch, shape, columns, unconditional, dtype, layout, options):
    q, k, _ = (as_layout(x, layout) for x in random_qkv(rng, shape, dtype))
    c = random_maps(rng, shape[0], shape[2], columns)
    if layout == "sliced":
        c = c.mT.contiguous().mT
    options = dict(unconditional=unconditional, **options)
    results, launches = run(arch, lambda: complete_from_qk(q, k, c, backend="triton", **options))
    assert len(launches) == 1 and launches[0].counters.float_atomics == 0
    naive = complete_from_qk(q, k, c, **options)
    truth = complete_from_qk(q.double(), k.double(), c.double(), **options)
    for name, result, expected, exact in zip(("tokens", "start"), results, naive, truth, strict=True):
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert_as_accurate_as(result, expected, exact, name=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "columns", "unconditional", "dtype", "layout", "options"), **by_name(CASES))
def test_result(rng, arch, shape, columns, unconditional, dtype, layout, options):
    check(rng, arch, shape, columns, unconditional, dtype, layout, options)


@pytest.mark.parametrize(("arch", "shape", "columns", "unconditional", "dtype", "layout"), **by_name(MORE_CASES))
def test_result_of_more_sizes(rng, arch, shape, columns, unconditional, dtype, layout):
    check(rng, arch, shape, columns, unconditional, dtype, layout, {})


def test_it_is_completion_by_the_map(rng):
    """The kernels of both ways: the same products of the same map, in tiles of other sizes."""
    q, k, _ = random_qkv(rng, (2, 3, 40, 40, 64), torch.float16)
    c = random_maps(rng, 2, 40, 77)
    found, _ = run(80, lambda: complete_from_qk(q, k, c, unconditional=1, backend="triton"))
    options = dict(unconditional=1, backend="triton")
    by_map, _ = run(80, lambda: complete(attention_map(q, k, backend="triton"), c, **options))
    for x, y in zip(found, by_map, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=0)


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_other_tiles_give_the_same(rng, fidelity):
    q, k, _ = random_qkv(rng, (2, 2, 50, 50, 40), torch.float16)
    c = random_maps(rng, 2, 50, 40)
    expected = complete_from_qk(q, k, c, unconditional=1, fidelity=fidelity)
    for block_m, map_n, block_t in ((16, 16, (16, 0)), (32, 64, (32, 16))):
        config = PropagateConfig(block_m // 16, 1, block_m, 16, map_n, block_t, "tf32x3")
        call = functools.partial(KERNELS["complete_from_qk"], q, k, c, 1, fidelity, 4, 40**-0.5, config)
        results, _ = run(80, call)
        for result, naive in zip(results, expected, strict=True):
            torch.testing.assert_close(result, naive, rtol=2e-5, atol=1e-7)


def test_the_scores_are_formed_once_for_the_softmax_and_once_per_product(rng):
    """128 rows in blocks of 64, four heads: q once and once more for every 32 keys and product, of a sample each."""
    q, k, _ = (as_layout(x, "projection") for x in random_qkv(rng, (2, 4, 128, 128, 64), torch.float16))
    c = random_maps(rng, 2, 128, 80)
    _, (launch,) = run(80, lambda: complete_from_qk(q, k, c, unconditional=1, backend="triton"))
    traffic = launch.counters.traffic
    assert traffic["q"].moved_bytes == (1 + 2 * 4) * q.nbytes and traffic["k"].moved_bytes == 3 * 2 * k.nbytes
    assert launch.counters.ctas == 2 * 2 * 4 + 2 * 2 * 2
    assert launch.counters.shared_wavefronts <= 1.1 * launch.counters.shared_wavefronts_ideal


def test_two_runs_are_equal_to_the_bit(rng):
    q, k, _ = random_qkv(rng, (2, 2, 37, 37, 16), torch.float16)
    c = random_maps(rng, 2, 37, 5)
    found = []
    for order in ("lockstep", "forward", "backward"):
        with simulated(80, order=order, check_races=order == "lockstep"):
            found.append(complete_from_qk(q, k, c, unconditional=1, backend="triton"))
    assert all(torch.equal(first, second) for other in found[1:] for first, second in zip(found[0], other, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_beside_a_tensor_is_touched(rng, arch):
    """37 rows in blocks of 64 or 32, and 21 columns in 32. Idle rows of a head would write to the next head's."""
    q, k, _ = random_qkv(rng, (2, 2, 37, 37, 40), torch.float16)
    c = random_maps(rng, 2, 37, 21)
    call = functools.partial(complete_from_qk, q, k, c, unconditional=1, backend="triton")
    assert_nothing_beside_is_touched(arch, call, "out of bounds|different values|race")


def test_nothing_to_do_launches_nothing(rng):
    q, k, _ = random_qkv(rng, (2, 2, 9, 9, 40), torch.float16)
    (tokens, start), launches = run(80, lambda: complete_from_qk(q[:0], k[:0], torch.zeros(0, 9, 7), backend="triton"))
    assert (tokens.shape, start.shape, launches) == ((0, 7, 9), (0, 9), [])
