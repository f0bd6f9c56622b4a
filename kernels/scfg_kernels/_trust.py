"""Whether `"auto"` may take the kernels on a CUDA device, and what happens when a launch fails under `"auto"`.

Three things keep `"auto"` on torch, per device: nothing of this project has run on its architecture; the canary, a few
small products, exponentials and gathers, fails there or disagrees with torch; or a kernel of the operator has failed to
compile or to launch. Each is said once, as a warning, and `available_backends` lists it. An explicit `"triton"` takes
the kernels all the same, and raises what they raise.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

MAX_CAPABILITY = (9, 0)
"""The highest compute capability on which `"auto"` takes the kernels: later instructions were compiled for alone."""
Result = TypeVar("Result")
_FAILED: dict[tuple[str, int], str] = {}
_SAID: set[str] = set()


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0


def say_once(reason: str, message: str) -> None:
    """Warn, unless this reason has been given in this process."""
    if reason not in _SAID:
        _SAID.add(reason)
        warnings.warn(message, UserWarning, stacklevel=3)


@torch.compiler.assume_constant_result  # of a plain function: Dynamo looks through a cache
def reasons_against(op: str, index: int) -> list[str]:
    """Why `"auto"` leaves `op` on a CUDA device to torch, although an explicit `"triton"` would run it."""
    found = list(_device_reasons(index)) if torch.cuda.is_available() else []
    return found + ([_FAILED[op, index]] if (op, index) in _FAILED else [])


@functools.cache
def _device_reasons(index: int) -> tuple[str, ...]:
    """Asked once per device: launching something while a CUDA graph is captured is an error, so it is asked before."""
    if torch.version.hip is not None:
        return ("the kernels are compiled for AMD and have never run there; backend='triton' takes them",)
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    if capability > MAX_CAPABILITY:
        version = ".".join(map(str, capability))
        return (f"the kernels have never run on compute capability {version}; backend='triton' takes them",)
    return tuple(canary_reasons(torch.device("cuda", index)))


def canary_reasons(device: torch.device) -> list[str]:
    """Why the canary's results on a device are not to be trusted; empty if they are."""
    try:
        from ._triton.canary import disagreement

        found = disagreement(device)
    except Exception as error:  # whatever a compiler, a driver or a device finds
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return [f"a small test kernel fails on this device: {found}"] if found else []


def run(
    op: str, backend: str, device: torch.device, launch: Callable[[], Result], twin: Callable[[], Result]
) -> Result:
    """The result of an operator whose backend is `"triton"`, `"torch"`, or `"auto"`: `launch` while it works.

    Under `"auto"` an error of `launch` is remembered and said once, and torch computes the operator from then on. Lack
    of memory is the caller's.
    """
    if backend == "triton":
        return launch()
    if backend == "auto" and (op, _index(device)) not in _FAILED:
        try:
            return launch()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's, a linker's, a driver's
            reason = f"its kernel fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _FAILED[op, _index(device)] = reason
            say_once(reason, f"scfg_kernels.{op} on {device}: {reason}. torch computes it from now on, more slowly.")
    return twin()


def say_why_torch(op: str, device: torch.device, reasons: Sequence[str]) -> None:
    """Once per reason, that `"auto"` leaves an operator on a CUDA device to torch."""
    if device.type == "cuda" and torch.cuda.is_available() and not torch.compiler.is_compiling():
        for reason in reasons:
            say_once(reason, f"scfg_kernels: torch computes {op} on {device}, and what else this concerns: {reason}.")
