"""Running the public operators' Triton kernels on CPU tensors, in poisoned memory between guard zones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scfg_kernels.testing import Guarded, guarded_empty
from torch.utils._python_dispatch import TorchDispatchMode

from lab.ptxsim import Launch, SimError, simulated
from lab.ptxsim.tests.mutations import without_masks

ARCHITECTURES = (80, 90)
"""mma.sync with cp.async, and the first with wgmma."""


class PoisonedMemory(TorchDispatchMode):
    """Every uninitialised tensor is full of poison between guard zones, also inside this package's custom operators."""

    EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Guarded] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "scfg_kernels":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        if func._schema.name not in self.EMPTY or result.numel() == 0:
            return result
        self.made.append(guarded_empty(result.shape, result.dtype))
        tensor = self.made[-1].tensor
        return tensor.as_strided(result.shape, result.stride(), tensor.storage_offset())


def run(arch: int, call: Callable[[], Any]) -> tuple[Any, list[Launch]]:
    """`call()` with the simulator active; nothing beside a result or a scratch tensor may have been written."""
    memory = PoisonedMemory()
    with simulated(arch) as simulation, memory:
        result = call()
    for guarded in memory.made:
        guarded.assert_guards_intact()
    return result, simulation.launches


def assert_nothing_beside_is_touched(
    arch: int, call: Callable[[], Any], caught: str = "out of bounds", masks: int = 2
) -> None:
    """`call` in tensors that end where their storage ends has the bits of one between guard zones; without the masks of
    its loads, or of its stores, the simulator ends it with an error that matches `caught`.
    `masks`: 1 where all loads are asynchronous copies, whose masks are lengths."""
    with simulated(arch) as simulation:
        exact = call()
    guarded, _ = run(arch, call)
    assert all(torch.equal(x, y) for x, y in zip(exact, guarded, strict=True)), "poison reached a result"
    mutants = list(without_masks(simulation.launches[0].ptx))
    assert len(mutants) == masks
    for mutant in mutants:
        with simulated(arch, rewrite=lambda _, ptx=mutant.ptx: ptx), pytest.raises(SimError, match=caught):
            call()
