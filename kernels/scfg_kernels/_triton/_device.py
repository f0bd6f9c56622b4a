"""What launchers share: limits of the device that the active Triton driver launches on, per-sample scales."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from .._launch import DeviceLimits, device_guard, version_numbers

__all__ = ["DeviceLimits", "copy_stages", "current_limits", "device_guard", "driver_reasons", "per_sample"]


@functools.cache
def _limits(driver: Any, index: int) -> DeviceLimits:
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return DeviceLimits(arch, properties["multiprocessor_count"], properties["max_shared_mem"])


def current_limits() -> DeviceLimits:
    """Asked once per driver and device."""
    driver = triton.runtime.driver.active
    return _limits(driver, driver.get_current_device())


def driver_reasons() -> list[str]:
    """Why Triton has no driver to launch with; empty if it has."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a compiler, a linker or the driver finds
        return [f"triton's driver fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    return []


FENCED = (3, 7, 1)
"""The first Triton with the fence (pull request 9610) between an asynchronous copy and a product that reads it as a
warp group's instructions do, `wgmma` or `tcgen05`."""


def copy_stages(stages: int) -> int:
    """`num_stages` of a loop whose products read asynchronous copies: 1 where that fence is missing."""
    needs_fence = current_limits().arch.startswith(("sm_9", "sm_10", "sm_11"))
    return 1 if needs_fence and version_numbers(triton.__version__) < FENCED else stages


def per_sample(values: float | torch.Tensor) -> tuple[float | torch.Tensor, int]:
    """A number, or a tensor [] or [B] of any strides; and how far one sample's element is from the next, or 0."""
    if not isinstance(values, torch.Tensor):
        return values, 0
    flat = values.reshape(-1)
    return flat, flat.stride(0) if flat.numel() > 1 else 0
