"""The benchmark of batch jobs runs, compares pixels, and writes what it found (T15 at a small size)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import batch
from benchmarks.report import read


@pytest.mark.slow
def test_job_and_loop_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--images", "4", "--batch-size", "2", "--steps", "2", "--size", "64", "--rounds", "2"]
    assert batch.main([*argv, "--out", str(tmp_path / "batch")]) == 0
    rows = {(row.provider, row.metric): row for row in read(tmp_path / "batch.csv")}
    ratios = {("job", "ratio_to_loop"), ("job", "ratio_to_loop_on_processor")}
    assert set(rows) == {("job", "images_per_second"), ("loop", "images_per_second")} | ratios
    assert all(row.value is not None and row.value > 0 and row.samples == 2 for row in rows.values())
    assert "job over loop" in capsys.readouterr().out


def test_other_pixels_end_it_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "job", lambda *_: ((1.0, 1.0), {}))
    monkeypatch.setattr(batch, "load_pipeline", lambda _: None)
    monkeypatch.setattr(batch, "Worker", lambda *_, **__: None)
    monkeypatch.setattr(batch, "loop", lambda *_: ((1.0, 1.0), {"00000001": "other"}))
    assert batch.main(["--images", "1", "--rounds", "1", "--out", str(tmp_path / "batch")]) == 1
    assert not list(tmp_path.iterdir())
