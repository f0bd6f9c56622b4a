"""What a launch did, counted: traffic, shared-memory wavefronts, tensor-core work, barriers, atomics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Pattern = Callable[[np.ndarray, int, np.ndarray], tuple[int, int]]

SECTOR = 32  # bytes that move together between L2 and a multiprocessor
BANKS = 32  # shared-memory banks of 4 bytes
WARP = 32


class PatternCache:
    """Remembers the cost of an access pattern: loops and neighbouring CTAs repeat the same few."""

    def __init__(self, limit: int = 4096) -> None:
        self._known: dict[tuple[int, bytes, bytes], tuple[int, int]] = {}
        self._limit = limit

    def get(
        self, width: int, addresses: np.ndarray, threads: np.ndarray, period: int, compute: Pattern
    ) -> tuple[int, int]:
        """`compute(addresses, width, threads)`, which must only depend on the addresses up to multiples of `period`."""
        shift = addresses[0] - addresses[0] % period
        relative = addresses - shift
        key = (width, relative.tobytes(), threads.tobytes())
        result = self._known.get(key)
        if result is None:
            if len(self._known) >= self._limit:
                self._known.clear()
            result = self._known[key] = compute(relative, width, threads)
        return result


def count_sectors(addresses: np.ndarray, width: int, threads: np.ndarray) -> tuple[int, int]:
    """32-byte sectors of one instruction, counted once per warp; the second number is always 0."""
    sectors = np.concatenate([addresses // SECTOR, (addresses + width - 1) // SECTOR])
    warps = np.concatenate([threads, threads]) // WARP
    return int(np.unique((sectors - sectors.min()) * (1 << 20) + warps).size), 0


def count_wavefronts(addresses: np.ndarray, width: int, threads: np.ndarray) -> tuple[int, int]:
    """Shared-memory wavefronts of one instruction, and the fewest that its bytes need.

    A warp's access is served in phases of at most 128 bytes: 32 threads of 4 bytes, 16 of 8, 8 of 16. A phase takes one
    wavefront per distinct word on its busiest bank; at best, one per 32 distinct words.

    Args:
        addresses: byte address per active thread.
        width: bytes per thread.
        threads: number of each of these threads.
    """
    words_each = max(width // 4, 1)
    phase = threads // WARP * 8 + threads % WARP // max(WARP // words_each, 1)
    words = addresses[:, None] // 4 + np.arange(words_each)
    keys = np.unique((phase[:, None] * (1 << 32) + words).ravel())
    _, dense = np.unique(keys >> 32, return_inverse=True)
    per_bank = np.bincount(dense * BANKS + (keys & (BANKS - 1)))
    per_bank = np.pad(per_bank, (0, -len(per_bank) % BANKS)).reshape(-1, BANKS)
    return int(per_bank.max(1).sum()), int((-(-per_bank.sum(1) // BANKS)).sum())


@dataclass
class Traffic:
    """Global traffic of one buffer. Bytes are what threads asked for, sectors are what moves between L2 and the
    multiprocessors (before L1), unique bytes are the sectors that were touched at all: the compulsory traffic."""

    load_bytes: int = 0
    store_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    unique_load_bytes: int = 0
    unique_store_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes of all sectors moved, loads and stores."""
        return SECTOR * (self.load_sectors + self.store_sectors)

    @property
    def unique_bytes(self) -> int:
        return self.unique_load_bytes + self.unique_store_bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, n) + getattr(other, n) for n in Traffic.__dataclass_fields__))


@dataclass
class Counters:
    """Counts of one launch.

    Attributes:
        ctas: programs executed.
        warp_instructions: instructions issued, once per warp.
        barriers: CTA-wide barriers passed, summed over CTAs.
        mma_flops: 2 M N K of every tensor-core instruction, padding included.
        shared_wavefronts: shared-memory wavefronts; `shared_wavefronts_ideal` is the fewest for the same bytes.
        atomics: atomic operations on global memory, one per thread and element; `float_atomics` of them on floats.
        uninitialised_shared_reads: reads that touched shared memory nobody had written (it holds NaN patterns).
        traffic: global traffic by argument name, atomics not included; buffers shared by arguments are joined with `/`.
    """

    ctas: int = 0
    warp_instructions: int = 0
    barriers: int = 0
    mma_flops: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_ideal: int = 0
    atomics: int = 0
    float_atomics: int = 0
    uninitialised_shared_reads: int = 0
    traffic: dict[str, Traffic] = field(default_factory=dict)

    @property
    def total(self) -> Traffic:
        """Global traffic over all arguments."""
        return sum(self.traffic.values(), Traffic())
