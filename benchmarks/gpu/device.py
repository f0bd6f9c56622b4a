"""Clock, graph and memory of the device. `Cpu` stands in for a dry run, so that all other lines run without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

HIDDEN = 4_000_000
"""Clock cycles, about 2 ms, that the device is kept busy while the host launches what is timed."""


class Cuda:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # Twice the L2 cache, written before every sample, so that operands come from memory.
        self._flush = torch.empty(2 * getattr(properties, "L2_cache_size", 128 << 20), dtype=torch.int8, device="cuda")
        self.description = {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Of one call, between two events of the stream. What the host takes to launch it is hidden up to `HIDDEN`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(HIDDEN)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def captured(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """`call` as a CUDA graph: what replays it, and the result that it fills."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # compiles, and warms the allocator up
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def peak(self, call: Callable[[], Any]) -> float | None:
        """Most MiB that were allocated at once during a call, above what was before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def release(self) -> None:
        torch.cuda.synchronize()  # raises again what the device does not recover from
        torch.cuda.empty_cache()


class Cpu:
    """The same on a CPU, where a graph is the call itself."""

    name = "cpu"

    def __init__(self) -> None:
        self.description = {"device": "cpu (dry run)", "capability": "", "multiprocessors": 0, "memory_gib": 0.0}

    def milliseconds(self, call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    def captured(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = call()

        def replay() -> None:
            torch.utils._pytree.tree_map(lambda old, new: old.copy_(new), result, call())

        return replay, result

    def peak(self, call: Callable[[], Any]) -> float | None:
        return None

    def release(self) -> None:
        pass


Device = Cuda | Cpu
