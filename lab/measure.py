"""How things are measured: interleaved samples, paired ratios, allocated and resident memory, dispatched operators.

Knows nothing of the cases.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scfg_kernels.attention_map import _attention_map, _attention_maps
from scfg_kernels.attention_with_lse import _attention_with_lse
from scfg_kernels.complete import _complete
from scfg_kernels.guide import _guide
from scfg_kernels.guide_pixels import _guide_pixels
from scfg_kernels.joint_attention_maps import _joint_attention_maps
from scfg_kernels.segment import _segment
from scfg_kernels.segment_and_guide import _segment_and_guide
from torch._C import DispatchKey
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 1 << 20

# The Python function under each custom op, by the name that the dispatcher knows.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    f"scfg_kernels::{name}": op._init_fn
    for name, op in {
        "attention_map": _attention_map,
        "attention_maps": _attention_maps,
        "attention_with_lse": _attention_with_lse,
        "complete": _complete,
        "joint_attention_maps": _joint_attention_maps,
        "segment": _segment,
        "guide": _guide,
        "guide_pixels": _guide_pixels,
        "segment_and_guide": _segment_and_guide,
    }.items()
}

# Operators that are no view by their schema but launch nothing: they relabel, allocate, or look at metadata.
LAUNCHES_NOTHING = {
    "aten::_fused_sdp_choice",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::promote_types",
}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, low, high, len(samples))


def ratios(top: Sequence[float], bottom: Sequence[float]) -> Spread:
    """Spread of the ratio within each round: what changes from round to round on the machine cancels."""
    return Spread.of([a / b for a, b in zip(top, bottom, strict=True)])


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Mean duration of `repeats` calls in a row, with the garbage collector off."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    finally:
        if was_on:
            gc.enable()


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    repeats: Mapping[str, int] | None = None,
    after_round: Callable[[int, dict[str, float]], bool] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call: every round times each entry once, in an order that is shuffled anew (with a fixed seed).

    Args:
        calls: what to time; the same function under two names is an A/A control.
        rounds: how many rounds.
        repeats: calls per sample, 1 where not named.
        after_round: told of each round; returns False to stop early.
    """
    shuffle = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for index in range(rounds):
        order = list(calls)
        shuffle.shuffle(order)
        latest = {name: seconds(calls[name], (repeats or {}).get(name, 1)) for name in order}
        for name, value in latest.items():
            samples[name].append(value)
        if after_round is not None and not after_round(index, latest):
            break
    return samples


def allocated_peak(call: Callable[[], Any]) -> int:
    """Largest number of bytes that torch's CPU allocator held at once for `call`, above what it held before.

    Read from the profiler's allocation events, so temporaries inside operators count; scratch buffers that oneDNN or
    MKL take from the system do not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    if not memory:
        return 0
    # The total goes on from one profile to the next: what was there before the first allocation is not this call's.
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return max(event["Total Allocated"] for event in memory) - before


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux: VmHWM, which starts at zero with the program; `ru_maxrss` there would carry over the parent's size.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _launches(func: Any) -> bool:
    return func.namespace != "prim" and not func.is_view and func._schema.name not in LAUNCHES_NOTHING


class _Inside(TorchDispatchMode):
    """Counts what runs below a custom op, where composite operators (matmul, softmax) arrive whole: it opens them."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))
        self.counts[func._schema.name] += _launches(func)
        return func(*args, **(kwargs or {}))


@dataclass
class OpCounts:
    """Operators that the dispatcher saw, views and pure allocations left out.

    Attributes:
        dispatched: a custom op of `scfg_kernels` counts as one.
        inside: a custom op of `scfg_kernels` counts as the operators of its torch implementation.
    """

    dispatched: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)


class CountOps(TorchDispatchMode):
    """Fills `counts` while it is active. Custom ops of `scfg_kernels` run their torch implementation in plain sight."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = OpCounts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.counts.dispatched[name] += _launches(func)
        if name in IMPLEMENTATIONS:
            with _Inside(self.counts.inside):
                return IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        self.counts.inside[name] += _launches(func)
        return func(*args, **(kwargs or {}))


def fresh_compiler() -> None:
    """Forget compiled graphs, so that one case's do not count against the recompilation limit of the next."""
    torch._dynamo.reset()
