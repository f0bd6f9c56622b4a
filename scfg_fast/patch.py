"""enable, disable, disabled, supports: putting S-CFG into a pipeline and taking it out again.

`enable` changes one thing: the calls of this pipeline object are intercepted (`interception`). A call installs the
processors and the hooks, runs the original call, and restores everything in a `finally`. Between calls the model is
stock: the same processor objects, no hooks. So loading adapters, switching attention backends, compiling, saving and
`from_pipe` see what they expect.

The arguments are read where the pipeline of diffusers gets them. A subclass of the user's that hands its call on
through `super()`, changed or twice, is guided as the stock pipeline would be. One with a loop of its own is read by the
arguments that it names.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # `diffusers` shows type checkers a placeholder
from scfg_kernels import available_backends

from .capture.layers import choose_layers
from .config import SCFGConfig
from .denoisers.base import Denoiser
from .denoisers.install import CaptureSet, HookedDenoiser, claimed, evaluations, installed, unwrap
from .denoisers.registry import denoiser_of
from .denoisers.unet import UNet
from .guidance.characteristic import CharacteristicGuidance
from .guidance.loss import LossGuidance
from .guidance.steps import StepWeight
from .pipelines.call import names_a_prompt, read_arguments, read_call
from .pipelines.families import (
    Family,
    cells_of,
    default_config,
    denoisers_of,
    family_of,
    stock_class,
    why_not,
    with_benchmark,
)
from .pipelines.interception import hands_on, intercept, original_of, release
from .regions import Regions
from .step.context import SCFGError, SCFGWarning, Stats
from .step.hook import GuidanceHook
from .step.scheduler import stepping

_HANDLES: weakref.WeakKeyDictionary[DiffusionPipeline, Handle] = weakref.WeakKeyDictionary()
_DISABLED: weakref.WeakKeyDictionary[DiffusionPipeline, int] = weakref.WeakKeyDictionary()
"""How many blocks of `disabled` are open; a pipeline with none is not in it."""
_DISABLED_LOCK = threading.Lock()


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
        """Take this handle's S-CFG out of the pipeline. Harmless after a later `enable` made another handle."""
        pipe = self._pipe()
        if pipe is not None and _HANDLES.get(pipe) is self:
            disable(pipe)

    def __repr__(self) -> str:
        return f"<scfg_fast.Handle on {self._original_class.__name__}: {self.stats.steps_applied} steps applied>"

    def _begin(self, pipe: DiffusionPipeline, overrides: dict[str, Any] | None) -> _Call:
        """The settings of one call, from the handle's and the call's own; every one is checked."""
        own = _checked_overrides(overrides)
        enabled = own.pop("enabled", True)
        schedule = _checked_schedule(own.pop("schedule", self.schedule))
        characteristic = _checked_settings(
            "characteristic", own.pop("characteristic", self.characteristic), CharacteristicGuidance
        )
        loss = _checked_settings("loss", own.pop("loss", self.loss), LossGuidance)
        config = self.config.replace(**own) if own else self.config
        self._regions, self.stats = None, Stats()
        return _Call(self, config, schedule, characteristic, loss, enabled and pipe not in _DISABLED)

    def _run(self, pipe: DiffusionPipeline, call: _Call, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run `proceed(*args, **kwargs)`, a call of the pipeline, with S-CFG installed."""
        arguments = read_arguments(pipe, proceed, args, kwargs)
        if arguments is None:
            return proceed(*args, **kwargs)  # raises the pipeline's own error about its arguments
        reasons, _ = _read_denoisers(pipe, call.config)
        if reasons:
            raise UnsupportedPipelineError(f"scfg_fast: {'; '.join(reasons)}. scfg_fast.disable(pipe) makes it stock")
        config = with_benchmark(pipe, cells_of(pipe, call.config))
        context = read_call(pipe, arguments, config, call.schedule, call.characteristic, call.loss)
        if context is None:
            result = proceed(*args, **kwargs)  # the pipeline's own check of its arguments complains
            self._complain("the call has neither prompt nor prompt_embeds by these names")
            return result
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
            self.stats.layers = tuple(dict.fromkeys(block.info.name for block in blocks))  # of two denoisers the same
            self.stats.backend = _backends(pipe, config)
            hook = GuidanceHook(config, hooked, context, self.stats, self._publish, self.strict)
            for each in hooked:
                undo.enter_context(installed(each.module, each.blocks))
            undo.callback(hook.remove)
            for denoiser in called:
                hook.install(denoiser)
            if hook.corrections.around_scheduler:
                undo.enter_context(stepping(pipe.scheduler, hook.corrections.around_step))
            return proceed(*args, **kwargs)

    def _publish(self, step: int, regions: Regions) -> None:
        self._regions = regions
        if self.on_regions is not None:
            self.on_regions(step, regions)

    def _complain(self, reason: str) -> None:
        """Say that a call was not guided.

        Raises:
            SCFGError: under `strict`.
        """
        if self.strict:
            raise SCFGError(f"scfg_fast (strict): {reason}")
        warnings.warn(f"scfg_fast: {reason}. Plain guidance is used instead.", SCFGWarning, stacklevel=2)


@dataclass
class _Call:
    """One call of an enabled pipeline.

    Attributes:
        handle: of the pipeline.
        config, schedule, characteristic, loss: the settings of this call.
        acts: whether S-CFG was not switched off for it.
        inside: whether S-CFG is installed at this moment; what is called in there passes through.
        reached: whether it was installed at any time.
    """

    handle: Handle
    config: SCFGConfig
    schedule: StepWeight | None
    characteristic: CharacteristicGuidance | None
    loss: LossGuidance | None
    acts: bool
    inside: bool = False
    reached: bool = False

    def run(self, pipe: DiffusionPipeline, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The call with S-CFG, or as it is where S-CFG does not act or is there already."""
        if not self.acts or self.inside:
            return proceed(*args, **kwargs)
        self.inside = self.reached = True
        try:
            return self.handle._run(pipe, self, proceed, args, kwargs)
        finally:
            self.inside = False


_CALL: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("scfg_call", default=None)
"""The innermost call of an enabled pipeline that is under way here."""


def _outer(pipe: DiffusionPipeline, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """A call of the pipeline as the user makes it."""
    overrides = kwargs.pop("scfg_kwargs", None)
    handle = _HANDLES.get(pipe)
    if handle is None:
        return proceed(*args, **kwargs)
    call = handle._begin(pipe, overrides)
    before = _CALL.set(call)
    try:
        cls, stock = type(pipe), cast(type, stock_class(pipe))
        own = original_of(cls) or cls
        if not call.acts or own is stock:
            return proceed(*args, **kwargs)
        if not hands_on(own, stock) and names_a_prompt(pipe, proceed, args, kwargs):
            return call.run(pipe, proceed, args, kwargs)
        with contextlib.ExitStack() as undo:
            counts = [undo.enter_context(evaluations(denoiser)) for denoiser in denoisers_of(pipe)]
            result = proceed(*args, **kwargs)
        if not call.reached and any(count() for count in counts):
            handle._complain(
                f"{own.__name__} ran the denoiser without a call of {stock.__name__} through super(), where S-CFG acts"
            )
        return result
    finally:
        _CALL.reset(before)


def _inner(pipe: DiffusionPipeline, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """The same call, or a part of it, as the pipeline of diffusers gets it."""
    overrides = kwargs.pop("scfg_kwargs", None)
    handle = _HANDLES.get(pipe)
    if handle is None:
        return proceed(*args, **kwargs)
    call = _CALL.get()
    if call is None or call.handle is not handle:  # from another thread than the outer call, or not through it
        call = handle._begin(pipe, overrides)
    return call.run(pipe, proceed, args, kwargs)


def _backends(pipe: DiffusionPipeline, config: SCFGConfig) -> dict[str, str]:
    """Operator -> backend for the device that the pipeline will run on and its denoiser's dtype."""
    table = available_backends(pipe._execution_device, denoisers_of(pipe)[0].dtype)
    return {op: chosen if config.backend == "auto" else config.backend for op, (chosen, _) in table.items()}


def _checked_overrides(overrides: Any) -> dict[str, Any]:
    """`scfg_kwargs` of a call, checked, as a copy."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise TypeError(f"scfg_fast: scfg_kwargs must be a dictionary or None, got {overrides!r}")
    enabled = overrides.get("enabled", True)
    if not isinstance(enabled, bool):
        raise TypeError(f"scfg_fast: scfg_kwargs['enabled'] must be True or False, got {enabled!r}")
    return dict(overrides)


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


def _check_pipeline(function: str, pipe: Any) -> None:
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"scfg_fast.{function}: a diffusers pipeline is needed, got a {type(pipe).__name__}")


def _checked_callback(on_regions: Any) -> Callable[[int, Regions], None] | None:
    if on_regions is not None and not callable(on_regions):
        raise TypeError(f"scfg_fast: on_regions must be a function (step, regions) or None, got {on_regions!r}")
    return on_regions


def _checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"scfg_fast: {name} must be True or False, got {value!r}")
    return value


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
    if family_of(pipe) is None:
        return Support(False, [why_not(pipe)])
    reasons, layers = _read_denoisers(pipe, config)
    if config.backend == "triton":
        ops_of: dict[str, list[str]] = {}
        for op, (_, why) in available_backends(pipe._execution_device, denoisers_of(pipe)[0].dtype).items():
            for reason in why:
                ops_of.setdefault(reason, []).append(op)
        reasons += [f"backend='triton' cannot run: {reason} ({', '.join(ops)})" for reason, ops in ops_of.items()]
    return Support(not reasons, reasons, layers)


def _read_denoisers(pipe: DiffusionPipeline, config: SCFGConfig) -> tuple[list[str], list[str]]:
    """Why S-CFG cannot run in the denoisers that the pipeline has now, and the layers that it would capture."""
    family = cast(Family, family_of(pipe))
    reasons: list[str] = []
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
    if not denoisers_of(pipe):
        reasons.append(f"the pipeline has no {' or '.join(family.denoisers)}")
    return reasons, list(dict.fromkeys(layers))


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
    on_regions, strict = _checked_callback(on_regions), _checked_flag("strict", strict)
    handle = _HANDLES.get(pipe)
    if handle is None:
        handle = Handle(pipe)
        _HANDLES[pipe] = handle
    intercept(pipe, cast(type, stock_class(pipe)), _outer, _inner)
    handle.config, handle.schedule, handle.characteristic, handle.loss = config, schedule, characteristic, loss
    handle.on_regions, handle.strict = on_regions, strict
    return handle


def disable(pipe: DiffusionPipeline) -> None:
    """Take S-CFG out of a pipeline. Harmless if it is not in.

    Raises:
        TypeError: not a pipeline.
    """
    _check_pipeline("disable", pipe)
    _HANDLES.pop(pipe, None)
    release(pipe)


@contextlib.contextmanager
def disabled(pipe: DiffusionPipeline) -> Iterator[None]:
    """Plain guidance inside the block, bit-identical to a pipeline without S-CFG. Harmless if it is not in.

    Blocks may nest, and overlap across threads and tasks: S-CFG acts again after the last one, whatever was enabled or
    disabled meanwhile. It is decided when a call of the pipeline begins.

    Raises:
        TypeError: not a pipeline.
    """
    _check_pipeline("disabled", pipe)
    with _DISABLED_LOCK:
        _DISABLED[pipe] = _DISABLED.get(pipe, 0) + 1
    try:
        yield
    finally:
        with _DISABLED_LOCK:
            _DISABLED[pipe] -= 1
            if not _DISABLED[pipe]:
                del _DISABLED[pipe]
