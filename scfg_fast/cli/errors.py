"""Errors for people: one line, and an exit status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class CommandError(Exception):
    """An error with a message for the user and an exit status: 2 for bad input, 1 for a failure while running."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def explain(error: BaseException) -> tuple[str, int]:
    """What to say about an exception, and the exit status."""
    if isinstance(error, CommandError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
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
