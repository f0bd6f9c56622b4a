r"""Head-mean self-attention applied to columns, without the N x N map.

    Y[b, n] = 1/H  sum_h  sum_t  softmax_t( scale * q[b, h, n] . k[b, h, t] )  X[b, t]

which is S X with the map S of `attention_map`. For layers whose map is too large to hold: with P(X) for `propagate`,
the completion of `complete` is

    official   X = (Y + (R - 1) P(Y)) / R,   Y = P(C)
    paper      X <- P(C + X), R times, then / R

and q and k must live until C is known. They take 2 e N H d bytes (e bytes an element), S takes 4 N^2: holding q and k
is less from N = e H d / 2, that is 640 keys for SDXL's layers of 10 heads of 64 in half precision, 1280 for 20 heads
and for Stable Diffusion 1.5's 8 heads of 160. Every product forms the scores again.

Scores, softmax and the product with X are fp32 (fp64 for fp64 inputs). Bytes that must move: q, k, X and Y once.
"""

from __future__ import annotations

import torch

from ._checks import Reasons, check_attention
from ._launch import choose_backend, outside_autocast, propagate_limits
from ._triton import KERNELS
from .attention_map import BLOCK_ELEMENTS, default_scale, map_dtype


@torch.library.custom_op("scfg_kernels::propagate", mutates_args=())
def _propagate(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
    if backend == "triton":
        return KERNELS["propagate"](q, k, x, scale)
    batch, heads, n, _ = q.shape
    dtype = map_dtype(q.dtype)
    result = torch.empty((batch, n, x.shape[2]), dtype=dtype, device=q.device)
    rows = max(16, BLOCK_ELEMENTS // (heads * k.shape[2]))
    with outside_autocast(q.device):
        for sample in range(batch):
            keys, columns = k[sample].to(dtype).transpose(-1, -2), x[sample].to(dtype)
            for start in range(0, n, rows):
                block = q[sample, :, start : start + rows].to(dtype) * scale
                mean = torch.softmax(block @ keys, dim=-1).mean(0)
                torch.mm(mean, columns, out=result[sample, start : start + rows])
    return result


@_propagate.register_fake
def _(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], x.shape[2]), dtype=map_dtype(q.dtype))


def propagate(
    q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Apply head-mean attention to columns, for example text tokens' maps, without ever forming the attention map.

    Args:
        q: queries [B, H, N, d], fp16, bf16, fp32 or fp64, any strides.
        k: keys [B, H, M, d], same dtype and device; the same tokens as q in self-attention.
        x: columns [B, M, T], floating point, any strides.
        scale: factor on the scores; default 1/sqrt(d).
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns:
        [B, N, T] in fp32 (fp64 for fp64 queries). If every row of x sums to 1, so does every row of the result.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
        BackendError: `backend="triton"` cannot run here.
    """
    check_attention("propagate", q, k, None)
    reasons = Reasons("propagate")
    fits = x.dim() == 3 and x.shape[:2] == (k.shape[0], k.shape[2])
    reasons.unless(fits, f"x must be [{k.shape[0]}, {k.shape[2]}, T], got {tuple(x.shape)}")
    reasons.unless(x.is_floating_point(), f"x must be floating point, got {x.dtype}")
    reasons.same_device(q, x)
    reasons.raise_if_any()
    chosen = choose_backend("propagate", backend, q.device, propagate_limits(q, k, x))
    return _propagate(q, k, x, default_scale(q, scale), chosen)
