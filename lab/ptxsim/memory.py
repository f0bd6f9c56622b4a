"""Byte storage with vector access, and global memory: one buffer per tensor storage, far apart, bounds checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .counters import SECTOR, Counters, PatternCache, Traffic, count_sectors
from .dtypes import UNSIGNED
from .errors import SimError
from .residency import Operation, Residency
from .visibility import Visibility

# A memory move of n bytes is one numpy element of n bytes; complex128 is only a 16-byte container here.
_CONTAINERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_BUFFER_SHIFT = 40  # a buffer's number is in its addresses from this bit on, so that buffers are 1 TiB apart


class ByteStore:
    """A byte array read and written by aligned vectors of 1 to 32 bytes per thread.

    Args:
        data: uint8 array.
        phase: device address of the first byte modulo 16; vectors are aligned in device addresses.
    """

    def __init__(self, data: np.ndarray, phase: int = 0) -> None:
        self.data, self._phase = data, phase
        self._views: dict[int, tuple[np.ndarray, int]] = {}

    def _view(self, width: int) -> tuple[np.ndarray, int]:
        if width not in self._views:
            skip = -self._phase % width
            usable = max(len(self.data) - skip, 0) // width * width
            self._views[width] = (self.data[skip : skip + usable].view(_CONTAINERS[width]), skip)
        return self._views[width]

    def gather(self, offsets: np.ndarray, width: int, unit: int) -> np.ndarray:
        """Read `width` bytes at each offset, as an array (n, width // unit) of unsigned integers of `unit` bytes."""
        step = min(width, 16)
        view, skip = self._view(step)
        index = (offsets - skip) // step
        if width > step:
            index = index[:, None] + np.arange(width // step)
        return view.take(index).reshape(len(offsets), -1).view(UNSIGNED[unit * 8])

    def scatter(self, offsets: np.ndarray, values: np.ndarray) -> bool:
        """Write the rows of `values` (n, k) at the offsets; False if two rows met at one place with different bytes."""
        width = values.shape[1] * values.itemsize
        step = min(width, 16)
        view, skip = self._view(step)
        index = (offsets - skip) // step
        data = np.ascontiguousarray(values).view(_CONTAINERS[step])
        if width > step:
            index = index[:, None] + np.arange(width // step)
        else:
            data = data[:, 0]
        view[index] = data
        return bool(np.array_equal(view.take(index).view(np.uint8), data.view(np.uint8)))


class Buffer:
    """One tensor storage in global memory."""

    def __init__(self, label: str, base: int, data: np.ndarray) -> None:
        self.label, self.base, self.size = label, base, len(data)
        self.bytes = ByteStore(data, base % 16)
        self.traffic = Traffic()
        sectors = (base % SECTOR + len(data)) // SECTOR + 1
        self._loaded, self._stored = np.zeros(sectors, bool), np.zeros(sectors, bool)

    def note(self, offsets: np.ndarray, width: int, sectors: int, *, store: bool) -> None:
        """Add one instruction's access to the traffic."""
        seen = self._stored if store else self._loaded
        shifted = offsets + self.base % SECTOR
        seen[shifted // SECTOR] = True
        seen[(shifted + width - 1) // SECTOR] = True
        if store:
            self.traffic.store_bytes += len(offsets) * width
            self.traffic.store_sectors += sectors
        else:
            self.traffic.load_bytes += len(offsets) * width
            self.traffic.load_sectors += sectors

    def finish(self) -> Traffic:
        """The traffic with its unique bytes."""
        self.traffic.unique_load_bytes = SECTOR * int(self._loaded.sum())
        self.traffic.unique_store_bytes = SECTOR * int(self._stored.sum())
        return self.traffic


class GlobalMemory:
    """Device memory of one launch. Addresses are made up; only their value modulo 16 is that of the host.

    Attributes:
        visibility: the race detector, or None.
        residency: who may wait for whom, or None: anybody for anybody.
    """

    def __init__(self) -> None:
        self.visibility: Visibility | None = None
        self.residency: Residency | None = None
        self._buffers: dict[int, Buffer] = {}
        self._patterns = PatternCache()

    def add(self, data: np.ndarray, label: str, host_address: int = 0) -> Buffer:
        """Make a flat uint8 array visible to the kernel; it is read and written in place."""
        number = len(self._buffers) + 1
        buffer = Buffer(label, (number << _BUFFER_SHIFT) + host_address % 16, data)
        self._buffers[number] = buffer
        return buffer

    def read(
        self, addresses: np.ndarray, width: int, unit: int, threads: np.ndarray, semantics: frozenset[str] | None = None
    ) -> np.ndarray:
        """Read `width` bytes per thread as (n, width // unit) unsigned integers; `semantics`: see `ordering`."""
        parts = self._locate(addresses, width, "load")
        if len(parts) == 1:
            buffer, offsets, _ = parts[0]
            self._count(buffer, offsets, width, threads, store=False)
            self._observe(buffer, offsets, width, threads, semantics, store=False)
            return self._polled(buffer, offsets, buffer.bytes.gather(offsets, width, unit), threads, semantics)
        result = np.empty((len(addresses), width // unit), UNSIGNED[unit * 8])
        for buffer, offsets, rows in parts:
            self._count(buffer, offsets, width, threads[rows], store=False)
            self._observe(buffer, offsets, width, threads[rows], semantics, store=False)
            values = buffer.bytes.gather(offsets, width, unit)
            result[rows] = self._polled(buffer, offsets, values, threads[rows], semantics)
        return result

    def _polled(
        self,
        buffer: Buffer,
        offsets: np.ndarray,
        values: np.ndarray,
        threads: np.ndarray,
        semantics: frozenset[str] | None,
    ) -> np.ndarray:
        """What ordered loads read where `values` (n, k) are stored; others read just that."""
        if self.residency is None or semantics is None or values.shape[1] > 1:
            return values
        number, width, rows = id(buffer), values.itemsize, zip(offsets.tolist(), threads.tolist(), values, strict=True)
        return np.stack([self.residency.seen((number, offset, width), thread, now) for offset, thread, now in rows])

    def write(
        self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray, semantics: frozenset[str] | None = None
    ) -> None:
        """Write the rows of `values` (n, k); `semantics`: see `ordering`."""
        width = values.shape[1] * values.itemsize
        for buffer, offsets, rows in self._locate(addresses, width, "store"):
            self._count(buffer, offsets, width, threads[rows], store=True)
            self._observe(buffer, offsets, width, threads[rows], semantics, store=True)
            if semantics is not None and self.residency is not None and values.shape[1] == 1:
                before = buffer.bytes.gather(offsets, width, width)[:, 0]
                stored = np.ascontiguousarray(values[rows])[:, 0]
                self._changed(buffer, offsets, threads[rows], before, stored, lambda old, new: new, [stored])
            if not buffer.bytes.scatter(offsets, values[rows]):
                raise SimError(f"one instruction stores different values to one address of {buffer.label}")

    def atomic(
        self,
        addresses: np.ndarray,
        operation: Operation,
        operands: Sequence[np.ndarray],
        threads: np.ndarray,
        semantics: frozenset[str],
    ) -> np.ndarray:
        """Read, modify and write one element per thread, threads of equal address in order; returns the old values."""
        width = operands[0].itemsize
        unsigned = UNSIGNED[width * 8]
        old = np.empty(len(addresses), operands[0].dtype)
        for buffer, offsets, rows in self._locate(addresses, width, "atomic"):
            self._observe(buffer, offsets, width, threads[rows], semantics, store=True)
            which = np.arange(len(addresses))[rows]
            for turn in turns(offsets):
                selected = which[turn]
                before = buffer.bytes.gather(offsets[turn], width, width)[:, 0].view(old.dtype)
                chosen = [operand[selected] for operand in operands]
                after = np.ascontiguousarray(operation(before, *chosen))
                buffer.bytes.scatter(offsets[turn], after.view(unsigned)[:, None])
                if self.residency is not None:
                    before = self._changed(buffer, offsets[turn], threads[selected], before, after, operation, chosen)
                old[selected] = before
        return old

    def _changed(
        self,
        buffer: Buffer,
        offsets: np.ndarray,
        threads: np.ndarray,
        before: np.ndarray,
        after: np.ndarray,
        operation: Operation,
        operands: Sequence[np.ndarray],
    ) -> np.ndarray:
        """Remember changes, one per thread; returns what their threads see as the values before.

        One that changes nothing, whatever of that it sees, is a poll.
        """
        seen = before.copy()
        for row, (offset, thread) in enumerate(zip(offsets.tolist(), threads.tolist(), strict=True)):
            place, here = (id(buffer), offset, before.itemsize), slice(row, row + 1)
            own = [operand[here] for operand in operands]
            if before[row] != after[row]:
                self.residency.changed(place, thread, before[here], after[here], operation, own)
                continue
            earlier = self.residency.seen(place, thread, before[here])
            if operation(earlier, *own)[0] == earlier[0]:
                seen[here] = earlier
        return seen

    def finish(self, counters: Counters) -> None:
        """Put the traffic of every buffer into the counters."""
        for buffer in self._buffers.values():
            traffic = buffer.finish()
            if traffic != Traffic():
                counters.traffic[buffer.label] = counters.traffic.get(buffer.label, Traffic()) + traffic

    def _count(self, buffer: Buffer, offsets: np.ndarray, width: int, threads: np.ndarray, *, store: bool) -> None:
        addresses = offsets + buffer.base % SECTOR
        sectors, _ = self._patterns.get(width, addresses, threads, SECTOR, count_sectors)
        buffer.note(offsets, width, sectors, store=store)

    def _observe(
        self,
        buffer: Buffer,
        offsets: np.ndarray,
        width: int,
        threads: np.ndarray,
        semantics: frozenset[str] | None,
        *,
        store: bool,
    ) -> None:
        if semantics is not None and self.residency is not None:
            for thread in threads.tolist():
                self.residency.start(thread)
        if self.visibility is None:
            return
        if semantics is None:
            (self.visibility.store if store else self.visibility.load)(buffer, offsets, width, threads)
            return
        for offset, thread in zip(offsets.tolist(), threads.tolist(), strict=True):
            self.visibility.atomic(buffer, offset, width, thread, semantics)

    def _locate(
        self, addresses: np.ndarray, width: int, what: str
    ) -> list[tuple[Buffer, np.ndarray, slice | np.ndarray]]:
        """Split an access by buffer and check it: (buffer, offsets, which threads)."""
        numbers = addresses >> _BUFFER_SHIFT
        if (numbers == numbers[0]).all():
            groups = [(int(numbers[0]), slice(None))]
        else:
            groups = [(int(number), np.nonzero(numbers == number)[0]) for number in np.unique(numbers)]
        result = []
        for number, rows in groups:
            buffer, selected = self._buffers.get(number), addresses[rows]
            if buffer is None:
                before, after = self._buffers.get(number + 1), self._buffers.get(number - 1)
                near = before or after
                hint = f"; nearest buffer: {near.label} of {near.size} bytes" if near else ""
                raise SimError(f"{what} out of bounds: address {int(selected[0]):#x} is in no tensor{hint}")
            offsets = selected - buffer.base
            bad = (offsets < 0) | (offsets + width > buffer.size)
            if bad.any():
                raise SimError(
                    f"{what} out of bounds: bytes {int(offsets[bad][0])} to {int(offsets[bad][0]) + width} of "
                    f"{buffer.label}, which has {buffer.size} ({int(bad.sum())} threads)"
                )
            if width > 1 and (selected % width).any():
                raise SimError(f"{what} of {width} bytes at a misaligned address of {buffer.label}")
            result.append((buffer, offsets, rows))
        return result


def turns(keys: np.ndarray) -> list[np.ndarray]:
    """Split positions so that each part has every key at most once, and equal keys keep their order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.searchsorted(ordered, ordered)
    rank = np.arange(len(keys)) - starts
    if not rank.any():
        return [np.arange(len(keys))]
    return [np.sort(order[rank == r]) for r in range(int(rank.max()) + 1)]
