"""A Triton driver that compiles and records launches instead of executing them, for targets that are not here.

Triton takes its ordinary path up to the launch: it specialises the arguments, compiles for the target, and checks the
shared memory against the device. So what is recorded is what a device would be given. Results are never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget

from .api import installed
from .driver import DEVICES, CPUTensorDriver, Device, compiled_files, is_cooperative
from .errors import SimError
from .machine import Grid

TARGETS: dict[str, tuple[GPUTarget, Device]] = {
    **{f"sm_{arch}": (GPUTarget("cuda", arch, 32), device) for arch, device in DEVICES.items()},
    "sm_100": (GPUTarget("cuda", 100, 32), Device("B200", 148, 232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("MI300X", 304, 65536)),
    "gfx950": (GPUTarget("hip", "gfx950", 64), Device("MI355X", 256, 163840)),
}


@dataclass(frozen=True)
class RecordedLaunch:
    """One launch that was compiled and not executed.

    Attributes:
        kernel: name of the kernel.
        target: `"sm_80"` or `"gfx942"`.
        grid: programs per axis.
        num_warps, num_stages: as compiled; a warp has 64 threads on gfx9.
        shared_bytes: shared memory per program.
        cooperative: whether all programs are to be resident at once.
        files: what the compiler wrote, by kind: `"ttgir"`, `"ptx"`, `"cubin"`, or `"amdgcn"`, `"hsaco"`.
    """

    kernel: str
    target: str
    grid: Grid
    num_warps: int
    num_stages: int
    shared_bytes: int
    cooperative: bool
    files: dict[str, Path]


class RecordingDriver(CPUTensorDriver):
    """The driver that `recorded` installs."""

    def __init__(self, name: str) -> None:
        if name not in TARGETS:
            raise ValueError(f"target={name!r} is unknown; use one of {', '.join(TARGETS)}")
        super().__init__(*TARGETS[name], 20_000 + list(TARGETS).index(name), _Recorder)
        self.name = name


class _Recorder:
    """Stands in for one compiled kernel; Triton makes one per kernel and keeps it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._metadata, self._files = metadata, compiled_files(metadata)

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        from triton.runtime import driver

        metadata = self._metadata
        name = getattr(driver.active, "name", None)
        if name not in TARGETS:
            raise SimError(f"{metadata.name} was compiled to be recorded, which has ended")
        grid = int(grid_x), int(grid_y), int(grid_z)
        cooperative = is_cooperative(metadata, grid, driver.active.device)
        shape = metadata.num_warps, metadata.num_stages, metadata.shared, cooperative
        driver.active.launches.append(RecordedLaunch(metadata.name, name, grid, *shape, self._files))


@contextmanager
def recorded(target: str) -> Iterator[list[RecordedLaunch]]:
    """Compile the Triton launches on CPU tensors for `target`, and record them instead of executing them.

    Args:
        target: a name in `TARGETS`.

    Yields:
        The launches so far, in order. What a kernel would have written is uninitialised memory.

    Raises:
        ValueError: unknown `target`.
        triton.runtime.errors.OutOfResources: from a launch that needs more shared memory than the device has.
        SimError: from a cooperative launch of more programs than the device has multiprocessors.
    """
    driver = RecordingDriver(target)
    with installed(driver):
        yield driver.launches
