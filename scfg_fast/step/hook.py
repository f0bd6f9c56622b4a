"""The guidance of one pipeline call: a pre-hook and a hook on the denoiser, alive for that call only.

`rewrite` has the algebra. The hook returns (f, f), unless the pipeline also uses t; in transformers, where nothing is
published, it rewrites u always, which for r = 1 is u bit for bit. Pipelines that run the denoiser twice per step, t
first, have used t when u arrives: there u is rewritten. A step whose weight is exactly 1 needs t alone: the
unconditional half of the batch is not computed. Steps that are not guided return the denoiser's own output object,
untouched. No value is read back from the device in a step. (A schedule that needs noise levels has the scheduler's
tables read once, before the first step.)

Characteristic Guidance solves for its prediction here, by further calls of the denoiser. What must see the sample too,
loss guidance and CFG++ in a multistep solver, happens around the scheduler's step (`around_step`).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from ..capture.maps import BatchLayout, BlockMaps, StepMaps
from ..config import SCFGConfig
from ..denoisers.install import IN_USE, HookedDenoiser, batch_must_not_change, hooked, unwrap
from ..denoisers.unet import UNet
from ..guidance.mixing import distances
from ..guidance.steps import Step, in_part, step_levels
from ..layouts import Geometry
from ..regions import Regions
from .arguments import argument, copied, second_half
from .combiner import Combiner, zero_step
from .context import CallContext, FirstPass, SCFGError, SCFGWarning, Stats
from .corrections import Corrections, StepInputs
from .finder import RegionFinder, guide_plainly
from .plan import regions_skip_reason, step_weight
from .rewrite import MIN_SCALE_OF_REWRITE, compensating_uncond, with_prediction

ONE_PASS = "the denoiser ran once: no guidance"


class GuidanceHook:
    """Applies S-CFG to every step of one call. `install` it on the denoisers, `remove` it in a `finally`."""

    def __init__(
        self,
        config: SCFGConfig,
        denoisers: Sequence[HookedDenoiser],
        context: CallContext,
        stats: Stats,
        on_regions: Callable[[int, Regions], None] | None,
        strict: bool,
    ) -> None:
        self.config = config
        self.context = context
        self.stats = stats
        self.on_regions = on_regions
        self.strict = strict
        self.regions: Regions | None = None
        self._step = -1
        self._guided_steps = 0
        self._capturing = False
        self._blocked: str | None = None  # why the step is left to the pipeline altogether
        self._skip: str | None = None  # why it has no regions
        self._half = False  # whether the conditional half alone was computed
        self._weight = 1.0
        self._levels: tuple[list[tuple[float, float]], bool] | None = None
        self._sigmas: tuple[float, float] | None = None  # before and after this step, where something asks
        self._flow = False
        self._inputs: tuple[tuple, dict[str, Any]] = ((), {})
        self._rate: torch.Tensor | None = None  # [B, 1, H, W] of this step, or None for 1 everywhere
        self._moved: torch.Tensor | None = None  # f - u of this step, where it was mixed here
        self._hooked = {id(hooked.module): hooked for hooked in denoisers}
        self._now = denoisers[0]  # the denoiser of this step
        self._geometry = Geometry(1, 0, 0)
        self._first: FirstPass | None = None
        self._second = False  # whether this is the unconditional pass of two
        self._other_method_call = False  # whether this run of the denoiser is for another method of the pipeline's
        self.corrections = Corrections(context, stats)
        self._finder = RegionFinder(config, context.token_mask)
        self._combiner = Combiner(config, self._finder, context.rates, context.samples)
        self.stats.images = context.samples
        self._warned: set[str] = set()
        self._thread = threading.get_ident()
        self._fixed_batch = False
        self._undo = contextlib.ExitStack()
        self._installed = contextlib.ExitStack()  # capture processors, during an evaluation

    def install(self, denoiser: torch.nn.Module) -> None:
        """Hook an object that the pipeline calls."""
        self._fixed_batch = self._fixed_batch or batch_must_not_change(denoiser)
        self.corrections.fixed_batch = self._fixed_batch
        self._undo.enter_context(hooked(denoiser, self._before, self._after))

    def remove(self) -> None:
        self._undo.close()
        self._installed.close()
        self._leave_first_pass()

    def _before(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(IN_USE)
        if self.corrections.inside:
            return None
        self._now = self._hooked[id(unwrap(module))]
        sample = argument(args, kwargs, 0, self._now.denoiser.sample)
        # A third prediction, which the pipeline adds itself.
        self._other_method_call = kwargs.get("skip_layers") is not None
        if self._other_method_call:
            self._prepare(False, "both")
            return None
        self._second = self._first is not None and self._first.sample is sample
        if self._second:
            self.stats.samples += len(sample)
            self._prepare(self._capturing and self.context.foreground == "unconditional", "unconditional")
            return None
        if self._leave_first_pass() and self.stats.steps_applied == 0:
            self._complain(
                "the denoiser ran once in a step, S-CFG expected it twice on the very same latents, conditional first."
            )
        self._step += 1
        self._read_levels(argument(args, kwargs, 1, "timestep"))
        self._geometry = self._now.denoiser.geometry(self._now.module, sample, kwargs, self.context.size)
        self._blocked = self._skip_reason(sample)
        scale = self._scale_now()
        self._weight = scale if self._blocked else self._step_weight(scale)
        self._skip = self._blocked or regions_skip_reason(
            self.config, self._step, self.context.num_steps(), self._weight, self.context.rates is not None
        )
        due = self._finder.segments is None or self._guided_steps % self.config.reuse_every == 0
        self._capturing = self._skip is None and due and self.config.rates == "regions"
        self._prepare(self._capturing, "conditional" if self.context.two_pass else "both")
        self._half = self._conditional_half_will_do(kwargs)
        self.stats.weights.append(self._weight if scale > 1.0 else 1.0)
        self.stats.distances.append(None)
        self.stats.samples += len(sample) // (2 if self._half else 1)
        if self._half:
            args, kwargs = second_half(args, len(sample)), second_half(kwargs, len(sample))
        if self.corrections.needs_levels:
            self._inputs = copied(args), copied(kwargs)
        return (args, kwargs) if self._half else None

    def _leave_first_pass(self) -> bool:
        """Forget a conditional pass that no other followed: the pipeline guided nothing in that step. Whether it was
        so."""
        first, self._first = self._first, None
        if first is None or first.prediction is None:
            return False
        self.stats.steps_skipped[ONE_PASS] = self.stats.steps_skipped.get(ONE_PASS, 0) + 1
        self.stats.weights[-1] = 1.0
        return True

    def _prepare(self, active: bool, branch: str) -> None:
        """The captured layers for the next evaluation of the denoiser: with capture processors, if it is `active`."""
        self._installed.close()  # of an evaluation that did not end
        if not active:
            return
        groups = 1 if self.context.two_pass else self.context.groups()
        layout = BatchLayout(groups, self.context.foreground, branch, self._now.denoiser.conditional_first)
        self._installed.enter_context(self._now.installation)
        for block in self._now.blocks:
            block.prepare(layout, self._geometry)

    def _take(self) -> list[BlockMaps]:
        """What the captured blocks left in this evaluation; the capture processors are taken out."""
        left = [block.take() for block in self._now.blocks]
        self._installed.close()
        return left

    def _scale_now(self) -> float:
        """The pipeline's own guidance scale in this step."""
        return self.context.guidance_scale(self._now.module)

    def _skip_reason(self, sample: Any) -> str | None:
        """Why this step is the pipeline's own affair, or None.

        A callback that turns guidance off for a part of the run is no reason to warn; a whole run without it is.
        """
        scale = self._scale_now()
        if not scale > 1.0:
            if self._step > 0 or self.context.loss is not None:
                return "guidance is off"
            return self._complain(f"guidance is off: there is nothing to scale. Pass {self.context.switch}.")
        groups = 1 if self.context.two_pass else self.context.groups()
        if self._now.denoiser.conditional_first and len(sample) == self.context.samples:
            return "guidance is off"  # cut off by the pipeline in a part of the run
        if len(sample) != groups * self.context.samples:
            return self._complain(
                f"the denoiser ran on {len(sample)} samples, S-CFG expected {groups * self.context.samples} "
                f"({groups} groups of {self.context.samples}, unconditional, then conditional)."
            )
        if self._cond_is_read_again() and scale < MIN_SCALE_OF_REWRITE:
            return self._complain(
                f"guidance_scale={scale:g} below {MIN_SCALE_OF_REWRITE} where the pipeline reads the conditional "
                "prediction again (guidance_rescale, perturbed attention, two passes) would magnify rounding. Raise "
                "guidance_scale."
            )
        if self.context.undone_by and self.config.rates != "none":
            self._complain(f"this pipeline {self.context.undone_by}.", "Rates change directions there, not lengths.")
        return None

    def _read_levels(self, timestep: Any) -> None:
        """Noise levels of this step, if anything needs them; the scheduler's tables are read at the first."""
        context = self.context
        if self._levels is None:
            scheduled = context.schedule is not None and context.schedule.needs_levels
            needed = scheduled or self.corrections.needs_levels
            self._levels = (step_levels(context.scheduler, timestep) if needed else None) or ([], False)
        levels, self._flow = self._levels
        self._sigmas = levels[self._step] if self._step < len(levels) else None

    def _step_weight(self, scale: float) -> float:
        """The weight of this step, from the schedule if there is one."""
        sigma, next_sigma = self._sigmas or (None, None)
        step = Step(self._step, self.context.num_steps(), scale, sigma, next_sigma, self._flow)
        return step_weight(self.context.schedule, step)

    def _conditional_half_will_do(self, kwargs: dict) -> bool:
        """Whether the unconditional half can be left out: not where the size of the batch must stay what it is, and not
        with attention arguments, whose batch dimension is unknown."""
        return (
            self._blocked is None
            and self._weight == 1.0
            and self.context.groups() == 2
            and isinstance(self._now.denoiser, UNet)
            and not self.corrections.renoises
            and getattr(self.context.schedule, "half_batch", True)
            and not self._fixed_batch
            and not kwargs.get("cross_attention_kwargs")
        )

    def _cond_is_read_again(self) -> bool:
        """Whether the pipeline uses the conditional prediction for more than the guidance."""
        context = self.context
        return context.two_pass or context.rereads or context.guidance_rescale() > 0.0 or context.groups() > 2

    def _complain(self, message: str, instead: str = "Plain guidance is used instead.") -> str:
        """Warn once per call, or raise under strict. Returns the message."""
        if self.strict:
            raise SCFGError(f"scfg_fast (strict): {message}")
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"scfg_fast: {message} {instead}", SCFGWarning, stacklevel=2)
        return message

    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict, output):
        corrections = self.corrections
        if corrections.inside or self._other_method_call:
            return None
        left = self._take()
        first_pass = self.context.two_pass and not self._second
        sample = argument(args, kwargs, 0, self._now.denoiser.sample) if first_pass else None
        if self._nothing_to_do():
            reason = cast(str, self._skip)
            if not self._second:
                self.stats.steps_skipped[reason] = self.stats.steps_skipped.get(reason, 0) + 1
            self._first = FirstPass(sample, None, []) if first_pass else None
            return None
        view = self._now.denoiser.view(self._now.module)
        prediction = view.open(output[0], self._geometry)
        if first_pass:
            self._first = FirstPass(sample, prediction, left)
            return None
        first, self._first = self._first, None
        if first is not None:
            prediction = torch.cat([prediction, cast(torch.Tensor, first.prediction)])
            there = self.context.foreground == "unconditional"
            left = [BlockMaps(c.tokens, u.start if there else c.start) for c, u in zip(first.maps, left, strict=True)]
        del first
        maps = self._collect(left) if self._capturing else None
        del left
        if self._skip is None and self.config.rates == "regions" and maps is None and self._finder.segments is None:
            self._skip = self._complain("no captured layer left a usable attention map.")
        if self.context.watcher is not None and maps is not None:
            self.context.watcher(self._step, maps, *self._finder.find(maps))
        if self.context.watches_only:
            return None
        self._rate = self._moved = None
        corrections.step = self._describe(module, prediction) if corrections.needs_levels else None
        shifted = self._is_to_be_shifted()
        if self._skip is not None:
            self.stats.steps_skipped[self._skip] = self.stats.steps_skipped.get(self._skip, 0) + 1
            plain = self._weight == self._scale_now() and not self._half and not shifted
            if self._blocked or (plain and not self._combines()):
                self._measure(prediction)
                return None
        if self._half:
            both = torch.cat([prediction, prediction])
            result = torch.zeros_like(both) if zero_step(self.config, self._step) else both
        else:
            result = self._rewrite(prediction, maps, shifted)
        if self._second:
            result = result.chunk(2)[0]
        if self._skip is None:
            self._guided_steps += 1
            self.stats.steps_applied += 1
            if self.on_regions is not None and self.regions is not None:
                self.on_regions(self._step, self.regions)
        whole = torch.cat([output[0], output[0]]) if self._half else output[0]
        return with_prediction(output, view.close(result, whole, self._geometry))

    def _describe(self, module: torch.nn.Module, prediction: torch.Tensor) -> StepInputs | None:
        """This step for the corrections; None where the batch is not the one they know, or without a noise level."""
        groups = 1 if self._blocked or self._half else 2
        if self._sigmas is None:
            name = type(self.context.scheduler).__name__
            self._complain(f"{name} publishes no noise level for this step.", "Nothing but S-CFG acts in it.")
            return None
        if prediction.shape[0] != groups * self.context.samples:
            return None
        args, kwargs = self._inputs
        uncond = prediction.chunk(2)[0] if groups == 2 and self.corrections.renoises else None
        rescale = 0.0 if self._blocked else self.context.guidance_rescale()
        return StepInputs(self._step, module, args, kwargs, self._sigmas, self._weight, groups == 2, rescale, uncond)

    def _is_to_be_shifted(self) -> bool:
        """Whether Characteristic Guidance acts in this step: where there is guidance that could be exaggerated."""
        settings, state = self.context.characteristic, self.corrections.step
        if settings is None or state is None or not state.guided or self._weight == 1.0:
            return False
        return in_part(self._step, self.context.num_steps(), settings.start, settings.stop)

    def _nothing_to_do(self) -> bool:
        """Whether this run of the denoiser is left as it is, and unseen."""
        if self._blocked or self._skip is None:
            return self._blocked is not None and not self.corrections.needs_levels
        plain = self._weight == self._scale_now() and not self._half and not self._combines()
        return plain and not self.corrections.needs_levels and not self.context.guidance_rescale() > 0.0

    def _combines(self) -> bool:
        """Whether this step mixes the predictions by a rule; one of weight 1 is the conditional prediction."""
        ruled = self._blocked is None and self.config.combine != "cfg"
        return ruled and (self._weight != 1.0 or zero_step(self.config, self._step))

    def _measure(self, prediction: torch.Tensor, guided: torch.Tensor | None = None) -> None:
        """Note the dose of the step, where it is not the weight itself, from [u; t] or [u; t; perturbed]."""
        rescale, moved = self.context.guidance_rescale(), self._moved
        if self._blocked or (self._rate is moved is guided is None and not rescale > 0.0):
            return
        uncond, cond, *_ = prediction.chunk(self.context.groups())
        if guided is not None:
            moved = guided - uncond
        self.stats.distances[-1] = distances(
            uncond, cond, self._weight, self._rate, moved, rescale, self.context.samples
        )

    def _collect(self, left: list[BlockMaps]) -> StepMaps | None:
        """What the layers left in this step."""
        blocks = self._now.blocks
        size = (self._geometry.height, self._geometry.width)
        maps, missing = self._finder.take([(b.info, maps) for b, maps in zip(blocks, left, strict=True)], size)
        self.stats.bytes = max(self.stats.bytes, self._finder.nbytes)
        # Perturbed-attention guidance puts processors of its own into its layers for the call: nothing to warn of.
        if missing and self.context.groups() == 2:
            self._complain(f"layers {missing} left no usable attention map.", "The other layers are used.")
        return maps

    def _rewrite(self, prediction: torch.Tensor, maps: StepMaps | None, shifted: bool) -> torch.Tensor:
        """[u; t] or [u; t; perturbed] -> what to return in its place, same shape and dtype."""
        uncond, cond, *others = prediction.chunk(self.context.groups())
        has_rates = self._skip is None and not shifted
        reread = self._cond_is_read_again()
        own_weight = self._weight == self._scale_now()
        compensates = reread and not (own_weight and has_rates)
        copies = 2 if not reread and not shifted and len(uncond) > 1 else 1
        if compensates and not has_rates and not shifted and not self._combines():
            # u' + s (t - u') = u + w (t - u), in one launch
            scale = self._scale_now()
            result = guide_plainly(self.config, uncond, cond, (scale - self._weight) / (scale - 1.0))
            self._measure(prediction)
            return torch.cat([result, cond, *others])
        result = self._combine(uncond, cond, maps, "unconditional" if reread and not compensates else "guided", copies)
        if self._rate is not None and self.corrections.step is not None:
            self.corrections.step.weight = self._weight * self._rate
        if shifted:
            result = self.corrections.characteristic(result, uncond, cond)
        self._measure(prediction, result if shifted else None)
        if compensates:
            result = compensating_uncond(result, cond, self._scale_now())
        if reread:
            return torch.cat([result, cond, *others])
        if len(result) > len(uncond):
            return result
        return result.expand(2, *result.shape).flatten(0, 1)  # (f, f): of one image a view

    def _combine(
        self, uncond: torch.Tensor, cond: torch.Tensor, maps: StepMaps | None, rewrite: str, copies: int
    ) -> torch.Tensor:
        """f, or the u' that stands in for u, in copies where an operator makes them. Records rates and regions."""
        weight, scale = self._weight, self._scale_now()
        if self._skip is not None and not self._combines():
            return self._combiner.plain(uncond, cond, weight, scale, copies)
        done = self._combiner(
            uncond, cond, maps, step=self._step, weight=weight, scale=scale, has_rates=self._skip is None,
            rewrite=rewrite, copies=copies,
        )  # fmt: skip
        self._rate, self._moved = done.rate, done.moved
        self.regions = done.regions or self.regions
        return done.result
