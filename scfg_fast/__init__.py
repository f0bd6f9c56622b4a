"""Semantic-aware classifier-free guidance (S-CFG) for diffusers.

    import scfg_fast
    scfg_fast.enable(pipe)                  # any later pipe(...) uses S-CFG
    image = pipe("a boy in a red shirt").images[0]
    scfg_fast.disable(pipe)                 # stock again

Names are imported when first used, so that `import scfg_fast` and `scfg-fast --help` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import SCFGConfig
    from .inversion import invert
    from .models import bundled_model_path
    from .patch import Handle, Support, UnsupportedPipelineError, disable, disabled, enable, supports
    from .regions import Regions
    from .step.context import SCFGError, SCFGWarning, Stats
    from .watching import Watched, watch

_HOME = {
    "Handle": "patch",
    "Regions": "regions",
    "SCFGConfig": "config",
    "SCFGError": "step.context",
    "SCFGWarning": "step.context",
    "Stats": "step.context",
    "Support": "patch",
    "UnsupportedPipelineError": "patch",
    "bundled_model_path": "models",
    "disable": "patch",
    "disabled": "patch",
    "enable": "patch",
    "invert": "inversion",
    "supports": "patch",
    "watch": "watching",
    "Watched": "watching",
}

__all__ = [
    "Handle",
    "Regions",
    "SCFGConfig",
    "SCFGError",
    "SCFGWarning",
    "Stats",
    "Support",
    "UnsupportedPipelineError",
    "Watched",
    "__version__",
    "bundled_model_path",
    "disable",
    "disabled",
    "enable",
    "invert",
    "supports",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
