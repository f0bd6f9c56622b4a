"""Attention processors that make maps alongside the user's own output: of transformers, and of joint attention.

The output of such a layer is its own processor's, whatever attention backend that uses. A reader
(`scfg_fast.denoisers.readers`) says what the layer compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from scfg_kernels import complete, joint_attention_maps

from ..config import SCFGConfig
from ..layouts import Geometry, swapped_halves
from .compared import QueriesAndKeys, Reader, capture_maps, start_column
from .maps import BatchLayout
from .wrapping import class_for


class JointAttentionCapture:
    """Processor of a captured layer with added keys (DeepFloyd IF): text and picture in one softmax, whose rows are
    split and not divided by their sums, as in the published code.

    The output is the user's processor's own, the map is made beside it. `tokens` and `layout` are those of
    `CrossAttentionCapture`; `start` [B, 2, N] has the sum of all other tokens' completed maps beside the start token's.
    T5 has no start token: its first token stands there, as in the published code.
    """

    def __init__(self, inner, read: Reader, config: SCFGConfig) -> None:
        self.inner = inner
        self.read = read
        self.fidelity, self.powers, self.backend = config.fidelity, config.powers, config.backend
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
        *args,
        **kwargs,
    ) -> torch.Tensor:
        self.tokens = self.start = None
        if encoder_hidden_states is not None and attention_mask is None:
            self._observe(self.read(attn, hidden_states, encoder_hidden_states))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    def _observe(self, compared: QueriesAndKeys) -> None:
        used, unconditional = self.layout.rows(compared.query.shape[0])
        compared = compared.of(used)
        maps = joint_attention_maps(
            compared.query, compared.text, compared.image, grid=(1, compared.query.shape[2]), stochastic=False,
            backend=self.backend,
        )  # fmt: skip
        own, cross = cast(tuple[torch.Tensor, torch.Tensor], maps)
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
        inner: as in `_Capture`.
        geometry: of the latents, set before every step.
        paired: whether a self-attention layer of the block runs before this one.
        one_stream: whether text and image come as one sequence, so that the reader must be told where they part.
    """

    def __init__(
        self, inner, read: Reader, config: SCFGConfig, level: int, start_token: str, *, last: TransformerCapture | None
    ) -> None:
        self.inner = inner
        self.read = read
        self.last = self if last is None else last
        self.paired = False
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

    def release(self) -> None:
        """Drop what is held: maps, and the user's processor, which may have weights that are unloaded."""
        self.self_map = self.tokens = self.start = self.inner = None

    def __call__(self, attn, *args, **kwargs):
        geometry = self.last.geometry
        if geometry is not None and not self._has_foreign_keys(*args, **kwargs):
            size = geometry.frames * (geometry.height // self.level) * (geometry.width // self.level)
            told = {"image_tokens": size} if self.one_stream else {}
            compared = self.read(attn, *args, **kwargs, **told)
            queries, keys = compared.query.shape[2], size if compared.image is None else compared.image.shape[2]
            if size <= queries and size <= keys <= queries:  # else tokens are merged, or keys are another image's
                self._observe(compared, self.last)
        return self.inner(attn, *args, **kwargs)

    def _has_foreign_keys(self, hidden_states, encoder_hidden_states=None, *_: Any, **__: Any) -> bool:
        """Whether this is self-attention, the first layer of two, with keys of other images."""
        given = encoder_hidden_states is not None and encoder_hidden_states is not hidden_states
        return self.last is not self and given

    def _observe(self, compared: QueriesAndKeys, last: TransformerCapture) -> None:
        geometry, layout, batch = cast(Geometry, last.geometry), last.layout, compared.query.shape[0]
        used, unconditional = layout.rows(batch)
        unconditional *= geometry.frames
        compared = compared.of(slice(batch - used.stop, batch - used.start) if layout.conditional_first else used)
        swap = layout.conditional_first and unconditional > 0
        own, cross = capture_maps(compared, geometry, self.level, self.cell, self.backend)
        last.self_map = last.self_map if own is None else own
        if cross is None:
            return
        own, last.self_map = last.self_map, None
        column = start_column(compared.bias, cross.shape[2], self.start_token)
        if isinstance(column, torch.Tensor):
            column = column.repeat_interleave(geometry.frames, 0)
            column = swapped_halves(column) if swap else column
        if swap:
            cross, own = swapped_halves(cross), None if own is None else swapped_halves(own)
        if own is None and last.paired:
            return  # the self-attention of this block had none to leave
        if own is None:  # linear self-attention has no map: nothing spreads
            last.tokens = cross[unconditional:].transpose(1, 2).contiguous()
            last.start = _column(cross, column)[: unconditional or None]
            return
        if unconditional:
            cross = cross.clone()
            cross[:unconditional, :, 0] = _column(cross, column)[:unconditional]
        last.tokens, start = complete(
            own, cross, unconditional=unconditional, fidelity=self.fidelity, powers=self.powers,
            backend=self.backend,
        )  # fmt: skip
        last.start = start if unconditional else _column(last.tokens.transpose(1, 2), column)


def _column(maps: torch.Tensor, column: torch.Tensor | int) -> torch.Tensor:
    """[B, N, T] -> [B, N]: one column, or one for each sample."""
    if isinstance(column, int):
        return maps[:, :, column].contiguous()
    return maps.gather(2, column[:, None, None].expand(-1, maps.shape[1], 1)).squeeze(2)


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
        kind = class_for(TransformerCapture, inner)
        last = captures[0] if captures else None
        if last is not None:
            last.paired = True
        captures.append(kind(inner, read, config, level, start_token, last=last))
    return tuple(reversed(captures))


def wrap_joint(attn: Attention, read: Reader, config: SCFGConfig) -> JointAttentionCapture:
    """The processor for one layer with added keys, around the one that it has now. Installs nothing."""
    inner: Any = attn.processor
    return class_for(JointAttentionCapture, inner)(inner, read, config)
