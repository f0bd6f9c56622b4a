"""Results as files: one long-format CSV row per case, provider and metric, and the same with every sample as JSON."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from lab.measure import Spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One number. See README.md for what each metric means.

    Attributes:
        case, op, sizes, batch: what was measured.
        provider: who computed it.
        metric, unit: what the number is.
        value, low, high: median and quartiles of the samples; equal if there is one sample; empty if it was not run.
        samples: number of samples.
        status: "ok", or why there is no number.
        cpu, cores, threads, torch, commit, dirty, date: where it comes from.
    """

    case: str
    op: str
    sizes: str
    batch: int
    provider: str
    metric: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    samples: int
    status: str
    cpu: str
    cores: int
    threads: int
    torch: str
    commit: str
    dirty: bool
    date: str


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Machine, versions and commit. `commit` is "none" outside a repository or before the first commit."""
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/img")
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": list(psutil.getloadavg()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "diffusers", "transformers", "triton", "numpy")},
        "commit": _git("rev-parse", "--short=12", "HEAD") or "none",
        "dirty": changes is None or bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Report:
    """Collects rows and writes them; may be written any number of times, the last time with `finished=True`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.environment = environment()
        self.arguments = arguments
        self.rows: list[Row] = []
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.details: dict[str, Any] = {}
        known = {f.name for f in fields(Row)}
        self._stamp = {name: value for name, value in self.environment.items() if name in known}

    def add(
        self, case: str, op: str, sizes: str, batch: int, provider: str, metric: str, unit: str,
        number: Spread | float | None, status: str = "ok",
    ) -> Row:  # fmt: skip
        """Add one row; a plain number is one sample, None is a row without a number."""
        if isinstance(number, Spread):
            value, low, high, count = number.value, number.low, number.high, number.count
        else:
            value, low, high, count = number, number, number, int(number is not None)
        row = Row(case, op, sizes, batch, provider, metric, unit, value, low, high, count, status, **self._stamp)
        self.rows.append(row)
        return row

    def write(self, out: Path, finished: bool) -> list[Path]:
        """Write OUT.csv and OUT.json, each whole or not at all."""
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "finished": finished,
            "environment": self.environment,
            "arguments": self.arguments,
            "rows": [asdict(row) for row in self.rows],
            "samples_seconds": self.samples,
            "details": self.details,
        }
        table, record = out.with_name(out.name + ".csv"), out.with_name(out.name + ".json")
        for path, write in (
            (table, lambda file: _write_rows(self.rows, file)),
            (record, lambda file: file.write(json.dumps(content, indent=1) + "\n")),
        ):
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("w", encoding="utf-8", newline="") as file:
                write(file)
            os.replace(temporary, path)
        return [table, record]


def _write_rows(rows: Sequence[Row], file: Any) -> None:
    writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """Rows of a CSV that `Report.write` wrote; numbers come back rounded to six digits.

    Raises:
        ValueError: the columns are not those of `Row`.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        expected = [f.name for f in fields(Row)]
        if reader.fieldnames != expected:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {expected}")
        return [_parse(values) for values in reader]


def _parse(values: dict[str, str]) -> Row:
    typed: dict[str, Any] = dict(values)
    for name in ("value", "low", "high"):
        typed[name] = float(values[name]) if values[name] else None
    for name in ("batch", "samples", "cores", "threads"):
        typed[name] = int(values[name])
    typed["dirty"] = values["dirty"] == "True"
    return Row(**typed)
