"""Operators of semantic-aware classifier-free guidance (S-CFG) on plain tensors.

This package knows tensors, not models: it needs torch alone. One denoising step of S-CFG is

    out, lse = attention_with_lse(q, k, v)          # every captured layer: the output that it has anyway
    S, C   = attention_maps(q1, k1, lse1, q2, k2, lse2)  # self- and cross-attention of a block
    X, x0  = complete(S, C, unconditional=B)        # S is freed here
    ids, fg = segment(Xs, x0s, sizes, size)         # once per step, over all captured layers
    guided, rate = guide(uncond, cond, ids, fg, guidance_scale, num_tokens=T)

`attention_map` is the map of one layer, `joint_attention_maps` those of a transformer's layer on a grid of cells;
`complete_from_qk` is `complete` from queries and keys, for layers whose map S is too large to make;
`segment_and_guide` is the last two lines in one operator; `guide_pixels` is another rule of guidance, which needs the
two predictions alone. Every operator has one public function that checks its arguments and chooses a backend, one torch
implementation (the reference, the CPU path and the fallback), and is registered as a `torch.library` custom op, so
`torch.compile(fullgraph=True)` sees one node.
"""

from ._launch import BackendError, available_backends, choose_backend
from .attention_map import attention_map, attention_maps
from .attention_with_lse import attention_with_lse
from .complete import complete
from .complete_from_qk import complete_from_qk
from .guide import guide
from .guide_pixels import guide_pixels
from .joint_attention_maps import joint_attention_maps
from .segment import segment, smooth
from .segment_and_guide import segment_and_guide

__all__ = [
    "BackendError",
    "attention_map",
    "attention_maps",
    "attention_with_lse",
    "available_backends",
    "choose_backend",
    "complete",
    "complete_from_qk",
    "guide",
    "guide_pixels",
    "joint_attention_maps",
    "segment",
    "segment_and_guide",
    "smooth",
]
