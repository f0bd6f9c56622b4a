"""The environment report: true, complete, fit for JSON, and without anything private."""

from __future__ import annotations

import json
import os
import platform
import socket
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from scfg_kernels import available_backends

import scfg_fast
from scfg_fast.env import PACKAGES, default_device, environment, package_versions, report


@pytest.fixture(scope="module")
def found() -> dict:
    return environment()


def test_versions_are_those_of_the_imported_packages(found: dict) -> None:
    assert found["scfg_fast"] == scfg_fast.__version__
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["packages"]["diffusers"] == diffusers.__version__
    assert found["packages"]["transformers"] == transformers.__version__
    assert tuple(found["packages"]) == PACKAGES


def test_a_package_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scfg_fast.env.PACKAGES", ("torch", "no-such-package-of-scfg"))
    assert package_versions()["no-such-package-of-scfg"] is None
    assert package_versions()["torch"] is not None


def test_devices_and_default(found: dict) -> None:
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    assert len([d for d in found["devices"] if d["device"].startswith("cuda")]) == (
        torch.cuda.device_count() if torch.cuda.is_available() else 0
    )
    assert found["default_device"] == default_device()
    assert default_device() in {d["device"].split(":")[0] for d in found["devices"]}


def test_backends_are_what_auto_chooses_on_the_default_device(found: dict) -> None:
    expected = available_backends(found["default_device"])
    assert {op: (b["backend"], b["reasons"]) for op, b in found["backends"].items()} == {
        op: (backend, list(reasons)) for op, (backend, reasons) in expected.items()
    }


def test_it_is_plain_data(found: dict) -> None:
    assert json.loads(json.dumps(found)) == found


def test_the_report_says_everything(found: dict) -> None:
    text = report(found)
    for name, version in found["packages"].items():
        assert f"  {name:<16} {version or 'not installed'}" in text
    for op, choice in found["backends"].items():
        assert f"  {op:<22} {choice['backend']}\n" in text + "\n"
    assert max(map(len, text.splitlines())) <= 100
    assert not text.endswith("\n")


def test_the_report_explains_why_an_operator_is_not_on_triton() -> None:
    made_up = {
        **environment(),
        "backends": {
            "segment": {
                "backend": "torch",
                "reasons": ["triton is not installed", "this version has no kernel for segment"],
            },
            "guide": {"backend": "torch", "reasons": ["triton is not installed"]},
        },
        "devices": [{"device": "cuda:0", "name": "Some GPU", "capability": "9.0", "memory_gib": 78.0}],
    }
    text = report(made_up)
    assert "  all operators: triton is not installed" in text
    assert "  segment: this version has no kernel for this operator" in text
    assert "Some GPU, compute capability 9.0, 78.0 GiB" in text and "none:" not in text


def test_nothing_private_is_in_it(found: dict) -> None:
    text = report(found) + json.dumps(found)
    for private in (socket.gethostname(), str(Path.home()), os.getcwd(), str(Path(scfg_fast.__file__).parent)):
        assert len(private) <= 1 or private not in text
