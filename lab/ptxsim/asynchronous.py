"""Commit groups: the bookkeeping that cp.async (per thread) and wgmma (per warp group) have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Payload = TypeVar("Payload")


class Entry(NamedTuple, Generic[Payload]):
    """Operations issued by one instruction: one per owner, its group, and what is needed to finish it."""

    owners: np.ndarray
    groups: np.ndarray
    payload: Payload
    rows: np.ndarray  # which rows of the payload are still pending


class CommitGroups(Generic[Payload]):
    """Operations that are pending until their owner waits for their group."""

    def __init__(self, owners: int) -> None:
        self._committed = np.zeros(owners, np.int64)
        self.pending: list[Entry[Payload]] = []

    def add(self, owners: np.ndarray, payload: Payload) -> None:
        """Issue one operation per owner, into the owner's open group."""
        self.pending.append(Entry(owners, self._committed[owners], payload, np.arange(len(owners))))

    def commit(self, owners: slice | np.ndarray) -> None:
        """Close the open group."""
        self._committed[owners] += 1

    def wait(self, active: np.ndarray | None, newest: int) -> Iterator[Entry[Payload]]:
        """Finish all groups of the active owners but the `newest` ones (-1: the open group too)."""
        before, self.pending = self.pending, []
        for entry in before:
            done = entry.groups < self._committed[entry.owners] - newest
            if active is not None:
                done &= active[entry.owners]
            if done.all():
                yield entry
                continue
            if done.any():
                yield _part(entry, done)
                entry = _part(entry, ~done)
            self.pending.append(entry)


def _part(entry: Entry[Payload], which: np.ndarray) -> Entry[Payload]:
    return Entry(entry.owners[which], entry.groups[which], entry.payload, entry.rows[which])
