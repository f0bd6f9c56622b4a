"""The lowest versions that are allowed, and what needs newer ones."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

import scfg_fast
from lab.versions import BEGIN, END, PAGE, stacks, table
from scfg_fast import versions
from scfg_fast.pipelines.families import FAMILIES, why_not
from scfg_fast.versions import GATES, Gate, reason_against, release

ROOT = Path(__file__).parents[2]
OF_PIPELINES = [(gate, name) for gate in GATES for name in gate.pipelines]
OF_MODULES = [(gate, name) for gate in GATES for name in gate.modules]


def below(version: str) -> str:
    """The last release before one of the form 0.N.0."""
    first, second, _ = release(version)
    return f"{first}.{second - 1}.9"


def bare(name: str) -> Any:
    """A pipeline object without components, of a class of that name, which this diffusers may not have."""
    cls = getattr(diffusers, name, None) or type(name, (diffusers.DiffusionPipeline,), {"__module__": "diffusers.x"})
    return cls.__new__(cls)


@pytest.mark.parametrize("gate, name", OF_PIPELINES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_pipeline_behind_a_gate(gate: Gate, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(name in family.pipelines for family in FAMILIES)
    pipe = bare(name)
    monkeypatch.setattr(versions, "installed_diffusers", lambda: below(gate.version))
    support = scfg_fast.supports(pipe)
    assert not support.supported and len(support.reasons) == 1
    assert f"{name} needs diffusers {gate.version} or newer, and {below(gate.version)} is" in support.reasons[0]
    assert gate.why in support.reasons[0] and f"pip install 'diffusers>={gate.version}'" in support.reasons[0]
    with pytest.raises(scfg_fast.UnsupportedPipelineError, match=f"needs diffusers {re.escape(gate.version)}"):
        scfg_fast.enable(pipe)
    derived = type(pipe)
    assert why_not(type("Mine", (derived,), {}).__new__(type("Mine", (derived,), {}))) == support.reasons[0]
    for version in (gate.version, f"{gate.version}.dev0", "1.0.0"):
        monkeypatch.setattr(versions, "installed_diffusers", lambda version=version: version)
        assert why_not(pipe) is None


@pytest.mark.slow
@pytest.mark.parametrize("gate, name", OF_MODULES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_behind_a_gate_says_so_or_is_imported(gate: Gate, name: str) -> None:
    """In a process of its own, with the installed diffusers, and with one whose guiders cannot be imported."""
    program = "import sys, scfg_fast.versions as v\n{}\nimport importlib; importlib.import_module({!r})"
    older = f"v.installed_diffusers = lambda: {below(gate.version)!r}; sys.modules['diffusers.guiders'] = None"
    runs = [(older, True), ("", release(versions.installed_diffusers()) < release(gate.version))]
    for setting, refused in runs:
        command = [sys.executable, "-c", program.format(setting, name)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode != 0) == refused, result.stderr
        if refused:
            assert f"ImportError: {name} needs diffusers {gate.version} or newer" in result.stderr


def test_what_is_behind_no_gate_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_diffusers", lambda: lowest()["diffusers"])
    behind = {name for gate in GATES for name in (*gate.pipelines, *gate.modules)}
    for family in FAMILIES:
        for name in family.pipelines:
            assert (reason_against(name) is not None) == (name in behind)


def lowest() -> dict[str, str]:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return dict(re.findall(r'"(torch|diffusers|transformers|huggingface_hub)>=([\d.]+)"', text))


def test_the_lowest_set_is_what_setup_allows() -> None:
    first = stacks()[0]
    for package, version in lowest().items():
        tested = getattr(first, package)
        assert release(tested)[:2] == release(version)[:2], package
    assert stacks()[-1].diffusers == "-", "the last is the newest"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"stack: [{', '.join(stack.name for stack in stacks())}]" in workflow


def test_every_gate_is_above_the_lowest_and_some_set_is_on_each_side() -> None:
    tested = [release(stack.diffusers) for stack in stacks() if stack.diffusers != "-"]
    for gate in GATES:
        assert release(gate.version) > min(tested)


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table(), "run python -m lab.versions"


def test_installed_versions_are_read_without_an_import() -> None:
    assert versions.installed_diffusers() == importlib.metadata.version("diffusers")
    assert release("0.38.0.dev0") == (0, 38, 0) and release("1.2") == (1, 2)
