"""enable, disable, disabled, supports: putting S-CFG into a pipeline and taking it out again.

`enable` changes one thing: the pipeline object's class becomes a subclass, with the same name, whose `__call__`
installs the processors and the hooks, runs the original call, and restores everything in a `finally`. Between calls the
model is stock: the same processor objects, no hooks. So loading adapters, switching attention backends, compiling,
saving and `from_pipe` see what they expect.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # `diffusers` shows type checkers a placeholder
from scfg_kernels import available_backends

from .capture import choose_layers
from .config import SCFGConfig
from .families import FAMILIES, family_of, read_call
from .guidance.steps import StepWeight
from .hooks import IN_USE, CapturedBlock, GuidanceHook, Stats
from .processors import find_blocks, wrap_block
from .regions import Regions

_HANDLES: weakref.WeakKeyDictionary[DiffusionPipeline, Handle] = weakref.WeakKeyDictionary()
_CLAIMED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # denoisers inside an S-CFG call
_CLAIM_LOCK = threading.Lock()


class UnsupportedPipelineError(ValueError):
    """The pipeline cannot run S-CFG; the message lists every reason."""


@dataclass(frozen=True)
class Support:
    """Whether a pipeline can run S-CFG.

    Attributes:
        supported: True if `enable` will accept it.
        reasons: why not; empty if supported.
        layers: names of the transformer blocks that would be captured with the given configuration.
    """

    supported: bool
    reasons: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.supported:
            return f"supported: {len(self.layers)} layers captured ({', '.join(self.layers)})"
        return "not supported: " + "; ".join(self.reasons)


class Handle:
    """What `enable` returns: the configuration, and what the last call did.

    Attributes:
        config: the configuration of the next call; assign another `SCFGConfig` to change it.
        schedule: a `scfg_fast.guidance` rule for the weight of each step, or None for the pipeline's guidance_scale.
        on_regions: called as `on_regions(step, regions)` after every guided step, or None.
        strict: raise instead of warning where S-CFG must leave a step to plain guidance.
        stats: `Stats` of the last call.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = weakref.ref(pipe)
        self._original_class = type(pipe)
        self._enabled = True
        self._blocks: list[CapturedBlock] = []
        self._blocks_of: tuple = ()
        self._regions: Regions | None = None
        self._config = SCFGConfig()
        self.schedule: StepWeight | None = None
        self.on_regions: Callable[[int, Regions], None] | None = None
        self.strict = False
        self.stats = Stats()

    @property
    def config(self) -> SCFGConfig:
        return self._config

    @config.setter
    def config(self, config: SCFGConfig) -> None:
        self._config = _checked(config)

    @property
    def regions(self) -> Regions | None:
        """A copy of the regions of the last guided step, or None before the first."""
        return None if self._regions is None else self._regions.clone()

    def disable(self) -> None:
        """Take S-CFG out of the pipeline; the same as `scfg_fast.disable(pipe)`."""
        pipe = self._pipe()
        if pipe is not None:
            disable(pipe)

    def __repr__(self) -> str:
        return f"<scfg_fast.Handle on {self._original_class.__name__}: {self.stats.steps_applied} steps applied>"

    def _call(self, pipe: DiffusionPipeline, args: tuple, kwargs: dict, overrides: dict[str, Any] | None) -> Any:
        """Run the original `__call__` with S-CFG installed."""
        original = self._original_class.__call__
        overrides = dict(overrides or {})
        enabled = overrides.pop("enabled", True)
        schedule = overrides.pop("schedule", self.schedule)
        config = self.config.replace(**overrides) if overrides else self.config
        if not (self._enabled and enabled):
            self._regions, self.stats = None, Stats()
            return original(pipe, *args, **kwargs)
        try:
            bound = inspect.signature(original).bind(pipe, *args, **kwargs)
        except TypeError:
            return original(pipe, *args, **kwargs)  # raises the pipeline's own error about its arguments
        bound.apply_defaults()
        context = read_call(pipe, bound.arguments, config, schedule)
        if context is None:
            return original(pipe, *args, **kwargs)  # no usable prompt: the pipeline's own check says so
        unet = _unwrap(pipe.unet)
        with _claimed(unet):
            blocks = self._captured_blocks(unet, config)
            self._regions, self.stats = None, Stats(tuple(block.info.name for block in blocks), _backends(pipe, config))
            hook = GuidanceHook(config, blocks, context, self.stats, self._publish, self.strict)
            with _installed(unet, blocks):
                try:
                    hook.install(pipe.unet)
                    return original(pipe, *args, **kwargs)
                finally:
                    hook.remove()

    def _publish(self, step: int, regions: Regions) -> None:
        self._regions = regions
        if self.on_regions is not None:
            self.on_regions(step, regions)

    def _captured_blocks(self, unet: torch.nn.Module, config: SCFGConfig) -> list[CapturedBlock]:
        """Processors for the chosen blocks: those of the last call, unless something under them changed."""
        if config.rates == "none":
            return []
        modules = {info.name: (info, module) for info, module in find_blocks(unet)}
        chosen = choose_layers([info for info, _ in modules.values()], config)
        inner = tuple(
            (info.name, modules[info.name][1].attn1.processor, modules[info.name][1].attn2.processor) for info in chosen
        )
        capture_settings = (config.fidelity, config.powers, config.backend)
        key = (inner, capture_settings)
        if not (self._blocks and _same_objects(key, self._blocks_of)):
            self._blocks = [CapturedBlock(info, *wrap_block(modules[info.name][1], config)) for info in chosen]
            self._blocks_of = key
        return self._blocks

    def _forget(self) -> None:
        """Drop the processors kept between calls; they hold on to those of the model."""
        self._blocks, self._blocks_of = [], ()


def _same_objects(a: tuple, b: tuple) -> bool:
    """Whether two keys of `_captured_blocks` name the same processor objects and the same settings."""
    if a[1] != b[1] or len(a[0]) != len(b[0]):
        return False
    return all(x[0] == y[0] and x[1] is y[1] and x[2] is y[2] for x, y in zip(a[0], b[0], strict=True))


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module under a `torch.compile` wrapper."""
    return getattr(module, "_orig_mod", module)


def _backends(pipe: DiffusionPipeline, config: SCFGConfig) -> dict[str, str]:
    """Operator -> backend for the device that the pipeline will run on and its denoiser's dtype."""
    table = available_backends(pipe._execution_device, pipe.unet.dtype)
    return {op: chosen if config.backend == "auto" else config.backend for op, (chosen, _) in table.items()}


@contextlib.contextmanager
def _claimed(unet: torch.nn.Module) -> Iterator[None]:
    """The denoiser for this call alone, from before its processors are read until they are back."""
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
def _installed(unet: torch.nn.Module, blocks: list[CapturedBlock]) -> Iterator[None]:
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


@functools.cache
def _intercepted(base: type) -> type:
    """A subclass of a pipeline class, with its name, whose call goes through the handle."""

    def __call__(self, *args, scfg_kwargs: dict[str, Any] | None = None, **kwargs):
        handle = _HANDLES.get(self)
        if handle is None:
            return base.__call__(self, *args, **kwargs)
        return handle._call(self, args, kwargs, scfg_kwargs)

    def __reduce_ex__(self, protocol):
        # Copies and pickles are plain pipelines: S-CFG belongs to the object that enable() was called on, and a pickle
        # must load where this package is not installed.
        _, _, *rest = cast(Any, base).__reduce_ex__(self, protocol)
        return (object.__new__, (base,), *rest)

    signature = inspect.signature(base.__call__)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter("scfg_kwargs", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="dict | None")
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    parameters.insert(at, extra)
    __call__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    __call__.__doc__ = base.__call__.__doc__
    namespace = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), namespace)


def _checked(config: Any) -> SCFGConfig:
    if not isinstance(config, SCFGConfig):
        raise TypeError(
            f"scfg_fast: config must be an SCFGConfig, got a {type(config).__name__}; write SCFGConfig(**values)"
        )
    return config


def supports(pipe: DiffusionPipeline, config: SCFGConfig | None = None) -> Support:
    """Whether `enable(pipe, config)` will work, with every reason if not. Changes nothing.

    Args:
        pipe: any diffusers pipeline.
        config: the configuration to judge; default `SCFGConfig()`.
    """
    config = _checked(config or SCFGConfig())
    if family_of(pipe) is None:
        families = ", ".join(family.name for family in FAMILIES)
        return Support(False, [f"{type(pipe).__name__} is not supported; this version supports {families} pipelines"])
    unet = _unwrap(pipe.unet)
    if not isinstance(unet, UNet2DConditionModel):
        return Support(
            False, [f"the denoiser is a {type(unet).__name__}, S-CFG reads the attention of a UNet2DConditionModel"]
        )
    reasons = []
    if cast(Any, unet.config).time_cond_proj_dim is not None:
        reasons.append("the UNet is distilled (time_cond_proj_dim): it runs without classifier-free guidance")
    layers: list[str] = []
    try:
        if config.rates != "none":
            layers = [info.name for info in choose_layers([info for info, _ in find_blocks(unet)], config)]
    except ValueError as error:
        reasons.append(str(error))
    if config.backend == "triton":
        ops_of: dict[str, list[str]] = {}
        for op, (_, why) in available_backends(pipe._execution_device, unet.dtype).items():
            for reason in why:
                ops_of.setdefault(reason, []).append(op)
        reasons += [f"backend='triton' cannot run: {reason} ({', '.join(ops)})" for reason, ops in ops_of.items()]
    return Support(not reasons, reasons, layers)


def enable(
    pipe: DiffusionPipeline,
    config: SCFGConfig | None = None,
    *,
    schedule: StepWeight | None = None,
    on_regions: Callable[[int, Regions], None] | None = None,
    strict: bool = False,
) -> Handle:
    """Turn semantic-aware guidance on for a pipeline object. Every later `pipe(...)` uses it, until `disable`.

    Args:
        pipe: an unmodified diffusers pipeline (see `supports`).
        config: parameters; default `SCFGConfig()`, the published code's.
        schedule: weight of each step in the place of guidance_scale, for example
            `scfg_fast.guidance.WeightSchedule("linear")` or `CFGPlusPlus(0.6)`. Composes with S-CFG; with
            `SCFGConfig(rates="none")` it works alone.
        on_regions: called as `on_regions(step, regions)` after every guided step.
        strict: raise `SCFGError` instead of warning when a step or a layer must be left to plain guidance.

    Returns:
        The pipeline's handle. A second call on the same pipeline changes the settings of the same handle.

    Raises:
        UnsupportedPipelineError: the pipeline cannot run S-CFG; lists every reason.

    Per call, `pipe(..., scfg_kwargs={"enabled": False})` is plain guidance, and `schedule` or any `SCFGConfig` field
    may be overridden the same way.
    """
    config = config or SCFGConfig()
    support = supports(pipe, config)
    if not support.supported:
        raise UnsupportedPipelineError(f"scfg_fast.enable: {'; '.join(support.reasons)}")
    handle = _HANDLES.get(pipe)
    if handle is None:
        handle = Handle(pipe)
        original: type = type(pipe)
        pipe.__class__ = _intercepted(original)
        _HANDLES[pipe] = handle
    handle.config, handle.schedule, handle.on_regions, handle.strict = config, schedule, on_regions, strict
    return handle


def disable(pipe: DiffusionPipeline) -> None:
    """Take S-CFG out of a pipeline. Harmless if it is not in."""
    handle = _HANDLES.pop(pipe, None)
    if handle is not None:
        pipe.__class__ = handle._original_class
        handle._forget()


@contextlib.contextmanager
def disabled(pipe: DiffusionPipeline) -> Iterator[None]:
    """Plain guidance inside the block, bit-identical to a pipeline without S-CFG. Harmless if it is not in."""
    handle = _HANDLES.get(pipe)
    before = handle._enabled if handle is not None else False
    try:
        if handle is not None:
            handle._enabled = False
        yield
    finally:
        if handle is not None:
            handle._enabled = before
