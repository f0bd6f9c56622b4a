"""The package as it is published: what the archives hold, what PyPI shows, and what a user's type checker sees."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import scfg_fast

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(kind: str, source: Path, out: Path) -> Path:
    """Build with setuptools alone: no network, no environment of its own."""
    subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=source, check=True, capture_output=True)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked; from a copy, as building writes beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".benchmarks", "*.egg-info", "dist")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=unwanted)
    archive = build("build_sdist", copy, folder / "archive")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution."""
    return build("build_wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has the wheel, and what this one has."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    paths = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(paths))
    return folder / "bin" / "python"


def tracked(suffixes: tuple[str, ...], *folders: str) -> set[str]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return {str(path.relative_to(ROOT)) for path in found if not any(part.startswith(".") for part in path.parts)}


def test_the_source_distribution_is_a_whole_checkout(sdist: Path) -> None:
    folders = ("scfg_fast", "kernels", "tests", "lab", "benchmarks", "training", "docs", "examples")
    expected = tracked((".py", ".md", ".json", ".csv", ".png", ".safetensors", ".txt", ".typed"), *folders)
    assert len(expected) > 200 and not [name for name in sorted(expected) if not (sdist / name).is_file()]
    for name in ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md", "Makefile", ".ci/run"):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.pyc"))


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"scfg_fast", "scfg_kernels"}
    assert {"scfg_fast/py.typed", "scfg_kernels/py.typed"} <= names
    modules = tracked((".py",), "scfg_fast") | {n.removeprefix("kernels/") for n in tracked((".py",), "kernels")}
    assert {name for name in names if name.endswith(".py")} == modules
    models = tracked((".safetensors", ".json", ".txt", ".md", ""), "scfg_fast/models")
    assert {name for name in models if (ROOT / name).is_file()} <= names


def test_the_metadata_that_pypi_shows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        text = next(file.read(name) for name in file.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(text)
    assert metadata["Version"] == scfg_fast.__version__ and metadata["Name"] == "scfg_fast"
    assert len(metadata.get_all("Project-URL")) >= 4 and len(metadata.get_all("Classifier")) >= 10
    assert metadata["Keywords"] and "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    links = re.findall(r"\]\(([^)]*)\)", metadata.get_payload())
    assert len(links) > 10 and not [link for link in links if not link.startswith(("https://", "#"))]
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", metadata.get_payload())
    assert pictures
    for link in pictures:
        assert link.startswith("https://raw.githubusercontent.com/")
        assert (ROOT / link.split(f"/v{scfg_fast.__version__}/")[1]).is_file()


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == scfg_fast.__version__ and citation["license"] == "Apache-2.0"


def test_every_dependency_is_imported() -> None:
    """A dependency that nothing imports costs every user its installation."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = re.findall(r'"([a-z_]+)>=', setup[setup.index("install_requires") : setup.index("extras_require")])
    sources = "\n".join(
        p.read_text(encoding="utf-8") for f in ("scfg_fast", "kernels") for p in (ROOT / f).rglob("*.py")
    )
    names = {"pillow": "PIL"}
    unused = {name for name in needed if not re.search(rf"(import|from) {names.get(name, name)}\b", sources)}
    assert len(needed) >= 6 and unused <= {"accelerate"}  # diffusers loads without a second copy of the weights by it


def test_the_installed_wheel_makes_a_picture(installed: Path, tmp_path: Path) -> None:
    alone = {"PATH": "", "OMP_NUM_THREADS": "1"}  # without PYTHONPATH, which may name this checkout
    command = [str(installed), "-m", "scfg_fast", "generate", "a panda on a beach", "--steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert (result.returncode, result.stdout) == (0, "scfg.png\n"), result.stderr
    where = [str(installed), "-c", "import scfg_fast, scfg_kernels; print(scfg_fast.__file__, scfg_kernels.__file__)"]
    output = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True, env=alone).stdout
    assert str(ROOT) not in output


SCRIPT = """
import scfg_fast
import scfg_kernels
from scfg_fast.guidance import WeightSchedule

reveal_type(scfg_fast.SCFGConfig().rate_max)
reveal_type(scfg_fast.enable)
reveal_type(scfg_kernels.smooth)
scfg_fast.SCFGConfig(rate_max="high")
WeightSchedule(shape=5)
scfg_fast.supports()
"""


def test_a_users_type_checker_sees_our_types(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    site = next(installed.parents[1].glob("lib/python*/site-packages"))
    (site / "others.pth").unlink()  # torch's own types take a minute to read, and are not what is asked
    command = [sys.executable, "-m", "mypy", "--python-executable", str(installed), "--ignore-missing-imports"]
    result = subprocess.run([*command, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert "import-untyped" not in result.stdout and "import-not-found" not in result.stdout
    revealed = [line for line in lines if "Revealed type" in line]
    assert len(revealed) == 3 and "float" in revealed[0] and "Handle" in revealed[1] and "def (" in revealed[2]
    codes = {int(line.split(":")[1]): line.rpartition("[")[2] for line in lines if "error:" in line}
    assert codes == {9: "arg-type]", 10: "arg-type]", 11: "call-arg]"}, result.stdout


def test_the_forms_of_issues_are_well_formed() -> None:
    forms = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        fields = form["body"]
        assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in fields)
        assert len({field["id"] for field in fields}) == len(fields)
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
