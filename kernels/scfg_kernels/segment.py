r"""From completed maps to regions: resize, smooth, renormalise over space, mean over layers, argmax over tokens.

For the layers l with completed maps X_l [T, N_l], all brought to one grid of n = h w cells:

    A_l[t]   = G * resize(X_l[t])                      bilinear, then a 3x3 Gaussian with reflected border
    mean     = 1/L  sum_l  A_l[t] / ( mean_s A_l[t, s] + 1e-8 )
    id[s]    = argmax_t mean[t, s]                     lowest index wins a tie

    foreground[s]  <=>  sum_l ( a_l[s] - m_l ) / ( m_l (1 - m_l) )  <  0

where a_l is the start token's A_l in the *unconditional* sample and m_l its mean over space. That is the published test
(channel [start token, all other tokens], each divided by its own spatial mean, averaged over layers, larger one wins, a
tie is background) written with one channel: rows sum to 1 before and after completion, resizing and smoothing, so the
other channel is 1 - a_l. Where rows do not sum to 1 (text and picture in one softmax, DeepFloyd IF), the other channel
b_l is given too, and

    foreground[s]  <=>  sum_l  a_l[s] / m_l - b_l[s] / mean(b_l)  <  0

Resizing and smoothing are linear and keep constants, so every layer is divided by its mean *before* them, layers of one
size are added up, and each size is resized and smoothed once. The mean after smoothing is a fixed weighted mean of X_l
before it.

3x3 Gaussian: per axis exp(-(dx / (2 sigma))^2) = exp(-dx^2 / (4 sigma^2)), normalised, so sigma = 0.5 acts as 0.7071:
this is what the published code computes. sigma = 0 means no smoothing.

Not exact: cells within rounding of a tie may fall to either token. A foreground score within 1e-6 of zero counts as a
tie. Bytes that must move: every X_l once, ids and foreground once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ._checks import Reasons, check_maps, check_smoothing
from ._launch import backend_for, kept, outside_autocast, segment_limits
from ._triton import KERNELS
from ._trust import run

EPSILON = 1e-8
TIE = 1e-6


def kernel_weights(sigma: float) -> tuple[float, float]:
    """(edge, centre) of the 1-D three-tap kernel, 2 edge + centre = 1. sigma is in cells; 0 gives (0, 1)."""
    if sigma == 0.0:
        return 0.0, 1.0
    edge = math.exp(-1.0 / (4.0 * sigma * sigma))
    return edge / (1.0 + 2.0 * edge), 1.0 / (1.0 + 2.0 * edge)


def smooth_axis(x: torch.Tensor, dim: int, edge: float) -> torch.Tensor:
    """Three-tap filter (edge, 1 - 2 edge, edge) along `dim`, border reflected about the edge sample.

    A single sample stays as it is, and so, to the bit, does a constant: neighbours enter by their difference alone.
    """
    size = x.shape[dim]
    if size == 1:
        return x
    # Dynamo traces through a cache, and warns that it does.
    before, after = (_neighbours if torch.compiler.is_compiling() else _kept_neighbours)(size, x.device)
    neighbours = x.index_select(dim, before).add_(x.index_select(dim, after))
    return torch.lerp(x, neighbours.mul_(0.5), 2.0 * edge)


def _neighbours(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the sample before and after each one, int64 [size], reflected about the border samples."""
    position = torch.arange(size, device=device)
    return (position - 1).abs(), size - 1 - (size - 2 - position).abs()


_kept_neighbours = kept(_neighbours)


def smooth(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """3x3 Gaussian of S-CFG over the last two dimensions, reflected border, in the dtype of x.

    Args:
        x: [..., H, W].
        sigma: the published parameter, in samples; acts as sigma * sqrt(2). 0 returns x.
    """
    if sigma == 0.0:
        return x
    edge, _ = kernel_weights(sigma)
    return smooth_axis(smooth_axis(x, -1, edge), -2, edge)


@kept
def _axis_operator(
    length: int, target: int, sigma: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resizing and smoothing along one axis as a matrix [target, length], and its column means [length]."""
    impulses = torch.eye(length, dtype=dtype, device=device)
    if length != target:
        impulses = F.interpolate(impulses[None], size=target, mode="linear", align_corners=False)[0]
    matrix = smooth_axis(impulses, -1, kernel_weights(sigma)[0]).T.contiguous()
    return matrix, matrix.mean(0)


@torch.library.custom_op("scfg_kernels::segment", mutates_args=())
def _segment(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    h: int,
    w: int,
    blur_sigma: float,
    token_mask: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = tokens, start, sizes, h, w, blur_sigma, token_mask
    with outside_autocast(tokens[0].device):
        return run(
            "segment", backend, tokens[0].device,
            lambda: KERNELS["segment"](*options), lambda: segment_torch(*options),
        )  # fmt: skip


def segment_torch(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    h: int,
    w: int,
    blur_sigma: float,
    token_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(tokens[0].dtype, torch.float32)
    token_score: Any = 0.0  # [B, T, h, w] after the first size
    start_score: Any = 0.0  # [B, h, w]
    layer_sizes = list(zip(sizes[::2], sizes[1::2], strict=True))
    for size in dict.fromkeys(layer_sizes):
        rows, row_means = _axis_operator(size[0], h, blur_sigma, dtype, tokens[0].device)  # [h, h_l]
        columns, column_means = _axis_operator(size[1], w, blur_sigma, dtype, tokens[0].device)  # [w, w_l]
        weights = torch.outer(row_means, column_means).flatten()  # mean(resize and smooth(x)) = <weights, x>
        members = [index for index, layer_size in enumerate(layer_sizes) if layer_size == size]
        layers = [tokens[index].to(dtype) for index in members]  # [B, T, N] each
        # A sum of products, not a GEMV: that rounds its last rows differently, and would break ties at random.
        means = torch.stack([(layer * weights).sum(-1, keepdim=True) for layer in layers])
        inverse = (means + EPSILON).reciprocal_()  # [L, B, T, 1]
        x = layers[0] * inverse[0]
        for index, layer in enumerate(layers[1:], 1):
            x.addcmul_(layer, inverse[index])
        starts = torch.stack([start[index] for index in members]).to(dtype)  # [L, B, N] or [L, B, 2, N]
        m = (starts * weights).sum(-1, keepdim=True)
        if starts.dim() == 3:
            s = ((starts - m) / (m * (1.0 - m))).sum(0)
        else:
            against, others = ((starts - m) / m).unbind(2)
            s = (against - others).sum(0)
        token_score = token_score + rows @ x.unflatten(-1, size) @ columns.T
        start_score = start_score + rows @ s.unflatten(-1, size) @ columns.T
    if token_mask is not None:
        token_score = token_score.masked_fill(~token_mask[:, :, None, None], -math.inf)
    ids = token_score.argmax(1)
    foreground = start_score < -TIE * len(layer_sizes)
    return ids, foreground


@_segment.register_fake
def _(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[int],
    h: int,
    w: int,
    blur_sigma: float,
    token_mask: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokens[0].shape[0]
    return tokens[0].new_empty((batch, h, w), dtype=torch.int64), tokens[0].new_empty((batch, h, w), dtype=torch.bool)


def segment(
    tokens: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    *,
    blur_sigma: float = 0.5,
    token_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign every cell of the latent to the token that attends to it most, and find the foreground.

    Args:
        tokens: per captured layer, the completed maps of the conditional samples [B, T, N_l].
        start: per captured layer, the completed start-token map of the unconditional samples [B, N_l]; or [B, 2, N_l]
            in all layers, that map and the sum of all other tokens', where the rows of the maps do not sum to 1.
        sizes: per captured layer, (h_l, w_l) with h_l w_l = N_l.
        size: (h, w) of the grid of cells; maps of any other size are resized to it.
        blur_sigma: smoothing of the maps, in cells; 0 for none.
        token_mask: [B, T] bool, which tokens may own a region; None means all.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        token_index [B, h, w] int64 and foreground [B, h, w] bool. Foreground is where the start token attends less than
        its mean; with two channels, where it falls further below its mean than the others do.

    Raises:
        ValueError: shapes do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    reasons = Reasons("segment")
    check_smoothing(reasons, blur_sigma)
    check_maps(reasons, tokens, start, sizes, size, token_mask)
    reasons.same_device(*tokens, *start, *([token_mask] if token_mask is not None else []))
    reasons.raise_if_any()
    h, w = size
    chosen = backend_for("segment", backend, tokens[0].device, segment_limits(tokens, start, token_mask, h, w))
    flat_sizes = [length for pair in sizes for length in pair]
    return _segment(list(tokens), list(start), flat_sizes, h, w, float(blur_sigma), token_mask, chosen)
