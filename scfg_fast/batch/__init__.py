"""Batch jobs: a file of prompts becomes a folder of images, once, whatever dies. See docs/batch.md.

    from scfg_fast.batch import generate
    summary = generate("prompts.jsonl", "images")

`ray` and `pyarrow` are imported here and nowhere else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import export
    from .errors import FolderError, InputError, MissingPackageError, ModelError
    from .job import Terminated, generate
    from .report import Status, Summary, read_status

_HOME = {
    "FolderError": "errors",
    "InputError": "errors",
    "MissingPackageError": "errors",
    "ModelError": "errors",
    "Status": "report",
    "Summary": "report",
    "Terminated": "job",
    "export": "dataset",
    "generate": "job",
    "read_status": "report",
}
__all__ = [
    "FolderError",
    "InputError",
    "MissingPackageError",
    "ModelError",
    "Status",
    "Summary",
    "Terminated",
    "export",
    "generate",
    "read_status",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
