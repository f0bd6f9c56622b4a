"""`attention_map`, and what it shares with the two operators that return the output as well."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from scfg_kernels import attention_map, attention_maps, attention_with_lse
from scfg_kernels.testing import Recorder, as_layout, assert_as_accurate_as
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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
    q, k, _ = random_qkv(rng, (1, 4, 63, 77, 40), torch.float64)
    whole = attention_map(q, k)
    module = importlib.import_module("scfg_kernels.attention_map")
    monkeypatch.setattr(module, "CPU_BLOCK", 77 * 20)  # twenty rows, and a last block of three
    torch.testing.assert_close(attention_map(q, k), whole, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("with_lse", [False, True])
def test_half_precision_scores_are_formed_in_fp32(rng, with_lse):
    q, k, _ = random_qkv(rng, (1, 2, 64, 77, 40), torch.float16)
    lse = attention_with_lse(q, k, k)[1] if with_lse else None
    with Recorder() as recorder:
        attention_map(q, k, lse)
    formed = {seen.dtype for seen in recorder.made if "addmm" in seen.op or "softmax" in seen.op}
    assert formed == {torch.float32}


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("shape", **by_name(ATTENTION_SHAPES))
def test_with_the_lse_of_attention_it_is_as_accurate(rng, shape, dtype):
    q, k, v = random_qkv(rng, shape, dtype)
    _, lse = attention_with_lse(q, k, v)
    assert lse is not None
    truth = reference_map(q.double(), k.double())
    result = attention_map(q, k, lse)
    if dtype == torch.float32:
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-7)
    else:  # torch's attention on a CPU has an approximate exponential there
        torch.testing.assert_close(result.double(), truth, rtol=1e-3, atol=1e-6)


def test_the_lse_is_taken_literally(rng):
    """A row's share of a softmax over more keys than these: what a joint attention's lse means."""
    q, k, _ = random_qkv(rng, (2, 3, 9, 30, 8))
    _, lse = attention_with_lse(q, k, k)
    part = attention_map(q, k[:, :, :11], lse)
    torch.testing.assert_close(part, attention_map(q, k)[..., :11], rtol=1e-5, atol=1e-7)


def test_an_lse_that_does_not_fit_is_refused(rng):
    q, k, _ = random_qkv(rng, (2, 3, 9, 7, 8))
    with pytest.raises(ValueError, match=r"lse must be \[2, 3, 9\] torch.float32 on cpu, got \[2, 3, 7\]"):
        attention_map(q, k, torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match=r"torch\.float64 on cpu"):
        attention_map(q.double(), k.double(), torch.zeros(2, 3, 9))


class Operators(TorchDispatchMode):
    """Counts aten operators that do work: views, and what only asks for a device, aside."""

    FREE = ("view", "slice", "transpose", "unsqueeze", "alias", "expand", "permute", "select", "detach", "empty")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += name.startswith("aten::") and not any(free in name for free in self.FREE)
        return func(*args, **(kwargs or {}))


def operators(samples: int, heads: int, n: int, tokens: int, dim: int, dtype: torch.dtype, with_lse: bool) -> int:
    """How many work on a CUDA device for a map, which is not there: fake tensors."""
    with FakeTensorMode():
        q, k = (
            torch.empty(samples, length, heads * dim, dtype=dtype, device="cuda").unflatten(2, (heads, -1))
            for length in (n, tokens)
        )
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        lse = torch.empty(samples, heads, n, device="cuda") if with_lse else None
        with Operators() as seen:
            attention_map(q, k, lse, backend="torch")
    return seen.count


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dtype", **by_name(DTYPES))
def test_few_operators_make_a_map_on_a_gpu(dtype, with_lse):
    """An SDXL layer: at most 7 for a map of one sample or of as many as 256 MiB hold the scores of, never a loop."""
    self_attention = [operators(samples, 20, 1024, 1024, 64, dtype, with_lse) for samples in (1, 2, 3)]
    assert self_attention[0] <= self_attention[1] == self_attention[2] <= 7
    cross_attention = [operators(samples, 20, 1024, 77, 64, dtype, with_lse) for samples in (1, 2, 16, 32)]
    assert cross_attention[0] <= cross_attention[1] == cross_attention[3] <= 7


def test_the_blocks_of_a_gpu_give_the_same(rng, monkeypatch):
    """On CPU tensors, with the blocks and the order of operators of a device."""
    q, k, _ = random_qkv(rng, (3, 4, 63, 77, 40))
    _, lse = attention_with_lse(q, k, k)
    module = importlib.import_module("scfg_kernels.attention_map")
    for most in (1 << 26, 2 * 4 * 63 * 77, 4 * 77 * 20):
        monkeypatch.setattr(module, "DEVICE_BLOCK", most)
        for own in (None, lse):
            parts = torch.full((3, 63, 77), torch.nan)
            for samples, rows, mean in module.device_blocks(q, k, 40**-0.5, own):
                parts[samples, rows] = mean
            torch.testing.assert_close(parts, attention_map(q, k), rtol=1e-5, atol=1e-7)


def test_repeats_are_bit_equal(rng):
    q, k, _ = random_qkv(rng, (2, 4, 250, 77, 40))
    assert torch.equal(attention_map(q, k), attention_map(q, k))


def test_inputs_are_left_alone(rng):
    q, k, _ = random_qkv(rng, (1, 2, 63, 77, 40))
    before = q.clone(), k.clone()
    attention_map(q, k)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_two_maps_are_those_of_the_layers_alone(rng):
    q1, k1, _ = random_qkv(rng, (2, 4, 63, 63, 40))
    q2, k2, _ = random_qkv(rng, (2, 5, 60, 77, 24))
    lse1 = attention_with_lse(q1, k1, k1)[1]
    own, cross = attention_maps(q1, k1, lse1, q2, k2, None, scale2=0.3)
    assert torch.equal(own, attention_map(q1, k1, lse1))
    assert torch.equal(cross, attention_map(q2, k2, scale=0.3))


@pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
def test_opcheck(rng, dtype):
    q, k, _ = random_qkv(rng, (2, 3, 9, 7, 8), dtype)
    operator = torch.ops.scfg_kernels.attention_map.default
    for lse in (None, attention_with_lse(q, k, k)[1]):
        torch.library.opcheck(operator, (as_layout(q, "projection"), k, lse, 0.3, "torch"))


@pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
def test_opcheck_of_two_maps(rng, dtype):
    q1, k1, _ = random_qkv(rng, (2, 3, 9, 9, 8), dtype)
    q2, k2, _ = random_qkv(rng, (2, 3, 9, 7, 8), dtype)
    lse = attention_with_lse(q2, k2, k2)[1]
    operator = torch.ops.scfg_kernels.attention_maps.default
    torch.library.opcheck(operator, (q1, k1, None, 0.3, as_layout(q2, "projection"), k2, lse, 0.2, "torch"))


def test_compiles_as_one_graph(rng):
    q, k, _ = random_qkv(rng, (2, 3, 9, 7, 8))
    compiled = torch.compile(attention_map, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), attention_map(q, k))
    compiled = torch.compile(attention_maps, fullgraph=True, backend="aot_eager")
    both = compiled(q, q, None, q, k, None)
    assert all(torch.equal(x, y) for x, y in zip(both, attention_maps(q, q, None, q, k, None), strict=True))


def test_composes_with_the_users_own_attention(rng):
    """The map belongs to the attention whose output the user has: map @ values averages the heads' outputs."""
    q, k, v = random_qkv(rng, (1, 4, 63, 77, 40))
    v = v[:, :1].expand_as(v)  # one set of values for all heads
    out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention_map(q, k) @ v[:, 0], out.mean(1), rtol=1e-4, atol=1e-5)
