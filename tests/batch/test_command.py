"""`scfg-fast batch`: what it prints, its exit statuses, and that the options mean what they mean for generate."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast.batch import Terminated, job
from scfg_fast.batch.folder import Folder
from scfg_fast.cli import main
from tests.batch.jobs import rows_of, write_rows

PROMPTS = ["a red cat", "a blue sea"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd_pipeline(sample_size=8, max_tokens=16, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "p.jsonl", PROMPTS)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(["batch", *(str(argument) for argument in argv)])
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return call


def test_a_job_its_status_and_its_export(run: Any, model: Path) -> None:
    options = ("p.jsonl", "--out", "o", "--model", model, "--steps", 2, "--guidance-scale", 4, "--negative", "a dog")
    status, out, err = run(*options)
    assert status == 0 and out.startswith("2 images, 0 errors, 0 missing, 0 resumed, 0 twice\n"), err
    rows = rows_of(Path("o"))
    call = {"guidance_scale": 4.0, "negative_prompt": "a dog", "num_inference_steps": 2}
    assert [json.loads(row["call"]) for row in rows.values()] == [call, call]
    assert run(*options)[1].startswith("2 images, 0 errors, 0 missing, 2 resumed, 0 twice\n")
    assert run("--out", "o", "--status")[:2] == (0, "2 images, 0 errors, 0 missing\n")
    assert run("--out", "o", "--export", "e")[:2] == (0, "2 images in e\n")
    with Image.open("e/00000001.png") as image:
        assert np.asarray(image).shape == (64, 64, 3)
    assert run("--out", "o", "--export", "s", "--shards")[:2] == (0, "2 images in s\n")
    folder = Folder("o")
    folder.drop(folder.committed_names()[0])
    assert run("--out", "o", "--status")[:2] == (1, "0 images, 0 errors, 2 missing\n")


@pytest.mark.parametrize("argv, reason", [
    (["--out", "o"], "PROMPTS is missing"), (["none.jsonl", "--out", "o"], "there is no such file"),
    (["p.jsonl"], "--out"), (["p.jsonl", "--out", "o", "--shards"], "--shards belongs to --export"),
    (["--out", "o", "--status"], "is not the folder of a job"), (["--out", "o", "--export", "e"], "is not the folder"),
    (["p.jsonl", "--out", "o", "--guidance-scale", "1"], "above 1"),
    (["p.jsonl", "--out", "o", "--workers", "0"], "at least 1"),
    (["p.jsonl", "--out", "o", "--status", "--export", "e"], "not allowed with"),
    (["p.jsonl", "--out", "o", "--model", "no/such/model"], "--model"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_two(run: Any, argv: list[str], reason: str) -> None:
    status, _, err = run(*argv)
    assert status == 2 and reason in err and err.count("\n") == 1
    assert sorted(os.listdir()) == ["p.jsonl"]


def test_bad_rows_and_other_settings_are_exit_two(run: Any, model: Path) -> None:
    Path("bad.jsonl").write_text('{"prompt": ""}\n{"prompt": "a", "seed": "x"}\n')
    status, _, err = run("bad.jsonl", "--out", "o", "--model", model)
    assert status == 2 and "row 1, line 1: the prompt is empty; row 2, line 2: seed" in err and err.count("\n") == 1
    assert run("p.jsonl", "--out", "o", "--model", model, "--steps", 2)[0] == 0
    status, _, err = run("p.jsonl", "--out", "o", "--model", model, "--steps", 3)
    assert status == 2 and "belongs to a job with other settings" in err


def test_failures_while_running_are_exit_one(run: Any, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    status, _, err = run("p.jsonl", "--out", "o", "--model", "broken")
    assert status == 1 and "the model 'broken' cannot be loaded" in err
    assert not list(Path("o/attempts").rglob("*-*-*")) and not Path("o/lock").exists()
    status, _, err = run("p.jsonl", "--out", "/proc/scfg-fast")
    assert status == 1 and "cannot be used" in err


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_interrupts_have_their_own_status(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], status: int
) -> None:
    def stop(*_: Any) -> None:
        if error is Terminated:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)
        raise error

    monkeypatch.setattr(job, "run_local", stop)
    got, _, err = run("p.jsonl", "--out", "o")
    assert got == status and "0 of 2 rows are done, the same command makes the rest" in err
