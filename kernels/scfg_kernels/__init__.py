"""Operators of semantic-aware classifier-free guidance (S-CFG) on plain tensors.

This package knows tensors, not models: it needs torch alone. One denoising step of S-CFG is

    out, S = self_attention_map(q, k, v)            # every captured self-attention layer
    out, C = cross_attention_map(q, k, v)           # the cross-attention layer of the same block
    X, x0  = complete(S, C, unconditional=B)        # S is freed here
    ids, fg = segment(Xs, x0s, sizes, size)         # once per step, over all captured layers
    guided, rate = guide(uncond, cond, ids, fg, guidance_scale, num_tokens=T)

`attention_map` is the map alone, for layers whose output another implementation has computed already; `propagate` is
S X from q and k, for layers whose map S is too large to hold, and `complete_from_qk` is `complete` from them;
`segment_and_guide` is the last two lines in one operator; `guide_pixels` is another rule of guidance, which needs the
two predictions alone. Every operator has one public function that checks its arguments and chooses a backend, one torch
implementation (the reference, the CPU path and the fallback), and is registered as a `torch.library` custom op, so
`torch.compile(fullgraph=True)` sees one node.
"""

from ._launch import BackendError, available_backends, choose_backend
from .attention_map import attention_map
from .attention_with_lse import attention_with_lse
from .complete import complete
from .complete_from_qk import complete_from_qk
from .cross_attention_map import cross_attention_map
from .guide import guide
from .guide_pixels import guide_pixels
from .propagate import propagate
from .segment import segment, smooth
from .segment_and_guide import segment_and_guide
from .self_attention_map import self_attention_map

__all__ = [
    "BackendError",
    "attention_map",
    "attention_with_lse",
    "available_backends",
    "choose_backend",
    "complete",
    "complete_from_qk",
    "cross_attention_map",
    "guide",
    "guide_pixels",
    "propagate",
    "segment",
    "segment_and_guide",
    "self_attention_map",
    "smooth",
]
