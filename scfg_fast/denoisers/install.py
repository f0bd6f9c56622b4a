"""Capture processors in a denoiser: which objects, for how long, and for whom.

Between two evaluations the model is stock: the user's own processors are in it, whatever they are by then. For one
evaluation whose maps are wanted, the chosen layers get capture processors around them. A call, or a pass of a modular
pipeline, claims the denoiser, so that no other puts captures into it.
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


class CapturedBlock:
    """A block and its capture processors; kept between calls, so that compiled graphs find the same objects.

    It keeps neither the model nor the user's processors alive: of these, it remembers the classes.

    Attributes:
        info: the block.
        layers: names of its captured attention modules, in the order in which they run; "" for the block itself.
        captures: their processors; the last one holds what the block leaves.
    """

    def __init__(self, info: BlockInfo, module: torch.nn.Module, denoiser: Denoiser, config: SCFGConfig) -> None:
        self.info = info
        self.layers = denoiser.layers()
        self.captures: tuple[Any, ...] = ()
        self._module = weakref.ref(module)
        self._denoiser, self._config, self._found = denoiser, config, info
        self._classes: list[weakref.ref[type]] = []

    def is_of(self, module: torch.nn.Module) -> bool:
        """Whether this is the block that it was made for."""
        return self._module() is module

    def put_in(self, layout: BatchLayout, geometry: Geometry) -> None:
        """Capture the next evaluation, around the processors that the layers have now.

        A processor with weights of its own (IP-Adapter) is a registered submodule. It stays one: the capture processor
        goes into the layer's `__dict__`, where attribute access looks first.
        """
        attentions = self._attentions()
        processors = [attn.processor for attn in attentions]
        if any(type(processor).__name__.startswith("PAG") for processor in processors):
            return  # perturbed-attention guidance, whose layers the pipeline chose to spoil in a part of the batch
        classes: list[type] = [type(processor) for processor in processors]
        if [reference() for reference in self._classes] != classes:
            self.info, self.captures = self._denoiser.wrap(self._found, self._block(), self._config)
            self._classes = [weakref.ref(cls) for cls in classes]
        self.captures[-1].layout, self.captures[-1].geometry = layout, geometry
        for attn, capture, processor in zip(attentions, self.captures, processors, strict=True):
            capture.inner = processor
            attn.__dict__["processor"] = capture

    def take_out(self) -> BlockMaps:
        """What the block left. The user's processors are back, the very objects; what was changed meanwhile stays."""
        if not self.captures or self._module() is None:
            return BlockMaps(None, None)
        last = self.captures[-1]
        maps = BlockMaps(last.tokens, last.start)
        for attn, capture in zip(self._attentions(), self.captures, strict=True):
            if attn.__dict__.get("processor") is capture:
                del attn.__dict__["processor"]
                if "processor" not in attn._modules:
                    attn.__dict__["processor"] = capture.inner
            capture.release()
        return maps

    def _block(self) -> Any:
        return self._module()

    def _attentions(self) -> list[Any]:
        block = self._block()
        return [getattr(block, name) if name else block for name in self.layers]


class CaptureSet:
    """The captured blocks that one user of a denoiser has, made when they are first needed."""

    def __init__(self) -> None:
        self._blocks: list[CapturedBlock] = []
        self._settings: tuple = ()

    def blocks(self, model: torch.nn.Module, config: SCFGConfig) -> list[CapturedBlock]:
        """The chosen blocks: those of the last time, unless the model or the configuration is another.

        Raises:
            ValueError: the model has none of the layers that `config` names.
        """
        denoiser = denoiser_of(model)
        if config.rates != "regions" or denoiser is None:
            return []
        found = list(denoiser.blocks(model))
        modules = {info.name: module for info, module in found}
        chosen = choose_layers([info for info, _ in found], config)
        settings = ([info.name for info in chosen], config.cell, config.fidelity, config.powers, config.backend)
        known = self._settings == settings and all(block.is_of(modules[block.info.name]) for block in self._blocks)
        if not known:
            self._blocks = [CapturedBlock(info, modules[info.name], denoiser, config) for info in chosen]
            self._settings = settings
        return self._blocks


@dataclass(frozen=True)
class HookedDenoiser:
    """A denoiser of a call: how it is read, and what is captured in it."""

    module: torch.nn.Module
    denoiser: Denoiser
    blocks: Sequence[CapturedBlock]

    def put_in(self, layout: BatchLayout, geometry: Geometry) -> None:
        """Capture the next evaluation."""
        for block in self.blocks:
            block.put_in(layout, geometry)

    def take_out(self) -> list[tuple[BlockInfo, BlockMaps]]:
        """What every block left; the model is stock again."""
        left = [(block, block.take_out()) for block in self.blocks]
        return [(block.info, maps) for block, maps in left]


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module under a `torch.compile` wrapper."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def claimed(model: torch.nn.Module) -> Iterator[None]:
    """The denoiser for this call alone.

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
def hooked(
    model: torch.nn.Module, before: Callable[..., Any], end: Callable[[], None], after: Callable[..., Any]
) -> Iterator[None]:
    """Around every evaluation of an object that a pipeline calls, with keyword arguments.

    A model that was compiled in place traces its hooks into the graph, so there the compiled call itself is wrapped;
    `before` cannot change its arguments.

    Args:
        model: the object.
        before: the last pre-hook, (module, args, kwargs).
        end: called first after the evaluation, also if it raised an `Exception`; before the user's own hooks.
        after: the last hook, (module, args, kwargs, output). Also called after an `Exception`, with output None.
    """
    compiled = model.__dict__.get("_compiled_call_impl")
    with contextlib.ExitStack() as undo:
        if compiled is None:
            undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
            first = model.register_forward_hook(lambda *_: end(), prepend=True, always_call=True)
            undo.callback(first.remove)
            undo.callback(model.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        else:

            def call(*args, **kwargs):
                output = rewritten = None
                try:
                    before(model, args, kwargs)
                    output = compiled(*args, **kwargs)
                finally:
                    end()
                    rewritten = after(model, args, kwargs, output)
                return output if rewritten is None else rewritten

            undo.callback(setattr, model, "_compiled_call_impl", compiled)
            model._compiled_call_impl = call
        yield


HARMLESS_HOOKS = {"group_offloading", "layerwise_casting", "peft_autocast_disable"}
"""Hooks of diffusers that do not look at the batch."""


def can_halve(denoiser: torch.nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether an evaluation may have the conditional half of the batch alone. Walks through all modules.

    Not where another batch size would cost a compilation, or meet features cached from a full step: caches replace the
    forward of blocks, or are diffusers hooks (offloading and casting do so too and are harmless). Not where somebody
    looks at the batch: hooks, and attention processors that are not diffusers' own. Not with attention arguments, whose
    batch dimension is unknown.
    """
    if arguments.get("cross_attention_kwargs"):
        return False
    for module in denoiser.modules():
        state = vars(module)
        if hasattr(module, "_orig_mod") or state.get("_compiled_call_impl") is not None:
            return False
        registry = state.get("_diffusers_hook")
        if registry is not None and not set(registry.hooks) <= HARMLESS_HOOKS:
            return False
        if "forward" in state and registry is None and "_hf_hook" not in state:
            return False
        if any(not _is_from(hook, __package__) for hook in (*_hooks(module, "forward"), *_hooks(module, "forward_pre"))):
            return False
        processor = getattr(module, "processor", None)
        if processor is not None and not _is_from(type(processor), "diffusers"):
            return False
    return True


def _hooks(module: torch.nn.Module, kind: str) -> list[Any]:
    return list(getattr(module, f"_{kind}_hooks").values())


def _is_from(thing: Any, package: str | None) -> bool:
    """Whether a class or a function is defined in a package."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] == str(package).partition(".")[0]
