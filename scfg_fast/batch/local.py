"""The local runner: micro-batches one after another in this process, encoded and written on another thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .folder import Folder
from .plan import MicroBatch
from .run import Worker, encode

WAITING = 2
"""Micro-batches that may wait to be written; their pixels are all the images that are held in memory."""


def run_local(folder: Folder, batches: Iterable[MicroBatch], worker: Callable[[], Worker]) -> None:
    """Make and commit micro-batches in their order.

    Raises:
        OSError: a file could not be written; what was committed stays.
    """
    maker = worker()
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for batch in batches:
            while len(writes) >= WAITING or (writes and writes[0].done()):
                writes.popleft().result()
            rows = maker.make(batch)
            writes.append(writer.submit(_commit, folder, rows, batch.name))
        for write in writes:
            write.result()


def _commit(folder: Folder, rows: Sequence[dict[str, Any]], name: str) -> None:
    folder.commit(encode(rows), name)
