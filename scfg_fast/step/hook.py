"""The guidance of one pipeline call: hooks on the denoiser and around the scheduler, alive for that call only.

`clock` says which step an evaluation of the denoiser belongs to, `plan` what that step does, `finder` makes regions of
the maps, and `rewrite` has the algebra of what is returned. Steps that are not guided return the denoiser's own output
object, untouched. No value is read back from the device in a step. (A schedule that needs noise levels has the
scheduler's tables read once, before the first step.)

Evaluations that are not the pipeline's own are stock and count nothing: those in the user's callbacks, in the
scheduler's step or in another evaluation, and those of skip-layer guidance, which the pipeline combines itself.

Characteristic Guidance solves for its prediction here, by further calls of the denoiser. What must see the sample too,
loss guidance and CFG++ in a multistep solver, happens around the scheduler's step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from ..capture.maps import BatchLayout, StepMaps
from ..config import SCFGConfig
from ..denoisers.install import IN_USE, HookedDenoiser, can_halve, hooked, unwrap
from ..denoisers.unet import UNet
from ..guidance.mixing import distances
from ..guidance.steps import step_levels
from ..regions import Regions
from .arguments import argument, copied, second_half
from .clock import StepClock
from .combiner import Combination, Combiner
from .context import CallContext, SCFGError, SCFGWarning, Stats
from .corrections import Corrections, StepInputs
from .finder import RegionFinder
from .plan import PLAIN_INSTEAD, StepPlan, StepState, plan
from .records import Evaluation, Left, OpenStep, Run, are_one, joined
from .rewrite import Rewrite, with_prediction
from .scheduler import around_prediction, watched

ONE_PASS = "the denoiser ran once: no guidance"


class GuidanceHook:
    """Applies S-CFG to every step of one call. `install` it on the denoisers, `remove` it in a `finally`.

    Attributes:
        stats: of the call.
    """

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
        self._hooked = {id(each.module): each for each in denoisers}
        self._thread = threading.get_ident()
        self._clock = StepClock(context.scheduler)
        self._warned: set[str] = set()
        self._undo = contextlib.ExitStack()
        self.stats.images = context.samples
        # What changes in the course of a call:
        self._run: Run | None = None
        self._step: OpenStep | None = None
        self._evaluations: list[Evaluation | None] = []  # that are running, one inside another; None is not ours
        self._aside = 0  # how many pieces of other people's code are running, one inside another

    def install(self, called: Sequence[torch.nn.Module]) -> None:
        """Hook the objects that the pipeline calls, and its scheduler."""
        for denoiser in called:
            self._undo.enter_context(hooked(denoiser, self._before, self._end, self._after))
        self._undo.enter_context(
            watched(self.context.scheduler, step=self._around_step, set_timesteps=self._around_set_timesteps)
        )

    def remove(self) -> None:
        """Take everything out again."""
        self._end()  # an evaluation that was interrupted
        self._evaluations.clear()
        self._undo.close()
        self._close_step()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluations of the denoiser inside are not the pipeline's own."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    # Around the scheduler

    def _is_ours(self) -> bool:
        """Whether the pipeline itself is running, and not the user's code or another pipeline's."""
        return self._aside == 0 and not self._evaluations and threading.get_ident() == self._thread

    def _around_set_timesteps(self, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_ours():
            self._clock.set_timesteps()
        return set_timesteps(*args, **kwargs)

    def _around_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_ours():
            return step(*args, **kwargs)
        self._clock.stepped(args[1] if len(args) > 1 else kwargs.get("timestep"))
        with self.aside():
            if self._run is not None and (self.context.renoises or self.context.loss is not None):
                return around_prediction(step, self._run.corrections.around_step, *args, **kwargs)
            return step(*args, **kwargs)

    # Before the denoiser

    def _before(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(IN_USE)
        others = self._aside > 0 or bool(self._evaluations) or kwargs.get("skip_layers") is not None
        self._evaluations.append(None)  # first of all: `_after` takes it out, whatever happens here
        if others:
            return None
        denoiser = self._hooked[id(unwrap(module))]
        sample = argument(args, kwargs, 0, denoiser.denoiser.sample)
        run_before, timestep = self._clock.run, argument(args, kwargs, 1, "timestep")
        begins = self._clock.evaluated(timestep)
        if begins and self._close_step() and self.stats.steps_applied == 0:
            self._complain(
                "the denoiser ran once in a step, S-CFG expected it twice on the very same latents, conditional first."
            )
        if self._clock.run != run_before:
            self._run = self._begin_run(timestep)
        evaluation = self._second_pass(sample) or self._first_pass(module, denoiser, sample, kwargs)
        half = evaluation.plan.half
        self.stats.samples += len(sample) // (2 if half else 1)
        if half:
            args, kwargs = second_half(args, len(sample)), second_half(kwargs, len(sample))
        if self.context.corrects:
            evaluation.args, evaluation.kwargs = copied(args), copied(kwargs)
        self._evaluations[-1] = evaluation
        if evaluation.finds:
            groups = 1 if self.context.two_pass else evaluation.plan.groups
            first = denoiser.denoiser.conditional_first
            layout = BatchLayout(groups, self.context.foreground, evaluation.branch, first)
            denoiser.put_in(layout, evaluation.geometry)
        return (args, kwargs) if half else None

    def _second_pass(self, sample: Any) -> Evaluation | None:
        """The unconditional pass of two, or None: it gets the very latents of a conditional one."""
        waiting = self._step.waiting if self._step is not None else []
        first = next((each for each in waiting if are_one(each.sample, sample)), None)
        if first is None:
            return None
        waiting.remove(first)
        finds = first.finds and self.context.foreground == "unconditional"
        return Evaluation(
            first.hooked, first.plan, first.window, first.finder, first.combiner, first.geometry, sample, (), {},
            "unconditional", finds, first,
        )  # fmt: skip

    def _first_pass(self, module: torch.nn.Module, denoiser: HookedDenoiser, sample: Any, kwargs: dict) -> Evaluation:
        """Any other evaluation: of a new step, or of another window of the present one."""
        geometry = denoiser.denoiser.geometry(denoiser.module, sample, kwargs, self.context.size)
        run, step = cast(Run, self._run), self._step
        window = 0 if step is None else step.windows
        if window == len(run.finders):
            finder = RegionFinder(self.config, self.context.token_mask)
            combiner = Combiner(self.config, finder, self.context.rates, self.context.samples)
            run.finders.append((finder, combiner))
        finder, combiner = run.finders[window]
        has_regions = finder.begin((geometry.height, geometry.width))
        planned = step.plan if step is not None else None
        if step is None or planned is None or step.batch != len(sample):
            planned = self._plan(run, module, denoiser, len(sample), has_regions, kwargs)
            for message, instead in planned.warnings:
                self._complain(message, instead)
        if step is None:
            step = self._step = OpenStep(planned, len(sample))
            self.stats.weights.append(planned.weight if planned.scale > 1.0 else 1.0)
            self.stats.distances.append(None)
        step.windows += 1
        finds = planned.regions == "find" or (planned.regions == "keep" and not has_regions)
        branch = "conditional" if self.context.two_pass else "both"
        return Evaluation(denoiser, planned, window, finder, combiner, geometry, sample, (), {}, branch, finds)

    def _plan(
        self, run: Run, module: torch.nn.Module, denoiser: HookedDenoiser, batch: int, has_regions: bool, kwargs: dict
    ) -> StepPlan:
        context, index = self.context, self._clock.index
        levels, flow = run.levels
        unet, halves = isinstance(denoiser.denoiser, UNet), getattr(context.schedule, "half_batch", True)
        with self.aside():  # a schedule is the user's code
            return plan(context, self.config, StepState(
                index=index,
                count=context.num_steps(),
                scale=context.guidance_scale(denoiser.module),
                rescale=context.guidance_rescale(),
                groups=1 if context.two_pass else context.groups(),
                batch=batch,
                guided_steps=run.guided_steps,
                has_regions=has_regions,
                sigmas=levels[index] if index < len(levels) else None,
                flow=flow,
                conditional_first=denoiser.denoiser.conditional_first,
                can_halve=lambda: unet and halves and can_halve(module, kwargs),
            ))  # fmt: skip

    def _begin_run(self, timestep: Any) -> Run:
        levels = step_levels(self.context.scheduler, timestep) if self.context.needs_levels else None
        return Run(Corrections(self.context, self.stats, self.aside), levels or ([], False))

    def _close_step(self) -> bool:
        """Forget conditional passes that no other followed: the pipeline guided nothing in that step. Whether it was
        so."""
        step, self._step = self._step, None
        if step is None or step.counted or not any(each.prediction is not None for each in step.waiting):
            return False
        self._skip(ONE_PASS)
        self.stats.weights[-1] = 1.0
        return True

    # After the denoiser

    def _end(self) -> None:
        """The model is stock again."""
        if not self._evaluations or threading.get_ident() != self._thread:
            return
        evaluation = self._evaluations[-1]
        if evaluation is not None and evaluation.finds and not evaluation.left:
            evaluation.left = evaluation.hooked.take_out()

    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self._evaluations or threading.get_ident() != self._thread:
            return None
        evaluation = self._evaluations.pop()
        if evaluation is None or output is None:
            return None
        step, run, planned = cast(OpenStep, self._step), cast(Run, self._run), evaluation.plan
        first_pass = evaluation.branch == "conditional"
        measured = planned.guided and planned.rescale > 0.0
        if not planned.changes and not measured and not self.context.corrects:
            self._count(step, planned)
            if first_pass:
                step.waiting.append(evaluation)  # only to know its second pass
            return None
        view = evaluation.hooked.denoiser.view(evaluation.hooked.module)
        evaluation.prediction = view.open(output[0], evaluation.geometry)
        if first_pass:
            step.waiting.append(evaluation)
            return None
        prediction, left = joined(evaluation, self.context.foreground)
        maps = self._collect(evaluation, left) if (evaluation.first or evaluation).finds else None
        if planned.regions != "none" and maps is None and evaluation.finder.segments is None:
            planned = planned.without_maps()
            for message, instead in planned.warnings:
                self._complain(message, instead)
        if self.context.watcher is not None and maps is not None:
            with self.aside():
                self.context.watcher(planned.index, maps, *evaluation.finder.find(maps))
        if self.context.watches_only:
            return None
        self._count(step, planned)
        corrections = run.corrections
        corrections.step = self._describe(module, evaluation, prediction) if self.context.corrects else None
        shifted = planned.shifted and corrections.step is not None and corrections.step.guided
        planned = dataclasses.replace(planned, shifted=shifted)
        combination = Combination(evaluation.combiner, planned, maps)
        if not planned.changes:
            self._measure(planned, prediction, combination)
            return None
        whole = output[0]
        if planned.half:
            result, whole = torch.cat([prediction, prediction]), torch.cat([whole, whole])
            result = torch.zeros_like(result) if planned.zero else result
        else:
            groups = 2 if self.context.two_pass else planned.groups
            rewrite = Rewrite(planned.scale, planned.weight, planned.rereads, groups, self.config)
            solve = functools.partial(self._solve, planned, prediction, corrections, combination) if shifted else None
            combines = planned.reason is None or planned.combines
            result = rewrite(prediction, combination if combines else None, solve)
            if combination.done.rate is not None and corrections.step is not None:
                corrections.step.weight = planned.weight * combination.done.rate
            if solve is None:
                self._measure(planned, prediction, combination)
        regions = combination.done.regions
        if evaluation.first is not None:
            result = result.chunk(2)[0]
        if self.on_regions is not None and regions is not None:
            with self.aside():
                self.on_regions(planned.index, regions)
        return with_prediction(output, view.close(result, whole, evaluation.geometry))

    def _solve(
        self,
        planned: StepPlan,
        prediction: torch.Tensor,
        corrections: Corrections,
        combination: Combination,
        guided: torch.Tensor,
        *halves: torch.Tensor,
    ) -> torch.Tensor:
        """Characteristic Guidance, with the rates of this step."""
        step = cast(StepInputs, corrections.step)
        if combination.done.rate is not None:
            step.weight = planned.weight * combination.done.rate
        solved = corrections.characteristic(guided, *halves)
        self._measure(planned, prediction, combination, solved)
        return solved

    def _measure(
        self, planned: StepPlan, prediction: torch.Tensor, combination: Combination, solved: torch.Tensor | None = None
    ) -> None:
        """Note the dose of the step, where it is not the weight itself: of [u; t] or [u; t; perturbed], with what was
        solved for or mixed here, or with weight and rates."""
        rate, moved = combination.done.rate, combination.done.moved
        if not planned.guided or (rate is moved is solved is None and not planned.rescale > 0.0):
            return
        uncond, cond, *_ = prediction.chunk(2 if self.context.two_pass else planned.groups)
        moved = moved if solved is None else solved - uncond
        samples = self.context.samples
        self.stats.distances[-1] = distances(uncond, cond, planned.weight, rate, moved, planned.rescale, samples)

    def _describe(self, module: torch.nn.Module, evaluation: Evaluation, prediction: torch.Tensor) -> StepInputs | None:
        """This step for the corrections; None where the batch is not the one they know, or without a noise level."""
        planned = evaluation.plan
        groups = 2 if planned.guided and not planned.half else 1
        if planned.sigmas is None:
            name = type(self.context.scheduler).__name__
            self._complain(f"{name} publishes no noise level for this step.", "Nothing but S-CFG acts in it.")
            return None
        if prediction.shape[0] != groups * self.context.samples:
            return None
        uncond = prediction.chunk(2)[0] if groups == 2 and self.context.renoises else None
        return StepInputs(
            planned.index, module, evaluation.args, evaluation.kwargs, planned.sigmas, planned.weight, groups == 2,
            planned.rescale, uncond,
        )  # fmt: skip

    def _collect(self, evaluation: Evaluation, left: Left) -> StepMaps | None:
        """What the layers left in this evaluation."""
        finder = evaluation.finder
        maps, missing = finder.take(left, (evaluation.geometry.height, evaluation.geometry.width))
        self.stats.bytes = max(self.stats.bytes, finder.nbytes)
        # Perturbed-attention guidance puts processors of its own into its layers for the call: nothing to warn of.
        if missing and evaluation.plan.groups < 3:
            self._complain(f"layers {missing} left no usable attention map.", "The other layers are used.")
        return maps

    def _count(self, step: OpenStep, planned: StepPlan) -> None:
        """A step in the statistics, once."""
        if step.counted:
            return
        step.counted = True
        if planned.reason is not None:
            self._skip(planned.reason)
            return
        cast(Run, self._run).guided_steps += 1
        self.stats.steps_applied += 1

    def _skip(self, reason: str) -> None:
        self.stats.steps_skipped[reason] = self.stats.steps_skipped.get(reason, 0) + 1

    def _complain(self, message: str, instead: str = PLAIN_INSTEAD) -> None:
        """Warn once per call, or raise under strict."""
        if self.strict:
            raise SCFGError(f"scfg_fast (strict): {message}")
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"scfg_fast: {message} {instead}", SCFGWarning, stacklevel=2)
