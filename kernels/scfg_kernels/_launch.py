"""The choice of a backend: a pure function of the operator, the request and the device."""

from __future__ import annotations

import importlib.util

import torch

from ._triton import KERNELS

BACKENDS = ("auto", "triton", "torch")
OPS = ("self_attention_map", "cross_attention_map", "attention_map", "complete", "segment", "guide")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run; the message lists every reason."""


def triton_reasons(op: str, device: torch.device) -> list[str]:
    """Every reason why the Triton kernel of `op` cannot run on `device`; empty if it can."""
    reasons = []
    if op not in KERNELS:
        reasons.append(f"this version has no Triton kernel for {op}")
    if not _TRITON_INSTALLED:
        reasons.append("triton is not installed")
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device.type!r}, Triton kernels need a CUDA device")
    return reasons


def choose_backend(op: str, backend: str, device: torch.device) -> str:
    """Resolve `"auto" | "triton" | "torch"` to the backend that will run.

    Args:
        op: operator name, for example `"self_attention_map"`.
        backend: `"torch"` is always available; `"triton"` is taken literally; `"auto"` is Triton where it can run, else
            torch.
        device: device of the operands.

    Returns:
        `"triton"` or `"torch"`.

    Raises:
        ValueError: unknown backend name.
        BackendError: `backend="triton"` and it cannot run; lists every reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch":
        return "torch"
    reasons = triton_reasons(op, device)
    if not reasons:
        return "triton"
    if backend == "triton":
        raise BackendError(f"{op}: backend='triton' cannot run: {'; '.join(reasons)}. Use backend='auto' or 'torch'.")
    return "torch"


def available_backends(device: torch.device | str = "cpu") -> dict[str, tuple[str, list[str]]]:
    """Per operator: the backend `"auto"` takes on `device`, and why it is not Triton (empty if it is)."""
    device = torch.device(device)
    return {op: (choose_backend(op, "auto", device), triton_reasons(op, device)) for op in OPS}
