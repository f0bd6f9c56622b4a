"""What the tests of batch jobs share: prompt files, jobs in processes of their own, and what a folder holds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scfg_fast.batch.folder import Folder

ROOT = Path(__file__).parents[2]
SMALL = {"batch_size": 2, "num_inference_steps": 4, "height": 64, "width": 64}
FAKE = {"load": "fake", "guidance": "cfg", "batch_size": 2}


def write_rows(path: Path, prompts: Iterable[str | dict[str, Any]]) -> Path:
    rows = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextlib.contextmanager
def job(prompts: Path, out: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """A job in a process of its own, in a session of its own; what is left of it is killed."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "tests.batch.pipelines", str(prompts), str(out), json.dumps(options)]
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen, timeout: float = 600.0) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_until(condition: Callable[[], Any], process: subprocess.Popen, timeout: float = 300.0) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        assert process.poll() is None, f"the job ended first: {process.communicate()}"
        time.sleep(0.02)
    raise AssertionError("nothing happened")


def committed(out: Path) -> list[Path]:
    return [path for path in (out / "checkpoint").glob("*.parquet") if ".pending" not in path.name]


def rows_of(out: Path | Folder) -> dict[str, dict[str, Any]]:
    """Rows of all committed data files by id; no id is there twice."""
    folder = out if isinstance(out, Folder) else Folder(out)
    rows = [row for table in folder.tables(folder.committed_names()) for row in table.to_pylist()]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows), "a row is there twice"
    return by_id


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        return np.asarray(image)


def assert_equal_images(out: Path | Folder, expected: Path | Folder, ids: Sequence[str] | None = None) -> None:
    """The same rows, with equal decoded pixels and equal recorded hashes."""
    found, wanted = rows_of(out), rows_of(expected)
    assert set(found) == set(wanted)
    for id in ids or wanted:
        assert found[id]["status"] == "image", found[id]["error"]
        assert (pixels_of(found[id]) == pixels_of(wanted[id])).all(), f"{id} has other pixels"
        assert found[id]["sha256"] == wanted[id]["sha256"]


def assert_nothing_half_written(out: Path) -> None:
    """Every file is whole: names of temporary files are gone, and data files and checkpoints pair up."""
    names = {path.name.removesuffix("-0.parquet") for path in (out / "images").iterdir()}
    assert names == {path.name.removesuffix(".parquet") for path in (out / "checkpoint").iterdir()}
    assert not [path for path in out.rglob("*.tmp")]
    assert not (out / "lock").exists()
