"""`cross_attention_map`: the output is torch's own, the map is the literal reference's."""

import pytest
import torch
import torch.nn.functional as F
from scfg_kernels import cross_attention_map
from scfg_kernels.testing import Recorder, as_layout, assert_as_accurate_as

from lab.reference import official
from tests.kernels.cases import ATTENTION_SHAPES, BATCH_NOISE, DTYPES, by_name, random_qkv, reference_map


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("shape", **by_name(ATTENTION_SHAPES))
def test_output_is_torchs_bit_for_bit_and_the_map_is_as_accurate_as_the_reference(rng, shape, dtype):
    q, k, v = random_qkv(rng, shape, dtype)
    out, attention = cross_attention_map(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert out.dtype == dtype and attention.dtype == torch.float32
    assert_as_accurate_as(attention, reference_map(q, k), reference_map(q.double(), k.double()))


@pytest.mark.parametrize("shape", **by_name(ATTENTION_SHAPES))
def test_output_agrees_with_the_literal_processor(rng, shape):
    q, k, v = random_qkv(rng, shape)
    out, _ = cross_attention_map(q, k, v)

    def literal(q, k, v):
        folded = [official.fold_heads(x) for x in (q, k, v)]
        probabilities = official.attention_probabilities(folded[0], folded[1], q.shape[3] ** -0.5)
        return (probabilities @ folded[2]).view_as(out)

    assert_as_accurate_as(out, literal(q, k, v), literal(q.double(), k.double(), v.double()), name="output")


def test_output_is_laid_out_for_the_projection(rng):
    q, k, v = random_qkv(rng, (2, 4, 63, 77, 40))
    out, _ = cross_attention_map(q, k, v)
    assert out.shape == (2, 4, 63, 40)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", ["projection", "sliced", "strided", "expanded"])
def test_any_layout_gives_torchs_output_and_the_contiguous_map(rng, layout):
    q, k, v = (as_layout(x, layout) for x in random_qkv(rng, (2, 4, 63, 77, 40)))
    out, attention = cross_attention_map(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    _, expected = cross_attention_map(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(attention, expected, rtol=BATCH_NOISE, atol=0)


def test_scale_is_used_for_both_results(rng):
    q, k, v = random_qkv(rng, (1, 2, 17, 77, 64), gain=0.5)
    out, attention = cross_attention_map(q, k, v, scale=0.7)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.7))
    truth = reference_map(q.double(), k.double(), 0.7)
    assert_as_accurate_as(attention, reference_map(q, k, 0.7), truth)


def test_values_may_have_their_own_width(rng):
    q, k, v = random_qkv(rng, (1, 2, 17, 77, 64))
    out, attention = cross_attention_map(q, k, v[..., :24])
    assert out.shape == (1, 2, 17, 24)
    expected = F.scaled_dot_product_attention(q, k, v)[..., :24]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(attention, cross_attention_map(q, k, v)[1])


def test_a_batch_equals_its_samples_alone(rng):
    q, k, v = random_qkv(rng, (3, 4, 64, 77, 40))
    out, attention = cross_attention_map(q, k, v)
    alone = [cross_attention_map(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(3)]
    assert torch.equal(out, torch.cat([sample[0] for sample in alone]))
    torch.testing.assert_close(attention, torch.cat([sample[1] for sample in alone]), rtol=BATCH_NOISE, atol=0)


def test_a_permuted_batch_is_permuted_bit_for_bit(rng):
    q, k, v = random_qkv(rng, (3, 4, 64, 77, 40))
    order = [1, 2, 0]
    permuted, expected = cross_attention_map(q[order], k[order], v[order]), cross_attention_map(q, k, v)
    assert all(torch.equal(x, y[order]) for x, y in zip(permuted, expected, strict=True))


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
def test_no_per_head_map_is_ever_made(rng, dtype):
    q, k, v = random_qkv(rng, (1, 8, 1024, 77, 40), dtype)
    with Recorder() as recorder:
        _, attention = cross_attention_map(q, k, v)
    # The map itself, q or k whole, or one 1 MiB block of fp32 scores: never [B, H, N, T].
    recorder.assert_none_larger_than(max(attention.numel(), q.numel(), 1 << 18))
    assert recorder.largest.numel < 8 * attention.numel()


def test_repeats_are_bit_equal(rng):
    q, k, v = random_qkv(rng, (2, 4, 250, 77, 40))
    first, second = cross_attention_map(q, k, v), cross_attention_map(q, k, v)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
def test_opcheck(rng, dtype):
    q, k, v = random_qkv(rng, (2, 3, 9, 7, 8), dtype)
    q = as_layout(q, "projection")
    torch.library.opcheck(torch.ops.scfg_kernels.cross_attention_map.default, (q, k, v, 0.3, "torch"))


def test_compiles_as_one_graph(rng):
    q, k, v = random_qkv(rng, (2, 3, 9, 7, 8))
    compiled = torch.compile(cross_attention_map, fullgraph=True, backend="aot_eager")
    results, expected = compiled(q, k, v), cross_attention_map(q, k, v)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results, expected, strict=True))
