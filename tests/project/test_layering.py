"""Who may import whom (docs/design.md): parsed from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIFFUSERS_ALLOWED = {
    "capture",
    "denoisers",
    "pipelines",
    "patch",
    "guider",
    "inversion",
    "models",
    "cli",
    "env",
}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, absolute imports only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and not str(argument.value).startswith("."):
                found.add(str(argument.value).split(".")[0])
    return found


KERNEL_FILES = sorted((ROOT / "kernels" / "scfg_kernels").rglob("*.py"))
PACKAGE_FILES = sorted((ROOT / "scfg_fast").rglob("*.py"))


def test_the_files_are_found() -> None:
    assert len(KERNEL_FILES) >= 8 and len(PACKAGE_FILES) >= 8


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.name)
def test_kernels_know_tensors_not_models(path: Path) -> None:
    assert not imported_packages(path) & {"scfg_fast", "diffusers", "transformers", "xformers", "benchmarks", "tests"}
    if path.parent.name != "_triton":
        assert "triton" not in imported_packages(path)


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: str(p.relative_to(ROOT / "scfg_fast")))
def test_the_package_keeps_its_imports_in_their_rooms(path: Path) -> None:
    imports = imported_packages(path)
    room = path.relative_to(ROOT / "scfg_fast").parts[0].removesuffix(".py")
    assert not imports & {"triton", "benchmarks", "tests"}
    assert "diffusers" not in imports or room in DIFFUSERS_ALLOWED
    assert "ray" not in imports or room == "batch"


def test_the_kernels_folder_is_a_source_root_not_a_package() -> None:
    """A package named `kernels` would shadow the one on PyPI that diffusers and transformers look for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
