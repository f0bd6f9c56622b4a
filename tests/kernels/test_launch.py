"""The choice of a backend is a pure function; a choice that cannot run says every reason why."""

import pytest
import scfg_kernels
import torch
from scfg_kernels import BackendError, _launch, available_backends, choose_backend
from scfg_kernels._launch import BACKENDS, OPS, triton_reasons

from tests.kernels.cases import random_maps, random_qkv

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def call(op: str, rng: torch.Generator, backend: str):
    """Run one operator on small CPU tensors."""
    q, k, _ = random_qkv(rng, (1, 2, 16, 16, 8))
    s, c = random_maps(rng, 1, 16, 16), random_maps(rng, 1, 16, 5)
    predictions = torch.randn(2, 1, 4, 16, 16, generator=rng)
    arguments = {
        "attention_map": lambda: ((q, k), {}),
        "attention_maps": lambda: ((q, k, None, q, k, None), {}),
        "joint_attention_maps": lambda: ((q, k, k), {"grid": (4, 4), "pool": 2}),
        "complete": lambda: ((s, c), {}),
        "segment": lambda: (([c.mT], [c[..., 0]], [(4, 4)], (4, 4)), {}),
        "guide": lambda: (
            (q, k, torch.zeros(1, 4, 2, dtype=torch.int64), torch.ones(1, 4, 2, dtype=torch.bool), 7.5),
            {"num_tokens": 5},
        ),
        "segment_and_guide": lambda: (([c.mT.contiguous()], [c[..., 0]], [(4, 4)], (4, 4), *predictions, 7.5), {}),
        "guide_pixels": lambda: ((*predictions, 7.5), {}),
    }
    positional, options = arguments[op]()
    return getattr(scfg_kernels, op)(*positional, **options, backend=backend)


@pytest.fixture
def all_kernels_present(monkeypatch):
    """The table of kernels and the installed packages as on a machine where everything is there."""
    monkeypatch.setattr(_launch, "_TRITON_INSTALLED", True)
    for op in OPS:
        monkeypatch.setitem(_launch.KERNELS, op, call)


def test_the_operators_are_the_public_functions():
    assert all(callable(getattr(scfg_kernels, op)) for op in OPS)
    assert set(OPS) < set(scfg_kernels.__all__)
    assert all(hasattr(torch.ops.scfg_kernels, op) for op in OPS)


@pytest.mark.parametrize("op", OPS)
class TestEveryOperator:
    @pytest.mark.parametrize("device", [CPU, CUDA])
    def test_torch_is_always_available(self, op, device):
        assert choose_backend(op, "torch", device) == "torch"

    def test_auto_on_the_cpu_is_torch(self, op, all_kernels_present):
        assert choose_backend(op, "auto", CPU) == "torch"

    def test_auto_where_the_kernel_can_run_is_triton(self, op, all_kernels_present):
        assert triton_reasons(op, CUDA) == []
        assert choose_backend(op, "auto", CUDA) == choose_backend(op, "triton", CUDA) == "triton"

    def test_auto_falls_back_for_any_single_reason(self, op, all_kernels_present, monkeypatch):
        monkeypatch.delitem(_launch.KERNELS, op)
        assert choose_backend(op, "auto", CUDA) == "torch"
        assert triton_reasons(op, CUDA) == [f"this version has no Triton kernel for {op}"]
        monkeypatch.setitem(_launch.KERNELS, op, call)
        monkeypatch.setattr(_launch, "_TRITON_INSTALLED", False)
        assert choose_backend(op, "auto", CUDA) == "torch"
        assert triton_reasons(op, CUDA) == ["triton is not installed"]

    def test_a_triton_request_that_cannot_run_lists_every_reason(self, op, all_kernels_present, monkeypatch):
        monkeypatch.setattr(_launch, "_TRITON_INSTALLED", False)
        monkeypatch.delitem(_launch.KERNELS, op)
        with pytest.raises(BackendError) as raised:
            choose_backend(op, "triton", CPU)
        message = str(raised.value)
        for part in (f"{op}: backend='triton'", "no Triton kernel for", "not installed", "on 'cpu'", "backend='auto'"):
            assert part in message
        assert len(triton_reasons(op, CPU)) == 3

    def test_triton_on_cpu_tensors_raises(self, op, rng):
        with pytest.raises(BackendError, match=f"{op}: backend='triton' cannot run: .*need a CUDA device"):
            call(op, rng, "triton")

    def test_an_unknown_backend_names_the_choices(self, op, rng):
        with pytest.raises(ValueError, match=f"{op}: backend='cuda' is unknown; use one of 'auto', 'triton', 'torch'"):
            call(op, rng, "cuda")

    def test_torch_and_auto_give_the_same_on_the_cpu(self, op, rng):
        state = rng.get_state()
        results = []
        for backend in ("torch", "auto"):
            rng.set_state(state)
            result = call(op, rng, backend)
            results.append(result if isinstance(result, tuple) else (result,))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_available_backends_lists_every_operator_with_its_reasons():
    for device in ("cpu", CPU):
        table = available_backends(device)
        assert list(table) == list(OPS)
        for op, (backend, reasons) in table.items():
            assert backend == "torch" and reasons == triton_reasons(op, CPU)
            assert any("need a CUDA device" in reason for reason in reasons)


def test_available_backends_where_everything_is_there(all_kernels_present):
    assert all(choice == ("triton", []) for choice in available_backends("cuda").values())


def test_backend_error_is_a_runtime_error_and_not_a_value_error():
    assert issubclass(BackendError, RuntimeError) and not issubclass(BackendError, ValueError)
    assert BACKENDS == ("auto", "triton", "torch")
