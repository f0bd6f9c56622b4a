"""Changes of PTX that make a program wrong: a dropped barrier, wait, fence or mask, a weaker memory order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# What is dropped one at a time. `bar.sync` orders warps; the waits end asynchronous copies and products; the fences
# order them.
_DROPPED = re.compile(
    r"^\s*(bar\.sync|cp\.async\.wait_group|cp\.async\.wait_all|wgmma\.wait_group|wgmma\.fence|fence\.proxy\.async)[^;\n]*;"
)
_ORDERED = re.compile(r"\b((?:atom|red|ld|st)\.global\.[\w.]*)\b(acq_rel|acquire|release)\b")
_WEAKER = {"acq_rel": ("acquire", "release", "relaxed"), "acquire": ("relaxed",), "release": ("relaxed",)}
_MASKED = re.compile(r"^(\s*)@%p\d+\s+((ld|st)\.global\b)", re.M)


@dataclass(frozen=True)
class Mutant:
    """A changed program.

    Attributes:
        what: the instruction that was dropped, or `mask of st.global`.
        number: position among those of this kind in the program.
        ptx: the changed text.
    """

    what: str
    number: int
    ptx: str

    def __str__(self) -> str:
        return f"{self.what} #{self.number}"


def without_synchronisation(ptx: str) -> Iterator[Mutant]:
    """One mutant per barrier, wait and fence, without it."""
    lines = ptx.split("\n")
    counts: dict[str, int] = {}
    for place, line in enumerate(lines):
        match = _DROPPED.match(line)
        if match:
            kind = match.group(1)
            counts[kind] = counts.get(kind, 0) + 1
            rest = line[match.end() :]
            yield Mutant(kind, counts[kind], "\n".join([*lines[:place], rest, *lines[place + 1 :]]))


def without_all(ptx: str, kind: str) -> Mutant:
    """Without every instruction of a kind."""
    kept = [line for line in ptx.split("\n") if not ((m := _DROPPED.match(line)) and m.group(1) == kind)]
    return Mutant(f"every {kind}", 0, "\n".join(kept))


def with_weaker_order(ptx: str) -> Iterator[Mutant]:
    """One mutant per ordered access of global memory and weaker order: without its release, its acquire, or both."""
    for number, match in enumerate(_ORDERED.finditer(ptx), 1):
        for weaker in _WEAKER[match.group(2)]:
            what = f"{match.group(1)}{match.group(2)} as {weaker}"
            yield Mutant(what, number, ptx[: match.start(2)] + weaker + ptx[match.end(2) :])


def without_masks(ptx: str) -> Iterator[Mutant]:
    """Two mutants: all global loads, or all global stores, without their predicate."""
    for kind in ("ld", "st"):
        changed, count = _MASKED.subn(
            lambda m, kind=kind: m.group(1) + m.group(2) if m.group(3) == kind else m.group(), ptx
        )
        if changed != ptx:
            yield Mutant(f"masks of {kind}.global", count, changed)
