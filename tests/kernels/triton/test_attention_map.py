"""The kernels of attention maps, executed: against torch's implementation, and against an fp64 truth."""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import attention_map, attention_maps, joint_attention_maps
from scfg_kernels._triton import KERNELS
from scfg_kernels._triton.attention_map import MapConfig, row_lse
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from lab.ptxsim import SimError, simulated
from lab.ptxsim.tests.mutations import without_masks
from tests.kernels.cases import by_name, random_qkv
from tests.kernels.triton.simulation import ARCHITECTURES, run

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = {
    # name: (shape [batch, heads, queries, keys, head_dim], dtype, layout)
    "sd15": ((1, 8, 20, 77, 40), HALF, "projection"),
    "one-query": ((1, 2, 1, 78, 64), BRAIN, "contiguous"),
    "one-key": ((1, 2, 18, 1, 64), HALF, "contiguous"),
    "expanded": ((3, 2, 17, 63, 80), BRAIN, "expanded"),
    "sliced": ((1, 2, 17, 78, 72), HALF, "sliced"),
    "head-160": ((1, 3, 19, 77, 160), HALF, "projection"),
    "300-tokens": ((1, 2, 33, 300, 64), HALF, "projection"),
    "fp32": ((3, 1, 40, 99, 40), SINGLE, "sliced"),
    "fp32-160": ((1, 2, 17, 77, 160), SINGLE, "projection"),
}
# One architecture each: other head sizes, more keys than a tile has.
MORE_CASES = {
    "head-16": (80, (2, 10, 17, 133, 16), BRAIN, "projection"),
    "head-96": (80, (1, 2, 17, 78, 96), BRAIN, "projection"),
    "head-128": (90, (1, 2, 17, 150, 128), HALF, "projection"),
    "head-300": (80, (1, 2, 17, 40, 300), HALF, "contiguous"),
    "head-512": (90, (1, 1, 17, 40, 512), HALF, "contiguous"),
    "head-5": (80, (1, 2, 17, 40, 5), HALF, "contiguous"),
    "fp32-300": (90, (1, 1, 17, 40, 300), SINGLE, "contiguous"),
    "1200-keys": (90, (1, 1, 70, 1200, 64), HALF, "projection"),
    "sd15-16x16": (80, (1, 2, 256, 256, 160), HALF, "projection"),
    "sdxl-32x32-64-rows": (90, (1, 20, 64, 1024, 64), HALF, "projection"),
}


def operands(rng, shape, dtype, layout):
    q, k, _ = random_qkv(rng, shape, dtype)
    return as_layout(q, layout), as_layout(k, layout)


def truth_of(q, k, bias=None):
    """Map and log-sum-exp in fp64."""
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    return scores.softmax(-1).mean(1), scores.logsumexp(-1)


def check(found, q, k):
    truth, _ = truth_of(q, k)
    assert found.dtype == torch.float32 and found.is_contiguous()
    if q.dtype != SINGLE and k.shape[2] > 1:  # a softmax over one key is exact
        half = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)
        assert_as_accurate_as(found, half, truth, name="map")
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-7)


def check_map(rng, arch, shape, dtype, layout):
    q, k = operands(rng, shape, dtype, layout)
    lse = truth_of(q, k)[1].float()
    given, launches = run(arch, lambda: attention_map(q, k, lse, backend="triton"))
    assert [launch.kernel for launch in launches] == ["map_kernel"]
    check(given, q, k)
    found, launches = run(arch, lambda: attention_map(q, k, backend="triton"))
    assert [launch.kernel for launch in launches] == ["lse_kernel", "map_kernel"]
    check(found, q, k)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "dtype", "layout"), **by_name(CASES))
def test_map_with_and_without_the_lse(rng, arch, shape, dtype, layout):
    check_map(rng, arch, shape, dtype, layout)


@pytest.mark.parametrize(("arch", "shape", "dtype", "layout"), **by_name(MORE_CASES))
def test_map_of_more_sizes(rng, arch, shape, dtype, layout):
    check_map(rng, arch, shape, dtype, layout)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_the_lse_itself(rng, arch, dtype):
    q, k = operands(rng, (2, 3, 40, 150, 64), dtype, "projection")
    found, _ = run(arch, lambda: row_lse(q, k, 0.125))
    torch.testing.assert_close(found.double(), truth_of(q, k)[1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["bhn", "bnh", "sliced"])
def test_the_lse_may_lie_in_any_order(rng, arch, layout):
    q, k = operands(rng, (2, 3, 20, 30, 16), HALF, "projection")
    lse = truth_of(q, k)[1].float()
    if layout == "bnh":
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":  # rows filled up to a multiple of 32, as torch's efficient attention leaves them
        lse = torch.cat([lse, torch.full((2, 3, 12), torch.nan)], 2)[:, :, :20]
    found, _ = run(arch, lambda: attention_map(q[1:], k[1:], lse[1:], backend="triton"))
    check(found, q[1:], k[1:])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_two_maps_in_one_launch_have_the_bits_of_the_layers_alone(rng, arch, dtype):
    q1, k1 = operands(rng, (2, 3, 70, 70, 40), dtype, "projection")
    q2, k2 = operands(rng, (2, 3, 70, 77, 40), dtype, "expanded")
    lse = [truth_of(q, k)[1].float() for q, k in ((q1, k1), (q2, k2))]
    (own, cross), launches = run(arch, lambda: attention_maps(q1, k1, lse[0], q2, k2, lse[1], backend="triton"))
    assert len(launches) == 1
    check(own, q1, k1)
    check(cross, q2, k2)
    with simulated(arch):
        assert torch.equal(own, attention_map(q1, k1, lse[0], backend="triton"))
        assert torch.equal(cross, attention_map(q2, k2, lse[1], backend="triton"))


def test_layers_that_differ_take_two_launches(rng):
    q1, k1 = operands(rng, (1, 3, 20, 20, 40), HALF, "projection")
    q2, k2 = operands(rng, (1, 2, 20, 77, 24), HALF, "projection")
    lse = [truth_of(q, k)[1].float() for q, k in ((q1, k1), (q2, k2))]
    (own, cross), launches = run(80, lambda: attention_maps(q1, k1, lse[0], q2, k2, lse[1], backend="triton"))
    assert len(launches) == 2
    check(own, q1, k1)
    check(cross, q2, k2)


JOINT = {
    # name: (arch, grid, pool, tokens beyond the grid, text tokens, bias, dtype, head size)
    "pooled": (80, (6, 8), 2, 0, 20, True, HALF, 64),
    "pooled-sm90": (90, (6, 8), 2, 0, 20, True, HALF, 64),
    "ragged-cells": (80, (7, 9), 2, 0, 33, False, BRAIN, 40),
    "cells-of-16": (90, (9, 10), 4, 0, 20, True, SINGLE, 24),
    "reference-image": (80, (5, 6), 1, 11, 20, True, HALF, 64),
    "text-alone": (90, (8, 8), 4, 0, 20, True, HALF, 64),
    "image-alone": (80, (6, 8), 2, 0, 0, False, HALF, 64),
}


@pytest.mark.parametrize(("arch", "grid", "pool", "more", "tokens", "biased", "dtype", "dim"), **by_name(JOINT))
def test_joint_maps_are_torchs(request, rng, arch, grid, pool, more, tokens, biased, dtype, dim):
    count = grid[0] * grid[1]
    q, image = operands(rng, (2, 3, count, count + more, dim), dtype, "projection")
    text = random_qkv(rng, (2, 3, 1, max(1, tokens), dim), dtype)[1] if tokens else None
    image = None if "text-alone" in request.node.name else image
    bias = torch.zeros(2, tokens) if biased else None
    if bias is not None:
        bias[0, 15:], bias[1, 3] = -torch.inf, 0.5
    options = dict(grid=grid, pool=pool, bias=bias)
    found, launches = run(arch, lambda: joint_attention_maps(q, text, image, **options, backend="triton"))
    assert [launch.kernel for launch in launches] == ["lse_kernel", "map_kernel"]
    expected = joint_attention_maps(q, text, image, **options, backend="torch")
    for actual, twin in zip(found, expected, strict=True):
        assert (actual is None) == (twin is None)
        if twin is not None:
            torch.testing.assert_close(actual, twin, rtol=2e-5, atol=1e-7)
            torch.testing.assert_close(actual.sum(-1), torch.ones(actual.shape[:2]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("keys", [20, 133])
def test_results_do_not_depend_on_the_order_of_warps(rng, keys):
    q, k, _ = random_qkv(rng, (1, 10, 17, keys, 16), BRAIN)
    results = []
    for order in ("lockstep", "lockstep", "forward", "backward"):
        with simulated(80, order=order, check_races=order == "lockstep"):
            results.append(attention_map(q, k, backend="triton"))
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("config", [(16, 16, 0, 1, 1), (64, 32, 0, 4, 3), (32, 64, 32, 2, 1), (128, 64, 0, 8, 2)])
def test_other_tiles_give_the_same(rng, config):
    q, k = operands(rng, (1, 5, 19, 77, 40), HALF, "projection")
    lse = truth_of(q, k)[1].float()
    found, _ = run(80, lambda: KERNELS["attention_map"](q, k, lse, 40**-0.5, MapConfig(*config, precision="ieee")))
    check(found, q, k)


def test_nothing_beside_a_tensor_is_touched(rng):
    """Rows and keys beyond the last are the last, so only stores have masks; without them the simulator ends it."""
    q, k, _ = random_qkv(rng, (2, 2, 18, 77, 64), HALF)
    lse = truth_of(q, k)[1].float()
    with simulated(80) as simulation:
        exact = attention_map(q, k, lse, backend="triton")
    guarded, _ = run(80, lambda: attention_map(q, k, lse, backend="triton"))
    assert torch.equal(exact, guarded), "poison reached a result"
    (mutant,) = without_masks(simulation.launches[0].ptx)
    with (
        simulated(80, rewrite=lambda _: mutant.ptx),
        pytest.raises(SimError, match=r"out of bounds|different values|race"),
    ):
        attention_map(q, k, lse, backend="triton")


@pytest.mark.parametrize(("arch", "shape"), [(80, (1, 8, 256, 256, 160)), (90, (1, 20, 64, 1024, 64))])
def test_bytes_and_wavefronts_of_a_real_layer(rng, arch, shape):
    _, heads, rows, keys, dim = shape
    q, k = operands(rng, shape, HALF, "projection")
    lse = torch.zeros(1, heads, rows)
    config = MapConfig(64, 64, 0, 4, 2, "ieee")
    mean, launches = run(arch, lambda: KERNELS["attention_map"](q, k, lse, dim**-0.5, config))
    counters, traffic = launches[0].counters, launches[0].counters.traffic
    assert counters.shared_wavefronts <= 1.1 * counters.shared_wavefronts_ideal
    assert counters.float_atomics == 0
    assert counters.ctas == -(-rows // 64) * -(-keys // 64)
    moved = {name: part.moved_bytes for name, part in traffic.items()}
    assert moved["q1/q2"] == keys // 64 * q.nbytes and moved["k1/k2"] == rows // 64 * k.nbytes
    assert sum(part for name, part in moved.items() if name.startswith("out")) == mean.nbytes


def test_an_empty_batch_launches_nothing(rng):
    q, k, _ = (x[:0] for x in random_qkv(rng, (1, 2, 9, 77, 40), HALF))
    mean, launches = run(80, lambda: attention_map(q, k, backend="triton"))
    assert (mean.shape, launches) == ((0, 9, 77), [])


def test_auto_is_torch_for_cpu_tensors_even_in_simulation(rng):
    q, k, _ = random_qkv(rng, (1, 2, 9, 77, 40), HALF)
    _, launches = run(80, lambda: attention_map(q, k))
    assert launches == []
