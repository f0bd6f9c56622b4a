"""Images out of a job's folder: PNG files that `imagefolder` reads, or Parquet shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pyarrow
import pyarrow.compute
from pyarrow import fs, parquet

from .errors import InputError
from .folder import IMAGES, Folder

SHARD_BYTES = 256 * 2**20
MAX_NAME = 200
METADATA = ("id", "prompt", "seed", "call", "sha256", "mean_weight", "effective_weight")


def export(
    out: str | os.PathLike,
    to: str | os.PathLike,
    *,
    shards: bool = False,
    shard_bytes: int = SHARD_BYTES,
    filesystem: fs.FileSystem | None = None,
) -> int:
    """Write the images of a job, finished or not.

    Args:
        out: the job's folder.
        to: the folder to write, made if missing; files of the same names are replaced.
        shards: `images-00000.parquet`, ... with all columns, instead of `<id>.png` and `metadata.jsonl`.
        shard_bytes: size of a shard, about.
        filesystem: what `out` is a path in.

    Returns:
        The number of images.

    Raises:
        InputError: two ids would become one file name; nothing is written then.
    """
    folder, target = Folder(out, filesystem), Folder(to)
    batches = folder.read_plan()
    committed = folder.look(batches).files
    files = [committed[batch.name] for batch in batches if batch.name in committed]
    names = {} if shards else _file_names(folder, files)
    target.filesystem.create_dir(target.root, recursive=True)
    return _write_shards(folder, files, target, shard_bytes) if shards else _write_files(folder, files, target, names)


def _images(folder: Folder, files: list[str], columns: list[str] | None = None) -> Iterator[pyarrow.Table]:
    wanted = None if columns is None else ["status", *columns]
    for table in folder.tables(files, wanted):
        table = table.filter(pyarrow.compute.equal(table["status"], "image"))
        if len(table):
            yield table


def _file_names(folder: Folder, files: list[str]) -> dict[str, str]:
    """Id -> file name, safe on every file system; upper and lower case are one name on some."""
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    reasons = []
    for table in _images(folder, files, ["id"]):
        for id in table["id"].to_pylist():
            name = re.sub(r"[^\w.-]", "_", id).lstrip(".")
            name = name.encode()[:MAX_NAME].decode(errors="ignore") or "_"
            owner = owners.setdefault(name.casefold(), id)
            if owner != id:
                reasons.append(f"ids {owner!r} and {id!r} would both be {name}.png")
            names[id] = f"{name}.png"
    if reasons:
        raise InputError("--export", [*reasons, "use --shards, which keeps the ids as they are"])
    return names


def _write_files(folder: Folder, files: list[str], target: Folder, names: dict[str, str]) -> int:
    count = 0
    with target.writing("metadata.jsonl") as metadata:
        for table in _images(folder, files):
            for row in table.to_pylist():
                target.write(names[row["id"]], row["image"]["bytes"])
                record = {"file_name": names[row["id"]]} | {name: row[name] for name in METADATA}
                metadata.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                count += 1
    return count


def _features() -> pyarrow.Schema:
    """The schema with what Hugging Face datasets need to know that `image` is an image."""
    features = {
        field.name: {"_type": "Image"} if field.name == "image" else {"dtype": _dtype(field.type), "_type": "Value"}
        for field in IMAGES
    }
    return IMAGES.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _dtype(kind: pyarrow.DataType) -> str:
    return {"double": "float64"}.get(str(kind), str(kind))


def _write_shards(folder: Folder, files: list[str], target: Folder, shard_bytes: int) -> int:
    tables = _images(folder, files)
    schema = _features()
    count = number = 0
    table = next(tables, None)
    while table is not None:
        with (
            target.writing(f"images-{number:05d}.parquet") as file,
            parquet.ParquetWriter(file, schema, compression="none") as writer,
        ):
            size = 0
            while table is not None and size < shard_bytes:
                group: list[pyarrow.Table] = []
                while table is not None and sum(part.nbytes for part in group) < shard_bytes // 8:
                    group.append(table.select(schema.names).cast(schema))
                    table = next(tables, None)
                rows = pyarrow.concat_tables(group)
                writer.write_table(rows)
                size, count = size + rows.nbytes, count + len(rows)
        number += 1
    return count
