"""The study at equal dose: its intervals, its measures, and one method against its plain twin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import guidance
from benchmarks.report import Report
from scfg_fast.models.classifier import bundled_classifier


def test_the_bootstrap_is_around_the_mean_and_leaves_out_what_has_no_answer() -> None:
    values = torch.arange(40.0)
    spread = guidance.bootstrap(torch.cat([values, torch.tensor([float("nan")] * 5)]))
    assert spread.value == pytest.approx(19.5) and spread.count == 40
    error = float(values.std() / 40**0.5)
    assert spread.low == pytest.approx(19.5 - 1.96 * error, abs=0.4) and spread.high > 19.5 + 1.5 * error
    same = guidance.bootstrap(torch.full((9,), 2.0))
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)
    assert guidance.bootstrap(torch.tensor([float("nan")])).count == 0


def test_restlessness_is_the_mean_difference_of_neighbours_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of 0 and 1 in the left half, where the judge sees background: 1 across, 0 down."""
    pictures = torch.zeros(2, 3, 256, 256)
    pictures[0, :, :, 0:128:2] = 1.0
    logits = torch.zeros(2, 2, 16, 16)
    logits[:, 1, :, 8:] = 1.0
    monkeypatch.setattr(
        guidance, "assess", lambda *_: [SimpleNamespace(objects=1, exact=0, position=None, background=1)] * 2
    )
    judge = SimpleNamespace(network=None, logits=lambda _: logits)
    scores = guidance.picture_scores(judge, pictures, [guidance.pair(0), guidance.pair(1)])
    assert scores["restlessness"].tolist() == pytest.approx([0.5 * 127 / 128, 0.0])
    assert scores["clipped"].tolist() == [1.0, 1.0] and bool(scores["position"].isnan().all())


@pytest.mark.slow
def test_one_method_is_compared_with_plain_guidance_at_its_dose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "STUDIED", {"none": {}, "scfg": guidance.STUDIED["scfg"]})
    monkeypatch.setattr(guidance, "STUDY_SCALES", (5.0,))
    report = Report({})
    guidance.study(report, bundled_classifier(), 2, [2], tmp_path / "study.png")
    found = {(row.provider, row.metric): row for row in report.rows}
    assert found["none", "effective_weight"].value == pytest.approx(5.0)
    assert found["none", "saturation_difference"].value == 0.0, "plain guidance is its own twin"
    assert found["scfg", "effective_weight"].value != 5.0 != found["scfg", "saturation_difference"].value
    assert [path.name for path in tmp_path.iterdir()] == ["study-g5-steps2.png"]
