"""Who may import whom (docs/design.md), held as data and parsed from the source.

Every import counts: those inside functions, under TYPE_CHECKING, and by `import_module` of a constant name too.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEFT_TO_RIGHT = (
    {"_version", "versions"},
    {"config", "files", "layouts", "guidance"},
    {"regions"},
    {"pictures", "models", "env", "methods"},
    {"capture"},
    {"denoisers"},
    {"step"},
    {"pipelines"},
    {"handle"},
    {"patch", "inversion", "guider"},
    {"watching"},
    {"__init__"},
    {"batch", "community"},
    {"cli"},
    {"__main__"},
)
"""Folders and modules of scfg_fast. Each imports what stands to its left, but for `NEVER`."""

NEVER = {
    "_version": {"*"},
    "versions": {"*"},
    "config": {"*"},
    "files": {"*"},
    "layouts": {"*"},
    "guidance": {"*"},
    "regions": {"layouts", "guidance"},
    "pictures": {"config", "layouts", "guidance"},
    "models": {"config", "layouts", "guidance", "regions"},
    "env": {"config", "files", "layouts", "guidance", "regions"},
    "methods": {"files", "layouts", "regions"},
    "capture": {"files", "pictures", "models", "env"},
    "denoisers": {"files", "pictures", "models", "env"},
    "step": {"files", "pictures", "models", "env"},
    "pipelines": {"files", "pictures", "models", "env"},
    "inversion": {"capture", "step", "pictures", "models", "env"},
    "guider": {"pipelines", "pictures", "models", "env"},
    "watching": {"step", "pipelines", "pictures", "models", "env", "inversion", "guider"},
    "batch": {"capture", "denoisers", "step", "pictures", "guider"},
    "community": {"capture", "denoisers", "step", "pictures", "guider", "batch"},
    "cli": {"guider", "community"},
}

PACKAGES = {
    "diffusers": {
        "models",
        "capture",
        "denoisers",
        "pipelines",
        "handle",
        "patch",
        "watching",
        "inversion",
        "guider",
        "batch",
        "community",
        "cli",
    },
    "transformers": {"models", "cli"},
    "scfg_kernels": {"capture", "denoisers", "step", "handle", "patch", "env"},
    "ray": {"batch"},
    "pyarrow": {"batch"},
    "triton": set(),
}
"""Package -> the folders of scfg_fast that may import it."""

TREES = {
    "kernels/scfg_kernels": set(),
    "scfg_fast": {"scfg_kernels"},
    "lab": {"scfg_fast", "scfg_kernels"},
    "training": {"lab", "scfg_fast", "scfg_kernels"},
    "benchmarks": {"lab", "scfg_fast", "scfg_kernels"},
    "tests/benchmarks": {"benchmarks", "tests", "lab", "scfg_fast", "scfg_kernels"},
    "tests": {"lab", "scfg_fast", "scfg_kernels"},
}
"""Folder -> which of our own packages it may import, apart from itself. The first folder that holds a file decides."""

OURS = {tree.split("/")[-1] for tree in TREES}
TRITON_ONLY_IN = "kernels/scfg_kernels/_triton"


def sources(tree: str) -> list[Path]:
    return sorted(path for path in (ROOT / tree).rglob("*.py"))


def module_of(path: Path, root: Path) -> str:
    """scfg_fast/step/hook.py -> step.hook; a package is its name, the top one `__init__`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def absolute_imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module, or name in a module, that is imported, with its package: relative names are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                name = str(argument.value)
                yield package + name if name.startswith(".") else name


@functools.cache
def imports(path: Path, source_root: Path = ROOT) -> set[str]:
    """What a file imports, by absolute names."""
    package = ".".join(path.parent.relative_to(source_root).parts)
    return set(absolute_imports(ast.parse(path.read_text(encoding="utf-8")), package))


def graph_of(folder: Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports."""
    files = {module_of(path, folder): path for path in sorted(folder.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        inside = {
            name.removeprefix(f"{folder.name}.")
            for name in imports(path, folder.parent)
            if name.startswith(f"{folder.name}.")
        }
        found = {next((n for n in (name, name.rpartition(".")[0]) if n in files), "__init__") for name in inside}
        if any(name == folder.name for name in imports(path, folder.parent)):
            found.add("__init__")
        graph[module] = found - {module}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules of a circle, in order, or nothing."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if circle := visit(other, [*trail, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), [])


PACKAGE_GRAPH = graph_of(ROOT / "scfg_fast")
FOLDERS = sorted({module.split(".")[0] for module in PACKAGE_GRAPH})
PLACE = {name: place for place, names in enumerate(LEFT_TO_RIGHT) for name in names}


def test_the_order_names_every_folder_and_no_other() -> None:
    """`batch` may be missing: a checkout without it is whole."""
    assert set(FOLDERS) - {"batch"} == set(PLACE) - {"batch"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_stands_to_its_left(folder: str) -> None:
    wrong = []
    for module, others in PACKAGE_GRAPH.items():
        if module.split(".")[0] != folder:
            continue
        for other in others:
            room = other.split(".")[0]
            never = NEVER.get(folder, set())
            if room != folder and (PLACE[room] >= PLACE[folder] or room in never or "*" in never):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_module_of_the_package_imports_itself_through_others() -> None:
    assert not circle_in(PACKAGE_GRAPH)


@pytest.mark.parametrize("path", sources("scfg_fast"), ids=lambda path: module_of(path, ROOT / "scfg_fast"))
def test_packages_are_imported_where_they_belong(path: Path) -> None:
    room = module_of(path, ROOT / "scfg_fast").split(".")[0]
    roots = {name.split(".")[0] for name in imports(path)}
    assert not [package for package, rooms in PACKAGES.items() if package in roots and room not in rooms]


@pytest.mark.parametrize("tree", TREES)
def test_trees_keep_apart(tree: str) -> None:
    own, allowed = tree.split("/")[0 if tree.startswith("tests") else -1], TREES[tree]
    inner = [other for other in TREES if other.startswith(f"{tree}/")]
    wrong = []
    for path in sources(tree):
        if any(path.is_relative_to(ROOT / other) for other in inner):
            continue
        roots = {name.split(".")[0] for name in imports(path, ROOT / "kernels" if tree.startswith("kernels") else ROOT)}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in (roots & OURS) - allowed - {own}]
    assert sources(tree) and not wrong


@pytest.mark.parametrize("path", sources("kernels/scfg_kernels"), ids=lambda path: path.name)
def test_kernels_know_tensors_not_models(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, ROOT / "kernels")}
    assert not roots & {"diffusers", "transformers", "xformers"}
    if path.parent != ROOT / TRITON_ONLY_IN:
        assert "triton" not in roots


def test_no_file_of_the_package_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in sources("scfg_fast")}
    assert not {name: lines for name, lines in lengths.items() if lines > 400}


def test_the_kernels_folder_is_a_source_root_not_a_package() -> None:
    """A package named `kernels` would shadow the one on PyPI that diffusers and transformers look for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


# The parser itself


def test_every_form_of_import_is_seen() -> None:
    text = """
import os.path
from . import a
from ..b import c
from .d.e import f
def later():
    from ...g import h
    importlib.import_module(".i", __package__)
if TYPE_CHECKING:
    from .j import k
"""
    found = set(absolute_imports(ast.parse(text), "top.mid.low"))
    assert found == {
        "os.path",
        "top.mid.low.a",
        "top.mid.b.c",
        "top.mid.low.d.e.f",
        "top.g.h",
        "top.mid.low.i",
        "top.mid.low.j.k",
    }


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()})
