"""The local runner: real jobs, killed, interrupted and resumed, against one that nothing disturbed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import scfg_fast
from scfg_fast.batch import FolderError, InputError, MissingPackageError, generate, read_status
from scfg_fast.batch.folder import Folder
from tests.batch.jobs import (
    FAKE,
    ROOT,
    SMALL,
    assert_equal_images,
    assert_nothing_half_written,
    committed,
    finish,
    job,
    pixels_of,
    rows_of,
    wait_until,
    write_rows,
)  # fmt: skip
from tests.batch.pipelines import fake

PROMPTS = [f"a {color} {thing}" for color in ("red", "blue") for thing in "apple car cat sun tree house".split()]
FAKE_HERE = FAKE | {"load": fake}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    return write_rows(folder / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, prompts: Path) -> Path:
    """A job of 12 prompts in micro-batches of 2 with the bundled model."""
    summary = generate(prompts, folder / "undisturbed", **SMALL)
    assert (summary.images, summary.errors, summary.missing, summary.twice) == (12, 0, 0, 0)
    assert summary.exit_status == 0
    return folder / "undisturbed"


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_images_are_what_the_library_makes(undisturbed: Path) -> None:
    import diffusers
    import numpy as np
    import torch

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(scfg_fast.bundled_model_path())
    pipe.set_progress_bar_config(disable=True)
    rows = [rows_of(undisturbed)[id] for id in ("00000001", "00000002")]
    generators = [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows]
    call = {"num_inference_steps": 4, "height": 64, "width": 64, "guidance_scale": 5.0}
    handle = scfg_fast.enable(pipe)
    images = pipe(PROMPTS[:2], generator=generators, output_type="np", **call).images
    effective = torch.stack(handle.stats.effective_weights).double().mean(0)
    for row, image, weight in zip(rows, images, effective, strict=True):
        assert row["effective_weight"] == pytest.approx(weight.item(), rel=1e-6)
        assert (pixels_of(row) == (image * 255).round().astype(np.uint8)).all()
        assert json.loads(row["call"]) == call
        assert (row["mean_weight"], row["attempt"], row["together"], row["error"]) == (5.0, 1, 2, "")
        assert row["effective_weight"] > 0.0 and row["effective_weight"] != 5.0


@pytest.mark.slow
def test_killed_driver(prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """T2: what is durable is not made again, and the rest has equal pixels."""
    out = tmp_path / "out"
    with job(prompts, out, **SMALL) as process:
        wait_until(lambda: len(committed(out)) >= 2, process)
        process.kill()
        process.wait()
    durable = {path.name: path.stat().st_mtime_ns for path in committed(out)}
    assert 2 <= len(durable) < 6
    summary = generate(prompts, out, **SMALL)
    assert (summary.images, summary.missing, summary.twice) == (12, 0, 0)
    assert summary.resumed >= 2 * len(durable)
    assert all((out / "checkpoint" / name).stat().st_mtime_ns == time for name, time in durable.items())
    assert_equal_images(out, undisturbed)
    assert_nothing_half_written(out)


def test_finished_job(prompts: Path, copy: Path) -> None:
    """T3: neither torch nor a model nor Ray is loaded."""
    before = tree(copy)
    script = (
        "import sys; from scfg_fast.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules); sys.exit(status)"
    )
    options = ["--batch-size", "2", "--steps", "4", "--size", "64"]
    result = subprocess.run(
        [sys.executable, "-c", script, "batch", str(prompts), "--out", str(copy), *options],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("12 images, 0 errors, 0 missing, 12 resumed, 0 twice\n")
    after = tree(copy)
    assert {name for name in before if before[name] != after[name]} <= {"summary.json"} and set(before) == set(after)


@pytest.mark.slow
def test_rows_that_kill_and_rows_that_raise(tmp_path: Path) -> None:
    """T4: each killed process is an attempt; then rows run alone; the row that dies again is an error row."""
    prompts = write_rows(tmp_path / "p.jsonl", ["a", "it dies", "b", "it fails", "c", "nan d"])
    out = tmp_path / "out"
    options = FAKE | {"max_attempts": 1}
    for _ in range(2):
        with job(prompts, out, **options) as process:
            assert finish(process)[0] == -signal.SIGKILL
    with job(prompts, out, **options) as process:
        status, printed, _ = finish(process)
    assert status == 2
    assert "3 images, 3 errors, 0 missing" in printed and "error in 00000002: its worker died" in printed
    rows = rows_of(out)
    errors = {id: row["error"] for id, row in rows.items() if row["status"] == "error"}
    assert list(errors) == ["00000002", "00000004", "00000006"] or set(errors) == {"00000002", "00000004", "00000006"}
    assert errors["00000004"] == "RuntimeError: this prompt fails"
    assert "not numbers" in errors["00000006"]
    assert rows["00000001"]["attempt"] == 3 and rows["00000005"]["attempt"] == 1
    assert all(rows[id]["image"]["bytes"] == b"" for id in errors)
    # Error rows are done, until they are asked for.
    assert generate(prompts, out, **FAKE_HERE).resumed == 6
    with job(prompts, out, **options | {"retry_errors": True}) as process:
        assert finish(process)[0] == -signal.SIGKILL
    assert read_status(Folder(out)).missing > 0


@pytest.mark.parametrize("change, what", [
    ({"guidance_scale": 4.0}, "call was"), ({"batch_size": 3}, "batch_size was 2 and is 3"), ({"seed": 1}, "seed was"),
    ({"guidance": "scfg+linear"}, "guidance was 'scfg'"), ({"config": scfg_fast.SCFGConfig.paper()}, "config was None"),
])  # fmt: skip
def test_other_settings_are_refused(prompts: Path, undisturbed: Path, change: dict, what: str) -> None:
    """T5: and the folder is not touched."""
    before = tree(undisturbed)
    with pytest.raises(FolderError, match=what):
        generate(prompts, undisturbed, **SMALL | change)
    assert tree(undisturbed) == before


def test_other_versions_are_refused(prompts: Path, copy: Path) -> None:
    settings = json.loads((copy / "run.json").read_text())
    settings["versions"]["torch"] = "2.0.0"
    (copy / "run.json").write_text(json.dumps(settings))
    with pytest.raises(FolderError, match=r"versions was .*2\.0\.0"):
        generate(prompts, copy, **SMALL)


def test_lost_and_torn_files(prompts: Path, undisturbed: Path, copy: Path, capsys: pytest.CaptureFixture) -> None:
    """T7, and a data file without a checkpoint, a pending checkpoint, and a temporary file."""
    files = sorted((copy / "images").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-100])
    checkpoints = sorted((copy / "checkpoint").iterdir())
    checkpoints[2].unlink()
    checkpoints[3].rename(checkpoints[3].with_suffix(".pending.parquet"))
    (copy / "images" / ".half.tmp").write_bytes(b"half")
    summary = generate(prompts, copy, **SMALL)
    assert "2 files were lost or torn and are made again" in capsys.readouterr().err
    assert (summary.images, summary.resumed, summary.twice) == (12, 4, 0)
    assert_equal_images(copy, undisturbed)
    assert_nothing_half_written(copy)


def test_a_second_data_file_of_a_micro_batch_goes(prompts: Path, undisturbed: Path, copy: Path) -> None:
    name = committed(copy)[0].stem
    shutil.copy(copy / "checkpoint" / f"{name}.parquet", copy / "checkpoint" / "zz.parquet")
    shutil.copy(copy / "images" / f"{name}-0.parquet", copy / "images" / "zz-0.parquet")
    assert generate(prompts, copy, **SMALL).twice == 0
    assert_equal_images(copy, undisturbed)
    assert_nothing_half_written(copy)


def test_grown_input(prompts: Path, undisturbed: Path, copy: Path, tmp_path: Path) -> None:
    """T9: only the new rows are made, one of another size."""
    rows = [*PROMPTS, "a green apple", {"prompt": "a wide apple", "width": 72}, "a last apple"]
    grown = write_rows(tmp_path / "grown.jsonl", rows)
    summary = generate(grown, copy, **SMALL)
    assert (summary.images, summary.resumed, summary.missing) == (15, 12, 0)
    found, before = rows_of(copy), rows_of(undisturbed)
    assert all(found[id] == before[id] for id in before)
    assert pixels_of(found["00000014"]).shape == (64, 72, 3)
    assert found["00000013"]["batch"] == found["00000015"]["batch"]


def test_a_partial_micro_batch_keeps_its_rows_when_the_input_grows(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", ["a", "b", "c"])
    generate(prompts, tmp_path / "out", **FAKE_HERE)
    before = rows_of(tmp_path / "out")
    write_rows(prompts, ["a", "b", "c", "d", "e"])
    assert generate(prompts, tmp_path / "out", **FAKE_HERE).resumed == 3
    after = rows_of(tmp_path / "out")
    assert all(after[id] == before[id] for id in before) and len(after) == 5
    write_rows(prompts, ["a", "another", "c", "d", "e"])
    with pytest.raises(InputError, match="'00000002' was planned with the prompt 'b' and has 'another' now"):
        generate(prompts, tmp_path / "out", **FAKE_HERE)


@pytest.mark.slow
def test_two_drivers_and_a_stale_lock(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """T10: the second driver is refused and names the first; the lock of one that was killed is taken over."""
    prompts = write_rows(tmp_path / "p.jsonl", [f"slow {i}" for i in range(12)])
    out = tmp_path / "out"
    with job(prompts, out, **FAKE) as process:
        wait_until(lambda: committed(out), process)
        with pytest.raises(FolderError, match=f"process {process.pid} on .* works in"):
            generate(prompts, out, **FAKE_HERE)
        process.kill()
        process.wait()
    assert (out / "lock").exists()
    assert generate(prompts, out, **FAKE_HERE).images == 12
    assert f"process {process.pid} on" in capsys.readouterr().err
    assert_nothing_half_written(out)


def test_a_lock_of_another_host_holds(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", ["a"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "1"}))
    with pytest.raises(FolderError, match="process 1 on elsewhere"):
        generate(prompts, tmp_path / "out", **FAKE_HERE)
    (tmp_path / "out" / "lock").write_text("")  # torn: its writer died while writing it
    assert generate(prompts, tmp_path / "out", **FAKE_HERE).images == 1


def test_full_disk(prompts: Path, tmp_path: Path) -> None:
    """T11: files may not grow beyond a limit; nothing half-written stays, and a rerun completes."""
    prompts = write_rows(tmp_path / "p.jsonl", ["a", "b", {"prompt": "c", "width": 512, "height": 512}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError):
            generate(prompts, tmp_path / "out", **FAKE_HERE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(committed(tmp_path / "out")) == 1
    assert not list((tmp_path / "out").rglob("*.tmp")) and not (tmp_path / "out" / "lock").exists()
    assert generate(prompts, tmp_path / "out", **FAKE_HERE).images == 3
    assert_nothing_half_written(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupts(tmp_path: Path, number: int, status: int) -> None:
    """T12: nobody is blamed, the line says how to go on, and the same command does."""
    prompts = write_rows(tmp_path / "p.jsonl", [f"slow {i}" for i in range(12)])
    out = tmp_path / "out"
    with job(prompts, out, **FAKE | {"max_attempts": 1}) as process:
        wait_until(lambda: committed(out), process)
        process.send_signal(number)
        _, _, err = finish(process, 120)
    assert "scfg-fast: stopped; " in err and "of 12 rows are done, the same command makes the rest" in err
    done = {path.stem for path in committed(out)}
    assert {path.parent.name for path in (out / "attempts").rglob("*-*-*")} == done
    summary = generate(prompts, out, **FAKE_HERE | {"max_attempts": 1})
    assert (summary.images, summary.errors, summary.retried, summary.split) == (12, 0, 0, 0)
    assert_nothing_half_written(out)


def test_out_of_memory_halves_and_is_recorded(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [f"big {i}" for i in range(12)])
    summary = generate(prompts, tmp_path / "out", **FAKE_HERE | {"batch_size": 6})
    assert (summary.images, summary.errors, summary.split) == (12, 0, 2)
    assert {row["together"] for row in rows_of(tmp_path / "out").values()} == {1, 2}
    log = next((tmp_path / "out" / "logs").iterdir()).read_text()
    assert log.count("MemoryError") == 2 * 2  # 6 and 3 in the first micro-batch: named in the traceback and below it


def test_no_ray(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T16: one worker runs; two print the command that installs it."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r'pip install "scfg_fast\[batch\]"'):
        generate(prompts, tmp_path / "out", **FAKE_HERE | {"workers": 2})
    assert not (tmp_path / "out").exists()
    assert generate(prompts, tmp_path / "out", **FAKE_HERE).images == 12
