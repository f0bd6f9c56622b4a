"""`complete` against the N x N products of the literal reference."""

import pytest
import torch
from scfg_kernels import complete
from scfg_kernels.testing import Recorder, assert_as_accurate_as
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.measure import CountOps
from lab.reference import official
from tests.kernels.cases import BATCH_NOISE, DTYPES, by_name, random_maps

REFERENCES = {"official": official.official_completion, "paper": official.paper_completion}
SIZES = {
    # name: (batch, image tokens, text tokens)
    "one-cell": (1, 1, 77),
    "one-token": (2, 64, 1),
    "two-tokens": (1, 63, 2),
    "63": (2, 63, 77),
    "250": (1, 250, 78),
    "256": (2, 256, 77),
}


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("fidelity", ["official", "paper"])
@pytest.mark.parametrize("size", **by_name(SIZES))
def test_as_accurate_as_the_literal_products(rng, size, fidelity, dtype):
    batch, n, tokens = size
    s = random_maps(rng, batch, n, n, dtype=dtype)
    c = random_maps(rng, batch, n, tokens, dtype=dtype)
    reference = REFERENCES[fidelity]
    result, start = complete(s, c, fidelity=fidelity)
    assert result.shape == (batch, tokens, n) and result.dtype == dtype and result.is_contiguous()
    assert start.shape == (0, n)
    assert_as_accurate_as(result, reference(s, c).mT, reference(s.double(), c.double()).mT)


@pytest.mark.parametrize("powers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_number_of_powers(rng, fidelity, powers):
    s, c = random_maps(rng, 2, 63, 63).double(), random_maps(rng, 2, 63, 77).double()
    expected = REFERENCES[fidelity](s, c, powers).mT
    torch.testing.assert_close(complete(s, c, fidelity=fidelity, powers=powers)[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fidelity", ["official", "paper"])
@pytest.mark.parametrize("unconditional", [0, 1, 2, 4])
def test_unconditional_samples_keep_only_the_start_token(rng, unconditional, fidelity):
    s, c = random_maps(rng, 4, 64, 64), random_maps(rng, 4, 64, 77)
    tokens, start = complete(s, c, unconditional=unconditional, fidelity=fidelity)
    everything, _ = complete(s, c, fidelity=fidelity)
    assert tokens.shape == (4 - unconditional, 77, 64) and start.shape == (unconditional, 64)
    assert start.is_contiguous() and tokens.is_contiguous()
    torch.testing.assert_close(tokens, everything[unconditional:], rtol=BATCH_NOISE, atol=0)
    torch.testing.assert_close(start, everything[:unconditional, 0], rtol=BATCH_NOISE, atol=0)


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_the_other_tokens_of_an_unconditional_sample_are_one_minus_the_start_token(rng, fidelity):
    """The identity that lets the unconditional half be one column."""
    s, c = random_maps(rng, 1, 64, 64), random_maps(rng, 1, 64, 77)
    _, start = complete(s, c, unconditional=1, fidelity=fidelity)
    others = REFERENCES[fidelity](s.double(), c.double())[:, :, 1:].sum(-1)
    torch.testing.assert_close(1 - start.double(), others, rtol=0, atol=1e-6)  # the maps are rounded to fp32


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_no_product_of_two_image_maps(rng, fidelity):
    n, tokens = 256, 77
    s, c = random_maps(rng, 4, n, n), random_maps(rng, 4, n, tokens)
    with Recorder() as recorder:
        complete(s, c, unconditional=2, fidelity=fidelity)
    assert recorder.products, "the operator multiplies matrices; the recorder must have seen them"
    recorder.assert_no_product(n, n, n)
    # Views of S are all that is as large as S.
    large = {seen.op for seen in recorder.made if seen.numel > c.numel()}
    assert large <= {"slice", "transpose", "view", "expand", "_unsafe_view"}


def test_half_precision_cross_map_with_fp32_self_map(rng):
    s, c = random_maps(rng, 1, 63, 63), random_maps(rng, 1, 63, 77, dtype=torch.float16)
    result, _ = complete(s, c)
    assert result.dtype == torch.float32
    assert torch.equal(result, complete(s, c.float())[0])


def test_strided_maps_give_the_contiguous_result(rng):
    s, c = random_maps(rng, 2, 63, 63), random_maps(rng, 2, 63, 77)
    wide_s, wide_c = s.new_full((2, 65, 70), torch.nan), c.new_full((2, 63, 2 * 77), torch.nan)
    strided_s, strided_c = wide_s[:, 1:64, 3:66].copy_(s), wide_c[..., ::2].copy_(c)
    results, expected = complete(strided_s, strided_c, unconditional=1), complete(s, c, unconditional=1)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=BATCH_NOISE, atol=0)


def test_expanded_maps_give_the_contiguous_result(rng):
    s, c = random_maps(rng, 1, 63, 63).expand(3, -1, -1), random_maps(rng, 1, 63, 77).expand(3, -1, -1)
    torch.testing.assert_close(complete(s, c)[0], complete(s.clone(), c.clone())[0], rtol=BATCH_NOISE, atol=0)


def test_a_batch_equals_its_samples_alone(rng):
    s, c = random_maps(rng, 3, 64, 64), random_maps(rng, 3, 64, 77)
    alone = torch.cat([complete(s[i : i + 1], c[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(complete(s, c)[0], alone, rtol=BATCH_NOISE, atol=0)


def test_a_permuted_batch_is_permuted_bit_for_bit(rng):
    s, c = random_maps(rng, 3, 64, 64), random_maps(rng, 3, 64, 77)
    order = [2, 0, 1]
    assert torch.equal(complete(s[order], c[order])[0], complete(s, c)[0][order])


def test_repeats_are_bit_equal_and_inputs_are_left_alone(rng):
    s, c = random_maps(rng, 2, 64, 64), random_maps(rng, 2, 64, 77)
    before = s.clone(), c.clone()
    first, second = complete(s, c, unconditional=1), complete(s, c, unconditional=1)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(s, before[0]) and torch.equal(c, before[1])


def several(rng):
    """Layers of two sizes, in turns: S and C of each."""
    sizes = (16, 4, 16, 4, 16)
    return [random_maps(rng, 3, n, n) for n in sizes], [random_maps(rng, 3, n, 7) for n in sizes]


def test_layers_together_are_the_layers_alone(rng):
    own, cross = several(rng)
    tokens, start = complete(own, cross, unconditional=1)
    assert [x.shape for x in tokens] == [(3, 2, 7, 16), (2, 2, 7, 4)]
    assert [x.shape for x in start] == [(3, 1, 16), (2, 1, 4)]
    for size, of_size in enumerate(((0, 2, 4), (1, 3))):
        for place, layer in enumerate(of_size):
            alone = complete(own[layer], cross[layer], unconditional=1)
            assert torch.equal(tokens[size][place], alone[0]) and torch.equal(start[size][place], alone[1])


@pytest.mark.parametrize("layers", [1, 5, 60])
def test_an_accelerator_gets_the_layers_of_a_size_as_one_batch(layers):
    """Operators on CUDA tensors that have no storage: S and C of each half in one place, and two products of each."""
    with FakeTensorMode():
        own, cross = torch.empty(2, 256, 256, device="cuda"), torch.empty(2, 256, 77, device="cuda")
        with CountOps() as seen:
            complete([own] * layers, [cross] * layers, unconditional=1, backend="torch")
    assert seen.counts.inside.total() == (4 if layers == 1 else 8)


@pytest.mark.parametrize("unconditional", [0, 1, 2])
@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_opcheck(rng, fidelity, unconditional):
    s, c = random_maps(rng, 2, 9, 9), random_maps(rng, 2, 9, 7)
    torch.library.opcheck(torch.ops.scfg_kernels.complete.default, ([s], [c], unconditional, fidelity, 4, "torch"))


@pytest.mark.parametrize("powers", [1, 4])
def test_opcheck_of_powers(rng, powers):
    s, c = random_maps(rng, 2, 9, 9), random_maps(rng, 2, 9, 7)
    torch.library.opcheck(torch.ops.scfg_kernels.complete.default, ([s], [c], 1, "official", powers, "torch"))


def test_layers_together_compile_as_one_graph(rng):
    own, cross = several(rng)
    compiled = torch.compile(complete, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        compiled(own, cross, unconditional=1), complete(own, cross, unconditional=1), strict=True
    ):
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(found, expected, strict=True))


def test_compiles_as_one_graph(rng):
    s, c = random_maps(rng, 2, 9, 9), random_maps(rng, 2, 9, 7)
    compiled = torch.compile(complete, fullgraph=True, backend="aot_eager")
    results, expected = compiled(s, c, unconditional=1), complete(s, c, unconditional=1)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results, expected, strict=True))
