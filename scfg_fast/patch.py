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
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # `diffusers` shows type checkers a placeholder
from scfg_kernels import available_backends

from .capture.layers import choose_layers
from .config import SCFGConfig
from .denoisers.base import Denoiser
from .denoisers.install import CaptureSet, HookedDenoiser, claimed, unwrap
from .denoisers.registry import denoiser_of
from .denoisers.unet import UNet
from .guidance.characteristic import CharacteristicGuidance
from .guidance.loss import LossGuidance
from .guidance.steps import StepWeight
from .pipelines.call import read_call
from .pipelines.families import cells_of, default_config, denoisers_of, family_of, why_not, with_benchmark
from .regions import Regions
from .step.context import Stats
from .step.hook import GuidanceHook

_HANDLES: weakref.WeakKeyDictionary[DiffusionPipeline, Handle] = weakref.WeakKeyDictionary()


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
        characteristic: settings of Characteristic Guidance, or None.
        loss: settings of loss guidance, or None.
        on_regions: called as `on_regions(step, regions)` after every guided step, or None.
        strict: raise instead of warning where S-CFG must leave a step to plain guidance.
        stats: `Stats` of the last call.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = weakref.ref(pipe)
        self._original_class = type(pipe)
        self._enabled = True
        self._captures = (CaptureSet(), CaptureSet())  # Wan 2.2 has two denoisers
        self._regions: Regions | None = None
        self._config = SCFGConfig()
        self._schedule: StepWeight | None = None
        self._characteristic: CharacteristicGuidance | None = None
        self._loss: LossGuidance | None = None
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
    def schedule(self) -> StepWeight | None:
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: StepWeight | None) -> None:
        self._schedule = _checked_schedule(schedule)

    @property
    def characteristic(self) -> CharacteristicGuidance | None:
        return self._characteristic

    @characteristic.setter
    def characteristic(self, settings: CharacteristicGuidance | None) -> None:
        self._characteristic = _checked_settings("characteristic", settings, CharacteristicGuidance)

    @property
    def loss(self) -> LossGuidance | None:
        return self._loss

    @loss.setter
    def loss(self, settings: LossGuidance | None) -> None:
        self._loss = _checked_settings("loss", settings, LossGuidance)

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
        schedule = _checked_schedule(overrides.pop("schedule", self.schedule))
        characteristic = _checked_settings(
            "characteristic", overrides.pop("characteristic", self.characteristic), CharacteristicGuidance
        )
        loss = _checked_settings("loss", overrides.pop("loss", self.loss), LossGuidance)
        config = self.config.replace(**overrides) if overrides else self.config
        if not (self._enabled and enabled):
            self._regions, self.stats = None, Stats()
            return original(pipe, *args, **kwargs)
        try:
            bound = inspect.signature(original).bind(pipe, *args, **kwargs)
        except TypeError:
            return original(pipe, *args, **kwargs)  # raises the pipeline's own error about its arguments
        bound.apply_defaults()
        context = read_call(pipe, bound.arguments, config, schedule, characteristic, loss)
        if context is None:
            return original(pipe, *args, **kwargs)  # no usable prompt: the pipeline's own check says so
        config = with_benchmark(pipe, cells_of(pipe, config))
        called = denoisers_of(pipe)
        models = [unwrap(denoiser) for denoiser in called]
        with contextlib.ExitStack() as undo:
            for model in models:
                undo.enter_context(claimed(model))
            hooked = [
                HookedDenoiser(model, cast(Denoiser, denoiser_of(model)), captures.blocks(model, config))
                for model, captures in zip(models, self._captures, strict=False)
            ]
            blocks = [block for each in hooked for block in each.blocks]
            names = tuple(dict.fromkeys(block.info.name for block in blocks))  # two denoisers have the same
            self._regions, self.stats = None, Stats(names, _backends(pipe, config))
            hook = GuidanceHook(config, hooked, context, self.stats, self._publish, self.strict)
            undo.callback(hook.remove)
            hook.install(called)
            args, kwargs = hook.watch_callbacks(inspect.signature(original), args, kwargs)
            return original(pipe, *args, **kwargs)

    def _publish(self, step: int, regions: Regions) -> None:
        self._regions = regions
        if self.on_regions is not None:
            self.on_regions(step, regions)


def _backends(pipe: DiffusionPipeline, config: SCFGConfig) -> dict[str, str]:
    """Operator -> backend for the device that the pipeline will run on and its denoiser's dtype."""
    table = available_backends(pipe._execution_device, denoisers_of(pipe)[0].dtype)
    return {op: chosen if config.backend == "auto" else config.backend for op, (chosen, _) in table.items()}


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


def _checked_schedule(schedule: Any) -> StepWeight | None:
    if schedule is not None and (isinstance(schedule, type) or not isinstance(schedule, StepWeight)):
        raise TypeError(
            f"scfg_fast: schedule must be a rule of scfg_fast.guidance or None, got {schedule!r}; write for example "
            "WeightSchedule('linear')"
        )
    return schedule


_Settings = TypeVar("_Settings")


def _checked_settings(name: str, settings: Any, kind: type[_Settings]) -> _Settings | None:
    if settings is not None and not isinstance(settings, kind):
        raise TypeError(f"scfg_fast: {name} must be a {kind.__name__} or None, got {settings!r}")
    return settings


def supports(pipe: DiffusionPipeline, config: SCFGConfig | None = None) -> Support:
    """Whether `enable(pipe, config)` will work, with every reason if not. Changes nothing.

    Args:
        pipe: any diffusers pipeline.
        config: the configuration to judge; default as for `enable`.
    """
    config = _checked(default_config(pipe) if config is None else config)
    family = family_of(pipe)
    if family is None:
        return Support(False, [why_not(pipe)])
    reasons = []
    layers: list[str] = []
    for called in denoisers_of(pipe):
        model = unwrap(called)
        denoiser = denoiser_of(model)
        if denoiser is None or isinstance(denoiser, UNet) != (family.denoisers == ("unet",)):
            reasons.append(f"the denoiser is a {type(model).__name__}, whose attention S-CFG cannot read")
            continue
        if getattr(cast(Any, model.config), "time_cond_proj_dim", None) is not None:
            reasons.append("the UNet is distilled (time_cond_proj_dim): it runs without classifier-free guidance")
        try:
            if config.rates == "regions":
                layers += [info.name for info in choose_layers([info for info, _ in denoiser.blocks(model)], config)]
        except ValueError as error:
            reasons.append(str(error))
    if config.backend == "triton":
        ops_of: dict[str, list[str]] = {}
        for op, (_, why) in available_backends(pipe._execution_device, denoisers_of(pipe)[0].dtype).items():
            for reason in why:
                ops_of.setdefault(reason, []).append(op)
        reasons += [f"backend='triton' cannot run: {reason} ({', '.join(ops)})" for reason, ops in ops_of.items()]
    return Support(not reasons, reasons, list(dict.fromkeys(layers)))


def enable(
    pipe: DiffusionPipeline,
    config: SCFGConfig | None = None,
    *,
    schedule: StepWeight | None = None,
    characteristic: CharacteristicGuidance | None = None,
    loss: LossGuidance | None = None,
    on_regions: Callable[[int, Regions], None] | None = None,
    strict: bool = False,
) -> Handle:
    """Turn semantic-aware guidance on for a pipeline object. Every later `pipe(...)` uses it, until `disable`.

    Args:
        pipe: an unmodified diffusers pipeline (see `supports`).
        config: parameters; default the published code's: `SCFGConfig()`, but for DeepFloyd IF
            `SCFGConfig.deepfloyd()`.
        schedule: weight of each step in the place of guidance_scale, for example
            `scfg_fast.guidance.WeightSchedule("linear")` or `CFGPlusPlus(0.6)`. Composes with S-CFG; with
            `SCFGConfig(rates="none")` it works alone.
        characteristic: `scfg_fast.guidance.CharacteristicGuidance(...)`, or None. Takes further evaluations.
        loss: `scfg_fast.guidance.LossGuidance(loss_fn, ...)`, or None. Takes a further evaluation and its gradient.
        on_regions: called as `on_regions(step, regions)` after every guided step.
        strict: raise `SCFGError` instead of warning when a step or a layer must be left to plain guidance.

    Returns:
        The pipeline's handle. A second call on the same pipeline changes the settings of the same handle.

    Raises:
        UnsupportedPipelineError: the pipeline cannot run S-CFG; lists every reason.

    Per call, `pipe(..., scfg_kwargs={"enabled": False})` is plain guidance, and `schedule`, `characteristic`, `loss` or
    any `SCFGConfig` field may be overridden the same way.
    """
    config, schedule = default_config(pipe) if config is None else config, _checked_schedule(schedule)
    characteristic = _checked_settings("characteristic", characteristic, CharacteristicGuidance)
    loss = _checked_settings("loss", loss, LossGuidance)
    support = supports(pipe, config)
    if not support.supported:
        raise UnsupportedPipelineError(f"scfg_fast.enable: {'; '.join(support.reasons)}")
    handle = _HANDLES.get(pipe)
    if handle is None:
        handle = Handle(pipe)
        original: type = type(pipe)
        pipe.__class__ = _intercepted(original)
        _HANDLES[pipe] = handle
    handle.config, handle.schedule, handle.characteristic, handle.loss = config, schedule, characteristic, loss
    handle.on_regions, handle.strict = on_regions, strict
    return handle


def disable(pipe: DiffusionPipeline) -> None:
    """Take S-CFG out of a pipeline. Harmless if it is not in."""
    handle = _HANDLES.pop(pipe, None)
    if handle is not None:
        pipe.__class__ = handle._original_class


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
