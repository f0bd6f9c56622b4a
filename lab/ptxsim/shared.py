"""Shared memory of a batch of CTAs: bounds, alignment, and a race detector for the time between two barriers.

Every granule (the smallest unit the program accesses) remembers who wrote and who read it last, as a tag `epoch * 64 +
warp`. Epochs are numbered per CTA and end at its barriers. Two accesses of one epoch by different warps, at least one
of them a write, are a race: nothing orders them. Warps are assumed to run in lockstep, so a race inside a warp is not
seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .counters import Counters, PatternCache, count_wavefronts
from .errors import SimError
from .memory import ByteStore

NEVER = np.uint32(0xFFFFFFFF)
MANY = np.uint32(63)  # in place of a warp: several warps
ATOMIC = np.uint32(62)  # in place of a warp: an atomic access, which does not race with other atomics
EPOCH_MASK = np.uint32(0xFFFFFFC0)  # the epoch's part of a tag
_ONE, _SAME_EPOCH = np.uint32(1), np.uint32(63)

IN_FLIGHT = np.uint8(1)  # a cp.async that nobody has waited for writes here
UNFENCED = np.uint8(2)  # written by ordinary stores, not yet fenced for the async proxy (wgmma)
MATRIX_READ = np.uint8(4)  # a wgmma that nobody has waited for reads here


def _conflict(stored: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """Whether a stored tag has the same epoch and another warp."""
    return ((stored ^ tags) - _ONE) < _SAME_EPOCH


class Selection(NamedTuple):
    """The threads that take part in an instruction: numbers in the batch, their CTA, their tag; and their index."""

    index: slice | np.ndarray
    threads: np.ndarray
    ctas: np.ndarray
    tags: np.ndarray


class SharedMemory:
    """Shared memory of every CTA of a batch.

    Args:
        ctas: CTAs in the batch; each has its own memory.
        size: bytes per CTA.
        granule: smallest access of the program in bytes (power of two).
        asynchronous: whether the program has cp.async or wgmma, whose flags cost time.
        check_races: off, only bounds and alignment are checked.
        counters: where wavefronts are counted.
    """

    def __init__(
        self, ctas: int, size: int, granule: int, asynchronous: bool, check_races: bool, counters: Counters
    ) -> None:
        self.size, self.granule, self.check_races = size, granule, check_races
        self.stride = -(-(size + 16) // 1024) * 1024
        self.bytes = ByteStore(np.full(ctas * self.stride, 0xFF, np.uint8))
        granules = ctas * self.stride // granule
        self._written, self._read = np.full(granules, NEVER), np.full(granules, NEVER)
        self.flags = np.zeros(granules, np.uint8)
        self._asynchronous = asynchronous
        self._counters = counters
        self._patterns = PatternCache()

    def gather(self, who: Selection, addresses: np.ndarray, width: int, unit: int) -> np.ndarray:
        """Read `width` bytes per thread as (n, width // unit) unsigned integers."""
        offsets = self.locate(who.ctas, addresses, width, "read")
        self.count(addresses, width, who.threads)
        self.note_read(offsets, who.tags, width)
        return self.bytes.gather(offsets, width, unit)

    def scatter(self, who: Selection, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write the rows of `values`."""
        width = values.shape[1] * values.itemsize
        offsets = self.locate(who.ctas, addresses, width, "write")
        self.count(addresses, width, who.threads)
        self.note_write(offsets, who.tags, width)
        if not self.bytes.scatter(offsets, values):
            raise SimError("one instruction writes different values to one shared address")

    def locate(self, ctas: np.ndarray, addresses: np.ndarray, width: int, what: str) -> np.ndarray:
        """Check an access and return its offsets in `bytes`."""
        bad = (addresses < 0) | (addresses + width > self.size)
        if bad.any():
            first = int(addresses[bad][0])
            raise SimError(f"shared {what} out of bounds: bytes {first} to {first + width} of {self.size}")
        if width > 1 and (addresses & (width - 1)).any():
            raise SimError(f"shared {what} of {width} bytes at a misaligned address")
        return ctas * self.stride + addresses

    def granules(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """The granules of each access, flat, those of one access together."""
        per_access = width // self.granule
        first = offsets // self.granule
        return first if per_access <= 1 else (first[:, None] + np.arange(per_access)).ravel()

    def note_read(self, offsets: np.ndarray, tags: np.ndarray, width: int) -> None:
        """Check and remember a read."""
        if not self.check_races:
            return
        index = self.granules(offsets, width)
        tags = np.repeat(tags, len(index) // len(tags)) if len(index) != len(tags) else tags
        written = self._written[index]
        if _conflict(written, tags).any():
            raise SimError("shared memory race: read of data that another warp wrote, with no barrier between (RAW)")
        if self._asynchronous and (self.flags[index] & IN_FLIGHT).any():
            raise SimError("shared memory read of data whose cp.async has not been waited for")
        self._counters.uninitialised_shared_reads += int((written == NEVER).any())
        before = self._read[index]
        self._read[index] = np.where(_conflict(before, tags), tags | MANY, tags)
        several = self._read[index] != tags  # another warp read the same granule, now or before
        if several.any():
            self._read[index[several]] = tags[several] | MANY

    def note_write(self, offsets: np.ndarray, tags: np.ndarray, width: int, flag: np.uint8 = UNFENCED) -> None:
        """Check and remember a write."""
        if not self.check_races:
            return
        index = self.granules(offsets, width)
        tags = np.repeat(tags, len(index) // len(tags)) if len(index) != len(tags) else tags
        if _conflict(self._written[index], tags).any():
            raise SimError("shared memory race: two warps write one place with no barrier between (WAW)")
        if _conflict(self._read[index], tags).any():
            raise SimError("shared memory race: write to data that another warp reads, with no barrier between (WAR)")
        if self._asynchronous:
            flags = self.flags[index]
            if (flags & IN_FLIGHT).any():
                raise SimError("shared memory write where a cp.async has not been waited for")
            if (flags & MATRIX_READ).any():
                raise SimError("shared memory write where a wgmma that has not been waited for still reads")
            self.flags[index] = flags | flag
        self._written[index] = tags

    def land(self, index: np.ndarray, tags: np.ndarray) -> None:
        """The waited-for end of a cp.async: the data is there, for the thread that waited."""
        self.flags[index] &= ~IN_FLIGHT
        self._written[index] = tags

    def fence(self, ctas: np.ndarray, warps: np.ndarray, epochs: np.ndarray) -> None:
        """Async-proxy fence by some warps: covers their own writes and all that a barrier has ordered before."""
        per_cta = self.stride // self.granule
        for cta in np.unique(ctas):
            part = slice(int(cta) * per_cta, (int(cta) + 1) * per_cta)
            written, own = self._written[part], np.zeros(64, bool)
            own[warps[ctas == cta]] = True
            covered = (written >> np.uint32(6) < epochs[cta]) | own[written & _SAME_EPOCH]
            self.flags[part][covered] &= ~UNFENCED

    def matrix_read(self, index: np.ndarray, epoch_tags: np.ndarray) -> None:
        """A wgmma starts to read granules on behalf of the four warps of its group."""
        if not self.check_races:
            return
        written, flags, tags = self._written[index], self.flags[index], epoch_tags | MANY
        if (flags & UNFENCED).any():
            raise SimError("wgmma reads data written by ordinary stores without fence.proxy.async")
        if (flags & IN_FLIGHT).any():
            raise SimError("wgmma reads data whose cp.async has not been waited for")
        if _conflict(written, tags).any():
            raise SimError(
                "shared memory race: wgmma reads data that another warp wrote, with no barrier between (RAW)"
            )
        self._counters.uninitialised_shared_reads += int((written == NEVER).any())
        self._read[index] = tags

    def note_matrix_end(self, index: np.ndarray, tags: np.ndarray) -> None:
        """A wgmma was waited for: it counts as a read by its whole group up to this moment."""
        self._read[index] = np.broadcast_to(tags, index.shape)

    def count(self, addresses: np.ndarray, width: int, threads: np.ndarray) -> None:
        """Add the wavefronts of one instruction."""
        wavefronts, ideal = self._patterns.get(width, addresses, threads, 128, count_wavefronts)
        self._counters.shared_wavefronts += wavefronts
        self._counters.shared_wavefronts_ideal += ideal
