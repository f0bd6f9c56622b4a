"""Triton device code and launchers, one module per operator. The only place in the project that may import triton.

`KERNELS` maps an operator's name to its launcher; an operator that is not listed runs its torch implementation. A
launcher's module is imported, and triton with it, at the first launch.
"""

import importlib
from collections.abc import Callable
from typing import Any


def _launcher(module: str, function: str = "launch") -> Callable[..., Any]:
    def launch(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f".{module}", __name__), function)(*args, **options)

    return launch


KERNELS: dict[str, Callable[..., Any]] = {
    "attention_map": _launcher("attention_map"),
    "attention_maps": _launcher("attention_map", "launch_two"),
    "joint_attention_maps": _launcher("attention_map", "launch_joint"),
    "complete": _launcher("complete"),
    "segment": _launcher("segment"),
    "guide": _launcher("guide"),
    "segment_and_guide": _launcher("segment_and_guide"),
    "guide_pixels": _launcher("guide_pixels"),
}
