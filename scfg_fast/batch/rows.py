"""Rows of a prompt file, read and checked before anything is made.

JSONL, CSV and Parquet. `prompt` is required. `id`, `seed`, `negative_prompt`, `width`, `height`, `num_inference_steps`
and `guidance_scale` are optional, and so is a column for every parameter of `SCFGConfig`, which overrides it for that
row. An empty cell and a null mean that the job's value holds.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import SCFGConfig
from .errors import InputError

SETTINGS = tuple(field.name for field in dataclasses.fields(SCFGConfig))
CALL = ("negative_prompt", "width", "height", "num_inference_steps", "guidance_scale")
COLUMNS = ("prompt", "id", "seed", *CALL, "scfg_kwargs")
MIN_SIZE = 64
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Row:
    """One image to make.

    Attributes:
        id: unique in the file; the row's number in eight digits where the file names none.
        prompt: what the image shows.
        seed: of the image's own generator.
        call: keyword arguments of the pipeline call, as JSON with sorted keys. `scfg_kwargs` is one of them.
    """

    id: str
    prompt: str
    seed: int
    call: str


Place = str
"""Where a row stands, for messages: `row 3, line 4`."""


def read_rows(
    source: str | os.PathLike | Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    guidance: str = "scfg",
    config: SCFGConfig | None = None,
) -> list[Row]:
    """Read and check all rows.

    Args:
        source: a .jsonl, .csv or .parquet file, or the rows themselves.
        seed: the job's; a row without a seed gets 7 bytes of sha256(`seed|id`).
        defaults: keyword arguments of the call that hold where a row names no other.
        guidance: `"cfg"` has no `scfg_kwargs` and allows a guidance_scale of 1.
        config: the configuration that a row's `SCFGConfig` columns override.

    Raises:
        InputError: a file cannot be read, or rows are bad; lists every reason, by row and line.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        reasons: list[str] = []
        places = list(_read_file(name, reasons))
    else:
        name, reasons = "the rows", []
        places = [(f"row {number}", dict(row)) for number, row in enumerate(source, 1)]
    checks = _Checks(seed, dict(defaults or {}), guidance, config or SCFGConfig())
    rows = []
    first: dict[str, Place] = {}
    for number, (place, values) in enumerate(places):
        row, wrong = checks.row(number, values)
        if row is not None and row.id in first:
            wrong.append(f"id {row.id!r} is that of {first[row.id]} too; ids must be unique")
        reasons += [f"{place}: {reason}" for reason in wrong]
        if row is not None:
            first.setdefault(row.id, place)
            rows.append(row)
    if not places and not reasons:
        reasons.append("there is no row")
    if reasons:
        raise InputError(name, reasons)
    return rows


def _read_file(name: str, reasons: list[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    readers: dict[str, Callable[[bytes, list[str]], Iterator[tuple[Place, dict[str, Any]]]]]
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    read = readers.get(os.path.splitext(name)[1].lower())
    if read is None:
        raise InputError(name, [f"prompts are read from {', '.join(readers)} files"])
    try:
        with open(name, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise InputError(name, ["there is no such file"]) from None
    except OSError as error:
        raise InputError(name, [f"it cannot be read: {error.strerror}"]) from None
    return read(data, reasons)


def _read_jsonl(data: bytes, reasons: list[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    number = 0
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        number += 1
        place = f"row {number}, line {line}"
        try:
            values = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            reasons.append(f"{place}: it is not UTF-8 text; save the file as UTF-8")
        except ValueError as error:
            reasons.append(f"{place}: it is not JSON: {error}")
        else:
            if isinstance(values, dict):
                yield place, values
            else:
                reasons.append(f'{place}: it must be an object such as {{"prompt": "a red cat"}}')


def _read_csv(data: bytes, reasons: list[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reasons.append(f"line {line}: it is not UTF-8 text; save the file as UTF-8")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            reasons.append("line 1: two columns have one name")
            return
        before = reader.line_num
        for cells in reader:
            line, before = before + 1, reader.line_num  # a quoted cell may span lines
            if not any(cells):
                continue
            number += 1
            if len(cells) > len(header):
                reasons.append(f"row {number}, line {line}: {len(cells)} cells under {len(header)} columns")
                continue
            values = zip(header, cells, strict=False)
            yield f"row {number}, line {line}", {name: _from_text(name, cell) for name, cell in values if cell}
    except csv.Error as error:
        reasons.append(f"line {reader.line_num}: it is not CSV: {error}")


def _from_text(column: str, text: str) -> Any:
    """A cell of a CSV file: numbers and JSON where the column has them, otherwise the text."""
    if column in ("prompt", "id", "negative_prompt"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_parquet(data: bytes, reasons: list[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        reasons.append(f"it is not Parquet: {error}")
        return
    for number, values in enumerate(table.to_pylist(), 1):
        yield f"row {number}", values


@dataclass
class _Checks:
    """Turns the values of a row into a `Row`, or into reasons."""

    seed: int
    defaults: dict[str, Any]
    guidance: str
    config: SCFGConfig

    def row(self, number: int, values: Mapping[str, Any]) -> tuple[Row | None, list[str]]:
        given = {name: value for name, value in values.items() if value is not None}
        wrong = []
        unknown = sorted(str(name) for name in values if name not in (*COLUMNS, *SETTINGS))
        if unknown:
            wrong.append(
                f"unknown columns {', '.join(unknown)}; known are {', '.join(COLUMNS)} and the parameters of SCFGConfig"
            )
        prompt = given.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            wrong.append("the prompt is empty" if prompt is None or isinstance(prompt, str) else "prompt must be text")
        id = given.get("id", f"{number + 1:08d}")
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        if not isinstance(id, str) or not id.strip():
            wrong.append(f"id must be text or a whole number, got {id!r}")
            id = ""
        digest = hashlib.sha256(f"{self.seed}|{id}".encode("utf-8", "surrogatepass")).digest()
        seed = _whole(given.get("seed", int.from_bytes(digest[:7], "big")), 0)
        if seed is None:
            wrong.append(f"seed must be a whole number from 0 to {MAX_SEED}, got {given['seed']!r}")
        call = dict(self.defaults) | {name: given[name] for name in CALL if name in given}
        wrong += self._check_call(call)
        settings, reasons = self._settings(given)
        wrong += reasons
        if settings:
            call["scfg_kwargs"] = settings
        if wrong or seed is None:
            return (Row(id, "", 0, "") if id else None), wrong  # its id may still be that of another row
        return Row(id, str(prompt), seed, json.dumps(call, sort_keys=True, ensure_ascii=False)), []

    def _check_call(self, call: dict[str, Any]) -> Iterator[str]:
        """Reasons against a call; whole numbers that came as 64.0 are made whole."""
        if "negative_prompt" in call and not isinstance(call["negative_prompt"], str):
            yield f"negative_prompt must be text, got {call['negative_prompt']!r}"
        for name in ("width", "height"):
            if name in call:
                size = _whole(call[name], MIN_SIZE)
                if size is None or size % 8:
                    yield f"{name} must be a multiple of 8 of at least {MIN_SIZE}, got {call[name]!r}"
                else:
                    call[name] = size
        if "num_inference_steps" in call:
            steps = _whole(call["num_inference_steps"], 1)
            if steps is None:
                yield f"num_inference_steps must be a whole number of at least 1, got {call['num_inference_steps']!r}"
            else:
                call["num_inference_steps"] = steps
        if "guidance_scale" in call:
            scale = call["guidance_scale"]
            if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
                yield f"guidance_scale must be a number, got {scale!r}"
            elif scale < 1 or (scale == 1 and self.guidance != "cfg"):
                yield f"guidance_scale must be above 1 for S-CFG (at least 1 with --guidance cfg), got {scale!r}"
            else:
                call["guidance_scale"] = float(scale)

    def _settings(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The row's own `scfg_kwargs`, and reasons against them."""
        whole = given.get("scfg_kwargs", {})
        if not isinstance(whole, Mapping):
            return {}, [f'scfg_kwargs must be an object such as {{"rate_max": 1.5}}, got {whole!r}']
        settings = dict(whole) | {name: given[name] for name in SETTINGS if name in given}
        if not settings:
            return {}, []
        if self.guidance == "cfg":
            return {}, [f"{', '.join(settings)}: plain guidance (--guidance cfg) has no S-CFG parameters"]
        enabled = settings.get("enabled", True)
        if not isinstance(enabled, bool):
            return {}, [f"enabled must be true or false, got {enabled!r}"]
        try:
            self.config.replace(**{name: value for name, value in settings.items() if name != "enabled"})
        except (ValueError, TypeError) as error:
            return {}, [str(error)]
        return settings, []


def _whole(value: Any, least: int) -> int | None:
    """A whole number of at least `least`, or None; 64.0 counts, as tables with empty cells have it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_SEED:
        return None
    return value
