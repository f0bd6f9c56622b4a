"""What the attention layers of diffusion transformers compare: queries and keys after norms and positions.

A UNet keeps self- and cross-attention apart. Transformers do too (PixArt, HunyuanDiT, Sana, LTX, Wan), or compare image
tokens with text and image in one softmax (SD3, Flux, Qwen-Image, Chroma, CogView4), some in one stream of tokens
(Lumina 2, Z-Image). A reader takes what a layer's
processor is called with and gives `Compared`, from which `capture_maps` makes the two maps of S-CFG on the grid of
cells. The layer's output is left to its own processor, whatever attention backend that uses.

There is no published S-CFG for transformers. The rules here are ours:

* Maps are made on the grid of cells, as in UNets. Where tokens are finer, the query of a cell is the mean of those of
  its tokens, and the keys' probabilities are added up over a cell. No map of all tokens ever exists.
* In a joint softmax every query has one sum over text and image; both maps are divided by their own, so that all rows
  sum to 1 as they do in a UNet.
* Frames of a video are images of their own: image keys are those of the query's frame.
* Text without a start token (T5) has the last attended token in its place, the end token or padding: the only ones
  without content (`start_column`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from scfg_kernels import attention_map

from .views import Geometry

MASKED = -1e4
"""Added to scores instead of minus infinity: finite in fp16, and zero after any softmax."""


@dataclass(frozen=True)
class Compared:
    """Queries of image tokens and the keys that they are compared with.

    Attributes:
        query: [B, H, frames * N, d].
        text: [B, H, T, d], or None.
        image: [B, H, frames * N, d], or None. With `text`, in one softmax.
        bias: [B, T], added to the scores of text keys, or None.
        scale: factor on the scores; None for 1 / sqrt(d).
    """

    query: torch.Tensor
    text: torch.Tensor | None = None
    image: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float | None = None


Reader = Callable[..., Compared]
"""(attention module, and the arguments of its processor) -> Compared."""


def capture_maps(
    compared: Compared, geometry: Geometry, level: int, cell: int, backend: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Head-mean maps on the grid of cells, every row summing to 1.

    Args:
        compared: queries and keys of a layer.
        geometry: of the latents.
        level: latent pixels per side of a token.
        cell: latent pixels per side of a cell, at least `level`.
        backend: see `SCFGConfig.backend`.

    Returns:
        self map [B * frames, n, n] and cross map [B * frames, n, T], n cells per frame; None for keys that are not
        there.
    """
    if geometry.frames > 1:
        frames = [
            capture_maps(frame, Geometry(1, geometry.height, geometry.width), level, cell, backend)
            for frame in _frames(compared, geometry.frames)
        ]
        own, cross = (
            None if parts[0] is None else torch.stack(cast(list, parts), 1).flatten(0, 1)
            for parts in zip(*frames, strict=True)
        )
        return own, cross
    height, width = geometry.height // level, geometry.width // level
    count, pool = height * width, max(1, cell // level)
    query = compared.query[:, :, :count]  # what follows are reference images: keys, but not what is drawn
    if pool > 1:
        query = _pooled(query, height, width, pool)
    keys = [part for part in (compared.text, compared.image) if part is not None]
    key = torch.cat(keys, 2) if len(keys) > 1 else keys[0]
    scale = compared.scale if compared.scale is not None else query.shape[-1] ** -0.5
    if compared.bias is not None:
        query, key = _with_bias(query, key, compared.bias, scale)
    probabilities = attention_map(query, key, scale=scale, backend=backend)
    tokens = 0 if compared.text is None else compared.text.shape[2]
    cross = probabilities[:, :, :tokens] if tokens else None
    columns = probabilities[:, :, tokens : tokens + count]
    own = None if compared.image is None else _pooled_columns(columns, height, width, pool)
    if cross is not None and own is not None:
        cross, own = _stochastic(cross), _stochastic(own)
    return own, cross


def start_column(bias: torch.Tensor | None, tokens: int, which: str) -> torch.Tensor | int:
    """Column of the start token, or of what stands for it: `"first"` or `"last"` of the attended text tokens.

    Returns:
        A number, or [B] int64 where a mask decides.
    """
    if bias is None:
        return 0 if which == "first" else tokens - 1
    attended = (bias > 0.5 * MASKED).to(torch.int32)
    if which == "first":
        return attended.argmax(1)
    return tokens - 1 - attended.flip(1).argmax(1)


def _frames(compared: Compared, frames: int) -> Iterator[Compared]:
    """Frame by frame, one after another, so that keys are never copied for all of them at once."""
    queries = compared.query.unflatten(2, (frames, -1)).unbind(2)
    images = [None] * frames if compared.image is None else compared.image.unflatten(2, (frames, -1)).unbind(2)
    for query, image in zip(queries, images, strict=True):
        yield dataclasses.replace(compared, query=query, image=image)


def _pooled(query: torch.Tensor, height: int, width: int, pool: int) -> torch.Tensor:
    """[B, H, h * w, d] -> [B, H, n, d], means over pool x pool tokens; cells at the far edges may be ragged."""
    grid = query.transpose(2, 3).unflatten(3, (height, width)).flatten(0, 1)
    mean = F.avg_pool2d(grid, pool, ceil_mode=True, count_include_pad=False)
    return mean.unflatten(0, query.shape[:2]).flatten(3).transpose(2, 3)


def _pooled_columns(probabilities: torch.Tensor, height: int, width: int, pool: int) -> torch.Tensor:
    """[B, n, h * w] -> [B, n, n]: sums over the tokens of a cell."""
    if pool == 1:
        return probabilities.contiguous()
    grid = probabilities.unflatten(2, (height, width))
    return F.avg_pool2d(grid, pool, ceil_mode=True, divisor_override=1).flatten(2)


def _with_bias(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A bias of the first keys as one more component of queries and keys; eight, to keep vectors aligned."""
    query, key = F.pad(query, (0, 8)), F.pad(key, (0, 8))
    query[..., -1] = 1.0 / scale
    key[:, :, : bias.shape[1], -1] = bias[:, None].clamp(min=MASKED).to(key.dtype)
    return query, key


def _stochastic(part: torch.Tensor) -> torch.Tensor:
    """Rows divided by their sums; contiguous."""
    return part / part.sum(-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)


def key_bias(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The bias [B, T] of text keys in any mask that attention functions take: bool or additive, [B, K], [B, 1, K] or
    [B, heads, Q, K] of which all rows of image queries are alike; text keys first."""
    if mask is None:
        return None
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
    elif mask.ndim == 3:
        mask = mask[:, -1]
    text = mask[:, :tokens]
    if mask.dtype == torch.bool:
        return torch.zeros(text.shape, device=mask.device).masked_fill(~text, MASKED)
    return text if mask.shape[1] == tokens else text - mask[:, -1:]  # what image keys get too makes no difference


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, H * d] -> [B, N, H, d], a view."""
    return x.unflatten(-1, (heads, -1))


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


def read_cross(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None, **_: Any
) -> Compared:
    """Cross-attention of `Attention` without positions: PixArt."""
    if attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    query = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads).transpose(1, 2))
    key = _normed(attn.norm_k, _heads(attn.to_k(encoder_hidden_states), attn.heads).transpose(1, 2))
    return Compared(query, key, bias=key_bias(attention_mask, key.shape[2]))


def read_sana(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None, **_: Any
) -> Compared:
    """Cross-attention of Sana: norms over all heads at once, where there are any (1.5)."""
    query = _normed(attn.norm_q, attn.to_q(hidden_states))
    key = _normed(attn.norm_k, attn.to_k(encoder_hidden_states))
    query, key = (_heads(x, attn.heads).transpose(1, 2) for x in (query, key))
    return Compared(query, key, bias=key_bias(attention_mask, key.shape[2]))


def read_self(attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Compared:
    """Self-attention of `Attention` without positions: PixArt."""
    query = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads).transpose(1, 2))
    key = _normed(attn.norm_k, _heads(attn.to_k(hidden_states), attn.heads).transpose(1, 2))
    return Compared(query, image=key)


def read_hunyuan(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, temb=None,
    image_rotary_emb=None,
) -> Compared:  # fmt: skip
    """HunyuanDiT: as above with positions, on the keys of self-attention only."""
    from diffusers.models.embeddings import apply_rotary_emb

    cross = encoder_hidden_states is not None
    compared = (read_cross if cross else read_self)(attn, hidden_states, encoder_hidden_states, attention_mask)
    if image_rotary_emb is None:
        return compared
    rotate: Callable[[torch.Tensor], Any] = functools.partial(apply_rotary_emb, freqs_cis=image_rotary_emb)
    image = None if compared.image is None else rotate(compared.image)
    return Compared(rotate(compared.query), compared.text, image, compared.bias)


def read_ltx(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
) -> Compared:
    """LTX-Video: norms and positions over all heads at once."""
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    cross = encoder_hidden_states is not None
    query = attn.norm_q(attn.to_q(hidden_states))
    key = attn.norm_k(attn.to_k(encoder_hidden_states if cross else hidden_states))
    if image_rotary_emb is not None:
        query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
    query, key = (_heads(x, attn.heads).transpose(1, 2) for x in (query, key))
    if cross:
        return Compared(query, key, bias=key_bias(attention_mask, key.shape[2]))
    return Compared(query, image=key)


def read_wan(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
) -> Compared:
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
    return Compared(query, text=key) if cross else Compared(query, image=key)


def read_added_kv(attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Compared:
    """DeepFloyd IF's UNets: joint attention with added keys, over [B, C, h, w]."""
    picture = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
    text = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
    query, key, image = (
        _heads(x, attn.heads).transpose(1, 2) for x in (attn.to_q(picture), attn.add_k_proj(text), attn.to_k(picture))
    )
    return Compared(query, key, image)


def _rotated_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring components [..., 2i], [..., 2i + 1] rotated; cos and sin hold every angle twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return rotated.flatten(-2).type_as(x)


def read_sd3(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
) -> Compared:
    """Stable Diffusion 3: joint attention, no positions here."""
    query = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads).transpose(1, 2))
    image = _normed(attn.norm_k, _heads(attn.to_k(hidden_states), attn.heads).transpose(1, 2))
    text = _heads(attn.add_k_proj(encoder_hidden_states), attn.heads).transpose(1, 2)
    return Compared(query, _normed(attn.norm_added_k, text), image)


def read_flux(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None,
    image_rotary_emb=None, **_: Any,
) -> Compared:  # fmt: skip
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
    return Compared(query, text, image, key_bias(attention_mask, tokens))


def read_qwen(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_hidden_states_mask=None,
    attention_mask=None, image_rotary_emb=None,
) -> Compared:  # fmt: skip
    """Qwen-Image: joint attention, positions of text and image apart."""
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
    return Compared(query, text, image, key_bias(mask, text.shape[2]))


def read_cogview4(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None,
    image_rotary_emb=None,
) -> Compared:  # fmt: skip
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
    return Compared(query, text, image, bias)


def read_lumina2(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask=None,
    image_rotary_emb=None, base_sequence_length=None, *, image_tokens: int,
) -> Compared:  # fmt: skip
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
        return Compared(query[:, :, text_tokens:], key[:, :, :text_tokens], key[:, :, text_tokens:], None, scale)
    start = attention_mask.sum(1) - image_tokens  # [B], where each sample's image begins
    place = torch.arange(image_tokens, device=key.device) + start[:, None]
    place = place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    others = torch.arange(text_tokens, device=key.device) >= start[:, None]
    return Compared(
        query.gather(2, place),
        key[:, :, :text_tokens],
        key.gather(2, place),
        key_bias(~others, text_tokens),
        scale,
    )


def read_z_image(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, freqs_cis=None, *,
    image_tokens: int,
) -> Compared:  # fmt: skip
    """Z-Image: one stream, image, then text, each filled up to a multiple of 32 with tokens that are attended."""
    query, key = (_heads(projection(hidden_states), attn.heads) for projection in (attn.to_q, attn.to_k))
    query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
    if freqs_cis is not None:
        query, key = (_rotated_complex(x, freqs_cis) for x in (query, key))
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    begin = -(-image_tokens // 32) * 32
    bias = None if attention_mask is None else key_bias(attention_mask[:, begin:], key.shape[2] - begin)
    return Compared(query, key[:, :, begin:], key[:, :, :begin], bias)


def _rotated_complex(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Neighbouring components of [B, N, H, d] as complex numbers, times [B, N, d / 2] complex, in fp32."""
    rotated = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles.unsqueeze(2)
    return torch.view_as_real(rotated).flatten(3).type_as(x)
