"""`complete_from_qk` is `complete` of the map of its queries and keys, one sample's map at a time or without any."""

import sys

import pytest
import torch
import torch.nn.functional as F
from scfg_kernels import attention_map, complete, complete_from_qk
from scfg_kernels.testing import Recorder, as_layout, assert_as_accurate_as
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from lab.reference import official
from tests.kernels.cases import BATCH_NOISE, DTYPES, by_name, random_maps, random_qkv, reference_map

MODULE = sys.modules["scfg_kernels.complete_from_qk"]
REFERENCES = {"official": official.official_completion, "paper": official.paper_completion}


@pytest.fixture(params=["maps", "products"])
def way(request, monkeypatch):
    """Both ways of torch, whatever the number of tokens."""
    if request.param == "products":
        monkeypatch.setattr(MODULE, "MAP_TOKENS", 0)
    return request.param


def by_heads(q, k, c, fidelity):
    """Completion [B, N, T], written out with the probabilities of every head."""
    probabilities = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)

    def spread(x):
        return (probabilities @ x[:, None]).mean(1)

    total = spread(c)
    if fidelity == "official":
        return (total + 3.0 * spread(total)) / 4.0
    for _ in range(3):
        total = spread(c + total)
    return total / 4.0


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("fidelity", ["official", "paper"])
@pytest.mark.parametrize("tokens", [1, 77, 140], ids=["one-token", "77", "more-columns-than-a-program-takes"])
def test_is_as_accurate_as_completion_by_the_map(rng, way, tokens, fidelity, dtype):
    q, k, _ = random_qkv(rng, (4, 4, 63, 63, 40), dtype)
    c = random_maps(rng, 4, 63, tokens)
    results = complete_from_qk(q, k, c, unconditional=2, fidelity=fidelity)
    by_map = complete(attention_map(q, k), c, unconditional=2, fidelity=fidelity)
    if way == "products":  # heads are added up after the products
        tokens_by_heads = by_heads(q.float(), k.float(), c, fidelity).mT.contiguous()
        by_map = tokens_by_heads[2:], tokens_by_heads[:2, 0].contiguous()
    truth = REFERENCES[fidelity](reference_map(q.double(), k.double()), c.double()).mT
    for found, expected in zip(results, by_map, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, torch.float32) and found.is_contiguous()
    flat = lambda tokens, start: torch.cat([tokens.flatten(), start.flatten()])  # noqa: E731
    assert_as_accurate_as(flat(*results), flat(*by_map), flat(truth[2:], truth[:2, 0]))


@pytest.mark.parametrize("powers", [1, 2, 7])
@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_number_of_powers_in_fp64(rng, way, fidelity, powers):
    q, k, _ = random_qkv(rng, (2, 3, 63, 63, 40), torch.float64)
    c = random_maps(rng, 2, 63, 5, dtype=torch.float64)
    found, _ = complete_from_qk(q, k, c, fidelity=fidelity, powers=powers, scale=0.2)
    expected = REFERENCES[fidelity](reference_map(q, k, 0.2), c, powers).mT
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("tokens", [5, 140])
@pytest.mark.parametrize("unconditional", [0, 1, 3])
def test_halves_together_or_apart_are_the_samples_alone(rng, way, unconditional, tokens):
    q, k, _ = random_qkv(rng, (3, 2, 20, 20, 16))
    c = random_maps(rng, 3, 20, tokens)
    found, start = complete_from_qk(q, k, c, unconditional=unconditional)
    alone = torch.cat([complete_from_qk(q[i : i + 1], k[i : i + 1], c[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(found, alone[unconditional:], rtol=BATCH_NOISE, atol=0)
    torch.testing.assert_close(start, alone[:unconditional, 0], rtol=BATCH_NOISE, atol=0)


def test_views_of_a_layers_own_tensors(rng, way):
    q, k, _ = random_qkv(rng, (2, 4, 63, 63, 40))
    c = random_maps(rng, 2, 7, 63).mT
    strided = complete_from_qk(as_layout(q, "projection"), as_layout(k, "sliced"), c, unconditional=1)
    for found, expected in zip(strided, complete_from_qk(q, k, c.contiguous(), unconditional=1), strict=True):
        torch.testing.assert_close(found, expected, rtol=BATCH_NOISE, atol=0)


def test_memory_is_bounded_by_the_map_of_one_sample(rng):
    q, k, _ = random_qkv(rng, (3, 2, 600, 600, 8))
    with Recorder() as recorder:
        complete_from_qk(q, k, random_maps(rng, 3, 600, 5), unconditional=1)
    assert recorder.largest.numel == 600 * 600


def test_beyond_some_size_no_map_is_made(rng):
    """The largest tensors are queries and keys as wide as the columns."""
    tokens = MODULE.MAP_TOKENS + 1
    q, k, _ = random_qkv(rng, (1, 1, tokens, tokens, 8))
    with Recorder() as recorder:
        complete_from_qk(q, k, random_maps(rng, 1, tokens, 12))
    recorder.assert_none_larger_than(12 * tokens)


@pytest.mark.parametrize("dtype", **by_name({"fp16": torch.float16, "bf16": torch.bfloat16}))
def test_operands_of_half_precision_stay_so_on_a_gpu(dtype):
    """On fake tensors: two calls of attention a half, whose values are columns filled up to a multiple of 8."""
    seen = []

    class Attention(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append((args[0].dtype, args[2].dtype, tuple(args[2].shape)))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Attention():
        q, k = (torch.empty(2, 4, 1200, 40, dtype=dtype, device="cuda") for _ in range(2))
        tokens, start = complete_from_qk(q, k, torch.empty(2, 1200, 77, device="cuda"), unconditional=1)
    assert seen == [(dtype, dtype, (1, 4, 1200, 8))] * 2 + [(dtype, dtype, (1, 4, 1200, 80))] * 2
    assert (tokens.shape, start.shape, tokens.dtype) == ((1, 77, 1200), (1, 1200), torch.float32)


def test_every_reason_is_listed(rng):
    q, k, _ = random_qkv(rng, (2, 4, 9, 9, 40))
    with pytest.raises(ValueError) as raised:
        complete_from_qk(q, k, torch.zeros(2, 8, 3, dtype=torch.int64), unconditional=3, fidelity="exact", powers=0)
    for reason in (
        "complete_from_qk: cross_map must be [2, 9, T], got (2, 8, 3)", "cross_map must be floating point",
        "unconditional must lie in 0..2, got 3", "powers must be at least 1, got 0", "fidelity='exact' is unknown",
    ):  # fmt: skip
        assert reason in str(raised.value)
    with pytest.raises(ValueError, match="complete_from_qk: queries and keys must be the same tokens, got 9 and 8"):
        complete_from_qk(q, k[:, :, :8], torch.zeros(2, 9, 3))


def test_compiles_as_one_graph(rng, way):
    q, k, _ = random_qkv(rng, (2, 3, 9, 9, 8))
    c = random_maps(rng, 2, 9, 5)
    compiled = torch.compile(complete_from_qk, fullgraph=True, backend="aot_eager")
    results, expected = compiled(q, k, c, unconditional=1), complete_from_qk(q, k, c, unconditional=1)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results, expected, strict=True))
