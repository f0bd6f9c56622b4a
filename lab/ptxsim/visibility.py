"""Which stores to global memory a warp may rely on: the race detector between warps and between CTAs of one launch.

Every warp that stores has a clock per CTA, and every granule of a buffer remembers which warp stored it last, and when.
A store can be seen by

    the warp that made it
    the other warps of its CTA    after a bar.sync
    warps of other CTAs           along a chain: an atomic operation or store with release semantics publishes what its
                                  warp has stored, what its CTA had stored before the last bar.sync, and what both knew;
                                  one with acquire semantics at the same address learns it, for its warp at once, for
                                  the other warps of its CTA after a bar.sync

A load or a store where nothing orders the last store of another warp is a race (RAW, WAW), even if the order in which
the simulator happens to run things gives the right bytes. In programs with atomic or ordered accesses of global memory,
stores over what another warp has loaded last (WAR), and ordinary accesses where atomic operations of others need not be
over, are found too. Like shared memory's, the detector takes a warp for one unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import SimError

if TYPE_CHECKING:
    from .memory import Buffer

NEVER = -1
ACQUIRE, RELEASE = frozenset({"acquire", "acq_rel"}), frozenset({"release", "acq_rel"})


class _Last:
    """The last access to every granule of a buffer: which warp of the launch, and its CTA's time.

    Granules are as small as the narrowest access so far.
    """

    def __init__(self, buffer: Buffer, width: int) -> None:
        self._phase = buffer.base % 16
        self._granule = min(width, 16)
        granules = (self._phase + buffer.size) // self._granule + 1
        self.warp, self.time = np.full(granules, NEVER, np.int32), np.full(granules, NEVER, np.int32)

    def granules(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """[n, k]: those of each access."""
        if width < self._granule:
            finer = self._granule // width
            self.warp, self.time = np.repeat(self.warp, finer), np.repeat(self.time, finer)
            self._granule = width
        first = (offsets + self._phase) // self._granule
        return first[:, None] + np.arange(width // self._granule)


class Visibility:
    """What the warps of one launch know of each other's accesses. CTAs run in batches, one batch after another.

    Args:
        ctas: of the launch.
        warps: per CTA.
        loads: whether to remember loads too.
    """

    def __init__(self, ctas: int, warps: int, loads: bool) -> None:
        self._warps, self._agents, self._loads = warps, ctas * warps, loads
        self._stored: dict[int, _Last] = {}
        self._loaded: dict[int, _Last] = {}
        self._atomic: dict[int, dict[int, np.ndarray]] = {}  # buffer -> offset -> the last time of every warp
        self._released: dict[tuple[int, int], np.ndarray] = {}  # (buffer, offset) -> what has been published there
        self.begin(0, 0, 1)

    def begin(self, first: int, count: int, threads: int) -> None:
        """The next CTAs to run: `count` of them from number `first`, of `threads` threads each."""
        thread = np.arange(count * threads)
        self._cta = thread // threads  # of every thread, in the batch
        self._warp = ((first + self._cta) * self._warps + thread % threads // 32).astype(np.int32)  # in the launch
        self._first = first
        self._time, self._barrier = np.ones(count, np.int32), np.ones(count, np.int32)  # now, and at the last barrier
        self._known: dict[int, np.ndarray] = {}  # CTA in the batch -> of every warp, up to when its accesses are seen
        self._learnt: dict[int, np.ndarray] = {}  # warp in the launch -> the same, since the CTA's last barrier

    # ---- order

    def barrier(self, ctas: slice | np.ndarray) -> None:
        """These CTAs (an index into the batch) pass a bar.sync."""
        self._time[ctas] += 1
        self._barrier[ctas] = self._time[ctas]
        passed = np.zeros(len(self._time), bool)
        passed[ctas] = True
        for warp in [w for w in self._learnt if passed[w // self._warps - self._first]]:
            cta, learnt = warp // self._warps - self._first, self._learnt.pop(warp)
            self._known[cta] = np.maximum(self._known[cta], learnt) if cta in self._known else learnt

    def atomic(self, buffer: Buffer, offset: int, width: int, thread: int, semantics: frozenset[str]) -> None:
        """One thread's atomic operation, or its ordered load or store, in turn."""
        warp, cta = int(self._warp[thread]), int(self._cta[thread])
        self._check_store(buffer, np.array([offset]), width, np.array([thread]), "atomic operation on", "RAW")
        place = (id(buffer), offset)
        if semantics & ACQUIRE and place in self._released:
            self._learn(warp, self._released[place])
        times = self._atomic.setdefault(id(buffer), {}).setdefault(offset, np.full(self._agents, NEVER, np.int32))
        times[warp] = self._time[cta]
        if semantics & RELEASE:
            seen = self._seen(warp, cta)
            self._released[place] = np.maximum(self._released[place], seen) if place in self._released else seen
            self._time[cta] += 1

    def _learn(self, warp: int, published: np.ndarray) -> None:
        self._learnt[warp] = np.maximum(self._learnt[warp], published) if warp in self._learnt else published

    def _seen(self, warp: int, cta: int) -> np.ndarray:
        """Of every warp of the launch, up to which time this one sees its accesses."""
        seen = np.full(self._agents, NEVER, np.int32)
        for known in (self._known.get(cta), self._learnt.get(warp)):
            if known is not None:
                np.maximum(seen, known, out=seen)
        own = (self._first + cta) * self._warps
        np.maximum(seen[own : own + self._warps], self._barrier[cta] - 1, out=seen[own : own + self._warps])
        seen[warp] = self._time[cta]
        return seen

    def _ordered(self, threads: np.ndarray, other: np.ndarray, time: np.ndarray) -> bool:
        """Whether each thread sees what warp `other` did at `time`, both [n, k]; NEVER is always seen."""
        warps = self._warp[threads][:, None]
        open_ = (other != warps) & (other != NEVER)
        if not open_.any():
            return True
        ctas = self._cta[threads][:, None]
        open_ &= (other // self._warps - self._first != ctas) | (time >= self._barrier[ctas])
        for warp in np.unique(np.broadcast_to(warps, open_.shape)[open_]):
            mine = open_ & (warps == warp)
            seen = self._seen(int(warp), int(warp) // self._warps - self._first)
            if (time[mine] > seen[other[mine]]).any():
                return False
        return True

    # ---- accesses

    def load(self, buffer: Buffer, offsets: np.ndarray, width: int, threads: np.ndarray) -> None:
        """Check and remember an ordinary load; `threads` are numbers in the batch."""
        self._check_store(buffer, offsets, width, threads, "load from", "RAW")
        self._check_atomics(buffer, offsets, width, threads, "load from")
        if self._loads:
            self._note(self._loaded, buffer, offsets, width, threads)

    def store(self, buffer: Buffer, offsets: np.ndarray, width: int, threads: np.ndarray) -> None:
        """Check and remember an ordinary store."""
        self._check_store(buffer, offsets, width, threads, "store to", "WAW")
        self._check_atomics(buffer, offsets, width, threads, "store to")
        loaded = self._loaded.get(id(buffer))
        if loaded is not None:
            index = loaded.granules(offsets, width)
            if not self._ordered(threads, loaded.warp[index], loaded.time[index]):
                raise SimError(f"global memory race: store to {buffer.label} where another warp loads (WAR)")
        if not self._note(self._stored, buffer, offsets, width, threads):
            raise SimError(f"global memory race: two warps store to one place of {buffer.label} (WAW)")

    def _note(
        self, table: dict[int, _Last], buffer: Buffer, offsets: np.ndarray, width: int, threads: np.ndarray
    ) -> bool:
        """Whether no two warps met at one granule."""
        if id(buffer) not in table:
            table[id(buffer)] = _Last(buffer, width)
        last = table[id(buffer)]
        index = last.granules(offsets, width)
        warps = self._warp[threads][:, None]
        last.warp[index] = warps
        last.time[index] = self._time[self._cta[threads]][:, None]
        return bool((last.warp[index] == warps).all())

    def _check_store(
        self, buffer: Buffer, offsets: np.ndarray, width: int, threads: np.ndarray, what: str, kind: str
    ) -> None:
        stored = self._stored.get(id(buffer))
        if stored is None:
            return
        index = stored.granules(offsets, width)
        if not self._ordered(threads, stored.warp[index], stored.time[index]):
            raise SimError(
                f"global memory race: {what} {buffer.label} where another warp has stored, with no barrier, or release "
                f"and acquire, between ({kind})"
            )

    def _check_atomics(self, buffer: Buffer, offsets: np.ndarray, width: int, threads: np.ndarray, what: str) -> None:
        for place, times in self._atomic.get(id(buffer), {}).items():
            for thread in threads[(offsets <= place) & (place < offsets + width)]:
                seen = self._seen(int(self._warp[thread]), int(self._cta[thread]))
                if (times > seen).any():
                    raise SimError(
                        f"global memory race: {what} {buffer.label} where atomic operations of others need not be over"
                    )
