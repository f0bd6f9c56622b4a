"""The attention kernels, executed: O and the map against torch in the same dtype and against an fp64 truth."""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import attention_map, cross_attention_map, self_attention_map
from scfg_kernels._launch import AttentionConfig, DeviceLimits, FlashConfig, flash_config
from scfg_kernels._triton import KERNELS
from scfg_kernels.attention_map import attention_with_map
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from lab.ptxsim import DEVICES, simulated
from tests.kernels.cases import by_name, random_qkv
from tests.kernels.triton.simulation import ARCHITECTURES, assert_nothing_beside_is_touched, run

CASES = {
    # name: (shape [batch, heads, queries, keys, head_dim], dtype, layout)
    "sd15": ((1, 8, 20, 77, 40), torch.float16, "projection"),
    "one-query": ((1, 2, 1, 78, 64), torch.bfloat16, "contiguous"),
    "expanded": ((3, 2, 17, 63, 80), torch.bfloat16, "expanded"),
    "sliced": ((1, 2, 17, 78, 72), torch.float16, "sliced"),
    "head-160": ((1, 3, 19, 77, 160), torch.float16, "projection"),
    "more-heads-than-warps": ((1, 10, 5, 20, 64), torch.float16, "projection"),
    "two-parts": ((1, 2, 33, 300, 64), torch.float16, "projection"),
    "two-parts-160": ((1, 3, 18, 140, 160), torch.bfloat16, "projection"),
    "512-tokens": ((1, 2, 16, 512, 64), torch.float16, "projection"),
}
# One architecture each: the other head sizes of both kernels, two parts in every layout, fp32.
MORE_CASES = {
    "head-96": (80, (1, 2, 17, 78, 96), torch.bfloat16, "projection"),
    "head-128": (90, (1, 2, 17, 63, 128), torch.float16, "projection"),
    "two-parts-40": (90, (3, 2, 17, 130, 40), torch.float16, "expanded"),
    "two-parts-72": (80, (1, 2, 17, 131, 72), torch.bfloat16, "sliced"),
    "two-parts-80": (90, (3, 1, 17, 144, 80), torch.float16, "projection"),
    "two-parts-96": (80, (1, 2, 9, 129, 96), torch.float16, "contiguous"),
    "two-parts-128": (90, (1, 2, 17, 150, 128), torch.bfloat16, "projection"),
    "two-parts-more-heads-than-warps": (80, (2, 10, 17, 133, 16), torch.bfloat16, "projection"),
    "fp32-40": (80, (1, 5, 17, 77, 40), torch.float32, "projection"),
    "fp32-64": (90, (1, 2, 17, 140, 64), torch.float32, "sliced"),
    "fp32-96": (80, (1, 3, 17, 133, 96), torch.float32, "projection"),
}


def check(q, k, v, out, mean):
    scale = q.shape[-1] ** -0.5
    naive_out, naive_mean = attention_with_map(q, k, v, scale)
    true_out, true_mean = attention_with_map(q.double(), k.double(), v.double(), scale)
    if out is not None:
        assert out.dtype == q.dtype
        assert out.transpose(1, 2).is_contiguous(), "the layer's projection reads [batch, queries, heads * head_dim]"
        assert_as_accurate_as(out, naive_out, true_out, name="output")
    assert mean.dtype == torch.float32
    if q.dtype == torch.float32:
        assert_as_accurate_as(mean, naive_mean, true_mean, name="map")
    else:
        half = (q @ k.mT * scale).softmax(-1).mean(1)
        assert_as_accurate_as(mean, half, true_mean, factor=1.0, name="map")
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-7)


def check_cross(rng, arch, shape, dtype, layout):
    q, k, v = (as_layout(x, layout) for x in random_qkv(rng, shape, dtype))
    (out, mean), launches = run(arch, lambda: cross_attention_map(q, k, v, backend="triton"))
    assert len(launches) == 1
    check(q, k, v, out, mean)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "dtype", "layout"), **by_name(CASES))
def test_output_and_map(rng, arch, shape, dtype, layout):
    check_cross(rng, arch, shape, dtype, layout)


@pytest.mark.parametrize(("arch", "shape", "dtype", "layout"), **by_name(MORE_CASES))
def test_output_and_map_of_more_sizes(rng, arch, shape, dtype, layout):
    check_cross(rng, arch, shape, dtype, layout)


SELF_CASES = {
    # name: (shape [batch, heads, queries, keys, head_dim], dtype, layout)
    "bf16": ((1, 2, 101, 101, 40), torch.bfloat16, "projection"),
    "fp32": ((3, 1, 99, 99, 40), torch.float32, "sliced"),
    "fp32-few-keys": ((1, 2, 17, 17, 80), torch.float32, "expanded"),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "dtype", "layout"), **by_name(SELF_CASES))
def test_self_attention(rng, arch, shape, dtype, layout):
    q, k, v = (as_layout(x, layout) for x in random_qkv(rng, shape, dtype))
    (out, mean), launches = run(arch, lambda: self_attention_map(q, k, v, backend="triton"))
    assert len(launches) == 1
    check(q, k, v, out, mean)


@pytest.mark.parametrize(("arch", "map_n"), [(80, 128), (90, 64)])
@pytest.mark.parametrize("shape", [(2, 2, 141, 141, 64), (1, 1, 1024, 1024, 64)], ids=["ragged", "sdxl-one-head"])
def test_programs_of_128_rows(rng, arch, map_n, shape):
    """What both samples of an SDXL layer get, at fewer heads; the last block of ragged rows has 13."""
    device = DEVICES[arch]
    limits = DeviceLimits(f"sm_{arch}", device.multiprocessors, device.shared_memory)
    config = flash_config(2, 20, 1024, 1024, 64, torch.float16, limits)
    assert (config.num_warps, config.block_m, config.map_n) == (8, 128, map_n)
    q, k, v = (as_layout(x, "projection") for x in random_qkv(rng, shape, torch.float16))
    (out, mean), (launch,) = run(arch, lambda: KERNELS["self_attention_map"](q, k, v, 0.125, config))
    blocks = -(-shape[2] // 128)
    assert launch.counters.ctas == shape[0] * blocks * (shape[1] + -(-shape[3] // map_n))
    check(q, k, v, out, mean)


MAP_CASES = {
    # name: (arch, shape [batch, heads, queries, keys, head_dim], dtype, layout)
    "expanded": (80, (3, 2, 17, 63, 40), torch.bfloat16, "expanded"),
    "expanded-sm90": (90, (3, 2, 17, 63, 40), torch.bfloat16, "expanded"),
    "sliced": (90, (1, 2, 17, 78, 40), torch.float32, "sliced"),
    "fp32": (80, (1, 2, 17, 300, 40), torch.float32, "projection"),
    "two-parts": (90, (3, 2, 17, 300, 40), torch.bfloat16, "sliced"),
    "sd15-16x16-64-rows": (80, (1, 8, 64, 256, 160), torch.float16, "projection"),
    "sdxl-32x32-text-64-rows": (90, (1, 20, 64, 77, 64), torch.float16, "projection"),
}


@pytest.mark.parametrize(("arch", "shape", "dtype", "layout"), **by_name(MAP_CASES))
def test_the_map_alone(rng, arch, shape, dtype, layout):
    q, k, _ = (as_layout(x, layout) for x in random_qkv(rng, shape, dtype))
    mean, launches = run(arch, lambda: attention_map(q, k, backend="triton"))
    assert len(launches) == 1
    check(q, k, k, None, mean)


REAL_LAYERS = {
    # name: (arch, shape [batch, heads, queries, keys, head_dim]). Queries are whole programs; the other programs of the
    # layer do the same on other rows.
    "sd15-16x16-self": (80, (1, 8, 256, 256, 160)),
    "sd15-16x16-cross": (90, (1, 8, 256, 77, 160)),
    "sdxl-32x32-self-64-rows": (90, (1, 20, 64, 1024, 64)),
    "sdxl-32x32-cross-4-of-64-programs": (80, (1, 20, 64, 77, 64)),
}


@pytest.mark.parametrize(("arch", "shape"), **by_name(REAL_LAYERS))
def test_bytes_and_wavefronts_of_a_real_layer(rng, arch, shape):
    _, heads, queries, keys, dim = shape
    q, k, v = (as_layout(x, "projection") for x in random_qkv(rng, shape, torch.float16))
    (out, mean), launches = run(arch, lambda: cross_attention_map(q, k, v, backend="triton"))
    true_out, true_mean = attention_with_map(q.double(), k.double(), v.double(), dim**-0.5)
    assert_as_accurate_as(out, attention_with_map(q, k, v, dim**-0.5)[0], true_out, name="output")
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-7)

    counters, traffic = launches[0].counters, launches[0].counters.traffic
    assert counters.shared_wavefronts <= 1.1 * counters.shared_wavefronts_ideal
    assert counters.float_atomics == 0
    once = [traffic["out"], traffic["mean"]]
    if keys <= 96:  # one sweep: programs of 16 rows and all heads
        programs = queries // 16
        assert counters.ctas == programs
        once.append(traffic["q"])
        assert traffic["k"].moved_bytes == programs * k.nbytes, "from the L2 cache after the first program"
    else:  # two parts: 64 rows of one head, then tiles of 64 keys
        blocks, tiles = -(-queries // 64), keys // 64
        assert counters.ctas == blocks * (heads + tiles)
        assert traffic["q"].moved_bytes == (1 + tiles) * q.nbytes
        assert traffic["k"].moved_bytes == 2 * blocks * k.nbytes
        programs = blocks
    assert traffic["v"].moved_bytes == programs * v.nbytes
    assert sum(x.moved_bytes for x in once) <= 1.2 * sum(x.unique_bytes for x in once)


@pytest.mark.parametrize("keys", [20, 133])
def test_results_do_not_depend_on_the_order_of_warps(rng, keys):
    """Two launches, and two other legal interleavings of the warps, give the same bits.

    Races are looked for in lockstep only: in the other orders, warps that store copies of one value look like one.
    """
    q, k, v = random_qkv(rng, (1, 10, 17, keys, 16), torch.bfloat16)
    results = []
    for order in ("lockstep", "lockstep", "forward", "backward"):
        with simulated(80, order=order, check_races=order == "lockstep"):
            results.append(cross_attention_map(q, k, v, backend="triton"))
    for out, mean in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(mean, results[0][1])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("keys", [77, 140])
def test_the_map_alone_has_the_bits_of_the_map_beside_the_output(rng, arch, keys):
    q, k, v = random_qkv(rng, (2, 2, 18, keys, 40), torch.float16)
    mean, launches = run(arch, lambda: attention_map(q, k, backend="triton"))
    (_, beside), _ = run(arch, lambda: cross_attention_map(q, k, v, backend="triton"))
    assert len(launches) == 1
    assert torch.equal(mean, beside)


@pytest.mark.parametrize(("block_m", "block_n", "map_n"), [(16, 32, 16), (64, 16, 32)])
def test_self_attention_in_one_sweep_and_in_two_parts(rng, block_m, block_n, map_n):
    q, k, v = random_qkv(rng, (1, 2, 33, 33, 40), torch.float16)
    (out, mean), _ = run(80, lambda: self_attention_map(q, k, v, backend="triton"))
    forced = FlashConfig(4, 2, block_m=block_m, block_n=block_n, map_n=map_n, precision="ieee")
    (out2, mean2), launches = run(80, lambda: KERNELS["self_attention_map"](q, k, v, 40**-0.5, forced))
    assert launches[0].kernel == "self_attention_map_kernel"
    truth, true_mean = attention_with_map(q.double(), k.double(), v.double(), 40**-0.5)
    assert_as_accurate_as(out, out2, truth)
    assert_as_accurate_as(out2, out, truth)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mean2.double(), true_mean, rtol=1e-5, atol=1e-7)


def test_other_tiles_in_one_sweep_give_the_same(rng):
    q, k, v = random_qkv(rng, (1, 5, 19, 77, 40), torch.float16)
    chosen, _ = run(80, lambda: cross_attention_map(q, k, v, backend="triton"))
    forced = AttentionConfig(4, 1, heads=4, block_m=32, block_n=(128, 0), block_d=16, precision="ieee")
    other, (launch,) = run(80, lambda: KERNELS["cross_attention_map"](q, k, v, 40**-0.5, forced))
    assert (launch.num_warps, launch.counters.ctas) == (4, 1)
    check(q, k, v, *other)
    torch.testing.assert_close(other[1], chosen[1], rtol=1e-5, atol=1e-7)


NOTHING_BESIDE = {
    # name: (operator, keys)
    "one-sweep": (cross_attention_map, 77),
    "two-parts": (self_attention_map, 101),
    "map-in-one-sweep": (attention_map, 77),
    "map-in-two-parts": (attention_map, 101),
}


@pytest.mark.parametrize(("operator", "keys"), **by_name(NOTHING_BESIDE))
def test_nothing_beside_a_tensor_is_touched(rng, operator, keys):
    """Idle rows of a head would write to the next head's."""
    rows = keys if operator is self_attention_map else 18
    operands = random_qkv(rng, (2, 2, rows, keys, 40), torch.float16)[: 2 if operator is attention_map else 3]

    def call():
        result = operator(*operands, backend="triton")
        return result if isinstance(result, tuple) else (result,)

    assert_nothing_beside_is_touched(80, call, "out of bounds|different values|race")


def test_values_of_another_size_than_keys(rng):
    q, k, v = random_qkv(rng, (1, 2, 9, 77, 40), torch.float16)
    v = torch.cat([v, v, v[..., :16]], -1)
    (out, _), _ = run(80, lambda: cross_attention_map(q, k, v, backend="triton"))
    naive, _ = attention_with_map(q, k, v, 40**-0.5)
    truth, _ = attention_with_map(q.double(), k.double(), v.double(), 40**-0.5)
    assert_as_accurate_as(out, naive, truth)


def test_an_empty_batch_launches_nothing(rng):
    q, k, v = (x[:0] for x in random_qkv(rng, (1, 2, 9, 77, 40), torch.float16))
    (out, mean), launches = run(80, lambda: cross_attention_map(q, k, v, backend="triton"))
    assert (out.shape, mean.shape, launches) == ((0, 2, 9, 40), (0, 9, 77), [])


def test_auto_is_torch_for_cpu_tensors_even_in_simulation(rng):
    q, k, v = random_qkv(rng, (1, 2, 9, 77, 40), torch.float16)
    _, launches = run(80, lambda: cross_attention_map(q, k, v))
    assert launches == []
