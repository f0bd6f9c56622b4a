"""Who may wait for whom where not all CTAs of a launch need be resident at once.

A launch that is not cooperative starts a CTA when another one has ended, in an order of its own, so a CTA may only wait
for those that started before it. The simulator runs many side by side, where a kernel that breaks this rule would still
end. So what a poll sees is what the CTAs that started earlier have done, as if the later ones had not started: a CTA
that waits for a later one polls in vain for ever, which is reported.

A CTA starts with its first atomic or ordered access of global memory: before that nobody can tell, nor can it. Programs
that draw tickets do so first, and start in the order of their tickets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Operation = Callable[..., np.ndarray]
Place = tuple[int, int, int]  # buffer, offset and width of an element


@dataclass
class _History:
    """What atomic operations and ordered stores have made of one place."""

    first: np.ndarray  # [1], the value before all changes
    last: np.ndarray  # [1], the value after them
    changes: list[tuple[int, Operation, list[np.ndarray]]]  # who, by its start, and how
    latest: int  # start of the latest CTA among them
    polls: dict[int, tuple[int, np.ndarray]]  # start -> how many changes it has been shown, and the value after them


class Residency:
    """The starts of one launch, and the history of every place that CTAs talk to each other at."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}  # CTA -> how many have started before it
        self._places: dict[Place, _History] = {}
        self.begin(0, 1)

    def begin(self, first: int, threads: int) -> None:
        """The next batch: CTAs from number `first` on, of `threads` threads each."""
        self._first, self._threads = first, threads

    def start(self, thread: int) -> int:
        """When the CTA of a thread of the batch started, which is now if it has not yet."""
        cta = self._first + thread // self._threads
        return self._starts.setdefault(cta, len(self._starts))

    def changed(
        self,
        place: Place,
        thread: int,
        before: np.ndarray,
        after: np.ndarray,
        operation: Operation,
        operands: list[np.ndarray],
    ) -> None:
        """`operation(before, *operands)` was `after`, all [1]."""
        start, history = self.start(thread), self._places.get(place)
        if history is None or history.last != before:  # or there was an ordinary store, which is no news to anybody
            history = self._places[place] = _History(before, before, [], start, {})
        history.changes.append((start, operation, operands))
        history.last, history.latest = after, max(history.latest, start)

    def seen(self, place: Place, thread: int, now: np.ndarray) -> np.ndarray:
        """What a poll reads where `now` is stored, [1]."""
        start, history = self.start(thread), self._places.get(place)
        if history is None or history.latest <= start or history.last != now:
            return now
        shown, value = history.polls.get(start, (0, history.first))
        for other, operation, operands in history.changes[shown:]:
            if other <= start:
                value = operation(value, *operands)
        history.polls[start] = len(history.changes), value
        return value
