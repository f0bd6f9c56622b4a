"""Errors for people: one line, and an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class CommandError(Exception):
    """An error with a message for the user and an exit status: 2 for bad input, 1 for a failure while running."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


LONGEST = 1000
"""Characters of a message; what a user typed may be longer."""


def escaped(text: str) -> str:
    """The text without what steers a terminal: control characters are written as in Python."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(text: object) -> str:
    line = escaped(" ".join(str(text).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 3 :]}"


def say(text: str) -> None:
    """Print a result. Where nobody reads standard output any more, or it is full, the work goes on without it."""
    with contextlib.suppress(OSError):  # of an unbuffered stream; `flush_output` meets it again
        print(text)
    flush_output()


def flush_output() -> None:
    """Write out what was printed; after a failure standard output is nowhere, or Python would complain when it ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"scfg-fast: note: standard output cannot be written: {error.strerror}", file=sys.stderr)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an exception, or one that it came from, is of a kind."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, kind):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def explain(error: BaseException) -> tuple[str, int]:
    """What to say about an exception, and the exit status."""
    if caused_by(error, KeyboardInterrupt):  # libraries turn one that comes while they are imported into their own
        return "interrupted", 130
    if isinstance(error, CommandError):
        return str(error), error.status
    return f"{type(error).__name__}: {error} (--debug shows the traceback)", 1


@contextlib.contextmanager
def failures_as(what: str) -> Iterator[None]:
    """Turn an exception into one line that says what failed and, where that is known, what to do."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise CommandError(f"{what}: out of memory; try a smaller --size, or --dtype bf16 or fp16", 1) from error
        raise CommandError(f"{what}: {type(error).__name__}: {one_line(error)[:400]}", 1) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{str(path)!r} cannot be written: {error.strerror or error}", 1) from error
