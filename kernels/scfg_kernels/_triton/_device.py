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


def copy_stages(stages: int) -> int:
    """`num_stages` of a loop whose products read asynchronous copies: 1 on sm_90 with Triton 3.6, which leaves out the
    fence between such a copy and `wgmma` (its issue 9610; 3.7 has it)."""
    fenced = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    return stages if fenced or current_limits().arch != "sm_90" else 1


def per_sample(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor [] or [B] of any strides, and how far one sample's element is from the next: 0 for a shared one."""
    flat = values.reshape(-1)
    return flat, flat.stride(0) if flat.numel() > 1 else 0
