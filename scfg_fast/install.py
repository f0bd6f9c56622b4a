"""Capture processors in a denoiser: which objects, for how long, and for whom.

Between calls the model is stock. For one call, or one pass of a modular pipeline, a denoiser is claimed, its chosen
layers get capture processors, and at the end the very objects that were there are back.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .capture import BlockInfo, choose_layers
from .config import SCFGConfig
from .processors import CrossAttentionCapture, SelfAttentionCapture, find_blocks, wrap_block

IN_USE = (
    "scfg_fast: this denoiser is inside another S-CFG call. Pipelines that share a denoiser must run one after another."
)

_CLAIMED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_CLAIM_LOCK = threading.Lock()


@dataclass(frozen=True)
class CapturedBlock:
    """A block and its two processors; kept between calls, so that compiled graphs find the same objects."""

    info: BlockInfo
    own: SelfAttentionCapture
    cross: CrossAttentionCapture


class CaptureSet:
    """The capture processors that one user of a denoiser has, made when they are first needed.

    They hold on to the model's own processors only while they are installed.
    """

    def __init__(self) -> None:
        self._blocks: list[CapturedBlock] = []
        self._inner: list[weakref.ref] = []
        self._settings: tuple = ()

    def blocks(self, unet: torch.nn.Module, config: SCFGConfig) -> list[CapturedBlock]:
        """Processors for the chosen blocks: those of the last time, unless something under them changed.

        Raises:
            ValueError: the model has none of the layers that `config` names.
        """
        if config.rates != "regions":
            return []
        modules: dict[str, Any] = dict((info.name, (info, module)) for info, module in find_blocks(unet))
        chosen = [modules[info.name] for info in choose_layers([info for info, _ in modules.values()], config)]
        inner = [processor for _, module in chosen for processor in (module.attn1.processor, module.attn2.processor)]
        settings = ([info.name for info, _ in chosen], config.fidelity, config.powers, config.backend)
        if self._settings != settings or [reference() for reference in self._inner] != inner:
            self._blocks = [CapturedBlock(info, *wrap_block(module, config)) for info, module in chosen]
            self._inner, self._settings = [weakref.ref(processor) for processor in inner], settings
        for block, own, cross in zip(self._blocks, inner[::2], inner[1::2], strict=True):
            block.own.inner, block.cross.inner = own, cross
        return self._blocks


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module under a `torch.compile` wrapper."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def claimed(unet: torch.nn.Module) -> Iterator[None]:
    """The denoiser for this call alone, from before its processors are read until they are back.

    Raises:
        RuntimeError: it is inside another call, of this thread or another.
    """
    with _CLAIM_LOCK:
        if unet in _CLAIMED:
            raise RuntimeError(IN_USE)
        _CLAIMED.add(unet)
    try:
        yield
    finally:
        with _CLAIM_LOCK:
            _CLAIMED.discard(unet)


@contextlib.contextmanager
def installed(unet: torch.nn.Module, blocks: Sequence[CapturedBlock]) -> Iterator[None]:
    """The capture processors in place of the user's, which come back, the very objects, whatever happens.

    A processor with weights of its own (IP-Adapter) is a registered submodule. It stays one: the capture processor goes
    into the layer's `__dict__`, where attribute access looks first, so offloading and `state_dict` miss nothing.
    """
    before: list[tuple[dict[str, Any], bool, Any]] = []
    try:
        for block in blocks:
            module: Any = unet.get_submodule(block.info.name)
            for attn, processor in ((module.attn1, block.own), (module.attn2, block.cross)):
                for store in (attn.__dict__, attn._modules):
                    before.append((store, "processor" in store, store.get("processor")))
                attn.__dict__["processor"] = processor
        yield
    finally:
        for store, present, processor in reversed(before):
            if present:
                store["processor"] = processor
            else:
                store.pop("processor", None)
        for block in blocks:
            block.own.self_map = block.cross.tokens = block.cross.start = None
            block.own.inner = block.cross.inner = None  # it may have weights that the user unloads between calls
