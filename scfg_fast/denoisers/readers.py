"""What the attention layers of diffusers compare: queries and keys after norms and positions, a reader a layer class.

A UNet keeps self- and cross-attention apart. Transformers do too (PixArt, HunyuanDiT, Sana, LTX, Wan), or compare image
tokens with text and image in one softmax (SD3, Flux, Qwen-Image, Chroma, CogView4, DeepFloyd IF), some in one stream of
tokens (Lumina 2, Z-Image). A reader takes what a layer's processor is called with and gives `QueriesAndKeys`, of which
`capture.compared` makes the two maps of S-CFG on the grid of cells. The layer's output is left to its own processor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ..capture.compared import QueriesAndKeys, key_bias


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, H * d] -> [B, N, H, d], a view."""
    return x.unflatten(-1, (heads, -1))


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


def read_cross(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None, **_: Any
) -> QueriesAndKeys:
    """Cross-attention of `Attention` without positions: PixArt."""
    if attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    query = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads).transpose(1, 2))
    key = _normed(attn.norm_k, _heads(attn.to_k(encoder_hidden_states), attn.heads).transpose(1, 2))
    return QueriesAndKeys(query, key, bias=key_bias(attention_mask, key.shape[2]))


def read_sana(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None, **_: Any
) -> QueriesAndKeys:
    """Cross-attention of Sana: norms over all heads at once, where there are any (1.5)."""
    query = _normed(attn.norm_q, attn.to_q(hidden_states))
    key = _normed(attn.norm_k, attn.to_k(encoder_hidden_states))
    query, key = (_heads(x, attn.heads).transpose(1, 2) for x in (query, key))
    return QueriesAndKeys(query, key, bias=key_bias(attention_mask, key.shape[2]))


def read_self(attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> QueriesAndKeys:
    """Self-attention of `Attention` without positions: PixArt."""
    query = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads).transpose(1, 2))
    key = _normed(attn.norm_k, _heads(attn.to_k(hidden_states), attn.heads).transpose(1, 2))
    return QueriesAndKeys(query, image=key)


def read_hunyuan(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, temb=None,
    image_rotary_emb=None,
) -> QueriesAndKeys:  # fmt: skip
    """HunyuanDiT: as above with positions, on the keys of self-attention only."""
    from diffusers.models.embeddings import apply_rotary_emb

    cross = encoder_hidden_states is not None
    compared = (read_cross if cross else read_self)(attn, hidden_states, encoder_hidden_states, attention_mask)
    if image_rotary_emb is None:
        return compared
    rotate: Callable[[torch.Tensor], Any] = functools.partial(apply_rotary_emb, freqs_cis=image_rotary_emb)
    image = None if compared.image is None else rotate(compared.image)
    return QueriesAndKeys(rotate(compared.query), compared.text, image, compared.bias)


def read_ltx(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
) -> QueriesAndKeys:
    """LTX-Video: norms and positions over all heads at once."""
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    cross = encoder_hidden_states is not None
    query = attn.norm_q(attn.to_q(hidden_states))
    key = attn.norm_k(attn.to_k(encoder_hidden_states if cross else hidden_states))
    if image_rotary_emb is not None:
        query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
    query, key = (_heads(x, attn.heads).transpose(1, 2) for x in (query, key))
    if cross:
        return QueriesAndKeys(query, key, bias=key_bias(attention_mask, key.shape[2]))
    return QueriesAndKeys(query, image=key)


def read_wan(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
) -> QueriesAndKeys:
    """Wan 2.1 and 2.2: norms over all heads at once, positions as interleaved pairs."""
    cross = encoder_hidden_states is not None
    if cross and attn.add_k_proj is not None:
        encoder_hidden_states = encoder_hidden_states[:, encoder_hidden_states.shape[1] - 512 :]  # an image before it
    query = attn.norm_q(attn.to_q(hidden_states))
    key = attn.norm_k(attn.to_k(encoder_hidden_states if cross else hidden_states))
    query, key = _heads(query, attn.heads), _heads(key, attn.heads)
    if rotary_emb is not None:
        query, key = (_rotated_pairs(x, *rotary_emb) for x in (query, key))
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return QueriesAndKeys(query, text=key) if cross else QueriesAndKeys(query, image=key)


def read_added_kv(attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> QueriesAndKeys:
    """DeepFloyd IF's UNets: joint attention with added keys, over [B, C, h, w]."""
    picture = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
    text = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
    query, key, image = (
        _heads(x, attn.heads).transpose(1, 2) for x in (attn.to_q(picture), attn.add_k_proj(text), attn.to_k(picture))
    )
    return QueriesAndKeys(query, key, image)


def _rotated_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring components [..., 2i], [..., 2i + 1] rotated; cos and sin hold every angle twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return rotated.flatten(-2).type_as(x)


def read_sd3(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
) -> QueriesAndKeys:
    """Stable Diffusion 3: joint attention, no positions here."""
    query = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads).transpose(1, 2))
    image = _normed(attn.norm_k, _heads(attn.to_k(hidden_states), attn.heads).transpose(1, 2))
    text = _heads(attn.add_k_proj(encoder_hidden_states), attn.heads).transpose(1, 2)
    return QueriesAndKeys(query, _normed(attn.norm_added_k, text), image)


def read_flux(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None,
    image_rotary_emb=None, **_: Any,
) -> QueriesAndKeys:  # fmt: skip
    """Double blocks of Flux, FLUX.2 and Chroma: joint attention, positions on text and image."""
    from diffusers.models.embeddings import apply_rotary_emb

    if getattr(attn, "fused_projections", False):
        query, image, _ = attn.to_qkv(hidden_states).chunk(3, -1)
        _, text, _ = attn.to_added_qkv(encoder_hidden_states).chunk(3, -1)
    else:
        query, image = attn.to_q(hidden_states), attn.to_k(hidden_states)
        text = attn.add_k_proj(encoder_hidden_states)
    query, image, text = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, image, text))
    query, image, text = attn.norm_q(query), attn.norm_k(image), attn.norm_added_k(text)
    tokens = text.shape[1]
    if image_rotary_emb is not None:
        angles: Any = [(part[:tokens], part[tokens:]) for part in image_rotary_emb]  # cos, sin [T + N, d], text first
        at_text, at_image = zip(*angles, strict=True)
        query, image = (apply_rotary_emb(x, at_image, sequence_dim=1) for x in (query, image))
        text = apply_rotary_emb(text, at_text, sequence_dim=1)
    query, text, image = (x.transpose(1, 2) for x in (query, text, image))
    return QueriesAndKeys(query, text, image, key_bias(attention_mask, tokens))


def read_qwen(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_hidden_states_mask=None,
    attention_mask=None, image_rotary_emb=None,
) -> QueriesAndKeys:  # fmt: skip
    """Qwen-Image: joint attention, positions of text and image apart. AuraFlow, which has no positions here."""
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    size = attn.inner_dim // attn.heads
    query, image = attn.to_q(hidden_states), attn.to_k(hidden_states)
    text = attn.add_k_proj(encoder_hidden_states)
    query, image, text = (x.unflatten(-1, (-1, size)) for x in (query, image, text))
    query, image, text = _normed(attn.norm_q, query), _normed(attn.norm_k, image), _normed(attn.norm_added_k, text)
    if image_rotary_emb is not None:
        at_image, at_text = image_rotary_emb
        query, image = (apply_rotary_emb_qwen(x, at_image, use_real=False) for x in (query, image))
        text = apply_rotary_emb_qwen(text, at_text, use_real=False)
    query, text, image = (x.transpose(1, 2) for x in (query, text, image))
    mask = attention_mask if encoder_hidden_states_mask is None else encoder_hidden_states_mask
    return QueriesAndKeys(query, text, image, key_bias(mask, text.shape[2]))


def read_cogview4(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None,
    image_rotary_emb=None,
) -> QueriesAndKeys:  # fmt: skip
    """CogView4: joint attention with the same projections for text and image, positions on the image.

    Its mask enters the scores as a number, 1 for text and 0 for padding, as diffusers has it.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    query = attn.to_q(hidden_states)
    image, text = attn.to_k(hidden_states), attn.to_k(encoder_hidden_states)
    query, image, text = (_heads(x, attn.heads).transpose(1, 2) for x in (query, image, text))
    dtype = encoder_hidden_states.dtype
    query, image, text = (
        _normed(norm, x).to(dtype) for norm, x in ((attn.norm_q, query), (attn.norm_k, image), (attn.norm_k, text))
    )
    if image_rotary_emb is not None:
        query, image = (apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2) for x in (query, image))
    bias = None if attention_mask is None else attention_mask.to(query.dtype) - 1.0  # softmax does not see a constant
    return QueriesAndKeys(query, text, image, bias)


def read_lumina2(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None,
    image_rotary_emb=None, base_sequence_length=None, *, image_tokens: int,
) -> QueriesAndKeys:  # fmt: skip
    """Lumina 2: one stream, every sample's text, then its image, then padding; keys shared by groups of heads."""
    from diffusers.models.embeddings import apply_rotary_emb

    query = _heads(attn.to_q(hidden_states), attn.heads)
    key = attn.to_k(encoder_hidden_states).unflatten(-1, (-1, query.shape[-1]))
    query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
    if image_rotary_emb is not None:
        rotate: Callable[..., Any] = functools.partial(apply_rotary_emb, freqs_cis=image_rotary_emb, use_real=False)
        query, key = (rotate(x).to(x.dtype) for x in (query, key))
    key = key.repeat_interleave(attn.heads // key.shape[2], 2)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    length = hidden_states.shape[1]
    text_tokens = length - image_tokens  # of the longest prompt
    scale = attn.scale * (1.0 if base_sequence_length is None else math.log(length, base_sequence_length) ** 0.5)
    if attention_mask is None:  # prompts of one length
        return QueriesAndKeys(query[:, :, text_tokens:], key[:, :, :text_tokens], key[:, :, text_tokens:], None, scale)
    start = attention_mask.sum(1) - image_tokens  # [B], where each sample's image begins
    place = torch.arange(image_tokens, device=key.device) + start[:, None]
    place = place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    others = torch.arange(text_tokens, device=key.device) >= start[:, None]
    return QueriesAndKeys(
        query.gather(2, place),
        key[:, :, :text_tokens],
        key.gather(2, place),
        key_bias(~others, text_tokens),
        scale,
    )


def read_z_image(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, freqs_cis=None, *,
    image_tokens: int,
) -> QueriesAndKeys:  # fmt: skip
    """Z-Image: one stream, image, then text, each filled up to a multiple of 32 with tokens that are attended."""
    query, key = (_heads(projection(hidden_states), attn.heads) for projection in (attn.to_q, attn.to_k))
    query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
    if freqs_cis is not None:
        query, key = (_rotated_complex(x, freqs_cis) for x in (query, key))
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    begin = -(-image_tokens // 32) * 32
    bias = None if attention_mask is None else key_bias(attention_mask[:, begin:], key.shape[2] - begin)
    return QueriesAndKeys(query, key[:, :, begin:], key[:, :, :begin], bias)


def _rotated_complex(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Neighbouring components of [B, N, H, d] as complex numbers, times [B, N, d / 2] complex, in fp32."""
    rotated = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles.unsqueeze(2)
    return torch.view_as_real(rotated).flatten(3).type_as(x)
