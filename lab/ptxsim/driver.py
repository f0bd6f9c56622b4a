"""A Triton driver whose device is the simulator.

With it active, `kernel[grid](cpu_tensors)` takes Triton's ordinary path: specialise, compile for the chosen
architecture, launch. Only the last step is ours: instead of loading the cubin, the PTX is executed. It keeps to the
driver interface of Triton 3.6 to 3.9, which is semi-internal.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from .counters import Counters
from .decode import decode
from .errors import SimError
from .machine import Grid, launch
from .memory import GlobalMemory

_SCALARS = {"fp16": np.float16, "fp32": np.float32, "f32": np.float32, "fp64": np.float64}


@dataclass(frozen=True)
class Device:
    """What a launch may ask about a card."""

    name: str
    multiprocessors: int
    shared_memory: int  # bytes one CTA may have


DEVICES = {
    80: Device("A100", 108, 166912),
    86: Device("RTX 3090", 82, 101376),
    89: Device("RTX 4090", 128, 101376),
    90: Device("H100", 132, 232448),
    120: Device("RTX 5090", 170, 101376),
}


@dataclass
class Launch:
    """One kernel launch that was executed.

    Attributes:
        kernel: name of the kernel.
        arch: compute capability, 80 for sm_80.
        grid: CTAs per axis.
        num_warps: warps per CTA.
        shared_bytes: shared memory per CTA.
        cooperative: whether all CTAs were resident at once, as `launch_cooperative_grid=True` asks for.
        counters: what it did.
        seconds: time the simulation took.
        ptx: the program.
    """

    kernel: str
    arch: int
    grid: Grid
    num_warps: int
    shared_bytes: int
    cooperative: bool
    counters: Counters
    seconds: float
    ptx: str


@dataclass(frozen=True)
class Options:
    """How launches are executed; see `simulated`."""

    check_races: bool = True
    rewrite: Callable[[str], str] | None = None
    shared_bytes: int | None = None
    order: str = "lockstep"


class _Utilities:
    """The part of a driver that loads binaries and answers questions about the device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def load_binary(self, name: str, kernel: bytes, shared: int, device: object) -> tuple[None, int, int, int, int]:
        """Nothing is loaded. The module is None, so that Triton never asks another driver to unload it."""
        return None, 0, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {
            "max_shared_mem": self._device.shared_memory,
            "multiprocessor_count": self._device.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1_000_000,
            "mem_clock_rate": 1_000_000,
            "mem_bus_width": 1024,
        }


class CPUTensorDriver(DriverBase):
    """A driver without a device: takes CPU tensors and hands launches to `launcher_cls`.

    Args:
        target: what Triton compiles for.
        device: what launches are told about the card.
        number: the device number. Triton keeps one compiled kernel per number, whatever its target or driver, so every
            pair of the two needs its own.
        launcher_cls: made by Triton once per compiled kernel, called at every launch.
    """

    def __init__(self, target: GPUTarget, device: Device, number: int, launcher_cls: type) -> None:
        self.launches: list[Any] = []
        self.device = device
        self.utils = _Utilities(device)
        self.launcher_cls = launcher_cls
        self._target, self._number = target, number

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by itself

    def get_current_device(self) -> int:
        return self._number

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        return divmod(self._target.arch, 10)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable:
        raise SimError("the simulator knows no time, so nothing can be benchmarked or autotuned on it")

    def get_empty_cache_for_benchmark(self) -> None:
        self.get_benchmarker()

    def clear_cache(self, cache: object) -> None:
        self.get_benchmarker()


class SimulatedDriver(CPUTensorDriver):
    """The driver that `simulated` installs; it collects the launches."""

    def __init__(self, arch: int, options: Options) -> None:
        if arch not in DEVICES:
            raise ValueError(f"arch={arch!r} is unknown; use one of {', '.join(map(str, DEVICES))}")
        super().__init__(GPUTarget("cuda", arch, 32), DEVICES[arch], 10_000 + arch, Launcher)
        self.arch, self.options = arch, options


def compiled_files(metadata: Any) -> dict[str, Path]:
    """What Triton's cache keeps of a compiled kernel, by kind: `"ptx"` and `"cubin"`, or `"amdgcn"` and `"hsaco"`."""
    from triton.runtime.cache import get_cache_manager

    group = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json") or {}
    return {Path(name).suffix[1:]: Path(path) for name, path in group.items()}


def is_cooperative(metadata: Any, grid: Grid, device: Device) -> bool:
    """Whether all CTAs of a launch are to be resident at once.

    Raises:
        SimError: they do not fit, as the driver would say. How many share a multiprocessor depends on registers, which
            are not known here: one always fits.
    """
    cooperative = bool(getattr(metadata, "launch_cooperative_grid", False))
    if cooperative and math.prod(grid) > device.multiprocessors:
        raise SimError(
            f"{metadata.name}: a cooperative launch of {math.prod(grid)} CTAs; one fits on each of the "
            f"{device.multiprocessors} multiprocessors, whether more do is not known here"
        )
    return cooperative


class Launcher:
    """Executes one compiled kernel; Triton makes one per kernel and keeps it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._metadata = metadata
        names = source.fn.arg_names if hasattr(source, "fn") else list(source.signature)
        self._arguments = list(zip(names, source.signature.values(), strict=False))
        files = compiled_files(metadata)
        if "ptx" not in files:
            raise SimError(f"{metadata.name} has no PTX in Triton's cache")
        self._ptx = files["ptx"].read_text(encoding="utf-8")

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, stream: object, function: object, *rest: Any) -> None:
        """`rest`: packed metadata, launch metadata, enter hook, exit hook, then the kernel's arguments."""
        from triton.runtime import driver

        active = driver.active
        if not hasattr(getattr(active, "options", None), "check_races"):  # any copy of this module will do
            raise SimError(f"{self._metadata.name} was compiled for the simulator, which is not active any more")
        arguments = rest[4:]
        options, metadata = active.options, self._metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise SimError(f"{metadata.name}: clusters are not supported")
        grid = (int(grid_x), int(grid_y), int(grid_z))
        cooperative = is_cooperative(metadata, grid, active.device)
        memory, counters = GlobalMemory(), Counters()
        pairs = zip(self._arguments, arguments, strict=True)
        values = list(_values(memory, [(name, kind, value) for (name, kind), value in pairs]))
        values += _scratch(memory, metadata, grid)
        shared = metadata.shared if options.shared_bytes is None else options.shared_bytes
        ptx = options.rewrite(self._ptx) if options.rewrite else self._ptx
        started = time.perf_counter()
        try:
            if all(grid):
                how = {"check_races": options.check_races, "order": options.order, "cooperative": cooperative}
                launch(decode(ptx), memory, values, grid, shared, counters, **how)
        finally:
            memory.finish(counters)
            seconds = time.perf_counter() - started
            shape = grid, metadata.num_warps, shared, cooperative
            active.launches.append(Launch(metadata.name, active.arch, *shape, counters, seconds, ptx))


def _values(memory: GlobalMemory, arguments: Iterable[tuple[str, Any, Any]]) -> Iterator[int]:
    """Bit patterns of the arguments in order; tensors become buffers, one per storage."""
    storages: dict[int, tuple[Any, int]] = {}
    for name, kind, value in _flatten(arguments):
        if not isinstance(kind, str) or kind == "constexpr":
            continue
        if kind.startswith("*"):
            yield 0 if value is None else _pointer(memory, storages, name, value)
        elif kind in _SCALARS:
            pattern = np.array(value, _SCALARS[kind])
            yield int(pattern.view(f"u{pattern.itemsize}"))
        elif kind == "bf16":
            yield int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
        elif kind[0] in "iu" and kind[1:].isdigit():
            yield int(value) & ((1 << max(int(kind[1:]), 8)) - 1)
        else:
            raise SimError(f"argument {name} of type {kind} is not supported")


def _flatten(arguments: Iterable[tuple[str, Any, Any]]) -> Iterator[tuple[str, Any, Any]]:
    for name, kind, value in arguments:
        if isinstance(kind, (tuple, list)):
            parts = zip(kind, value, strict=True)
            yield from _flatten((f"{name}[{i}]", k, v) for i, (k, v) in enumerate(parts))
        else:
            yield name, kind, value


def _pointer(memory: GlobalMemory, storages: dict[int, tuple[Any, int]], name: str, tensor: Any) -> int:
    if not isinstance(tensor, torch.Tensor) and isinstance(getattr(tensor, "base", None), torch.Tensor):
        tensor = tensor.base  # triton.reinterpret
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
        raise SimError(f"argument {name} must be a CPU tensor, not {type(tensor).__name__}")
    storage = tensor.untyped_storage()
    host = storage.data_ptr()
    key = host if storage.nbytes() else -len(storages) - 1
    if key not in storages:
        size = storage.nbytes()
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host)) if size else np.zeros(0, np.uint8)
        storages[key] = (memory.add(data, name, host), host)
    else:
        storages[key][0].label += f"/{name}"
    buffer, start = storages[key]
    return buffer.base + tensor.data_ptr() - start


def _scratch(memory: GlobalMemory, metadata: Any, grid: Grid) -> list[int]:
    """Pointers to the scratch memory that the compiler asked for."""
    pointers = []
    for kind in ("global", "profile"):
        size = getattr(metadata, f"{kind}_scratch_size", 0) or 0
        total = size * grid[0] * grid[1] * grid[2]
        pointers.append(memory.add(np.zeros(total, np.uint8), f"{kind}_scratch").base if total else 0)
    return pointers
