"""What `enable` returns, and one call of an enabled pipeline: the settings of both, checked.

A call installs the processors and the hooks, runs the original call, and restores everything in a `finally`. Between
calls the model is stock: the same processor objects, no hooks. So loading adapters, switching attention backends,
compiling, saving and `from_pipe` see what they expect.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
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
from .pipelines.call import read_arguments, read_call
from .pipelines.families import (
    Family,
    cells_of,
    denoisers_of,
    family_of,
    with_reference,
)
from .pipelines.interception import described, release
from .regions import Regions
from .step.callbacks import watched_callbacks
from .step.context import SCFGError, SCFGWarning, Stats
from .step.hook import GuidanceHook
from .step.rates import Given, checked_rates

HANDLES: weakref.WeakKeyDictionary[DiffusionPipeline, Handle] = weakref.WeakKeyDictionary()


class UnsupportedPipelineError(ValueError):
    """The pipeline cannot run S-CFG; the message lists every reason."""


class Handle:
    """What `enable` returns: the configuration, and what the last call did.

    Attributes:
        config: the configuration of the next call; assign another `SCFGConfig` to change it.
        schedule: a `scfg_fast.guidance` rule for the weight of each step, or None for the pipeline's guidance_scale.
        characteristic: settings of Characteristic Guidance, or None.
        loss: settings of loss guidance, or None.
        on_regions: called as `on_regions(step, regions)` after every guided step, or None.
        strict: raise instead of warning where S-CFG must leave a step to plain guidance.
        rates: the user's own, see `enable`, or None.
        watcher, watches_only: what reads the maps of the steps, and whether nothing else happens (`scfg_fast.watch`).
        stats: `Stats` of the last call.
        runs: how many runs of the pipeline of diffusers there were with S-CFG; a call of a subclass may have several.
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
        self._on_regions: Callable[[int, Regions], None] | None = None
        self._strict = False
        self._rates: Given | None = None
        self.watcher: Any = None
        self.watches_only = False
        self.stats = Stats()
        self.runs = 0

    @property
    def config(self) -> SCFGConfig:
        return self._config

    @config.setter
    def config(self, config: SCFGConfig) -> None:
        self._config = checked_config(config)

    @property
    def schedule(self) -> StepWeight | None:
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: StepWeight | None) -> None:
        self._schedule = checked_schedule(schedule)

    @property
    def characteristic(self) -> CharacteristicGuidance | None:
        return self._characteristic

    @characteristic.setter
    def characteristic(self, settings: CharacteristicGuidance | None) -> None:
        self._characteristic = checked_settings("characteristic", settings, CharacteristicGuidance)

    @property
    def loss(self) -> LossGuidance | None:
        return self._loss

    @loss.setter
    def loss(self, settings: LossGuidance | None) -> None:
        self._loss = checked_settings("loss", settings, LossGuidance)

    @property
    def on_regions(self) -> Callable[[int, Regions], None] | None:
        return self._on_regions

    @on_regions.setter
    def on_regions(self, function: Callable[[int, Regions], None] | None) -> None:
        self._on_regions = checked_callback(function)

    @property
    def strict(self) -> bool:
        return self._strict

    @strict.setter
    def strict(self, strict: bool) -> None:
        self._strict = checked_flag("strict", strict)

    @property
    def rates(self) -> Given | None:
        return self._rates

    @rates.setter
    def rates(self, rates: Given | None) -> None:
        self._rates = checked_rates(rates)

    @property
    def regions(self) -> Regions | None:
        """A copy of the regions of the last guided step, or None before the first."""
        return None if self._regions is None else self._regions.clone()

    def disable(self) -> None:
        """Take this handle's S-CFG out of the pipeline. Harmless after a later `enable` made another handle."""
        pipe = self._pipe()
        if pipe is not None and HANDLES.get(pipe) is self:
            detach(pipe)

    def __repr__(self) -> str:
        return f"<scfg_fast.Handle on {self._original_class.__name__}: {self.stats.steps_applied} steps applied>"

    def begin(self, overrides: dict[str, Any] | None, *, acts: bool) -> Call:
        """The settings of one call, from the handle's and the call's own; every one is checked.

        Args:
            overrides: `scfg_kwargs` of the call.
            acts: whether S-CFG acts in it, unless they switch it off.
        """
        own = _checked_overrides(overrides)
        enabled = own.pop("enabled", True)
        schedule = checked_schedule(own.pop("schedule", self.schedule))
        characteristic = checked_settings(
            "characteristic", own.pop("characteristic", self.characteristic), CharacteristicGuidance
        )
        loss = checked_settings("loss", own.pop("loss", self.loss), LossGuidance)
        given = own.pop("rates") if not isinstance(own.get("rates", ""), str) else self.rates
        config = self.config.replace(**own) if own else self.config
        if isinstance(given, torch.Tensor):
            config = config.replace(rates="none")  # they need no capture
        self._regions, self.stats = None, Stats()
        return Call(self, config, schedule, characteristic, loss, checked_rates(given), acts and enabled)

    def run(self, pipe: DiffusionPipeline, call: Call, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run `proceed(*args, **kwargs)`, a call of the pipeline, with S-CFG installed."""
        self.runs += 1
        arguments = read_arguments(pipe, proceed, args, kwargs)
        if arguments is None:
            return proceed(*args, **kwargs)  # raises the pipeline's own error about its arguments
        reasons, _ = read_denoisers(pipe, call.config)
        if reasons:
            raise UnsupportedPipelineError(f"scfg_fast: {'; '.join(reasons)}. scfg_fast.disable(pipe) makes it stock")
        config = with_reference(pipe, cells_of(pipe, call.config))
        context = read_call(
            pipe, arguments, config, call.schedule, call.characteristic, call.loss, call.rates, self.watcher,
            self.watches_only,
        )  # fmt: skip
        if context is None:
            result = proceed(*args, **kwargs)  # the pipeline's own check of its arguments complains
            self.complain("the call has neither prompt nor prompt_embeds by these names")
            return result
        called = denoisers_of(pipe)
        models = [unwrap(denoiser) for denoiser in called]
        with contextlib.ExitStack() as undo:
            for model in models:
                undo.enter_context(claimed(model))
            hooked = [
                HookedDenoiser(model, cast(Denoiser, denoiser_of(model)), captures.choose(model, config))
                for model, captures in zip(models, self._captures, strict=False)
            ]
            blocks = [block for each in hooked for block in each.blocks]
            self.stats.layers = tuple(dict.fromkeys(block.info.name for block in blocks))  # of two denoisers the same
            self.stats.backend = _backends(pipe, config)
            hook = GuidanceHook(config, hooked, context, self.stats, self._publish, self.strict)
            undo.callback(hook.remove)
            hook.install(called)
            args, kwargs = watched_callbacks(inspect.signature(described(proceed)), args, kwargs, hook.aside)
            return proceed(*args, **kwargs)

    def _publish(self, step: int, regions: Regions) -> None:
        self._regions = regions
        if self.on_regions is not None:
            self.on_regions(step, regions)

    def complain(self, reason: str) -> None:
        """Say that a call was not guided.

        Raises:
            SCFGError: under `strict`.
        """
        if self.strict:
            raise SCFGError(f"scfg_fast (strict): {reason}")
        warnings.warn(f"scfg_fast: {reason}. Plain guidance is used instead.", SCFGWarning, stacklevel=2)


@dataclass
class Call:
    """One call of an enabled pipeline.

    Attributes:
        handle: of the pipeline.
        config, schedule, characteristic, loss, rates: the settings of this call.
        acts: whether S-CFG was not switched off for it.
        inside: whether S-CFG is installed at this moment; what is called in there passes through.
    """

    handle: Handle
    config: SCFGConfig
    schedule: StepWeight | None
    characteristic: CharacteristicGuidance | None
    loss: LossGuidance | None
    rates: Given | None
    acts: bool
    inside: bool = False

    def run(self, pipe: DiffusionPipeline, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The call with S-CFG, or as it is where S-CFG does not act or is there already."""
        if not self.acts or self.inside:
            return proceed(*args, **kwargs)
        self.inside = True
        try:
            return self.handle.run(pipe, self, proceed, args, kwargs)
        finally:
            self.inside = False


def detach(pipe: DiffusionPipeline) -> None:
    """Take S-CFG out of a pipeline. Harmless if it is not in."""
    HANDLES.pop(pipe, None)
    release(pipe)


def _backends(pipe: DiffusionPipeline, config: SCFGConfig) -> dict[str, str]:
    """Operator -> backend for the device that the pipeline will run on and its denoiser's dtype."""
    table = available_backends(pipe._execution_device, denoisers_of(pipe)[0].dtype)
    return {op: chosen if config.backend == "auto" else config.backend for op, (chosen, _) in table.items()}


def read_denoisers(pipe: DiffusionPipeline, config: SCFGConfig) -> tuple[list[str], list[str]]:
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


def checked_config(config: Any) -> SCFGConfig:
    if not isinstance(config, SCFGConfig):
        raise TypeError(
            f"scfg_fast: config must be an SCFGConfig, got a {type(config).__name__}; write SCFGConfig(**values)"
        )
    return config


def checked_schedule(schedule: Any) -> StepWeight | None:
    if schedule is not None and (isinstance(schedule, type) or not isinstance(schedule, StepWeight)):
        raise TypeError(
            f"scfg_fast: schedule must be a rule of scfg_fast.guidance or None, got {schedule!r}; write for example "
            "WeightSchedule('linear')"
        )
    return schedule


def check_pipeline(function: str, pipe: Any) -> None:
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"scfg_fast.{function}: a diffusers pipeline is needed, got a {type(pipe).__name__}")


def checked_callback(on_regions: Any) -> Callable[[int, Regions], None] | None:
    if on_regions is not None and not callable(on_regions):
        raise TypeError(f"scfg_fast: on_regions must be a function (step, regions) or None, got {on_regions!r}")
    return on_regions


def checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"scfg_fast: {name} must be True or False, got {value!r}")
    return value


_Settings = TypeVar("_Settings")


def checked_settings(name: str, settings: Any, kind: type[_Settings]) -> _Settings | None:
    if settings is not None and not isinstance(settings, kind):
        raise TypeError(f"scfg_fast: {name} must be a {kind.__name__} or None, got {settings!r}")
    return settings
