"""The attention kernels, executed: O and the map against torch in the same dtype and against an fp64 truth."""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import attention_map, cross_attention_map, self_attention_map
from scfg_kernels._launch import AttentionConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.attention_map import attention_with_map
from scfg_kernels.testing import as_layout, assert_as_accurate_as

from tests.kernels.cases import by_name, random_qkv
from tests.kernels.triton.simulation import ARCHITECTURES, run

CASES = {
    # name: (shape [batch, heads, queries, keys, head_dim], dtype, layout)
    "sd15": ((1, 8, 20, 77, 40), torch.float16, "projection"),
    "one-query": ((1, 2, 1, 78, 64), torch.bfloat16, "contiguous"),
    "expanded": ((3, 2, 17, 63, 80), torch.bfloat16, "expanded"),
    "sliced": ((1, 2, 17, 78, 72), torch.float16, "sliced"),
    "head-160": ((1, 3, 19, 77, 160), torch.float16, "projection"),
    "more-heads-than-warps": ((1, 10, 5, 20, 64), torch.float16, "projection"),
    "two-sweeps": ((1, 2, 33, 300, 64), torch.float16, "projection"),
    "two-sweeps-160": ((1, 3, 18, 140, 160), torch.bfloat16, "projection"),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "dtype", "layout"), **by_name(CASES))
def test_output_and_map(rng, arch, shape, dtype, layout):
    q, k, v = (as_layout(x, layout) for x in random_qkv(rng, shape, dtype))
    (out, mean), launches = run(arch, lambda: cross_attention_map(q, k, v, backend="triton"))
    assert len(launches) == 1
    naive_out, _ = attention_with_map(q, k, v, shape[-1] ** -0.5)
    true_out, true_mean = attention_with_map(q.double(), k.double(), v.double(), shape[-1] ** -0.5)
    assert (out.dtype, mean.dtype) == (dtype, torch.float32)
    assert out.transpose(1, 2).is_contiguous(), "the layer's projection reads [batch, queries, heads * head_dim]"
    assert_as_accurate_as(out, naive_out, true_out, name="output")
    half = (q @ k.mT * shape[-1] ** -0.5).softmax(-1).mean(1)
    assert_as_accurate_as(mean, half, true_mean, factor=1.0, name="map")
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("keys", [77, 140])
def test_the_map_alone_has_the_bits_of_the_map_beside_the_output(rng, arch, keys):
    q, k, v = random_qkv(rng, (2, 2, 18, keys, 40), torch.float16)
    mean, launches = run(arch, lambda: attention_map(q, k, backend="triton"))
    (_, beside), _ = run(arch, lambda: cross_attention_map(q, k, v, backend="triton"))
    assert len(launches) == 1
    assert torch.equal(mean, beside)


def test_self_attention_in_one_and_two_sweeps(rng):
    q, k, v = random_qkv(rng, (1, 2, 33, 33, 40), torch.float16)
    (out, mean), _ = run(80, lambda: self_attention_map(q, k, v, backend="triton"))
    forced = AttentionConfig(2, 2, heads=2, block_m=16, block_n=(32, 0), block_d=32, sweeps=2)
    (out2, mean2), launches = run(80, lambda: KERNELS["self_attention_map"](q, k, v, 40**-0.5, forced))
    assert launches[0].kernel == "self_attention_map_kernel"
    truth, true_mean = attention_with_map(q.double(), k.double(), v.double(), 40**-0.5)
    assert_as_accurate_as(out, out2, truth)
    assert_as_accurate_as(out2, out, truth)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mean2.double(), true_mean, rtol=1e-5, atol=1e-7)


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
