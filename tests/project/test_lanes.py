"""The lanes that CONTRIBUTING.md and the workflows name exist, and so do the files that its recipes name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
SPEAKERS = ["CONTRIBUTING.md", ".ci/run", *(f".github/workflows/{name}.yml" for name in ("ci", "simulator"))]


@pytest.mark.parametrize("name", SPEAKERS)
def test_targets_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = {
        target
        for line in re.findall(r"(?:^|[`\s])make ((?:[a-z][\w-]*[ `\n])+)", text)
        for target in re.findall(r"[\w-]+", line)
    }
    assert named and named <= TARGETS


def test_files_that_are_named_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = [path for path in re.findall(r"`([\w./-]+/[\w./-]+\.(?:py|md))`", text) if "NAME" not in path]
    assert len(named) > 8 and not [path for path in named if not (ROOT / path).exists()]
