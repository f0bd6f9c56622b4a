r"""Completion of cross-attention maps by the self-attention maps of the same blocks.

With S [N, N] row-stochastic and C [N, T], and R = `powers`:

    official   X = (S + (R - 1) S S) / R  C   =  (Y + (R - 1) S Y) / R,    Y = S C
    paper      X = 1/R  sum_{r=1..R} S^r C    by Horner:  X <- S (C + X), R times, then / R

The published code reads (S + 3 S S) / 4: its loop multiplies the original S by itself every time. The paper (section
4.1.2) has the mean of powers. Neither S S nor any other N x N product is ever formed: the official form costs two N x N
x T products, the paper's R.

The result is token-major, [T, N], because everything after it acts on one token's image at a time. Of the unconditional
samples only column 0 (the start token) is completed: the rows of S and C sum to 1, so the other columns together are 1
minus it, and that is all the foreground test needs. Bytes that must move: S twice (official), the used columns of C and
X once.

Layers that are completed together share their launches. In torch, an accelerator gets the layers of one size as one
batch of products; a CPU gets them one by one, where a copy costs more than a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from ._checks import Reasons, check_fidelity
from ._launch import MAX_LAYERS, backend_for, dtype_limits, outside_autocast
from ._results import completed, layers_by_size
from ._triton import KERNELS
from ._trust import run

Tensors = Sequence[torch.Tensor]


def _complete_columns(s: torch.Tensor, columns: torch.Tensor, fidelity: str, powers: int) -> torch.Tensor:
    """[B, N, N], [B, T, N] token-major -> [B, T, N]. Row-vector form: (S C)^T = C^T S^T."""
    s_t = s.transpose(1, 2)
    if fidelity == "official":
        once = torch.bmm(columns, s_t)
        return torch.baddbmm(once, once, s_t, beta=1.0 / powers, alpha=(powers - 1.0) / powers)
    total = torch.bmm(columns, s_t)
    for _ in range(powers - 1):
        total = torch.bmm(columns + total, s_t)
    return total / powers


def _complete_layers(maps: list[torch.Tensor], columns: list[torch.Tensor], fidelity: str, powers: int) -> torch.Tensor:
    """L times [B, N, N] and [B, T, N] -> [L, B, T, N]."""
    layers, samples = len(maps), maps[0].shape[0]
    if samples == 0 or layers == 1 or maps[0].device.type == "cpu":
        found = [_complete_columns(s, c, fidelity, powers) for s, c in zip(maps, columns, strict=True)]
        return torch.stack(found) if layers > 1 else found[0].unsqueeze(0)
    return _complete_columns(torch.cat(maps), torch.cat(columns), fidelity, powers).unflatten(0, (layers, samples))


def complete_torch(
    self_maps: Tensors, cross_maps: Tensors, unconditional: int, fidelity: str, powers: int
) -> list[torch.Tensor]:
    tokens, start = [], []
    for _, layers in layers_by_size(self_maps):
        maps = [self_maps[i] for i in layers]
        columns = [cross_maps[i].to(self_maps[i].dtype).transpose(1, 2) for i in layers]
        tokens.append(
            _complete_layers([s[unconditional:] for s in maps], [c[unconditional:] for c in columns], fidelity, powers)
        )
        single = [c[:unconditional, :1] for c in columns]
        start.append(_complete_layers([s[:unconditional] for s in maps], single, fidelity, powers).squeeze(2))
    return tokens + start


@torch.library.custom_op("scfg_kernels::complete", mutates_args=())
def _complete(
    self_maps: Tensors, cross_maps: Tensors, unconditional: int, fidelity: str, powers: int, backend: str
) -> list[torch.Tensor]:
    options = self_maps, cross_maps, unconditional, fidelity, powers
    with outside_autocast(self_maps[0].device):
        return run(
            "complete", backend, self_maps[0].device,
            lambda: KERNELS["complete"](*options), lambda: complete_torch(*options),
        )  # fmt: skip


@_complete.register_fake
def _(self_maps: Tensors, cross_maps: Tensors, unconditional: int, *_) -> list[torch.Tensor]:
    return completed(self_maps, cross_maps, unconditional)


def complete_limits(self_maps: Tensors, cross_maps: Tensors) -> list[str]:
    """Every reason why the kernel cannot take these maps; empty if it can."""
    reasons = []
    if any(x.dtype == torch.float64 for x in (*self_maps, *cross_maps)):
        reasons += dtype_limits("complete", torch.float64)
    if len(self_maps) > MAX_LAYERS:
        reasons.append(f"{len(self_maps)} layers exceed {MAX_LAYERS}")
    if any(x.shape[1] * max(x.shape[2], x.stride(1)) >= 2**31 for x in (*self_maps, *cross_maps)):
        reasons.append("a sample's map spans 2^31 elements or more")
    return reasons


def _check_layer(reasons: Reasons, own: torch.Tensor, cross: torch.Tensor, like: torch.Tensor, name: str) -> None:
    if not (own.dim() == 3 and cross.dim() == 3):
        reasons.unless(False, "self_map and cross_map must have three dimensions")
        return
    batch, n, m = own.shape
    if n != m:
        reasons.unless(False, f"self_map{name} must be square, got {tuple(own.shape)}")
    if tuple(cross.shape[:2]) != (batch, n):
        reasons.unless(False, f"cross_map{name} must be [{batch}, {n}, T], got {tuple(cross.shape)}")
    if cross.shape[2] < 1:
        reasons.unless(False, f"cross_map{name} must have at least one text token")
    if cross.shape[::2] != like.shape[::2]:
        reasons.unless(False, f"cross_map{name} must have the samples and text tokens of the first layer's")


@overload
def complete(
    self_map: torch.Tensor, cross_map: torch.Tensor, *, unconditional: int = 0, fidelity: str = "official",
    powers: int = 4, backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def complete(
    self_map: Tensors, cross_map: Tensors, *, unconditional: int = 0, fidelity: str = "official",
    powers: int = 4, backend: str = "auto",
) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...  # fmt: skip
def complete(
    self_map: torch.Tensor | Tensors,
    cross_map: torch.Tensor | Tensors,
    *,
    unconditional: int = 0,
    fidelity: str = "official",
    powers: int = 4,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Spread every token's cross-attention over the image by self-attention.

    Args:
        self_map: S, head-mean self-attention [B, N, N], rows sum to 1; or those of several layers, N as they have it.
        cross_map: C, head-mean cross-attention [B, N, T] of the same block; or of the same blocks.
        unconditional: how many leading samples are the unconditional half; only their start-token column is completed.
        fidelity: `"official"` for (S + (R-1) S S)/R, `"paper"` for the mean of the powers S^1 .. S^R.
        powers: R, 4 in the paper and in the code.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        tokens [B - unconditional, T, N] and start [unconditional, N], in the dtype of `self_map`. Of several layers two
        lists with an entry for every N, in the order in which the sizes first appear: tokens [L, B - unconditional, T,
        N] and start [L, unconditional, N] of the L layers of that size, in their order.

    Raises:
        ValueError: shapes, dtypes or options do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    single = isinstance(self_map, torch.Tensor) and isinstance(cross_map, torch.Tensor)
    own: list[torch.Tensor] = [self_map] if single else list(self_map)  # type: ignore[list-item]
    cross: list[torch.Tensor] = [cross_map] if single else list(cross_map)  # type: ignore[list-item]
    reasons = Reasons("complete")
    if reasons.unless(0 < len(own) == len(cross), "need a self_map and a cross_map for every layer, and a layer"):
        for index, (s, c) in enumerate(zip(own, cross, strict=True)):
            _check_layer(reasons, s, c, cross[0], "" if single else f"[{index}]")
            floating = s.is_floating_point() and c.is_floating_point()
            if not floating:
                reasons.unless(False, f"maps must be floating point, got {s.dtype} and {c.dtype}")
        if len({s.dtype for s in own}) > 1:
            reasons.unless(False, f"self_maps must have one dtype, got {sorted({str(s.dtype) for s in own})}")
        batch = own[0].shape[0] if own[0].dim() else 0
        if not 0 <= unconditional <= batch:
            reasons.unless(False, f"unconditional must lie in 0..{batch}, got {unconditional}")
        reasons.same_device(*own, *cross)
    if powers < 1:
        reasons.unless(False, f"powers must be at least 1, got {powers}")
    check_fidelity(reasons, fidelity)
    reasons.raise_if_any()
    chosen = backend_for("complete", backend, own[0].device, complete_limits(own, cross))
    results = torch.ops.scfg_kernels.complete(own, cross, unconditional, fidelity, powers, chosen)
    half = len(results) // 2
    if single:
        return results[0][0], results[half][0]
    return results[:half], results[half:]
