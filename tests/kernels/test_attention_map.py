"""`attention_map`, and what it shares with the two operators that return the output as well."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from scfg_kernels import attention_map, cross_attention_map, self_attention_map
from scfg_kernels.testing import Recorder, as_layout, assert_as_accurate_as

from tests.kernels.cases import ATTENTION_SHAPES, BATCH_NOISE, DTYPES, by_name, random_qkv, reference_map


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("shape", **by_name(ATTENTION_SHAPES))
def test_map_is_as_accurate_as_the_literal_reference(rng, shape, dtype):
    q, k, _ = random_qkv(rng, shape, dtype)
    truth = reference_map(q.double(), k.double())
    assert_as_accurate_as(attention_map(q, k), reference_map(q, k), truth)


@pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
def test_map_dtype_is_fp32_or_fp64(rng, dtype):
    q, k, _ = random_qkv(rng, (1, 2, 5, 7, 8), dtype)
    assert attention_map(q, k).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_fp64_equals_the_reference(rng):
    q, k, _ = random_qkv(rng, (2, 3, 63, 77, 40), torch.float64)
    torch.testing.assert_close(attention_map(q, k), reference_map(q, k), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
def test_rows_sum_to_one(rng, dtype):
    q, k, _ = random_qkv(rng, (2, 8, 250, 78, 40), dtype)
    # 78 roundings of numbers below 1, whatever the dtype of the inputs: the map is formed in fp32.
    torch.testing.assert_close(attention_map(q, k).sum(-1), torch.ones(2, 250), rtol=0, atol=1e-6)


def test_one_key_gives_exactly_one(rng):
    q, k, _ = random_qkv(rng, (2, 3, 9, 1, 40))
    assert torch.equal(attention_map(q, k), torch.ones(2, 9, 1))


@pytest.mark.parametrize("scale", [0.05, 0.125, 1.0])
def test_scale_is_used(rng, scale):
    q, k, _ = random_qkv(rng, (1, 2, 17, 23, 64), gain=0.5)
    truth = reference_map(q.double(), k.double(), scale)
    assert_as_accurate_as(attention_map(q, k, scale=scale), reference_map(q, k, scale), truth)


def test_default_scale_is_the_inverse_root_of_head_dim(rng):
    q, k, _ = random_qkv(rng, (1, 2, 17, 23, 64))
    assert torch.equal(attention_map(q, k), attention_map(q, k, scale=0.125))


@pytest.mark.parametrize("dtype", **by_name({"fp16": torch.float16, "bf16": torch.bfloat16}))
def test_scores_beyond_the_range_of_fp16_stay_finite(rng, dtype):
    q, k, _ = random_qkv(rng, (1, 2, 16, 77, 160), dtype, gain=60.0)
    assert float((q.float() @ k.float().transpose(-1, -2)).abs().max()) > torch.finfo(torch.float16).max
    result = attention_map(q, k)
    torch.testing.assert_close(result.double(), reference_map(q.double(), k.double()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["projection", "sliced", "strided", "expanded"])
def test_any_layout_gives_the_contiguous_result(rng, layout):
    q, k, _ = random_qkv(rng, (2, 4, 63, 77, 40))
    q, k = as_layout(q, layout), as_layout(k, layout)
    expected = attention_map(q.contiguous(), k.contiguous())
    torch.testing.assert_close(attention_map(q, k), expected, rtol=BATCH_NOISE, atol=0)


def test_a_batch_equals_its_samples_alone(rng):
    q, k, _ = random_qkv(rng, (3, 4, 64, 77, 40))
    alone = torch.cat([attention_map(q[i : i + 1], k[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(attention_map(q, k), alone, rtol=BATCH_NOISE, atol=0)


def test_a_permuted_batch_is_permuted_bit_for_bit(rng):
    q, k, _ = random_qkv(rng, (3, 4, 64, 77, 40))
    order = [2, 0, 1]
    assert torch.equal(attention_map(q[order], k[order]), attention_map(q, k)[order])


def test_the_block_size_does_not_change_the_result(rng, monkeypatch):
    q, k, _ = random_qkv(rng, (1, 4, 63, 77, 40))
    whole = attention_map(q, k)
    module = importlib.import_module("scfg_kernels.attention_map")
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 4 * 77 * 10)  # ten rows, and a last block of three
    torch.testing.assert_close(attention_map(q, k), whole, rtol=BATCH_NOISE, atol=0)


@pytest.mark.parametrize("tokens", [77, 1024])
def test_no_per_head_map_is_ever_made(rng, tokens):
    batch, heads, queries, dim = 1, 8, 1024, 40
    q, k, _ = random_qkv(rng, (batch, heads, queries, tokens, dim))
    with Recorder() as recorder:
        result = attention_map(q, k)
    # The map itself, q or k whole, or one 1 MiB block of fp32 scores: never [B, H, N, T].
    recorder.assert_none_larger_than(max(result.numel(), q.numel(), k.numel(), 1 << 18))
    assert recorder.largest.numel < batch * heads * queries * tokens
    assert {seen.dtype for seen in recorder.made} == {torch.float32}


def test_half_precision_scores_are_formed_in_fp32(rng):
    q, k, _ = random_qkv(rng, (1, 2, 64, 77, 40), torch.float16)
    with Recorder() as recorder:
        attention_map(q, k)
    softmaxes = {seen.dtype for seen in recorder.made if "softmax" in seen.op}
    assert softmaxes == {torch.float32}


def test_repeats_are_bit_equal(rng):
    q, k, _ = random_qkv(rng, (2, 4, 250, 77, 40))
    assert torch.equal(attention_map(q, k), attention_map(q, k))


def test_inputs_are_left_alone(rng):
    q, k, _ = random_qkv(rng, (1, 2, 63, 77, 40))
    before = q.clone(), k.clone()
    attention_map(q, k)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_all_three_operators_make_the_same_map(rng):
    q, k, v = random_qkv(rng, (2, 4, 63, 63, 40))
    expected = attention_map(q, k)
    assert torch.equal(self_attention_map(q, k, v)[1], expected)
    assert torch.equal(cross_attention_map(q, k, v)[1], expected)


@pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
def test_opcheck(rng, dtype):
    q, k, _ = random_qkv(rng, (2, 3, 9, 7, 8), dtype)
    torch.library.opcheck(torch.ops.scfg_kernels.attention_map.default, (as_layout(q, "projection"), k, 0.3, "torch"))


def test_compiles_as_one_graph(rng):
    q, k, _ = random_qkv(rng, (2, 3, 9, 7, 8))
    compiled = torch.compile(attention_map, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), attention_map(q, k))


def test_composes_with_the_users_own_attention(rng):
    """The map belongs to the attention whose output the user has: map @ values averages the heads' outputs."""
    q, k, v = random_qkv(rng, (1, 4, 63, 77, 40))
    v = v[:, :1].expand_as(v)  # one set of values for all heads
    out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention_map(q, k) @ v[:, 0], out.mean(1), rtol=1e-4, atol=1e-5)
