"""Argument checks. Every reason is collected and raised once, so that a caller fixes them all in one go."""

from __future__ import annotations

import torch

FIDELITIES = ("official", "paper")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reasons:
    """Collects the reasons why arguments are refused.

    Example:
        reasons = Reasons("guide")
        reasons.unless(cell >= 1, f"cell must be at least 1, got {cell}")
        reasons.raise_if_any()
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.found: list[str] = []

    def unless(self, condition: bool, reason: str) -> bool:
        """Record `reason` unless `condition` holds; returns `condition`."""
        if not condition:
            self.found.append(reason)
        return condition

    def same_device(self, *tensors: torch.Tensor) -> None:
        devices = sorted({str(t.device) for t in tensors})
        self.unless(len(devices) == 1, f"all tensors must be on one device, got {' and '.join(devices)}")

    def raise_if_any(self) -> None:
        """Raise one ValueError that lists every recorded reason."""
        if self.found:
            raise ValueError(f"{self.op}: " + "; ".join(self.found))


def check_attention(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, same_tokens: bool = False
) -> None:
    """Shared checks of the attention operators: q [B, H, N, d], k and v [B, H, T, d], one dtype, one device."""
    reasons = Reasons(op)
    named = [("q", q), ("k", k)] + ([("v", v)] if v is not None else [])
    shaped = all(tensor.dim() == 4 for _, tensor in named)
    for name, tensor in named:
        reasons.unless(tensor.dim() == 4, f"{name} must be [batch, heads, tokens, head_dim], got {tuple(tensor.shape)}")
        reasons.unless(tensor.dtype in FLOATING, f"{name} must be floating point, got {tensor.dtype}")
    reasons.unless(
        len({t.dtype for _, t in named}) == 1, f"q, k, v must share one dtype, got {[t.dtype for _, t in named]}"
    )
    reasons.same_device(*(t for _, t in named))
    if not shaped:
        reasons.raise_if_any()
    reasons.unless(q.shape[:2] == k.shape[:2], f"q and k differ in batch or heads: {tuple(q.shape)}, {tuple(k.shape)}")
    reasons.unless(q.shape[3] == k.shape[3], f"q and k differ in head_dim: {q.shape[3]}, {k.shape[3]}")
    reasons.unless(
        q.shape[1] > 0 and k.shape[2] > 0 and q.shape[3] > 0, "heads, key tokens and head_dim must not be empty"
    )
    if v is not None:
        reasons.unless(
            v.shape[:3] == k.shape[:3], f"k and v differ in batch, heads or tokens: {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if same_tokens:
        reasons.unless(
            q.shape[2] == k.shape[2],
            f"queries and keys must be the same tokens, got {q.shape[2]} and {k.shape[2]}; use cross_attention_map",
        )
    reasons.raise_if_any()


def check_fidelity(reasons: Reasons, fidelity: str) -> None:
    reasons.unless(fidelity in FIDELITIES, f"fidelity={fidelity!r} is unknown; use 'official' or 'paper'")
