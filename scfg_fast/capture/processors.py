"""Attention processors of the captured blocks of a UNet.

A captured block runs two of them. The self-attention one holds its queries, keys and log-sum-exp, the layer's own
tensors; the cross-attention one of the same block takes them, makes the head-mean maps S and C of both layers in one
launch, completes C by S, and keeps only the result, [B, T, N]. Only samples whose maps are needed are compared. Above
`maps.MAP_TOKENS` image tokens S is never made: `complete_from_qk` does without it.

Each wraps the processor that the user had. For the default `AttnProcessor2_0` and for xformers, the output comes from
the operator that the stock processor calls, and the log-sum-exp from the same call. For any other processor (sliced,
the user's own) the output is that processor's own, and queries and keys are projected alongside it.

Everything is stored on the processor object, and results are functional: with `torch.compile(fullgraph=True)` they
become outputs of the one graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models import attention_processor
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from scfg_kernels import attention_map, attention_maps, attention_with_lse, complete, complete_from_qk

from ..config import SCFGConfig
from ..layouts import Geometry
from .maps import MAP_TOKENS, BatchLayout
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


class Compared(NamedTuple):
    """What a layer compared: query [B, H, N, d], key [B, H, T, d], and their log-sum-exp [B, H, N] if it is known."""

    query: torch.Tensor
    key: torch.Tensor
    lse: torch.Tensor | None

    def of(self, samples: slice) -> Compared:
        return Compared(self.query[samples], self.key[samples], None if self.lse is None else self.lse[samples])


def _sdpa(
    attn: Attention, inner: AttnProcessor2_0, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out, lse = attention_with_lse(query, key, value)
    # On a CPU a softmax takes no longer than an exponential of differences, and has fewer roundings.
    return out, None if query.device.type == "cpu" else lse


def _xformers(
    attn: Attention, inner: XFormersAttnProcessor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of `memory_efficient_attention` that also returns its log-sum-exp, on the operands of the stock
    processor: heads folded into the batch."""
    operator = attention_processor.xformers.ops.memory_efficient_attention_forward_requires_grad
    folded = [x.flatten(0, 1).contiguous() for x in (query, key, value)]
    choice: Any = inner.attention_op  # (forward, backward)
    forward = None if choice is None else choice[0]
    out, lse = operator(*folded, scale=attn.scale, op=forward)
    batch, heads, n, _ = query.shape
    return out.unflatten(0, (batch, heads)).to(query.dtype), lse.reshape(batch, heads, -1)[:, :, :n]


class _Capture:
    """Common part: wraps the user's processor and keeps what the layer compares.

    Attributes:
        inner: the user's processor, while it captures.
    """

    def __init__(self, inner, config: SCFGConfig) -> None:
        self.inner = inner
        self.backend = config.backend

    def attend(
        self, attn, hidden_states, encoder_hidden_states, attention_mask, kwargs
    ) -> tuple[torch.Tensor, Compared | None]:
        """The layer's output, and what it compared, or None if this call cannot be captured."""
        capture = attention_mask is None and attn.spatial_norm is None
        kind = type(self.inner)
        attention: Any = _sdpa if kind is AttnProcessor2_0 else _xformers if kind is XFormersAttnProcessor else None
        if capture and attention is not None:
            query, key, value_states = _query_key(attn, hidden_states, encoder_hidden_states)
            value = _heads(attn, attn.to_v(value_states))
            out, lse = attention(attn, self.inner, query, key, value)
            return _finish(attn, out, hidden_states), Compared(query, key, lse)
        with projected_tokens(attn.to_k, self.inner) as projected:
            out = self.run_inner(attn, hidden_states, encoder_hidden_states, attention_mask, kwargs)
        if not capture:
            return out, None
        # IP-Adapter processors take (text, image) states; text keys are the ones that S-CFG reads.
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        if text is not None and projected:
            text = text[:, : projected[0]]  # what follows is an image prompt with keys of its own
        query, key, _ = _query_key(attn, hidden_states, text)
        return out, Compared(query, key, None)

    def run_inner(self, attn, hidden_states, encoder_hidden_states, attention_mask, kwargs) -> torch.Tensor:
        """The layer's output by the user's processor."""
        return self.inner(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
        )


class SelfAttentionCapture(_Capture):
    """Processor of a captured self-attention layer. `held` lives until the cross-attention takes it: with the
    default processor, the layer's own tensors."""

    def __init__(self, inner, config: SCFGConfig) -> None:
        super().__init__(inner, config)
        self.held: Compared | None = None

    def release(self) -> None:
        """Drop what is held, and the user's processor, which may have weights that are unloaded."""
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
            return self.run_inner(attn, hidden_states, encoder_hidden_states, attention_mask, kwargs)
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
        self.geometry: Geometry | None = None  # unused: a UNet's grid follows from its token count
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
        out, cross = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, kwargs)
        own, self.source.held = self.source.held, None
        self.tokens = self.start = None
        if own is not None and cross is not None and own.query.shape[2] == cross.query.shape[2]:
            self._complete(own, cross)
        return out

    def _complete(self, own: Compared, cross: Compared) -> None:
        """Fills `tokens` and `start`."""
        used, unconditional = self.layout.rows(cross.query.shape[0])
        own, cross = own.of(used), cross.of(used)
        options: dict[str, Any] = dict(unconditional=unconditional, fidelity=self.fidelity, powers=self.powers)
        if own.query.shape[2] <= MAP_TOKENS:
            self_map, cross_map = attention_maps(*own, *cross, backend=self.backend)
            tokens, start = complete(self_map, cross_map, **options, backend=self.backend)
        else:
            cross_map = attention_map(*cross, backend=self.backend)
            tokens, start = complete_from_qk(own.query, own.key, cross_map, **options)
        self.tokens, self.start = tokens, start if unconditional else tokens[:, 0].contiguous()


def wrap_block(block: BasicTransformerBlock, config: SCFGConfig) -> tuple[SelfAttentionCapture, CrossAttentionCapture]:
    """The pair of processors for one block of a UNet, around those that it has now. Installs nothing."""
    inner_self, inner_cross = block.attn1.processor, block.attn2.processor
    own = class_for(SelfAttentionCapture, inner_self)(inner_self, config)
    cross = class_for(CrossAttentionCapture, inner_cross)(inner_cross, own, config)
    return own, cross
