"""Capture processors in a denoiser: which objects, for how long, and for whom.

A denoiser is claimed for one call, or for one pass of a modular pipeline. Its chosen layers get capture processors for
one evaluation at a time. Between evaluations, so in the user's callbacks too, each layer has the user's own processor,
and what the user does to it holds.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

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

    def prepare(self, layout: BatchLayout, geometry: Geometry) -> None:
        """For the next evaluation of the denoiser."""
        self.captures[-1].layout, self.captures[-1].geometry = layout, geometry


class CaptureSet:
    """The capture processors that one user of a denoiser has, made when they are first needed.

    They hold on to the model and to its own processors only while they are installed.
    """

    def __init__(self) -> None:
        self.blocks: list[CapturedBlock] = []
        self.kinds: list[list[weakref.ref[type]]] = []
        """Per block, the classes of the processors that its own were made for."""
        self._settings: tuple = ()

    def choose(self, model: torch.nn.Module, config: SCFGConfig) -> Installation:
        """The chosen blocks of a model, with the processors of the last time unless the settings changed.

        Raises:
            ValueError: the model has none of the layers that `config` names.
        """
        denoiser = denoiser_of(model)
        chosen: list[tuple[BlockInfo, torch.nn.Module]] = []
        if config.rates == "regions" and denoiser is not None:
            modules = {info.name: (info, module) for info, module in denoiser.blocks(model)}
            chosen = [modules[info.name] for info in choose_layers([info for info, _ in modules.values()], config)]
        settings = ([info.name for info, _ in chosen], config.cell, config.fidelity, config.powers, config.backend)
        if self._settings != settings:
            self.blocks, self.kinds, self._settings = [], [], settings
        installation = Installation(self, denoiser, config, chosen)
        installation.renew()
        return installation


class Installation:
    """Capture processors in the layers of one model, as a context manager: for one evaluation of the model.

    A processor with weights of its own (IP-Adapter) is a registered submodule. It stays one: the capture processor goes
    into the layer's `__dict__`, where attribute access looks first, so offloading and `state_dict` miss nothing.
    """

    def __init__(
        self,
        captures: CaptureSet,
        denoiser: Denoiser | None,
        config: SCFGConfig,
        modules: Sequence[tuple[BlockInfo, torch.nn.Module]],
    ) -> None:
        self._captures = captures
        self._denoiser = denoiser
        self._config = config
        self._modules = modules
        names = () if denoiser is None else denoiser.layers()
        self._layers: list[list[Any]] = [[module.get_submodule(name) for name in names] for _, module in modules]
        self._before: list[tuple[dict[str, Any], Any, Any]] = []

    @property
    def blocks(self) -> list[CapturedBlock]:
        """The blocks, in the order of the model."""
        return self._captures.blocks

    def renew(self) -> None:
        """Make processors for the blocks whose own are of another class than those before."""
        blocks, kinds = self._captures.blocks, self._captures.kinds
        for place, ((info, module), layers) in enumerate(zip(self._modules, self._layers, strict=True)):
            present = [type(layer.processor) for layer in layers]
            if place < len(blocks) and [kind() for kind in kinds[place]] == present:
                continue
            denoiser = cast(Denoiser, self._denoiser)
            info, captures = denoiser.wrap(info, module, self._config)
            blocks[place : place + 1] = [CapturedBlock(info, denoiser.layers(), captures)]
            kinds[place : place + 1] = [[weakref.ref(kind) for kind in present]]
            for capture in captures:
                capture.release()

    def __enter__(self) -> Installation:
        self.renew()
        for block, layers in zip(self.blocks, self._layers, strict=True):
            if any(type(layer.processor).__name__.startswith("PAG") for layer in layers):
                continue  # perturbed-attention guidance: the pipeline spoils these layers in a part of the batch
            for capture, layer in zip(block.captures, layers, strict=True):
                capture.inner = layer.processor
                self._before.append((layer.__dict__, layer.__dict__.get("processor"), capture))
                layer.__dict__["processor"] = capture
        return self

    def __exit__(self, *_: object) -> None:
        for store, processor, capture in reversed(self._before):
            if store.get("processor") is capture:  # or somebody has put another one there
                if processor is None:
                    del store["processor"]
                else:
                    store["processor"] = processor
            capture.release()
        self._before.clear()


@dataclass(frozen=True)
class HookedDenoiser:
    """A denoiser of a call: how it is read, and what is captured in it."""

    module: torch.nn.Module
    denoiser: Denoiser
    installation: Installation

    @property
    def blocks(self) -> list[CapturedBlock]:
        return self.installation.blocks

    def put_in(self, layout: BatchLayout, geometry: Geometry) -> None:
        """Capture the next evaluation."""
        self.installation.__enter__()
        for block in self.blocks:
            block.prepare(layout, geometry)

    def take_out(self) -> list[tuple[BlockInfo, BlockMaps]]:
        """What every block left; the model is stock again."""
        left = [(block.info, block.take()) for block in self.blocks]
        self.installation.__exit__()
        return left


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


@contextlib.contextmanager
def evaluations(model: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Gives a function that says how often an object that a pipeline calls was called inside the block."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    with hooked(model, counted, lambda: None, lambda *_: None):
        yield lambda: count


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
        if any(
            not _is_from(hook, __package__) for hook in (*_hooks(module, "forward"), *_hooks(module, "forward_pre"))
        ):
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
