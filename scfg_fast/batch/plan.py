"""Rows become micro-batches, once and for all.

A row never changes its micro-batch. So its bits do not depend on when it was made, by how many workers, or after how
many kills.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .errors import InputError
from .rows import Row


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one pipeline call: the same call, different prompts and seeds.

    Attributes:
        ids, prompts, seeds: one entry per image.
        call: keyword arguments of the pipeline call, as JSON.
        name: 16 hex digits of sha256 over all of the above.
    """

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        content = json.dumps([self.ids, self.seeds, self.prompts, self.call]).encode()
        object.__setattr__(self, "name", hashlib.sha256(content).hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.ids)


def new_batches(rows: Iterable[Row], planned: Sequence[MicroBatch], size: int) -> list[MicroBatch]:
    """Micro-batches of the rows that no planned one has: grouped by call in input order, then cut.

    Args:
        rows: all rows of the input.
        planned: micro-batches of earlier runs; they keep their rows.
        size: images per micro-batch; the last of a group may be smaller.

    Raises:
        InputError: a planned id has another prompt, seed or call now.
    """
    known = {
        id: (prompt, seed, batch.call)
        for batch in planned
        for id, prompt, seed in zip(batch.ids, batch.prompts, batch.seeds, strict=True)
    }
    groups: dict[str, list[Row]] = {}
    reasons = []
    for row in rows:
        if row.id not in known:
            groups.setdefault(row.call, []).append(row)
            continue
        now = zip(("prompt", "seed", "call"), known[row.id], (row.prompt, row.seed, row.call), strict=True)
        reasons += [
            f"id {row.id!r} was planned with the {what} {before!r} and has {after!r} now; give the new row another id"
            for what, before, after in now
            if before != after
        ]
    if reasons:
        raise InputError("rows of an earlier run have changed", reasons)
    return [
        MicroBatch(
            tuple(row.id for row in part), tuple(row.prompt for row in part), tuple(row.seed for row in part), call
        )
        for call, group in groups.items()
        for part in (group[start : start + size] for start in range(0, len(group), size))
    ]
