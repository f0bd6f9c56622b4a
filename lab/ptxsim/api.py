"""The public entry: a context in which Triton launches run on the simulator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver

from .driver import Launch, Options, SimulatedDriver
from .errors import SimError


class Run:
    """What happened inside a `simulated` context.

    Attributes:
        arch: compute capability that was simulated.
        launches: one record per launch, in order; a launch that raised is in it too.
    """

    def __init__(self, driver: SimulatedDriver) -> None:
        self.arch = driver.arch
        self.launches: list[Launch] = driver.launches


@contextmanager
def installed(driver: DriverBase) -> Iterator[None]:
    """Make `driver` Triton's active one; the previous one is active again afterwards, also after an exception.

    Raises:
        SimError: Triton is in interpreter mode, or keeps its driver where it is not looked for.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise SimError("TRITON_INTERPRET is set: kernels are interpreted, there is no PTX to execute")
    if not hasattr(triton_driver, "_active"):
        raise SimError("this version of Triton keeps its active driver elsewhere; the simulator knows 3.6 to 3.9")
    previous = triton_driver._active
    triton_driver.set_active(driver)
    try:
        yield
    finally:
        triton_driver._active = previous


@contextmanager
def simulated(
    arch: int = 80,
    *,
    check_races: bool = True,
    rewrite: Callable[[str], str] | None = None,
    shared_bytes: int | None = None,
    order: str = "lockstep",
) -> Iterator[Run]:
    """Run Triton kernels on CPU tensors by executing the PTX that Triton compiles for `arch`.

    The previous driver is active again afterwards, also after an exception; contexts may be nested.

    Args:
        arch: 80, 86, 89, 90 or 120.
        check_races: look for missing barriers, waits and fences in shared memory, and for missing order in global.
        rewrite: changes the PTX before it is executed (to test the simulator).
        shared_bytes: shared memory per CTA instead of what the compiler asked for (likewise).
        order: `"lockstep"`, or one warp after another, `"forward"` or `"backward"`; see `machine.launch`.

    Yields:
        A `Run`, whose `launches` grow with every launch.

    Raises:
        ValueError: unknown `arch`.
        SimError: Triton is in interpreter mode; or, from a launch, anything wrong or unknown in the program.
    """
    driver = SimulatedDriver(arch, Options(check_races, rewrite, shared_bytes, order))
    with installed(driver):
        yield Run(driver)
