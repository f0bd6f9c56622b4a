"""The matrix of combinations in docs/pipelines.md: no row without a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = ("works", "refused")


def rows() -> list[list[str]]:
    """Cells of every row of the tables under Combinations, headings and rules left out."""
    section = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8").split("## Combinations")[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return [cells for cells in table if cells[-1] != "shown by"]


def test_the_matrix_is_found() -> None:
    assert len(rows()) >= 30


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_has_a_verdict_and_a_test(row: list[str]) -> None:
    _, verdict, shown_by = row
    assert verdict.startswith(VERDICTS)
    named = re.findall(r"`(test_\w+)` \((\w+)\)", shown_by)
    assert named
    for test, file in named:
        source = (ROOT / "tests" / "pipelines" / f"test_{file}.py").read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, f"{test} is not in test_{file}.py"
