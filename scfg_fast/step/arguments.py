"""Arguments of a denoiser's call: one of them, copies of them, half of their batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def argument(args: tuple, kwargs: dict, position: int, name: str) -> Any:
    """One argument of a denoiser's call, given by position or by name."""
    return args[position] if len(args) > position else kwargs[name]


def copied(value: Any, of_tensor: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Any:
    """New tuples, lists and dictionaries with `of_tensor` of every tensor in them. Denoisers take arguments apart: the
    residuals of a T2I-Adapter are popped from their list."""
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, dict):
        return {key: copied(item, of_tensor) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item, of_tensor) for item in value)
    return value


def second_half(value: Any, batch: int) -> Any:
    """`value` with the last half of every tensor of `batch` rows in it, through tuples, lists and dictionaries."""
    return copied(value, lambda x: x[batch // 2 :] if x.dim() > 0 and x.shape[0] == batch else x)
