"""Capture processors in a denoiser: which objects, for how long, and for whom.

Between calls the model is stock. For one call, or one pass of a modular pipeline, a denoiser is claimed, its chosen
layers get capture processors, and at the end the very objects that were there are back.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.layers import BlockInfo, choose_layers
from ..capture.maps import BatchLayout, BlockMaps
from ..config import SCFGConfig
from ..layouts import Geometry
from .base import Denoiser
from .registry import denoiser_of

IN_USE = (
    "scfg_fast: this denoiser is inside another S-CFG call. Pipelines that share a denoiser must run one after another."
)

_CLAIMED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_CLAIM_LOCK = threading.Lock()


@dataclass(frozen=True)
class CapturedBlock:
    """A block and its processors; kept between calls, so that compiled graphs find the same objects.

    Attributes:
        info: the block.
        layers: names of its captured attention modules, in the order in which they run; "" for the block itself.
        captures: their processors; the last one holds what the block leaves.
    """

    info: BlockInfo
    layers: tuple[str, ...]
    captures: tuple[Any, ...]

    def take(self) -> BlockMaps:
        """What the block left in its last run; dropped there."""
        last = self.captures[-1]
        maps = BlockMaps(last.tokens, last.start)
        last.tokens = last.start = None
        return maps

    def prepare(self, active: bool, layout: BatchLayout, geometry: Geometry) -> None:
        """For the next run of the denoiser."""
        for capture in self.captures:
            capture.active = active
        self.captures[-1].layout, self.captures[-1].geometry = layout, geometry

    def deactivate(self) -> None:
        """The user's own processors alone, until it is prepared again."""
        for capture in self.captures:
            capture.active = False


class CaptureSet:
    """The capture processors that one user of a denoiser has, made when they are first needed.

    They hold on to the model's own processors only while they are installed.
    """

    def __init__(self) -> None:
        self._blocks: list[CapturedBlock] = []
        self._inner: list[weakref.ref] = []
        self._settings: tuple = ()

    def blocks(self, model: torch.nn.Module, config: SCFGConfig) -> list[CapturedBlock]:
        """Processors for the chosen blocks: those of the last time, unless something under them changed.

        Raises:
            ValueError: the model has none of the layers that `config` names.
        """
        denoiser = denoiser_of(model)
        if config.rates != "regions" or denoiser is None:
            return []
        modules: dict[str, Any] = {info.name: (info, module) for info, module in denoiser.blocks(model)}
        chosen = [modules[info.name] for info in choose_layers([info for info, _ in modules.values()], config)]
        names = denoiser.layers()
        inner = [module.get_submodule(name).processor for _, module in chosen for name in names]
        settings = ([info.name for info, _ in chosen], config.cell, config.fidelity, config.powers, config.backend)
        if self._settings != settings or [reference() for reference in self._inner] != inner:
            wrapped = [denoiser.wrap(info, module, config) for info, module in chosen]
            self._blocks = [CapturedBlock(info, names, captures) for info, captures in wrapped]
            self._inner, self._settings = [weakref.ref(processor) for processor in inner], settings
        captures = [capture for block in self._blocks for capture in block.captures]
        for capture, processor in zip(captures, inner, strict=True):
            capture.inner = processor
        return self._blocks


@dataclass(frozen=True)
class HookedDenoiser:
    """A denoiser of a call: how it is read, and what is captured in it."""

    module: torch.nn.Module
    denoiser: Denoiser
    blocks: Sequence[CapturedBlock]


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module under a `torch.compile` wrapper."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def claimed(model: torch.nn.Module) -> Iterator[None]:
    """The denoiser for this call alone, from before its processors are read until they are back.

    Raises:
        RuntimeError: it is inside another call, of this thread or another.
    """
    with _CLAIM_LOCK:
        if model in _CLAIMED:
            raise RuntimeError(IN_USE)
        _CLAIMED.add(model)
    try:
        yield
    finally:
        with _CLAIM_LOCK:
            _CLAIMED.discard(model)


@contextlib.contextmanager
def installed(model: torch.nn.Module, blocks: Sequence[CapturedBlock]) -> Iterator[None]:
    """The capture processors in place of the user's, which come back, the very objects, whatever happens.

    A processor with weights of its own (IP-Adapter) is a registered submodule. It stays one: the capture processor goes
    into the layer's `__dict__`, where attribute access looks first, so offloading and `state_dict` miss nothing.
    """
    before: list[tuple[dict[str, Any], bool, Any]] = []
    try:
        for block in blocks:
            module = model.get_submodule(block.info.name)
            for name, processor in zip(block.layers, block.captures, strict=True):
                attn: Any = module.get_submodule(name)
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
            for capture in block.captures:
                capture.release()


@contextlib.contextmanager
def hooked(model: torch.nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """A pre-hook and a hook, with keyword arguments, on an object that a pipeline calls.

    A model that was compiled in place traces its hooks into the graph, so there the compiled call itself is wrapped;
    `before` cannot change its arguments.
    """
    compiled = model.__dict__.get("_compiled_call_impl")
    with contextlib.ExitStack() as undo:
        if compiled is None:
            undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        else:

            def call(*args, **kwargs):
                before(model, args, kwargs)
                output = compiled(*args, **kwargs)
                rewritten = after(model, args, kwargs, output)
                return output if rewritten is None else rewritten

            undo.callback(setattr, model, "_compiled_call_impl", compiled)
            model._compiled_call_impl = call
        yield


@contextlib.contextmanager
def evaluations(model: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Gives a function that says how often an object that a pipeline calls was called inside the block."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    with hooked(model, counted, lambda *_: None):
        yield lambda: count


def batch_must_not_change(denoiser: torch.nn.Module) -> bool:
    """Whether a step with another batch size would cost a compilation, or meet features cached from a full step.

    Caches replace the forward of blocks, or are diffusers hooks; offloading and casting do so too and are harmless.
    """
    harmless = {"group_offloading", "layerwise_casting", "peft_autocast_disable"}
    for module in denoiser.modules():
        state = vars(module)
        if hasattr(module, "_orig_mod") or state.get("_compiled_call_impl") is not None:
            return True
        registry = state.get("_diffusers_hook")
        if registry is not None and not set(registry.hooks) <= harmless:
            return True
        if "forward" in state and registry is None and "_hf_hook" not in state:
            return True
    return False
