"""Which cards and versions the kernels are for, and which tensors are kept from call to call."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from scfg_kernels import _launch, _trust, available_backends, choose_backend
from scfg_kernels._launch import (
    card_reasons,
    kept,
    may_keep,
    reasons_for_auto,
    target_reasons,
    triton_reasons,
    version_numbers,
    version_reasons,
)

CUDA = torch.device("cuda", 1)


_device_reasons = _trust._device_reasons.__wrapped__


@pytest.fixture
def card(monkeypatch):
    """What the rest of the package takes for a machine with a card; its reasons are asked of `found`."""
    found = []
    monkeypatch.setattr(_launch, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_trust, "_device_reasons", lambda index: ())
    monkeypatch.setattr(_trust, "_FAILED", {})
    monkeypatch.setattr(_trust, "_SAID", set())
    monkeypatch.setattr(_launch, "card_reasons", lambda index: [f"card {index}: {reason}" for reason in found])
    return found


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("3.8.0", (3, 8, 0)), ("3.7.1+git5e1b2c", (3, 7, 1)), ("3.10", (3, 10)), ("3.6.0rc1", (3, 6, 0))],
)
def test_version_numbers(version, numbers):
    assert version_numbers(version) == numbers
    assert version_reasons(version) == []


@pytest.mark.parametrize("version", ["3.5.1", "2.3.1", "3"])
def test_an_old_triton_is_a_reason(version):
    assert version_reasons(version) == [f"triton {version} is too old, the kernels need 3.6"]


def test_cards_without_the_tensor_core_instructions_are_a_reason():
    for major, minor in ((8, 0), (8, 9), (9, 0), (12, 0)):
        assert target_reasons(False, SimpleNamespace(major=major, minor=minor)) == []
    assert target_reasons(False, SimpleNamespace(major=7, minor=5)) == ["compute capability 7.5 is below 8.0"]
    assert target_reasons(True, SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")) == []
    assert target_reasons(True, SimpleNamespace(gcnArchName="gfx1100")) == ["gfx1100 is not one of gfx942, gfx950"]


def test_reasons_of_the_tensors_own_card_are_listed(card):
    assert choose_backend("guide", "auto", CUDA) == "triton"
    card.append("too old")
    assert triton_reasons("guide", CUDA) == ["card 1: too old"]
    with pytest.warns(UserWarning, match="torch computes guide on cuda:1, .* card 1: too old"):
        choose_backend("guide", "auto", CUDA)
    assert choose_backend("guide", "auto", CUDA) == "torch"
    with pytest.raises(_launch.BackendError, match="card 1: too old"):
        choose_backend("guide", "triton", CUDA)
    assert available_backends(CUDA)["guide"] == ("torch", ["card 1: too old"])
    assert available_backends("cpu")["guide"][1] == triton_reasons("guide", torch.device("cpu"))


def test_amd_is_taken_only_if_it_is_asked_for(card, monkeypatch):
    monkeypatch.setattr(_trust, "_device_reasons", _device_reasons)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(UserWarning, match="have never run there"):
        assert choose_backend("guide", "auto", CUDA) == "torch"
    assert choose_backend("guide", "triton", CUDA) == "triton"
    assert available_backends(CUDA)["guide"] == ("torch", reasons_for_auto(CUDA))
    assert reasons_for_auto(torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("capability", "trusted"), [((8, 0), True), ((9, 0), True), ((10, 0), False), ((12, 1), False)]
)
def test_architectures_that_nothing_ran_on_are_torchs(card, monkeypatch, capability, trusted):
    major, minor = capability
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=major, minor=minor))
    monkeypatch.setattr(_trust, "canary_reasons", lambda device: [])
    found = _device_reasons(1)
    assert (found == ()) == trusted and all(f"capability {major}.{minor};" in reason for reason in found)


def test_a_canary_that_fails_leaves_the_device_to_torch_and_says_so_once(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(_trust, "_device_reasons", _device_reasons)
    for answer in (lambda device: "its result is 1.0e+00 off", lambda device: 1 / 0):
        monkeypatch.setattr("scfg_kernels._triton.canary.disagreement", answer)
        with pytest.warns(UserWarning, match="a small test kernel fails") as said:
            assert choose_backend("guide", "auto", CUDA) == choose_backend("guide", "auto", CUDA) == "torch"
        assert len(said) == 1
        assert "a small test kernel fails" in available_backends(CUDA)["guide"][1][0]
        assert choose_backend("guide", "triton", CUDA) == "triton", "who asks for it gets it"


def test_a_launch_that_fails_is_torchs_from_then_on(card):
    def launch():
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match="guide on cuda:1: its kernel fails: RuntimeError: PassManager") as said:
        assert [_trust.run("guide", "auto", CUDA, launch, lambda: "torch") for _ in range(2)] == ["torch"] * 2
    assert len(said) == 1
    assert choose_backend("guide", "auto", CUDA) == "torch" and choose_backend("segment", "auto", CUDA) == "triton"
    assert "PassManager" in available_backends(CUDA)["guide"][1][0]
    with pytest.raises(RuntimeError, match="PassManager"):
        _trust.run("guide", "triton", CUDA, launch, lambda: "torch")


def test_lack_of_memory_is_the_callers(card):
    def launch():
        raise torch.cuda.OutOfMemoryError("2 GiB")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        _trust.run("guide", "auto", CUDA, launch, lambda: "torch")
    assert choose_backend("guide", "auto", CUDA) == "triton"


@pytest.mark.parametrize("given", ["auto", "triton", "torch"])
def test_a_custom_op_hears_that_auto_was_asked_for(card, given):
    assert _launch.backend_for("guide", given, CUDA) == given
    assert _launch.backend_for("guide", "auto", torch.device("cpu")) == "torch"


def test_an_operator_whose_launch_fails_gives_the_result_of_torch(card, monkeypatch):
    """From end to end, on CPU tensors."""
    module = importlib.import_module("scfg_kernels.complete")
    monkeypatch.setattr(module, "backend_for", lambda *_: "auto")
    monkeypatch.setitem(_launch.KERNELS, "complete", lambda *_: 1 / 0)
    s, c = torch.rand(2, 9, 9), torch.rand(2, 9, 5)
    with pytest.warns(UserWarning, match="complete on cpu: its kernel fails: ZeroDivisionError"):
        found = module.complete(s, c, unconditional=1)
    assert all(torch.equal(x, y) for x, y in zip(found, module.complete(s, c, unconditional=1), strict=True))


def test_a_compiled_function_takes_the_answer_for_a_constant(monkeypatch):
    """No break in the graph, though a driver is asked that Dynamo cannot trace; and asked once."""
    asked = []

    def properties(index):
        torch._dynamo.graph_break()  # an error in a full graph
        asked.append(index)
        return SimpleNamespace(major=7, minor=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr("scfg_kernels._triton._device.driver_reasons", lambda: ["no compiler"])
    _launch._card_reasons.cache_clear()

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x + len(_launch.card_reasons(1))

    try:
        assert [f(torch.zeros(size)).sum().item() for size in (1, 3)] == [2.0, 6.0] and asked == [1]
        assert card_reasons(1) == ["compute capability 7.0 is below 8.0", "no compiler"]
    finally:
        _launch._card_reasons.cache_clear()


def test_tensors_are_kept_where_no_graph_can_own_them(monkeypatch):
    made = []

    @kept
    def ones(number, device):
        made.append(number)
        return torch.ones(number)

    assert ones(3, torch.device("cpu")) is ones(3, torch.device("cpu")) and made == [3]
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert may_keep(CUDA) and ones(4, CUDA) is ones(4, CUDA) and made == [3, 4]
    stream.cuda_stream = 7
    assert not may_keep(CUDA) and ones(4, CUDA) is not ones(4, CUDA) and made == [3, 4, 4, 4]
