"""Attention processors that feed the capture, and the walk that finds where to put them in a model.

A captured block runs two of them. The self-attention one leaves the head-mean map S on itself; the cross-attention one
of the same block takes S, computes its own map C, completes it, and keeps only the result, [B, T, N]; S and C are gone
before the next block. In large layers (`capture.holds_map`) queries and keys, the layer's own tensors, are left in the
place of S, and `complete_from_qk` does without it.

Each wraps the processor that the user had. For the default `AttnProcessor2_0` the output comes from the same operator
as the map, in one pass, with the bits of the stock processor. For any other processor (xformers, sliced, the user's
own) the output is that processor's own, and the map is computed beside it from `to_q` and `to_k`. So it is in every
layer of a transformer, where `readers` knows what the layer compares.

Everything is stored on the processor object, and results are functional: with `torch.compile(fullgraph=True)` they
become outputs of the one graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from scfg_kernels import attention_map, complete, complete_from_qk, cross_attention_map, self_attention_map

from .capture import BlockInfo, holds_map
from .config import SCFGConfig
from .readers import Compared, Reader, capture_maps, read_added_kv, start_column
from .views import Geometry, turned


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
        inner: the processor that the layer had; put back by the caller after the pipeline call.
        active: whether this step needs maps; if not, the inner processor runs alone.
        observe: q [B, H, N, d] and k [B, H, T, d] -> what is observed; here the head-mean map [B, N, T].
        attend_and_observe: q, k, v -> the attention output [B, H, N, d], and that.
    """

    observe: Callable[..., Any] = staticmethod(attention_map)
    attend_and_observe: Callable[..., Any] = staticmethod(cross_attention_map)

    def __init__(self, inner, config: SCFGConfig) -> None:
        self.inner = inner
        self.active = True
        self.backend = config.backend
        self.fused = type(inner) is AttnProcessor2_0

    def attend(self, attn, hidden_states, encoder_hidden_states, attention_mask, kwargs):
        """The layer's output, and what was observed, or None if this call cannot be captured."""
        capture = self.active and attention_mask is None and attn.spatial_norm is None
        if not (capture and self.fused):
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
            query, key, _ = _query_key(attn, hidden_states, text)
            return out, self.observe(query, key, backend=self.backend)
        query, key, value_states = _query_key(attn, hidden_states, encoder_hidden_states)
        value = _heads(attn, attn.to_v(value_states))
        out, observed = self.attend_and_observe(query, key, value, backend=self.backend)
        return _finish(attn, out, hidden_states), observed


Held = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""A self-attention map [2B, N, N], or the queries and keys [2B, H, N, d] that it would be made of."""


def _holds_map(query: torch.Tensor) -> bool:
    _, heads, tokens, head_dim = query.shape
    return holds_map(tokens, heads, head_dim, query.element_size())


def _hold(query: torch.Tensor, key: torch.Tensor, *, backend: str) -> Held:
    return attention_map(query, key, backend=backend) if _holds_map(query) else (query, key)


def _attend_and_hold(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, backend: str
) -> tuple[torch.Tensor, Held]:
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
        self.held: Held | None = None

    def forget(self) -> None:
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
        out, self.held = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, kwargs)
        return out


@dataclass(frozen=True)
class BatchLayout:
    """What the samples of a denoiser batch are.

    Attributes:
        groups: how many groups of B samples: unconditional, conditional, and what else the pipeline adds; or 1 if the
            two are separate passes.
        foreground: "unconditional" or "conditional", whose start token is wanted.
        branch: "both", or which of the two this pass is.
        turned: whether the conditional group comes first.
    """

    groups: int = 2
    foreground: str = "unconditional"
    branch: str = "both"
    turned: bool = False

    def rows(self, batch: int) -> tuple[slice, int]:
        """The samples whose maps are needed, and how many of them, at the front, are unconditional."""
        if self.branch != "both":
            return slice(0, batch), batch if self.branch == "unconditional" else 0
        samples = batch // self.groups
        unconditional = samples if self.foreground == "unconditional" else 0
        return slice(samples - unconditional, 2 * samples), unconditional


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

    def forget(self) -> None:
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

    def _complete(self, held: Held, cross_map: torch.Tensor) -> None:
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


class JointAttentionCapture:
    """Processor of a captured layer with added keys (DeepFloyd IF): text and picture in one softmax, whose rows are
    split and not divided by their sums, as in the published code.

    The output is the user's processor's own, the map is made beside it. `tokens` and `layout` are those of
    `CrossAttentionCapture`; `start` [B, 2, N] has the sum of all other tokens' completed maps beside the start token's.
    T5 has no start token: its first token stands there, as in the published code.
    """

    def __init__(self, inner, config: SCFGConfig) -> None:
        self.inner = inner
        self.active = True
        self.fidelity, self.powers, self.backend = config.fidelity, config.powers, config.backend
        self.layout = BatchLayout()
        self.geometry: Geometry | None = None  # of no interest here: tokens of a UNet are counted
        self.tokens: torch.Tensor | None = None
        self.start: torch.Tensor | None = None

    def forget(self) -> None:
        """Drop what is held: maps, and the user's processor, which may have weights that are unloaded."""
        self.tokens = self.start = self.inner = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        self.tokens = self.start = None
        if self.active and encoder_hidden_states is not None and attention_mask is None:
            self._observe(read_added_kv(attn, hidden_states, encoder_hidden_states))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    def _observe(self, compared: Compared) -> None:
        text, image = cast(torch.Tensor, compared.text), cast(torch.Tensor, compared.image)
        used, unconditional = self.layout.rows(compared.query.shape[0])
        query, keys = compared.query[used], torch.cat([text, image], 2)[used]
        joint = attention_map(query, keys, backend=self.backend)  # [B, N, T + N]
        cross, own = joint[:, :, : text.shape[2]], joint[:, :, text.shape[2] :]
        self.tokens = self._complete(own[unconditional:], cross[unconditional:])
        if unconditional:
            columns = cross[:unconditional]
            two = torch.stack([columns[:, :, 0], columns[:, :, 1:].sum(2)], 2)
            self.start = self._complete(own[:unconditional], two)
        else:
            self.start = torch.stack([self.tokens[:, 0], self.tokens[:, 1:].sum(1)], 1)

    def _complete(self, own: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        """[B, N, N], [B, N, T] -> [B, T, N]."""
        return complete(own, cross, fidelity=self.fidelity, powers=self.powers, backend=self.backend)[0]


class TransformerCapture:
    """Processor of a captured layer in a transformer: the output is the user's processor's own, the maps are made
    beside it on the grid of cells.

    A block has one of them for joint attention, or two, for self- and for cross-attention. The last one holds what the
    block leaves: `tokens`, `start` and `layout` as in `CrossAttentionCapture`.

    Attributes:
        inner, active: as in `_Capture`.
        geometry: of the latents, set before every step.
        one_stream: whether text and image come as one sequence, so that the reader must be told where they part.
    """

    def __init__(
        self, inner, read: Reader, config: SCFGConfig, level: int, start_token: str, *, last: TransformerCapture | None
    ) -> None:
        self.inner = inner
        self.active = True
        self.read = read
        self.last = self if last is None else last
        self.level = level
        self.one_stream = "image_tokens" in inspect.signature(read).parameters
        self.cell = max(config.cell, level)
        self.start_token = start_token
        self.fidelity, self.powers, self.backend = config.fidelity, config.powers, config.backend
        self.layout = BatchLayout()
        self.geometry: Geometry | None = None
        self.self_map: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self.start: torch.Tensor | None = None

    def forget(self) -> None:
        """Drop what is held: maps, and the user's processor, which may have weights that are unloaded."""
        self.self_map = self.tokens = self.start = self.inner = None

    def __call__(self, attn, *args, **kwargs):
        geometry = self.last.geometry
        if self.active and geometry is not None:
            if self.one_stream:
                size = geometry.frames * (geometry.height // self.level) * (geometry.width // self.level)
                self._observe(self.read(attn, *args, **kwargs, image_tokens=size), self.last)
            else:
                self._observe(self.read(attn, *args, **kwargs), self.last)
        return self.inner(attn, *args, **kwargs)

    def _observe(self, compared: Compared, last: TransformerCapture) -> None:
        geometry = cast(Geometry, last.geometry)
        own, cross = capture_maps(compared, geometry, self.level, self.cell, self.backend)
        last.self_map = last.self_map if own is None else own
        if cross is None:
            return
        own, last.self_map = last.self_map, None
        if last.layout.turned:
            cross, own = turned(cross), None if own is None else turned(own)
        used, unconditional = last.layout.rows(cross.shape[0])
        column = start_column(compared.bias, cross.shape[2], self.start_token)
        if isinstance(column, torch.Tensor):
            column = (turned(column) if last.layout.turned else column).repeat_interleave(geometry.frames, 0)[used]
        cross = cross[used]
        if own is None:  # linear self-attention has no map: nothing spreads
            last.tokens = cross[unconditional:].transpose(1, 2).contiguous()
            last.start = _column(cross, column)[: unconditional or None]
            return
        if unconditional:
            cross = cross.clone()
            cross[:unconditional, :, 0] = _column(cross, column)[:unconditional]
        last.tokens, start = complete(
            own[used], cross, unconditional=unconditional, fidelity=self.fidelity, powers=self.powers,
            backend=self.backend,
        )  # fmt: skip
        last.start = start if unconditional else _column(last.tokens.transpose(1, 2), column)


def _column(maps: torch.Tensor, column: torch.Tensor | int) -> torch.Tensor:
    """[B, N, T] -> [B, N]: one column, or one for each sample."""
    if isinstance(column, int):
        return maps[:, :, column].contiguous()
    return maps.gather(2, column[:, None, None].expand(-1, maps.shape[1], 1)).squeeze(2)


@functools.cache
def _with_signature_of(base: type, inner: type) -> type:
    """`base` with the call signature of `inner`: diffusers drops keyword arguments that the signature does not name.

    A real function with these parameters, made from text as `dataclasses` does: a `__signature__` is what
    `torch.compile` cannot follow in every attention class.
    """
    signature = inspect.signature(inner.__call__)  # type: ignore[attr-defined]
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) < 3:
        return base  # it names nothing, as `forward` of a module does not: diffusers passes it nothing by name
    header = [p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None) for p in parameters]
    names = [f"**{p.name}" if p.kind is p.VAR_KEYWORD else f"{p.name}={p.name}" for p in parameters[3:]]
    passed = [p.name for p in parameters[:3]] + names  # self, the module, its hidden states; others by name
    scope: dict[str, Any] = {"call": base.__call__}  # type: ignore[attr-defined]
    exec(f"def __call__{inspect.Signature(header)}: return call({', '.join(passed)})", scope)
    call, optional = scope["__call__"], [p for p in parameters if p.default is not p.empty]
    call.__defaults__ = tuple(p.default for p in optional if p.kind is not p.KEYWORD_ONLY)
    call.__kwdefaults__ = {p.name: p.default for p in optional if p.kind is p.KEYWORD_ONLY}
    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


@functools.cache
def _passing_for(base: type, inner: type) -> type:
    """`base` that answers `isinstance` and attribute access like `inner`, a processor with weights and settings.

    diffusers finds IP-Adapter processors by class to set their scale, in callbacks too, while the capture is installed.
    """

    def __getattr__(self, name: str):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    namespace = {"__class__": property(lambda self: inner), "__getattr__": __getattr__, "__module__": base.__module__}
    return type(base.__name__, (_with_signature_of(base, inner),), namespace)


def _class_for(base: type, inner: object) -> type:
    kind: type = type(inner)
    if kind is AttnProcessor2_0:
        return base
    return (_passing_for if isinstance(inner, torch.nn.Module) else _with_signature_of)(base, kind)


def wrap_block(block: BasicTransformerBlock, config: SCFGConfig) -> tuple[SelfAttentionCapture, CrossAttentionCapture]:
    """The pair of processors for one block of a UNet, around those that it has now. Installs nothing."""
    inner_self, inner_cross = block.attn1.processor, block.attn2.processor
    own = _class_for(SelfAttentionCapture, inner_self)(inner_self, config)
    cross = _class_for(CrossAttentionCapture, inner_cross)(inner_cross, own, config)
    return own, cross


def wrap_layers(
    layers: Sequence[tuple[torch.nn.Module, Reader]], config: SCFGConfig, level: int, start_token: str
) -> tuple[TransformerCapture, ...]:
    """The processors for the captured layers of one transformer block, in the order of `layers`. Installs nothing.

    Args:
        layers: attention modules and their readers, in the order in which they run.
        config: of the call.
        level: latent pixels per side of a token.
        start_token: `"first"` or `"last"`, see `readers.start_column`.
    """
    captures: list[TransformerCapture] = []
    for attn, read in reversed(layers):
        inner: Any = attn.processor
        kind = _class_for(TransformerCapture, inner)
        last = captures[0] if captures else None
        captures.append(kind(inner, read, config, level, start_token, last=last))
    return tuple(reversed(captures))


def wrap_joint(attn: Attention, config: SCFGConfig) -> JointAttentionCapture:
    """The processor for one layer with added keys, around the one that it has now. Installs nothing."""
    inner: Any = attn.processor
    return _class_for(JointAttentionCapture, inner)(inner, config)


def find_blocks(unet: torch.nn.Module) -> Iterator[tuple[BlockInfo, BasicTransformerBlock]]:
    """Every transformer block of a UNet with a self- and a cross-attention layer over image tokens, in the order of the
    model."""
    for name, module, level in _modules_with_level(unet):
        if not isinstance(module, BasicTransformerBlock) or module.attn2 is None:
            continue
        if not module.attn1.is_cross_attention and module.attn2.is_cross_attention:
            yield BlockInfo(name, level), module


def find_joint_layers(unet: torch.nn.Module) -> Iterator[tuple[BlockInfo, Attention]]:
    """Every attention layer of a UNet over text and picture jointly, in the order of the model."""
    for name, module, level in _modules_with_level(unet):
        if not isinstance(module, Attention) or module.added_kv_proj_dim is None:
            continue
        if not module.only_cross_attention:
            yield BlockInfo(name, level, joint=True), module


def _modules_with_level(unet: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """Name, module and level of everything between the first and the last convolution, in the order of the model.

    The level comes from the structure: the downsamplers before a stage minus the upsamplers before it.
    """
    level = 1
    stages = [(f"down_blocks.{i}", stage) for i, stage in enumerate(getattr(unet, "down_blocks", []))]
    if getattr(unet, "mid_block", None) is not None:
        stages.append(("mid_block", unet.mid_block))
    stages += [(f"up_blocks.{i}", stage) for i, stage in enumerate(getattr(unet, "up_blocks", []))]
    for stage_name, stage in stages:
        for name, module in stage.named_modules():
            yield f"{stage_name}.{name}", module, level
        if getattr(stage, "downsamplers", None):
            level *= 2
        if getattr(stage, "upsamplers", None):
            level //= 2
