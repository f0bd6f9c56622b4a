r"""Completion of a cross-attention map by the self-attention map of the same block.

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
"""

from __future__ import annotations

import torch

from ._checks import Reasons, check_fidelity
from ._launch import choose_backend, complete_limits, outside_autocast
from ._triton import KERNELS


def _complete_columns(s: torch.Tensor, columns: torch.Tensor, fidelity: str, powers: int) -> torch.Tensor:
    """[B, N, N], [B, T, N] token-major -> [B, T, N]. Row-vector form: (S C)^T = C^T S^T."""
    s_t = s.transpose(1, 2)
    if fidelity == "official":
        once = columns @ s_t
        return torch.baddbmm(once, once, s_t, beta=1.0 / powers, alpha=(powers - 1.0) / powers)
    total = columns @ s_t
    for _ in range(powers - 1):
        total = (columns + total) @ s_t
    return total / powers


@torch.library.custom_op("scfg_kernels::complete", mutates_args=())
def _complete(
    self_map: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        return KERNELS["complete"](self_map, cross_map, unconditional, fidelity, powers)
    columns = cross_map.to(self_map.dtype).transpose(1, 2)
    with outside_autocast(self_map.device):
        start = _complete_columns(self_map[:unconditional], columns[:unconditional, :1], fidelity, powers)
        tokens = _complete_columns(self_map[unconditional:], columns[unconditional:], fidelity, powers)
    return tokens.contiguous(), start.squeeze(1).contiguous()


@_complete.register_fake
def _(
    self_map: torch.Tensor, cross_map: torch.Tensor, unconditional: int, fidelity: str, powers: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, n, tokens = cross_map.shape
    return self_map.new_empty((batch - unconditional, tokens, n)), self_map.new_empty((unconditional, n))


def complete(
    self_map: torch.Tensor,
    cross_map: torch.Tensor,
    *,
    unconditional: int = 0,
    fidelity: str = "official",
    powers: int = 4,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread every token's cross-attention over the image by self-attention.

    Args:
        self_map: S, head-mean self-attention [B, N, N], rows sum to 1.
        cross_map: C, head-mean cross-attention [B, N, T] of the same block.
        unconditional: how many leading samples are the unconditional half; only their start-token column is completed.
        fidelity: `"official"` for (S + (R-1) S S)/R, `"paper"` for the mean of the powers S^1 .. S^R.
        powers: R, 4 in the paper and in the code.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        tokens [B - unconditional, T, N] and start [unconditional, N], in the dtype of `self_map`.

    Raises:
        ValueError: shapes, dtypes or options do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    reasons = Reasons("complete")
    if reasons.unless(
        self_map.dim() == 3 and cross_map.dim() == 3, "self_map and cross_map must have three dimensions"
    ):
        batch, n, _ = self_map.shape
        reasons.unless(self_map.shape[2] == n, f"self_map must be square, got {tuple(self_map.shape)}")
        fits = tuple(cross_map.shape[:2]) == (batch, n)
        reasons.unless(fits, f"cross_map must be [{batch}, {n}, T], got {tuple(cross_map.shape)}")
        reasons.unless(cross_map.shape[2] >= 1, "cross_map must have at least one text token")
        in_range = 0 <= unconditional <= batch
        reasons.unless(in_range, f"unconditional must lie in 0..{batch}, got {unconditional}")
    floating = self_map.is_floating_point() and cross_map.is_floating_point()
    reasons.unless(floating, f"maps must be floating point, got {self_map.dtype} and {cross_map.dtype}")
    reasons.unless(powers >= 1, f"powers must be at least 1, got {powers}")
    check_fidelity(reasons, fidelity)
    reasons.same_device(self_map, cross_map)
    reasons.raise_if_any()
    chosen = choose_backend("complete", backend, self_map.device, complete_limits(self_map, cross_map))
    return _complete(self_map, cross_map, unconditional, fidelity, powers, chosen)
