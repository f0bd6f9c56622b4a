"""The folder of a job, on any file system that pyarrow knows. Every other module goes through it.

    run.json                            what decides the bits, see `Settings`
    plan.parquet                        one row per micro-batch
    images/<name>-0.parquet             one file per micro-batch, one row per image
    checkpoint/<name>.parquet           the micro-batch in the data file of the same name; `.pending` before the commit
    attempts/<micro-batch>/...          attempts that were begun
    attempts/<micro-batch>-<i>/...      rows that were begun alone and have not ended
    lock, summary.json, logs/           the driver; the last summary; a log per worker

A data file counts once it has a checkpoint. Files appear whole: they are written under a temporary name and moved.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow
from pyarrow import fs, parquet

from .errors import FolderError
from .plan import MicroBatch
from .settings import Settings

PENDING = ".pending.parquet"
TEMPORARY = ".tmp"

IMAGES = pyarrow.schema(
    [
        ("batch", pyarrow.string()),
        ("id", pyarrow.string()),
        ("prompt", pyarrow.string()),
        ("seed", pyarrow.int64()),
        ("call", pyarrow.string()),
        ("status", pyarrow.string()),
        ("error", pyarrow.string()),
        ("attempt", pyarrow.int32()),
        ("together", pyarrow.int32()),
        ("seconds", pyarrow.float64()),
        ("sha256", pyarrow.string()),
        ("mean_weight", pyarrow.float64()),
        ("effective_weight", pyarrow.float64()),
        ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
    ]
)
"""A row per image: `status` is `image` or `error`; `together` is the number of images in the pipeline call that made
it; `seconds` are of that call, divided by that number; `sha256` is of the decoded RGB pixels; `image` is what Hugging
Face datasets decode."""

PLAN = pyarrow.schema(
    [
        ("batch", pyarrow.string()),
        ("ids", pyarrow.list_(pyarrow.string())),
        ("prompts", pyarrow.list_(pyarrow.string())),
        ("seeds", pyarrow.list_(pyarrow.int64())),
        ("call", pyarrow.string()),
    ]
)


@dataclass
class Committed:
    """What a folder holds for good.

    Attributes:
        files: micro-batch -> the name that its data file and checkpoint share.
        lost: micro-batches whose data file was lost, torn or short.
        twice: micro-batches that had a second data file.
        uncommitted: data files without a checkpoint.
    """

    files: dict[str, str] = field(default_factory=dict)
    lost: int = 0
    twice: int = 0
    uncommitted: int = 0


class Folder:
    """A job's folder.

    Args:
        out: a path, or a URI such as `s3://bucket/path`.
        filesystem: what `out` is a path in, for credentials and for file systems without a URI.

    Every method raises OSError if the file system refuses.
    """

    def __init__(self, out: str | os.PathLike, filesystem: fs.FileSystem | None = None) -> None:
        self._name = os.fspath(out)
        if filesystem is not None:
            self.filesystem, self.root = filesystem, self._name.rstrip("/")
        elif "://" in self._name:
            self.filesystem, self.root = fs.FileSystem.from_uri(self._name)
        else:
            self.filesystem = fs.LocalFileSystem()
            self.root = os.path.abspath(os.path.expanduser(self._name)).replace(os.sep, "/")

    def __str__(self) -> str:
        return self._name

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    # Files

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def make(self) -> None:
        """Make the folder and what it has inside; nothing happens to what is there."""
        for name in ("images", "checkpoint", "attempts"):
            self.filesystem.create_dir(self.path(name), recursive=True)

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if there is no such file."""
        try:
            with self.filesystem.open_input_stream(self.path(name)) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | pyarrow.Buffer) -> None:
        """Write a file whole or not at all."""
        with self.writing(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pyarrow.NativeFile]:
        """A file that appears under its name only when the block has ended well."""
        parent, _, last = name.rpartition("/")
        temporary = self.path(f"{parent}/.{last}.{secrets.token_hex(4)}{TEMPORARY}".lstrip("/"))
        try:
            with self.filesystem.open_output_stream(temporary) as file:
                yield file
            self.filesystem.move(temporary, self.path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                self.filesystem.delete_file(temporary)
            raise

    def write_table(self, name: str, table: pyarrow.Table) -> None:
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(table, buffer)
        self.write(name, buffer.getvalue())

    def append(self, name: str, text: str) -> None:
        """Add to a file, where the file system can (object stores cannot)."""
        with contextlib.suppress(NotImplementedError, pyarrow.ArrowNotImplementedError):
            self.filesystem.create_dir(self.path(name).rpartition("/")[0], recursive=True)
            with self.filesystem.open_append_stream(self.path(name)) as file:
                file.write(text.encode("utf-8", "backslashreplace"))

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def names(self, folder: str, recursive: bool = False) -> list[str]:
        """Names of the files in a folder, sorted, relative to it; none if there is no such folder."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        # Some file systems begin their paths with a slash that the selector's path has not.
        start = len(self.path(folder).strip("/")) + 1
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.path.strip("/")[start:] for info in infos if info.type == fs.FileType.File)

    # Settings and plan

    def check_settings(self, settings: Settings) -> bool:
        """Compare with run.json; returns whether there is one.

        Raises:
            FolderError: the folder belongs to a job with other settings or versions; names every one.
        """
        data = self.read("run.json")
        if data is None:
            return False
        try:
            before = json.loads(data)
        except ValueError:
            raise FolderError(f"{self.path('run.json')} is damaged; use a new folder") from None
        differences = list(settings.differences(before))
        if differences:
            raise FolderError(
                f"{self} belongs to a job with other settings: {'; '.join(differences)}; use a new folder, or the "
                "settings that it began with"
            )
        return True

    def write_settings(self, settings: Settings) -> None:
        self.write("run.json", (json.dumps(settings.to_dict(), indent=2) + "\n").encode())

    def read_plan(self) -> list[MicroBatch]:
        data = self.read("plan.parquet")
        if data is None:
            return []
        rows = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
        return [MicroBatch(tuple(r["ids"]), tuple(r["prompts"]), tuple(r["seeds"]), r["call"]) for r in rows]

    def write_plan(self, batches: Sequence[MicroBatch]) -> None:
        self.write_table("plan.parquet", plan_table(batches))

    # Attempts

    def begin(self, key: str) -> str:
        """Note that an attempt begins; returns the marker, for `delete`.

        Args:
            key: a micro-batch, or `<micro-batch>-<i>` for a row of it that runs alone.
        """
        count = len(self.names(f"attempts/{key}"))
        marker = f"attempts/{key}/{count + 1}-{os.getpid()}-{time.time_ns()}"
        self.filesystem.create_dir(self.path(f"attempts/{key}"), recursive=True)
        self.write(marker, b"")
        return marker

    def attempts(self, key: str) -> int:
        """Attempts that were begun and not taken back."""
        return sum(not name.startswith(".") for name in self.names(f"attempts/{key}"))

    def markers(self) -> dict[str, list[str]]:
        """Key -> its markers, oldest first."""
        found: dict[str, list[str]] = {}
        for name in self.names("attempts", recursive=True):
            key, _, last = name.rpartition("/")
            if not last.startswith("."):
                found.setdefault(key, []).append(name)
        for names in found.values():
            names.sort(key=lambda name: int(name.rpartition("-")[2]))
        return found

    def forgive(self, before: dict[str, list[str]], left: Iterable[str]) -> None:
        """Take back the attempts that were in flight: of every micro-batch in `left`, the newest marker that was not
        there `before`. An interrupt is nobody's fault."""
        left = set(left)
        for key, names in self.markers().items():
            if key.partition("-")[0] in left and names[-1] not in before.get(key, []):
                self.delete(f"attempts/{names[-1]}")

    # Images

    def commit(self, table: pyarrow.Table, name: str) -> None:
        """Add the data file of one micro-batch: pending checkpoint, data, checkpoint."""
        self.write_table(f"checkpoint/{name}{PENDING}", pyarrow.table({"batch": table["batch"]}))
        self.write_table(f"images/{name}-0.parquet", table)
        self.filesystem.move(self.path(f"checkpoint/{name}{PENDING}"), self.path(f"checkpoint/{name}.parquet"))

    def drop(self, name: str) -> None:
        """Take a data file back, checkpoint first."""
        self.delete(f"checkpoint/{name}.parquet")
        self.delete(f"images/{name}-0.parquet")

    def committed_names(self) -> list[str]:
        return [
            name.removesuffix(".parquet")
            for name in self.names("checkpoint")
            if name.endswith(".parquet") and not name.endswith(PENDING) and not name.startswith(".")
        ]

    def batch_of(self, name: str) -> str | None:
        """The micro-batch that a checkpoint names, or None if it cannot be read."""
        try:
            data = self.read(f"checkpoint/{name}.parquet")
            return None if data is None else parquet.read_table(pyarrow.BufferReader(data))["batch"][0].as_py()
        except (IndexError, KeyError):
            return None
        except (pyarrow.ArrowException, OSError) as error:
            return _if_torn(error)

    def rows(self, name: str, columns: Sequence[str] | None = None) -> pyarrow.Table | None:
        """A data file, or None if it is lost or torn."""
        try:
            with self.filesystem.open_input_file(self.path(f"images/{name}-0.parquet")) as file:
                return parquet.read_table(file, columns=None if columns is None else list(columns))
        except (pyarrow.ArrowException, OSError) as error:
            return _if_torn(error)

    def _count(self, name: str) -> int:
        """Rows of a data file by its footer; -1 if it is lost or torn."""
        try:
            with self.filesystem.open_input_file(self.path(f"images/{name}-0.parquet")) as file:
                return parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            return _if_torn(error, -1)

    def look(self, batches: Iterable[MicroBatch], drop: Callable[[str], None] | None = None) -> Committed:
        """What is there for good. With `drop`, it is called with the name of every checkpoint that does not count."""
        expected = {batch.name: len(batch) for batch in batches}
        found = Committed()
        names = self.committed_names()
        with ThreadPoolExecutor(8) as pool:
            checkpoints = pool.map(lambda name: (name, self.batch_of(name), self._count(name)), names)
            for name, batch, count in checkpoints:
                if batch in found.files:
                    found.twice += 1
                elif batch is not None and count == expected.get(batch):
                    found.files[batch] = name
                    continue
                elif batch is not None and batch not in expected:
                    raise FolderError(
                        f"{self} has images of the micro-batch {batch}, which its plan.parquet does not know; use a "
                        "new folder"
                    )
                else:
                    found.lost += 1
                if drop is not None:
                    drop(name)
        return found

    def reconcile(self, batches: Iterable[MicroBatch]) -> Committed:
        """Make checkpoints and data files agree again after a kill; to be called under the lock.

        A checkpoint whose data file is lost, torn or short goes, and so does a data file without a checkpoint.
        """
        found = self.look(batches, self.drop)
        committed = set(found.files.values())
        for name in self.names("checkpoint"):
            if name.removesuffix(".parquet") not in committed:
                self.delete(f"checkpoint/{name}")
        for name in self.names("images"):
            if name.removesuffix("-0.parquet") not in committed:
                self.delete(f"images/{name}")
                found.uncommitted += not name.endswith(TEMPORARY)
        return found

    def tables(self, files: Iterable[str], columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
        """The data files of these names, one after another."""
        for name in files:
            table = self.rows(name, columns)
            if table is not None:
                yield table


def _if_torn(error: Exception, value: Any = None) -> Any:
    """`value` if the error says that a file is lost or cannot be decoded. A file system that fails has an errno."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.errno is not None:
        raise error
    return value


def plan_table(batches: Sequence[MicroBatch]) -> pyarrow.Table:
    """One row per micro-batch, as in plan.parquet."""
    rows = [
        {"batch": b.name, "ids": list(b.ids), "prompts": list(b.prompts), "seeds": list(b.seeds), "call": b.call}
        for b in batches
    ]
    return pyarrow.Table.from_pylist(rows, schema=PLAN)
