r"""Head-mean maps of a layer of a transformer, on the grid of cells.

    P[b, c, t]    = 1/H  sum_h  softmax_t( scale * q[b, h, c] . k[b, h, t] + bias[b, t] )     keys: text, then image
    cross[b, c]   = P over the text keys
    own[b, c, e]  = sum of P over the image tokens of cell e

q[b, h, c] is the mean of the queries of the tokens of cell c. With one set of keys alone, the softmax is over that.
Of both, every row is divided by its sum, so that the rows of own and of cross sum to 1 as they do in a UNet.

The map of cells and keys is never stored, however many keys there are: the kernel adds up a cell's keys in registers,
torch does so for a block of rows. Bytes that must move: q and all keys once, own and cross once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._checks import Reasons, check_attention
from ._launch import choose_backend, outside_autocast
from ._triton import KERNELS
from .attention_map import default_scale, map_dtype, map_limits, mean_blocks

MASKED = -1e4
"""The least bias: its probability is zero, and a row of which all keys have it stays finite."""


def _pooled(query: torch.Tensor, height: int, width: int, pool: int) -> torch.Tensor:
    """[B, H, h * w, d] -> [B, H, n, d], means over pool x pool tokens; cells at the far edges may be ragged."""
    query = query[:, :, : height * width]
    if pool == 1:
        return query
    grid = query.transpose(2, 3).unflatten(3, (height, width)).flatten(0, 1)
    mean = F.avg_pool2d(grid, pool, ceil_mode=True, count_include_pad=False)
    return mean.unflatten(0, query.shape[:2]).flatten(3).transpose(2, 3).contiguous()


def _cells(columns: torch.Tensor, height: int, width: int, pool: int) -> torch.Tensor:
    """[B, rows, h * w] -> [B, rows, n]: sums over the tokens of a cell."""
    if pool == 1:
        return columns
    grid = columns.unflatten(2, (height, width))
    return F.avg_pool2d(grid, pool, ceil_mode=True, divisor_override=1).flatten(2)


def _stochastic(part: torch.Tensor) -> torch.Tensor:
    """Rows divided by their sums."""
    return part.div_(part.sum(-1, keepdim=True).clamp_(min=torch.finfo(part.dtype).tiny))


@torch.no_grad()
def _maps(
    q: torch.Tensor, text: torch.Tensor | None, image: torch.Tensor | None, bias: torch.Tensor | None, height: int,
    width: int, pool: int, scale: float, stochastic: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """own and cross; empty where there are no such keys."""
    own, cross = _empty(q, text, image, height, width, pool)
    divided = stochastic and text is not None and image is not None
    with outside_autocast(q.device):
        q = _pooled(q, height, width, pool)
        if backend == "triton":
            own, cross = KERNELS["joint_attention_maps"](q, text, image, bias, (height, width, pool), scale)
            return (_stochastic(own), _stochastic(cross)) if divided else (own, cross)
        keys = [x for x in (text, image) if x is not None]
        every = torch.cat(keys, 2) if len(keys) > 1 else keys[0]
        tokens = cross.shape[2]
        if bias is not None:
            bias = F.pad(bias, (0, every.shape[2] - tokens))
        for samples, rows, mean in mean_blocks(q, every, scale, None, bias):
            if image is not None:
                part = _cells(mean[..., tokens : tokens + height * width], height, width, pool)
                own[samples, rows] = _stochastic(part) if divided else part
            if text is not None:
                part = mean[..., :tokens]  # after own: it may be divided in place
                cross[samples, rows] = _stochastic(part) if divided else part
    return own, cross


def _empty(
    q: torch.Tensor, text: torch.Tensor | None, image: torch.Tensor | None, height: int, width: int, pool: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised results."""
    cells = -(-height // pool) * -(-width // pool)
    own = q.new_empty((q.shape[0], cells, 0 if image is None else cells), dtype=map_dtype(q.dtype))
    tokens = 0 if text is None else text.shape[2]
    return own, q.new_empty((q.shape[0], cells, tokens), dtype=map_dtype(q.dtype))


@torch.library.custom_op("scfg_kernels::joint_attention_maps", mutates_args=())
def _joint_attention_maps(
    q: torch.Tensor, text: torch.Tensor | None, image: torch.Tensor | None, bias: torch.Tensor | None, height: int,
    width: int, pool: int, scale: float, stochastic: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _maps(q, text, image, bias, height, width, pool, scale, stochastic, backend)


@_joint_attention_maps.register_fake
def _(
    q: torch.Tensor, text: torch.Tensor | None, image: torch.Tensor | None, bias: torch.Tensor | None, height: int,
    width: int, pool: int, *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _empty(q, text, image, height, width, pool)


def joint_attention_maps(
    q: torch.Tensor,
    text: torch.Tensor | None,
    image: torch.Tensor | None,
    *,
    grid: tuple[int, int],
    pool: int = 1,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    stochastic: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Attention maps of image tokens over text, image, or both in one softmax, on a grid of cells.

    Args:
        q: queries of image tokens [B, H, N, d], row by row; those beyond `grid` are left out.
        text: text keys [B, H, T, d], or None.
        image: image keys [B, H, M, d], or None; those beyond `grid` are attended to and in no map.
        grid: rows and columns of image tokens, at most N and M of them.
        pool: tokens along a side of a cell; cells at the far edges may be ragged.
        bias: [B, T], added to the scores of text keys; clamped to `MASKED` from below.
        scale: factor on the scores; default 1/sqrt(d).
        stochastic: with text and image, whether rows of either map are divided by their sums.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        own [B, n, n] and cross [B, n, T] for n cells, fp32 (fp64 for fp64 inputs), or None where there are no such
        keys.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    op = "joint_attention_maps"
    keys = [x for x in (text, image) if x is not None]
    for part in keys:
        check_attention(op, q, part, None)
    count, tokens = grid[0] * grid[1], 0 if text is None else text.shape[2]
    fits = q.shape[2] >= count > 0 and (image is None or image.shape[2] >= count)
    if not keys or not fits or pool < 1 or (bias is not None and bias.shape != (q.shape[0], tokens)):
        reasons = Reasons(op)
        reasons.unless(bool(keys), "text or image keys are needed")
        reasons.unless(fits, f"grid={grid} must be positive and have at most as many tokens as q and image")
        reasons.unless(pool >= 1, f"pool must be at least 1, got {pool}")
        if bias is not None:
            reasons.unless(
                bias.shape == (q.shape[0], tokens), f"bias must be {[q.shape[0], tokens]}, got {list(bias.shape)}"
            )
        reasons.raise_if_any()
    if bias is not None:
        bias = bias.to(map_dtype(q.dtype)).clamp(min=MASKED)
    chosen = choose_backend(op, backend, q.device, map_limits(q, *keys))
    run = _joint_attention_maps if torch.compiler.is_compiling() or chosen == "triton" else _maps
    own, cross = run(q, text, image, bias, *grid, pool, default_scale(q, scale), stochastic, chosen)
    return None if image is None else own, None if text is None else cross
