"""A time limit for the whole run, divided among what is left to do."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds from construction on; what is not used goes to those that come later.

    Args:
        seconds: for the whole run.
        clock: seconds that never run backwards.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def share(self, waiting: int, kept: float = 0.0) -> Budget:
        """What one of `waiting` equal pieces of work may take, with `kept` seconds left for something else."""
        return Budget(max(0.0, self.left() - kept) / max(1, waiting), self._clock)

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether something that takes `seconds` may still begin."""
        return self.left() > seconds
