"""`attention_with_lse`: the output has the bits of `F.scaled_dot_product_attention`, the lse is that of its scores."""

import pytest
import torch
import torch.nn.functional as F
from scfg_kernels import attention_with_lse
from scfg_kernels.testing import as_layout
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernels.cases import ATTENTION_SHAPES, DTYPES, by_name, random_qkv

WITH_FP64 = {**DTYPES, "fp64": torch.float64}
LAYOUTS = ["contiguous", "projection", "sliced", "strided", "expanded"]


def true_lse(q, k, scale=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return torch.logsumexp(q.double() @ k.double().mT * scale, -1)


@pytest.mark.parametrize("dtype", **by_name(WITH_FP64))
@pytest.mark.parametrize("shape", **by_name(ATTENTION_SHAPES))
def test_output_has_the_bits_of_torch_and_the_lse_is_right(rng, shape, dtype):
    q, k, v = (as_layout(x, "projection") for x in random_qkv(rng, shape, dtype))
    out, lse = attention_with_lse(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    assert lse is not None and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), true_lse(q, k), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(rng, layout):
    q, k, v = (as_layout(x, layout) for x in random_qkv(rng, (2, 3, 20, 77, 40)))
    out, lse = attention_with_lse(q, k, v, scale=0.3)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))
    if layout == "strided":  # head elements that are not neighbours: torch's math
        assert lse is None
        return
    torch.testing.assert_close(lse.double(), true_lse(q, k, 0.3), rtol=1e-5, atol=1e-4)


def test_none_where_torch_has_none(rng):
    q, k, v = random_qkv(rng, (2, 3, 20, 77, 40))
    with sdpa_kernel(SDPBackend.MATH):
        out, lse = attention_with_lse(q, k, v)
        assert lse is None and torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    out, lse = attention_with_lse(q, k, v[..., :8])  # values of another size than keys: torch's math
    assert lse is None and torch.equal(out, F.scaled_dot_product_attention(q, k, v[..., :8]))


def test_autocast_attends_to_other_operands(rng):
    q, k, v = random_qkv(rng, (2, 3, 20, 77, 40))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention_with_lse(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v)
    assert lse is None and out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_gradients_flow(rng):
    q, k, v = (x.requires_grad_() for x in random_qkv(rng, (1, 2, 9, 7, 8)))
    grads = [
        torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
        for f in (lambda *x: attention_with_lse(*x)[0], F.scaled_dot_product_attention)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


CHOICES = {
    # name: (torch's choice, head size, the operator, its output is of the padded head)
    "flash": (SDPBackend.FLASH_ATTENTION, 64),
    "flash-padded": (SDPBackend.FLASH_ATTENTION, 36),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, 40),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, 64),
}


@pytest.mark.parametrize(("choice", "dim"), **by_name(CHOICES))
def test_the_operators_of_cuda_are_called_as_they_are_declared(monkeypatch, choice, dim):
    """On fake tensors, which have the shapes and dtypes that the real ones have."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: int(choice.value))
    with FakeTensorMode():
        q, k = (torch.empty(2, n, 3, dim, dtype=torch.float16, device="cuda").transpose(1, 2) for n in (50, 77))
        out, lse = attention_with_lse(q, k, k)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.float16, "cuda")
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)


@pytest.mark.parametrize("values", [8, 5])
@pytest.mark.parametrize("dtype", **by_name(WITH_FP64))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(rng, dtype, layout, values):
    q, k, v = (as_layout(x, layout) for x in random_qkv(rng, (2, 3, 9, 7, 8), dtype))
    operator = torch.ops.scfg_kernels.attention_with_lse.default
    torch.library.opcheck(operator, (q, k, v[..., :values], 0.3))


@pytest.mark.parametrize("values", [8, 5])
def test_compiles_as_one_graph(rng, values):
    q, k, v = (as_layout(x, "projection") for x in random_qkv(rng, (2, 3, 9, 7, 8)))
    v = v[..., :values]
    out, lse = torch.compile(attention_with_lse, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse.double(), true_lse(q, k), rtol=1e-5, atol=1e-4)


def test_operands_that_do_not_fit_are_refused(rng):
    q, k, v = random_qkv(rng, (2, 3, 9, 7, 8))
    with pytest.raises(ValueError, match="attention_with_lse: q and k differ in head_dim"):
        attention_with_lse(q, k[..., :4], v)
