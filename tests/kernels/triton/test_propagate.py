"""The propagation kernel, executed: against torch in the same dtype and against an fp64 truth."""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import propagate
from scfg_kernels._launch import PropagateConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from lab.ptxsim import simulated
from tests.kernels.cases import by_name, random_maps, random_qkv
from tests.kernels.triton.simulation import assert_nothing_beside_is_touched, run

CASES = {
    # name: (arch, shape [batch, heads, queries, keys, head_dim], columns, dtype of q and k, layout)
    "sdxl": (80, (1, 4, 20, 100, 64), 77, torch.float16, "projection"),
    "sdxl-sm90": (90, (1, 4, 20, 100, 64), 77, torch.float16, "projection"),
    "sd15-one-column": (80, (3, 2, 17, 78, 40), 1, torch.bfloat16, "expanded"),
    "more-heads-than-warps": (90, (2, 10, 5, 33, 16), 17, torch.float16, "projection"),
    "more-columns-than-a-program-takes": (80, (1, 2, 17, 40, 72), 150, torch.bfloat16, "sliced"),
    "fp32": (90, (1, 2, 17, 63, 80), 77, torch.float32, "projection"),
    "fp32-batch-3": (80, (3, 2, 17, 63, 80), 63, torch.float32, "sliced"),
    "300-columns": (80, (1, 2, 17, 40, 72), 300, torch.float16, "contiguous"),
    "head-96": (90, (3, 2, 17, 78, 96), 78, torch.bfloat16, "projection"),
    "head-128": (90, (1, 2, 17, 63, 128), 77, torch.float16, "projection"),
    "sd15-32x32-of-two-heads": (80, (1, 2, 64, 1024, 80), 77, torch.float16, "projection"),
    "head-160": (80, (1, 3, 9, 40, 160), 77, torch.float16, "contiguous"),
}


@pytest.mark.parametrize(("arch", "shape", "columns", "dtype", "layout"), **by_name(CASES))
def test_result(rng, arch, shape, columns, dtype, layout):
    q, k, _ = (as_layout(x, layout) for x in random_qkv(rng, shape, dtype))
    x = (
        random_maps(rng, shape[0], columns, shape[3]).mT
        if layout == "sliced"
        else random_maps(rng, shape[0], shape[3], columns, dtype=dtype)
    )
    result, launches = run(arch, lambda: propagate(q, k, x, backend="triton"))
    assert len(launches) == 1 and launches[0].counters.float_atomics == 0
    assert result.dtype == torch.float32
    assert_as_accurate_as(result, propagate(q, k, x), propagate(q.double(), k.double(), x.double()))
    if layout == "projection":  # others are not loaded in vectors of 16 bytes
        assert launches[0].counters.shared_wavefronts <= 1.1 * launches[0].counters.shared_wavefronts_ideal


def test_a_program_of_32_rows_has_the_result_of_two_of_16(rng):
    q, k, _ = random_qkv(rng, (1, 4, 32, 40, 64), torch.float16)
    x = random_maps(rng, 1, 40, 77)
    results = []
    for rows in (16, 32):
        config = PropagateConfig(4, 1, block_m=rows, block_n=16, map_n=16, block_t=(64, 16), precision="tf32x3")
        result, launches = run(80, lambda config=config: KERNELS["propagate"](q, k, x, 0.125, config))
        assert launches[0].counters.ctas == 32 // rows * (4 + 1)
        results.append(result)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


def test_bytes_at_4096_keys(rng):
    """64 rows of the 4096, two heads: k twice, x and the result once, q once more for every 32 keys."""
    q, k, _ = (as_layout(x, "projection") for x in random_qkv(rng, (1, 2, 64, 4096, 64), torch.float16))
    x = random_maps(rng, 1, 4096, 80)
    result, launches = run(80, lambda: propagate(q, k, x, backend="triton"))
    assert_as_accurate_as(result, propagate(q, k, x), propagate(q.double(), k.double(), x.double()))
    traffic = launches[0].counters.traffic
    for name, bytes_moved in (("q", 129 * q.nbytes), ("k", 2 * k.nbytes), ("x", x.nbytes), ("out", result.nbytes)):
        assert traffic[name].moved_bytes == bytes_moved


def test_result_does_not_depend_on_the_order_of_warps(rng):
    q, k, _ = random_qkv(rng, (1, 5, 9, 20, 16), torch.float16)
    x = random_maps(rng, 1, 20, 7)
    results = []
    for order in ("lockstep", "lockstep", "forward", "backward"):
        with simulated(80, order=order, check_races=order == "lockstep"):
            results.append(propagate(q, k, x, backend="triton"))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_nothing_beside_a_tensor_is_touched(rng):
    """37 rows in a block of 64, and 21 columns in 32. Idle rows of a sample would write to the next one's."""
    q, k, _ = random_qkv(rng, (2, 2, 37, 37, 40), torch.float16)
    x = random_maps(rng, 2, 37, 21)
    call = lambda: (propagate(q, k, x, backend="triton"),)  # noqa: E731
    assert_nothing_beside_is_touched(80, call, "out of bounds|different values|race")


def test_nothing_to_do_launches_nothing(rng):
    q, k, _ = random_qkv(rng, (1, 2, 9, 20, 40), torch.float16)
    result, launches = run(80, lambda: propagate(q, k, torch.zeros(1, 20, 0), backend="triton"))
    assert (result.shape, launches) == ((1, 9, 0), [])
