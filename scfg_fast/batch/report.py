"""How far a job is: status, progress and summary, all from what is committed."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TextIO

from .folder import Folder
from .plan import MicroBatch

SHOWN_ERRORS = 10
RECENT = 20
COLUMNS = ("id", "status", "error", "attempt", "together", "seconds", "mean_weight", "effective_weight")


@dataclass
class Status:
    """What a folder holds. `--status` prints it.

    Attributes:
        images, errors, missing: rows; together all that are planned.
        images_per_second: over the last 20 micro-batches, by when they were committed; None before the second.
    """

    images: int
    errors: int
    missing: int
    images_per_second: float | None

    def __str__(self) -> str:
        rate = "" if self.images_per_second is None else f", {self.images_per_second:.3g} images/s lately"
        return f"{self.images} images, {self.errors} errors, {self.missing} missing{rate}"


def read_status(folder: Folder) -> Status:
    """Status of a job, running or not; reads only."""
    batches = folder.read_plan()
    files = folder.look(batches).files
    images = errors = 0
    for table in folder.tables(files.values(), ["status"]):
        failed = table["status"].to_pylist().count("error")
        images, errors = images + len(table) - failed, errors + failed
    missing = sum(map(len, batches)) - images - errors
    return Status(images, errors, missing, _recent_rate(folder, {b.name: len(b) for b in batches}, files))


def _recent_rate(folder: Folder, sizes: dict[str, int], files: dict[str, str]) -> float | None:
    paths = {folder.path(f"checkpoint/{name}.parquet"): sizes[batch] for batch, name in files.items()}
    infos = folder.filesystem.get_file_info(list(paths))
    times = sorted((info.mtime_ns or 0, paths[info.path]) for info in infos if info.path in paths)[-RECENT:]
    span = (times[-1][0] - times[0][0]) / 1e9 if times else 0.0
    return sum(size for _, size in times[1:]) / span if span > 0 else None


@dataclass
class Summary:
    """What a run did and what the folder holds; also `summary.json`.

    Attributes:
        images, errors, missing: rows; together all that are planned.
        resumed: rows that were there before this run.
        twice: micro-batches with two data files; always 0.
        seconds: of this run, start-up included.
        median_seconds: per image, of all images.
        images_per_second: rows of this run over the seconds from its first micro-batch's start to its last commit.
        retried: attempts at micro-batches beyond the first.
        split: micro-batches that were not made in one call: for memory, or because a row failed or died.
        mean_weight, effective_weight: means over all images; None where none is known.
        error_rows: the first ten, (id, error).
    """

    images: int = 0
    errors: int = 0
    missing: int = 0
    resumed: int = 0
    twice: int = 0
    seconds: float = 0.0
    median_seconds: float | None = None
    images_per_second: float | None = None
    retried: int = 0
    split: int = 0
    mean_weight: float | None = None
    effective_weight: float | None = None
    error_rows: list[tuple[str, str]] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0, all rows have an image; 2, there are error rows; 1, something is missing."""
        return 1 if self.missing else 2 if self.errors else 0

    def __str__(self) -> str:
        def number(value: float | None, unit: str) -> str:
            return "" if value is None else f", {value:.3g} {unit}"

        lines = [
            f"{self.images} images, {self.errors} errors, {self.missing} missing, {self.resumed} resumed, "
            f"{self.twice} twice",
            f"{self.seconds:.1f} s{number(self.images_per_second, 'images/s')}"
            f"{number(self.median_seconds, 's per image (median)')}, {self.retried} further attempts, "
            f"{self.split} micro-batches split"
            f"{number(self.mean_weight, 'mean weight')}{number(self.effective_weight, 'effective weight')}",
        ]
        lines += [f"error in {id}: {' '.join(error.split())[:200]}" for id, error in self.error_rows]
        if self.errors > len(self.error_rows):
            lines.append(f"and {self.errors - len(self.error_rows)} more; --retry-errors makes them again")
        return "\n".join(lines)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def summarise(folder: Folder, batches: Sequence[MicroBatch], resumed: int) -> Summary:
    """The summary of what is committed; the run's own times are left to the caller."""
    found = folder.look(batches)
    sizes = {batch.name: len(batch) for batch in batches}
    summary = Summary(resumed=resumed, twice=found.twice)
    seconds: list[float] = []
    weights: tuple[list[float], list[float]] = ([], [])
    for batch, name in found.files.items():
        for table in folder.tables([name], COLUMNS):
            rows = table.to_pylist()
            failed = [row for row in rows if row["status"] == "error"]
            summary.errors += len(failed)
            summary.images += len(rows) - len(failed)
            room = SHOWN_ERRORS - len(summary.error_rows)
            summary.error_rows += [(row["id"], row["error"]) for row in failed[:room]]
            seconds += [row["seconds"] for row in rows if row["status"] == "image"]
            summary.retried += max(row["attempt"] for row in rows) - 1
            summary.split += any(row["together"] < sizes[batch] for row in rows)
            for values, column in zip(weights, ("mean_weight", "effective_weight"), strict=True):
                values += [row[column] for row in rows if row[column] is not None]
    summary.missing = sum(sizes.values()) - summary.images - summary.errors
    summary.median_seconds = statistics.median(seconds) if seconds else None
    means = [statistics.fmean(values) if values else None for values in weights]
    summary.mean_weight, summary.effective_weight = means
    return summary


class Progress:
    """A line about a running job: a bar on a terminal, a line every 30 s elsewhere. Use as a context manager.

    It follows the checkpoints, so it is the same for both runners. Images of earlier runs count as done, not towards
    the speed.
    """

    def __init__(
        self, folder: Folder, batches: Iterable[MicroBatch], done: dict[str, str], file: TextIO | None = None
    ) -> None:
        self._folder, self._file = folder, file or sys.stderr
        self._sizes = {batch.name: len(batch) for batch in batches}
        self._seen = set(done.values())
        self._errors = sum(t["status"].to_pylist().count("error") for t in folder.tables(self._seen, ["status"]))
        self._resumed = self._done = sum(self._sizes[batch] for batch in done)
        self._terminal = self._file.isatty()
        self._started = self.last_commit = time.perf_counter()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        self._draw("\n")

    @property
    def made(self) -> int:
        """Rows that this run has committed."""
        return self._done - self._resumed

    def say(self, text: str) -> None:
        """A line above the bar."""
        with self._lock:
            self._file.write(f"\r\033[K{text}\n" if self._terminal else f"{text}\n")
            self._file.flush()

    def _follow(self) -> None:
        wait, shown = (0.5, 0.0) if self._terminal else (2.0, time.perf_counter())
        while not self._over.wait(wait):
            self._look()
            if self._terminal or time.perf_counter() - shown >= 30:
                shown = time.perf_counter()
                self._draw("" if self._terminal else "\n")

    def _look(self) -> None:
        try:
            for name in set(self._folder.committed_names()) - self._seen:
                batch = self._folder.batch_of(name)
                for table in self._folder.tables([name], ["status"]):
                    self._errors += table["status"].to_pylist().count("error")
                    self._done += self._sizes.get(batch or "", 0)
                    self.last_commit = time.perf_counter()
                self._seen.add(name)
        except OSError:  # the runner meets it too, and says so
            return

    def _draw(self, end: str) -> None:
        total = sum(self._sizes.values())
        rate = self.made / max(self.last_commit - self._started, 1e-9)
        text = f"{self._done}/{total} images"
        if self._errors:
            text += f", {self._errors} errors"
        if self.made:
            text += f", {rate:.3g} images/s, {_duration((total - self._done) / rate)} left"
        with self._lock:
            if self._terminal:
                width = 24
                filled = width * self._done // max(total, 1)
                text = f"\r\033[K{'█' * filled}{'░' * (width - filled)} {text}"
            self._file.write(text + end)
            self._file.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
