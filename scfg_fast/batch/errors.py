"""What ends a job: errors with every reason."""

from __future__ import annotations

from collections.abc import Sequence

MOST_REASONS = 20


class InputError(ValueError):
    """The prompts cannot be used; the message lists the first 20 reasons, by row and line.

    Attributes:
        reasons: all of them.
    """

    def __init__(self, source: str, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        more = len(self.reasons) - MOST_REASONS
        shown = [*self.reasons[:MOST_REASONS], *([f"and {more} more"] if more > 0 else [])]
        super().__init__(f"{source}: {'; '.join(shown)}")


class FolderError(RuntimeError):
    """The folder cannot be used: it holds another job, or somebody else works in it. The folder stays as it is."""


class MissingPackageError(RuntimeError):
    """A package that this needs is not installed; the message has the command that installs it."""


class ModelError(RuntimeError):
    """The pipeline could not be loaded; the folder stays resumable."""
