"""What launchers share: limits of the device that the active Triton driver launches on, per-sample scales."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from .._launch import DeviceLimits


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


def per_sample(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor [] or [B] of any strides, and how far one sample's element is from the next: 0 for a shared one."""
    flat = values.reshape(-1)
    return flat, flat.stride(0) if flat.numel() > 1 else 0
