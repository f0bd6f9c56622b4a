"""The CSV: one row per case, provider and metric, with every sample, and where it was measured."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lab.measure import Spread

from .grid import Case

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        case, op, sizes, batch, dtype: what was measured.
        provider: who computed it: ours, eager, published, compiled; or "ours (graph)", "eager (graph)".
        metric, unit: time in ms, peak_allocated in MiB, or agreement, which has no number.
        value, low, high: median and quartiles of the samples; empty without any.
        samples: every sample in the order of the rounds, separated by spaces.
        status: "ok", or why there is no number.
        device, capability, multiprocessors, memory_gib, torch, triton, cuda, python, commit, dirty, date: where from.
    """

    case: str
    op: str
    sizes: str
    batch: int
    dtype: str
    provider: str
    metric: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    samples: str
    status: str
    device: str
    capability: str
    multiprocessors: int
    memory_gib: float
    torch: str
    triton: str
    cuda: str
    python: str
    commit: str
    dirty: bool
    date: str


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def environment(description: Mapping[str, Any]) -> dict[str, Any]:
    """Device, versions and commit; `commit` is "none" outside a repository."""
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/img")
    return {
        **description,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "none",
        "dirty": changes is None or bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Record:
    """Collects rows; `write` may be called any number of times."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.rows: list[Row] = []
        self._environment = environment(description)

    def add(
        self, case: Case, provider: str, metric: str, unit: str = "", samples: Sequence[float] = (), status: str = "ok"
    ) -> Row:
        spread = Spread.of(samples) if samples else None
        row = Row(
            case.name, case.op, case.sizes.label, case.batch, case.dtype, provider, metric, unit,
            *((spread.value, spread.low, spread.high) if spread else (None, None, None)),
            " ".join(f"{sample:.6g}" for sample in samples), " ".join(status.split()), **self._environment,
        )  # fmt: skip
        self.rows.append(row)
        return row

    def write(self, path: Path) -> None:
        """The whole file or none of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            for row in self.rows:
                numbers = {name: f"{x:.6g}" for name, x in asdict(row).items() if isinstance(x, float)}
                writer.writerow(asdict(row) | numbers)
        os.replace(temporary, path)
