"""A simulator of the PTX that Triton compiles: `with simulated(80) as run: kernel[grid](*tensors)`. See README.md."""

from .api import Run, simulated
from .counters import Counters, Traffic
from .decode import decode
from .driver import DEVICES, Launch
from .errors import SimError
from .machine import launch
from .memory import GlobalMemory
from .parser import FLOAT_ATOMIC
from .recording import TARGETS, RecordedLaunch, recorded

__all__ = [
    "DEVICES",
    "FLOAT_ATOMIC",
    "TARGETS",
    "Counters",
    "GlobalMemory",
    "Launch",
    "RecordedLaunch",
    "Run",
    "SimError",
    "Traffic",
    "decode",
    "launch",
    "recorded",
    "simulated",
]
