"""Launcher of the three attention operators: one sweep where a row of scores fits in registers, else two parts."""

from __future__ import annotations

import torch

from .._launch import (
    AttentionConfig,
    FlashConfig,
    attention_config,
    device_guard,
    flash_config,
    in_one_sweep,
    refuse,
)
from ..attention_map import empty_output_and_map
from ._device import current_limits
from .cross_attention_map import run_one_sweep
from .self_attention_map import run_two_parts


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    out: torch.Tensor | None,
    mean: torch.Tensor,
    scale: float,
    config: AttentionConfig | FlashConfig | None,
) -> None:
    if mean.numel() == 0:
        return
    if config is not None:
        reasons = config.reasons(k.shape[2]) if isinstance(config, AttentionConfig) else config.reasons()
        refuse("attention_map", config, reasons)
    with device_guard(q.device):
        if config is None:
            batch, heads, rows, _ = q.shape
            keys, head_dim = k.shape[2], max(x.shape[3] for x in (k, v) if x is not None)
            if in_one_sweep(keys, q.dtype):
                config = attention_config(heads, keys, head_dim, current_limits())
            else:
                config = flash_config(batch, heads, rows, keys, head_dim, q.dtype, current_limits())
        if isinstance(config, AttentionConfig):
            run_one_sweep(q, k, v, out, mean, scale, config)
        else:
            run_two_parts(q, k, v, out, mean, scale, config)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, config: AttentionConfig | FlashConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and head-mean map; `config` overrides the choice."""
    out, mean = empty_output_and_map(q, k, v)
    _attend(q, k, v, out, mean, scale, config)
    return out, mean


def launch(
    q: torch.Tensor, k: torch.Tensor, scale: float, config: AttentionConfig | FlashConfig | None = None
) -> torch.Tensor:
    """The map alone; `config` overrides the choice."""
    mean = torch.empty((q.shape[0], q.shape[2], k.shape[2]), dtype=torch.float32, device=q.device)
    _attend(q, k, None, None, mean, scale, config)
    return mean
