"""Attention processors of the captured blocks of a UNet.

A captured block runs two of them. The self-attention one leaves the head-mean map S on itself; the cross-attention one
of the same block takes S, computes its own map C, completes it, and keeps only the result, [B, T, N]; S and C are gone
before the next block. In large layers (`maps.holds_map`) queries and keys, the layer's own tensors, are left in the
place of S, and `complete_from_qk` does without it.

Each wraps the processor that the user had. For the default `AttnProcessor2_0` the output comes from the same operator
as the map, in one pass, with the bits of the stock processor. For any other processor (xformers, sliced, the user's
own) the output is that processor's own, and the map is computed alongside it from `to_q` and `to_k`.

Everything is stored on the processor object, and results are functional: with `torch.compile(fullgraph=True)` they
become outputs of the one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from scfg_kernels import attention_map, complete, complete_from_qk, cross_attention_map, self_attention_map

from ..config import SCFGConfig
from ..layouts import Geometry
from .maps import BatchLayout, holds_map
from .wrapping import class_for, projected_tokens


def _heads(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """[B, N, H * d] -> [B, H, N, d], a view."""
    return x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)


def _flatten_image(hidden_states: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H * W, C]; three-dimensional input as it is."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states


def _query_key(
    attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k [B, H, N, d], and the states that values are projected from, as `AttnProcessor2_0` has them."""
    hidden_states = _flatten_image(hidden_states)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    query = _heads(attn, attn.to_q(hidden_states))
    if encoder_hidden_states is None:
        encoder_hidden_states = hidden_states
    elif attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    key = _heads(attn, attn.to_k(encoder_hidden_states))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, encoder_hidden_states


def _finish(attn: Attention, out: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """Attention output [B, H, N, d] -> the layer's output, shaped like `hidden_states`."""
    result = attn.to_out[0](out.transpose(1, 2).flatten(2))
    result = attn.to_out[1](result)
    if hidden_states.ndim == 4:
        result = result.transpose(-1, -2).reshape(hidden_states.shape)
    if attn.residual_connection:
        result = result + hidden_states
    return result / attn.rescale_output_factor


class _Capture:
    """Common part: wraps the user's processor and observes, beside its output, what the layer compares.

    Attributes:
        inner: the user's processor, while it captures.
        observe: q [B, H, N, d] and k [B, H, T, d] -> what is observed; here the head-mean map [B, N, T].
        attend_and_observe: q, k, v -> the attention output [B, H, N, d], and that.
    """

    observe: Callable[..., Any] = staticmethod(attention_map)
    attend_and_observe: Callable[..., Any] = staticmethod(cross_attention_map)

    def __init__(self, inner, config: SCFGConfig) -> None:
        self.inner = inner
        self.backend = config.backend
        self.fused = type(inner) is AttnProcessor2_0

    def attend(self, attn, hidden_states, encoder_hidden_states, attention_mask, kwargs):
        """The layer's output, and what was observed, or None if this call cannot be captured."""
        capture = attention_mask is None and attn.spatial_norm is None
        if not (capture and self.fused):
            with projected_tokens(attn.to_k, self.inner) as projected:
                out = self.inner(
                    attn,
                    hidden_states,
                    encoder_hidden_states=encoder_hidden_states,
                    attention_mask=attention_mask,
                    **kwargs,
                )
            if not capture:
                return out, None
            # IP-Adapter processors take (text, image) states; text keys are the ones that S-CFG reads.
            text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
            if text is not None and projected:
                text = text[:, : projected[0]]  # what follows is an image prompt with keys of its own
            query, key, _ = _query_key(attn, hidden_states, text)
            return out, self.observe(query, key, backend=self.backend)
        query, key, value_states = _query_key(attn, hidden_states, encoder_hidden_states)
        value = _heads(attn, attn.to_v(value_states))
        out, observed = self.attend_and_observe(query, key, value, backend=self.backend)
        return _finish(attn, out, hidden_states), observed


HeldMap = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""A self-attention map [2B, N, N], or the queries and keys [2B, H, N, d] that it would be made of."""


def _holds_map(query: torch.Tensor) -> bool:
    _, heads, tokens, head_dim = query.shape
    return holds_map(tokens, heads, head_dim, query.element_size())


def _hold(query: torch.Tensor, key: torch.Tensor, *, backend: str) -> HeldMap:
    return attention_map(query, key, backend=backend) if _holds_map(query) else (query, key)


def _attend_and_hold(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, backend: str
) -> tuple[torch.Tensor, HeldMap]:
    if _holds_map(query):
        return self_attention_map(query, key, value, backend=backend)
    return F.scaled_dot_product_attention(query, key, value), (query, key)


class SelfAttentionCapture(_Capture):
    """Processor of a captured self-attention layer.

    `held` lives until the cross-attention takes it: the map, 4 N^2 bytes a sample, or queries and keys, 2 e N H d, as
    `holds_map` says. With the default processor these are the layer's own tensors, which would be free otherwise.
    """

    observe = staticmethod(_hold)
    attend_and_observe = staticmethod(_attend_and_hold)

    def __init__(self, inner, config: SCFGConfig) -> None:
        super().__init__(inner, config)
        self.held: HeldMap | None = None

    def release(self) -> None:
        """Drop what is held: maps, and the user's processor, which may have weights that are unloaded."""
        self.held = self.inner = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
            # Keys of other images (reference-only, banked, cross-frame): their map has no place in this one.
            self.held = None
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        out, self.held = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, kwargs)
        return out


class CrossAttentionCapture(_Capture):
    """Processor of a captured cross-attention layer, the second of its block.

    `layout` says what the samples are. After the layer has run:
        tokens [B, T, N]: completed maps of the conditional samples, or None.
        start [B, N]: completed start-token map of the samples that decide the foreground, or None.
    """

    def __init__(self, inner, source: SelfAttentionCapture, config: SCFGConfig) -> None:
        super().__init__(inner, config)
        self.source = source
        self.fidelity = config.fidelity
        self.powers = config.powers
        self.layout = BatchLayout()
        self.geometry: Geometry | None = None  # of no interest here: tokens of a UNet are counted
        self.tokens: torch.Tensor | None = None
        self.start: torch.Tensor | None = None

    def release(self) -> None:
        """Drop what is held: maps, and the user's processor, which may have weights that are unloaded."""
        self.tokens = self.start = self.inner = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        out, cross_map = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, kwargs)
        held, self.source.held = self.source.held, None
        self.tokens = self.start = None
        if held is not None and cross_map is not None:
            self._complete(held, cross_map)
        return out

    def _complete(self, held: HeldMap, cross_map: torch.Tensor) -> None:
        """Fills `tokens` and `start`, unless the two layers saw different image tokens."""
        used, unconditional = self.layout.rows(cross_map.shape[0])
        options: dict[str, Any] = dict(
            unconditional=unconditional, fidelity=self.fidelity, powers=self.powers, backend=self.backend
        )
        if isinstance(held, torch.Tensor):
            if held.shape[1] != cross_map.shape[1]:
                return
            tokens, start = complete(held[used], cross_map[used], **options)
        else:
            query, key = held
            if query.shape[2] != cross_map.shape[1]:
                return
            tokens, start = complete_from_qk(query[used], key[used], cross_map[used], **options)
        self.tokens, self.start = tokens, start if unconditional else tokens[:, 0].contiguous()


def wrap_block(block: BasicTransformerBlock, config: SCFGConfig) -> tuple[SelfAttentionCapture, CrossAttentionCapture]:
    """The pair of processors for one block of a UNet, around those that it has now. Installs nothing."""
    inner_self, inner_cross = block.attn1.processor, block.attn2.processor
    own = class_for(SelfAttentionCapture, inner_self)(inner_self, config)
    cross = class_for(CrossAttentionCapture, inner_cross)(inner_cross, own, config)
    return own, cross
