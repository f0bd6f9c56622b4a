"""enable, disable, disabled, supports: putting S-CFG into a pipeline and taking it out again.

`enable` changes one thing: the calls of this pipeline object are intercepted (`pipelines.interception`).

The arguments are read where the pipeline of diffusers gets them. A subclass of the user's that hands its call on
through `super()`, changed or twice, is guided as the stock pipeline would be. One with a loop of its own is read by the
arguments that it names.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # `diffusers` shows type checkers a placeholder
from scfg_kernels import available_backends

from .config import SCFGConfig
from .denoisers.install import evaluations
from .guidance.characteristic import CharacteristicGuidance
from .guidance.loss import LossGuidance
from .guidance.steps import StepWeight
from .handle import (
    HANDLES,
    Call,
    Handle,
    UnsupportedPipelineError,
    check_pipeline,
    checked_callback,
    checked_config,
    checked_flag,
    checked_schedule,
    checked_settings,
    detach,
    read_denoisers,
)
from .pipelines.call import names_a_prompt
from .pipelines.families import (
    default_config,
    denoisers_of,
    stock_class,
    why_not,
)
from .pipelines.interception import hands_on, intercept, original_of
from .regions import Regions
from .step.rates import Given, checked_rates

_DISABLED: weakref.WeakKeyDictionary[DiffusionPipeline, int] = weakref.WeakKeyDictionary()
"""How many blocks of `disabled` are open; a pipeline with none is not in it."""
_DISABLED_LOCK = threading.Lock()


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


_CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("scfg_call", default=None)
"""The innermost call of an enabled pipeline that is under way here."""


def _outer(pipe: DiffusionPipeline, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """A call of the pipeline as the user makes it."""
    overrides = kwargs.pop("scfg_kwargs", None)
    handle = HANDLES.get(pipe)
    if handle is None:
        return proceed(*args, **kwargs)
    call = handle.begin(overrides, acts=pipe not in _DISABLED)
    before = _CALL.set(call)
    try:
        cls, stock = type(pipe), cast(type, stock_class(pipe))
        own = original_of(cls) or cls
        if not call.acts or own is stock:
            return proceed(*args, **kwargs)
        if not hands_on(own, stock) and names_a_prompt(pipe, proceed, args, kwargs):
            return call.run(pipe, proceed, args, kwargs)
        runs = handle.runs
        with contextlib.ExitStack() as undo:
            counts = [undo.enter_context(evaluations(denoiser)) for denoiser in denoisers_of(pipe)]
            result = proceed(*args, **kwargs)
        if handle.runs == runs and any(count() for count in counts):
            handle.complain(
                f"{own.__name__} ran the denoiser without a call of {stock.__name__} through super(), where S-CFG acts"
            )
        return result
    finally:
        _CALL.reset(before)


def _inner(pipe: DiffusionPipeline, proceed: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """The same call, or a part of it, as the pipeline of diffusers gets it."""
    overrides = kwargs.pop("scfg_kwargs", None)
    handle = HANDLES.get(pipe)
    if handle is None:
        return proceed(*args, **kwargs)
    call = _CALL.get()
    if call is None or call.handle is not handle:  # from another thread than the outer call, or not through it
        call = handle.begin(overrides, acts=pipe not in _DISABLED)
    return call.run(pipe, proceed, args, kwargs)


def supports(pipe: DiffusionPipeline, config: SCFGConfig | None = None) -> Support:
    """Whether `enable(pipe, config)` will work, with every reason if not. Changes nothing.

    Args:
        pipe: any diffusers pipeline.
        config: the configuration to judge; default as for `enable`.
    """
    config = checked_config(default_config(pipe) if config is None else config)
    if (refusal := why_not(pipe)) is not None:
        return Support(False, [refusal])
    reasons, layers = read_denoisers(pipe, config)
    if config.backend == "triton":
        ops_of: dict[str, list[str]] = {}
        for op, (_, why) in available_backends(pipe._execution_device, denoisers_of(pipe)[0].dtype).items():
            for reason in why:
                ops_of.setdefault(reason, []).append(op)
        reasons += [f"backend='triton' cannot run: {reason} ({', '.join(ops)})" for reason, ops in ops_of.items()]
    return Support(not reasons, reasons, layers)


def enable(
    pipe: DiffusionPipeline,
    config: SCFGConfig | None = None,
    *,
    schedule: StepWeight | None = None,
    characteristic: CharacteristicGuidance | None = None,
    loss: LossGuidance | None = None,
    rates: Given | None = None,
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
        rates: your own, in the place of S-CFG's. A tensor [B or 1, 1, H, W] over the latents, which needs no attention
            and works with every denoiser; a function `(step, regions, energy) -> [B or 1, 1, H, W]`, with the step's
            `Regions` (None unless `config.rates` is `"regions"`) and the energy of the guidance [B, 1, H, W]; or
            factors on S-CFG's rates in the regions of words, `{"boy": 1.2}`. `max_scale` bounds them. Ones are plain
            guidance.
        on_regions: called as `on_regions(step, regions)` after every guided step.
        strict: raise `SCFGError` instead of warning when a step or a layer must be left to plain guidance.

    Returns:
        The pipeline's handle. A second call on the same pipeline changes the settings of the same handle.

    Raises:
        UnsupportedPipelineError: the pipeline cannot run S-CFG; lists every reason.

    Per call, `pipe(..., scfg_kwargs={"enabled": False})` is plain guidance, and `schedule`, `characteristic`, `loss` or
    any `SCFGConfig` field may be overridden the same way; so may your own `rates`.
    """
    config, schedule = default_config(pipe) if config is None else config, checked_schedule(schedule)
    characteristic = checked_settings("characteristic", characteristic, CharacteristicGuidance)
    loss = checked_settings("loss", loss, LossGuidance)
    needs_maps = not isinstance(rates, torch.Tensor)
    support = supports(pipe, config if needs_maps else config.replace(rates="none"))
    if not support.supported:
        raise UnsupportedPipelineError(f"scfg_fast.enable: {'; '.join(support.reasons)}")
    rates = checked_rates(rates)
    on_regions, strict = checked_callback(on_regions), checked_flag("strict", strict)
    handle = HANDLES.get(pipe)
    if handle is None:
        handle = Handle(pipe)
        HANDLES[pipe] = handle
    intercept(pipe, cast(type, stock_class(pipe)), _outer, _inner)
    handle.config, handle.schedule, handle.characteristic, handle.loss = config, schedule, characteristic, loss
    handle.on_regions, handle.strict, handle.rates = on_regions, strict, rates
    return handle


def disable(pipe: DiffusionPipeline) -> None:
    """Take S-CFG out of a pipeline. Harmless if it is not in.

    Raises:
        TypeError: not a pipeline.
    """
    check_pipeline("disable", pipe)
    detach(pipe)


@contextlib.contextmanager
def disabled(pipe: DiffusionPipeline) -> Iterator[None]:
    """Plain guidance inside the block, bit-identical to a pipeline without S-CFG. Harmless if it is not in.

    Blocks may nest, and overlap across threads and tasks: S-CFG acts again after the last one, whatever was enabled or
    disabled meanwhile. It is decided when a call of the pipeline begins.

    Raises:
        TypeError: not a pipeline.
    """
    check_pipeline("disabled", pipe)
    with _DISABLED_LOCK:
        _DISABLED[pipe] = _DISABLED.get(pipe, 0) + 1
    try:
        yield
    finally:
        with _DISABLED_LOCK:
            _DISABLED[pipe] -= 1
            if not _DISABLED[pipe]:
                del _DISABLED[pipe]
