"""`propagate` is the map times the columns, in bounded memory, and completion can be written with it alone."""

import pytest
import torch
from scfg_kernels import attention_map, complete, propagate
from scfg_kernels.testing import Recorder, as_layout, assert_as_accurate_as

from tests.kernels.cases import ATTENTION_SHAPES, BATCH_NOISE, DTYPES, by_name, random_maps, random_qkv, reference_map


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("shape", **by_name(ATTENTION_SHAPES))
def test_is_as_accurate_as_the_literal_map_times_the_columns(rng, shape, dtype):
    q, k, _ = random_qkv(rng, shape, dtype)
    x = random_maps(rng, shape[0], shape[3], 13)
    truth = reference_map(q.double(), k.double()) @ x.double()
    result = propagate(q, k, x)
    assert result.dtype == torch.float32
    assert_as_accurate_as(result, reference_map(q, k).float() @ x, truth)


def test_fp64_equals_the_reference(rng):
    q, k, _ = random_qkv(rng, (2, 3, 63, 77, 40), torch.float64)
    x = random_maps(rng, 2, 77, 5, dtype=torch.float64)
    result = propagate(q, k, x)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, reference_map(q, k) @ x, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_completion_by_propagation(rng, fidelity):
    """(Y + 3 P(Y)) / 4 with Y = P(C), and the Horner form, are `complete` without its map."""
    q, k, _ = random_qkv(rng, (2, 4, 63, 63, 40))
    c = random_maps(rng, 2, 63, 77)
    if fidelity == "official":
        y = propagate(q, k, c)
        found = (y + 3 * propagate(q, k, y)) / 4
    else:
        found = propagate(q, k, c)
        for _ in range(3):
            found = propagate(q, k, c + found)
        found = found / 4
    expected, _ = complete(attention_map(q, k), c, fidelity=fidelity)
    truth, _ = complete(attention_map(q.double(), k.double()), c.double(), fidelity=fidelity)
    assert_as_accurate_as(found.mT, expected, truth)


def test_rows_that_sum_to_one_still_do(rng):
    q, k, _ = random_qkv(rng, (2, 8, 250, 250, 40))
    ones = propagate(q, k, random_maps(rng, 2, 250, 77)).sum(-1)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["projection", "sliced", "strided", "expanded"])
def test_any_layout(rng, layout):
    q, k, _ = random_qkv(rng, (2, 4, 33, 63, 40))
    q, k = as_layout(q, layout), as_layout(k, layout)
    x = random_maps(rng, 2, 9, 63).mT
    expected = propagate(q.contiguous(), k.contiguous(), x.contiguous())
    torch.testing.assert_close(propagate(q, k, x), expected, rtol=BATCH_NOISE, atol=0)


def test_scale_is_used(rng):
    q, k, _ = random_qkv(rng, (1, 2, 17, 23, 64), gain=0.5)
    x = random_maps(rng, 1, 23, 5)
    truth = reference_map(q.double(), k.double(), 0.7) @ x.double()
    assert_as_accurate_as(propagate(q, k, x, scale=0.7), reference_map(q, k, 0.7) @ x, truth)
    assert torch.equal(propagate(q, k, x), propagate(q, k, x, scale=0.125))


def test_memory_is_bounded(rng):
    """4096 keys: the largest tensor is the block of 16 rows of every head's scores, never [N, N] or [H, N, N]."""
    q, k, _ = random_qkv(rng, (1, 5, 4096, 4096, 8))
    x = random_maps(rng, 1, 4096, 2)
    with Recorder() as recorder:
        propagate(q[:, :, :256], k, x)
    recorder.assert_none_larger_than(5 * 16 * 4096)


def test_repeats_are_bit_equal(rng):
    q, k, _ = random_qkv(rng, (2, 4, 250, 250, 40))
    x = random_maps(rng, 2, 250, 77)
    assert torch.equal(propagate(q, k, x), propagate(q, k, x))


def test_every_reason_is_listed(rng):
    q, k, _ = random_qkv(rng, (2, 4, 9, 9, 40))
    with pytest.raises(ValueError, match=r"propagate: x must be \[2, 9, T\], got \(2, 8, 3\); x must be floating"):
        propagate(q, k, torch.zeros(2, 8, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="propagate: q and k differ in head_dim"):
        propagate(q, k[..., :20], torch.zeros(2, 9, 3))


@pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
def test_opcheck(rng, dtype):
    q, k, _ = random_qkv(rng, (2, 3, 9, 7, 8), dtype)
    x = random_maps(rng, 2, 7, 5)
    torch.library.opcheck(torch.ops.scfg_kernels.propagate.default, (as_layout(q, "projection"), k, x, 0.3, "torch"))


def test_compiles_as_one_graph(rng):
    q, k, _ = random_qkv(rng, (2, 3, 9, 9, 8))
    x = random_maps(rng, 2, 9, 5)
    compiled = torch.compile(propagate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, x), propagate(q, k, x))
