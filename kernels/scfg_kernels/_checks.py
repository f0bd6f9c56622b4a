"""Argument checks. Every reason is collected and raised once, so that a caller fixes them all in one go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FIDELITIES = ("official", "paper")
REWRITES = ("guided", "unconditional")
BENCHMARKS = ("foreground", "image")
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
        """Record `reason`, once, unless `condition` holds; returns `condition`."""
        if not condition and reason not in self.found:
            self.found.append(reason)
        return condition

    def same_device(self, *tensors: torch.Tensor) -> None:
        devices = sorted({str(t.device) for t in tensors})
        self.unless(len(devices) <= 1, f"all tensors must be on one device, got {' and '.join(devices)}")

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
            f"queries and keys must be the same tokens, got {q.shape[2]} and {k.shape[2]}; others have attention_map",
        )
    reasons.raise_if_any()


def check_fidelity(reasons: Reasons, fidelity: str) -> None:
    reasons.unless(fidelity in FIDELITIES, f"fidelity={fidelity!r} is unknown; use 'official' or 'paper'")


def check_benchmark(reasons: Reasons, benchmark: str) -> None:
    reasons.unless(benchmark in BENCHMARKS, f"benchmark={benchmark!r} is unknown; use 'foreground' or 'image'")


def check_copies(reasons: Reasons, copies: int) -> None:
    reasons.unless(copies in (1, 2), f"copies must be 1 or 2, got {copies}")


def check_cell(reasons: Reasons, cell: int) -> bool:
    return reasons.unless(cell >= 1, f"cell must be at least 1, got {cell}")


def check_smoothing(reasons: Reasons, blur_sigma: float) -> None:
    reasons.unless(blur_sigma >= 0.0, f"blur_sigma must not be negative, got {blur_sigma}")


def check_maps(
    reasons: Reasons,
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    token_mask: torch.Tensor | None,
) -> None:
    """Completed maps of every layer, tokens [B, T, N_l] and start [B, N_l] or [B, 2, N_l], and token_mask [B, T].

    Devices are not compared.
    """
    reasons.unless(size[0] >= 1 and size[1] >= 1, f"size must be positive, got {size}")
    lengths = (len(tokens), len(start), len(sizes))
    if not reasons.unless(
        len(set(lengths)) == 1 and lengths[0] > 0, f"need one entry per layer and at least one layer, got {lengths}"
    ):
        return
    batch, count = tokens[0].shape[:2] if tokens[0].dim() == 3 else (-1, -1)
    reasons.unless(count != 0, "tokens must have at least one text token")
    dtypes = sorted({str(x.dtype) for x in (*tokens, *start)})
    reasons.unless(all(x.is_floating_point() for x in (*tokens, *start)), f"maps must be floating point, got {dtypes}")
    for index, (x, s, (lh, lw)) in enumerate(zip(tokens, start, sizes, strict=True)):
        full = (batch, count, lh * lw)
        reasons.unless(tuple(x.shape) == full, f"tokens[{index}] must be {full}, got {tuple(x.shape)}")
        single, paired = (batch, lh * lw), (batch, 2, lh * lw)
        expected = paired if start[0].dim() == 3 else single
        reasons.unless(tuple(s.shape) == expected, f"start[{index}] must be {expected}, got {tuple(s.shape)}")
    if token_mask is not None:
        fits = tuple(token_mask.shape) == (batch, count) and token_mask.dtype == torch.bool
        reasons.unless(
            fits, f"token_mask must be [{batch}, {count}] bool, got {token_mask.dtype} {tuple(token_mask.shape)}"
        )


def rate_bounds(rate_min: float | None, rate_max: float | None) -> tuple[float, float]:
    """The clamps of the rate as numbers, 0 and infinity for none."""
    return 0.0 if rate_min is None else float(rate_min), math.inf if rate_max is None else float(rate_max)


def cell_grid(predictions: torch.Tensor, cell: int) -> tuple[int, int, int]:
    """(B, h, w): samples, and rows and columns of cells that cover predictions [B, C, H, W]; ragged ones count."""
    batch, _, height, width = predictions.shape
    return batch, -(-height // cell), -(-width // cell)


def check_predictions(
    reasons: Reasons,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    rate_min: float | None,
    rate_max: float | None,
    rewrite: str,
    rescale: float,
) -> bool:
    """Predictions [B, C, H, W], their scale and the options of the result; whether they have four dimensions.

    Devices are not compared.
    """
    reasons.unless(rewrite in REWRITES, f"rewrite={rewrite!r} is unknown; use 'guided' or 'unconditional'")
    if not 0.0 <= rescale <= 1.0:  # asked first: Dynamo cannot format a number that changes from call to call
        reasons.unless(False, f"rescale must lie in 0..1, got {rescale}")
    plain = rescale == 0.0 or rewrite != "unconditional"
    reasons.unless(plain, "rescale needs rewrite='guided': what it scales is the guided prediction")
    low, high = rate_bounds(rate_min, rate_max)
    if not low <= high:
        reasons.unless(False, f"rate_min must not exceed rate_max, got {rate_min} and {rate_max}")
    reasons.unless(cond.dtype in FLOATING, f"predictions must be floating point, got {cond.dtype}")
    same = uncond.shape == cond.shape and uncond.dtype == cond.dtype
    reasons.unless(
        same, f"uncond {uncond.dtype} {tuple(uncond.shape)} and cond {cond.dtype} {tuple(cond.shape)} must match"
    )
    shaped = reasons.unless(cond.dim() == 4, f"predictions must be [B, C, H, W], got {tuple(cond.shape)}")
    if isinstance(guidance_scale, torch.Tensor):
        if shaped:
            batch = cond.shape[0]
            fits = guidance_scale.numel() in (1, batch)
            reasons.unless(fits, f"guidance_scale must be a number, [] or [{batch}]")
        return shaped
    if not guidance_scale >= 0:
        reasons.unless(False, f"guidance_scale must not be negative, got {guidance_scale}")
    if rewrite == "unconditional" and not guidance_scale > 1:
        reasons.unless(False, f"rewrite='unconditional' needs a guidance_scale above 1, got {guidance_scale}")
    return shaped
