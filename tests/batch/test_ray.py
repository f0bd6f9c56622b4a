"""The Ray runner: a real local Ray, drivers and workers killed by their pids, against the local runner's images."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from scfg_fast.batch import generate
from tests.batch.jobs import (
    FAKE,
    ROOT,
    SMALL,
    assert_equal_images,
    assert_nothing_half_written,
    committed,
    finish,
    job,
    rows_of,
    wait_until,
    write_rows,
)

pytestmark = pytest.mark.slow
PROMPTS = [f"a {color} {thing}" for color in ("red", "blue") for thing in "apple car cat sun tree house".split()]
TWO = {"workers": 2}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """What one worker makes here, without Ray."""
    out = tmp_path_factory.mktemp("job") / "undisturbed"
    assert generate(prompts, out, **SMALL).images == 12
    return out


def markers(out: Path) -> list[Path]:
    """Markers of attempts, the newest last."""
    return sorted((out / "attempts").rglob("*-*-*"), key=lambda path: int(path.name.split("-")[2]))


def test_worker_count_and_a_folder_that_the_local_runner_began(
    prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """T6: two workers make the pixels of one, also of what a local run has left; and T3 after that: no Ray starts."""
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    for path in committed(out)[:4]:
        path.unlink()
        (out / "images" / f"{path.stem}-0.parquet").unlink()
    with job(prompts, out, **SMALL | TWO) as process:
        status, printed, err = finish(process)
    assert status == 0, err
    assert printed.startswith("12 images, 0 errors, 0 missing, 4 resumed, 0 twice\n")
    assert_equal_images(out, undisturbed)
    assert_nothing_half_written(out)
    assert len({path.name.split("-")[1] for path in markers(out)[-4:]}) == 2, "both workers made something"
    with job(prompts, out, **SMALL | TWO) as process:
        assert finish(process)[1].startswith("12 images, 0 errors, 0 missing, 12 resumed, 0 twice\n")


def test_killed_worker(prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """T1: every row once, equal pixels, and one attempt more for what was in flight."""
    out = tmp_path / "out"
    with job(prompts, out, **SMALL | TWO) as process:
        wait_until(lambda: len(markers(out)) >= 3, process)
        os.kill(int(markers(out)[-1].name.split("-")[1]), signal.SIGKILL)
        status, printed, err = finish(process)
    assert status == 0, err
    assert "12 images, 0 errors, 0 missing, 0 resumed, 0 twice\n" in printed  # after a line of Ray's about the worker
    assert int(re.search(r"(\d+) further attempts", printed)[1]) == 1 and len(markers(out)) == 7
    assert_equal_images(out, undisturbed)
    assert_nothing_half_written(out)


def test_killed_driver_and_the_local_runner_finishes(prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """T2, with the other runner: what is durable is not made again."""
    out = tmp_path / "out"
    with job(prompts, out, **SMALL | TWO) as process:
        wait_until(lambda: len(committed(out)) >= 2, process)
        process.kill()
        process.wait()
    durable = {path.name: path.stat().st_mtime_ns for path in committed(out)}
    summary = generate(prompts, out, **SMALL)
    assert (summary.images, summary.missing, summary.twice) == (12, 0, 0)
    assert summary.resumed >= 2 * len(durable) > 0
    assert all((out / "checkpoint" / name).stat().st_mtime_ns == time for name, time in durable.items())
    assert_equal_images(out, undisturbed)
    assert_nothing_half_written(out)


def test_rows_that_kill_and_rows_that_raise(tmp_path: Path) -> None:
    """T4: in bounded time, with just these two in error."""
    prompts = write_rows(tmp_path / "p.jsonl", ["a", "it dies", "b", "it fails", "c", "d", "e", "f"])
    out = tmp_path / "out"
    with job(prompts, out, **FAKE | TWO | {"max_attempts": 2}) as process:
        status, printed, err = finish(process)
    assert status == 2, err
    assert "6 images, 2 errors, 0 missing" in printed
    rows = rows_of(out)
    errors = {id: row["error"] for id, row in rows.items() if row["status"] == "error"}
    assert errors == {"00000002": "its worker died while making it", "00000004": "RuntimeError: this prompt fails"}
    assert rows["00000001"]["attempt"] == 4
    assert_nothing_half_written(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupts(tmp_path: Path, number: int) -> None:
    """T12: it ends in seconds with a clear line, and no row is blamed."""
    prompts = write_rows(tmp_path / "p.jsonl", [f"slow {i}" for i in range(40)])
    out = tmp_path / "out"
    with job(prompts, out, **FAKE | TWO | {"max_attempts": 1}) as process:
        wait_until(lambda: len(committed(out)) >= 2, process)
        process.send_signal(number)
        _, _, err = finish(process, 120)
    assert "scfg-fast: stopped; " in err and "of 40 rows are done" in err
    assert not (out / "lock").exists()
    done = {row["batch"] for row in rows_of(out).values()}
    assert {path.parent.name for path in markers(out)} == done


def test_the_floor_of_ray_is_the_one_that_ci_runs() -> None:
    """T17: `.ci/lowest-ray` installs the lowest Ray that setup.py allows and runs this file on it."""
    floor = re.search(r"ray\[data\]>=([\d.]+)", (ROOT / "setup.py").read_text())[1]
    assert floor == "2.60"
    script = (ROOT / ".ci" / "lowest-ray").read_text()
    assert "setup.py" in script and "tests/batch/test_ray.py" in script
