"""Guidance that evaluates the denoiser again, or must see the sample: what a step of `GuidanceHook` cannot do alone.

    Characteristic Guidance    solves for the prediction by further calls of the denoiser
    loss guidance              moves the sample after the scheduler's step, along a gradient through the denoiser
    CFG++ in multistep solvers takes the scheduler's step with the unconditional prediction, adds the guided difference

The hook describes each step (`StepInputs`); the regions and rates of a step hold for all its evaluations.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..denoisers.install import can_halve
from ..guidance.characteristic import CharacteristicGuidance, solve
from ..guidance.loss import LossGuidance, loss_gradient, renoise, update
from ..guidance.predictions import alpha_bar_of, denoising, noise_of, prediction_of, wide
from ..guidance.steps import trained_level
from .arguments import argument, copied, second_half
from .context import CallContext, Convergence, Stats
from .scheduler import SchedulerStep, rewind, snapshot


@dataclass
class StepInputs:
    """One denoising step, as the corrections need it.

    Attributes:
        index: of the step.
        module, args, kwargs: the denoiser's call, after the hook changed it and before the denoiser took it apart.
        sigmas: noise level of the input, and the one that the step leads to.
        weight: weight of the conditional direction: a number, or times the rates [B, 1, H, W].
        guided: whether the batch is [unconditional; conditional]; else it is one group of samples, used as it is.
        rescale: phi of guidance_rescale.
        uncond: the unconditional prediction [B, C, H, W], where CFG++ needs it.
    """

    index: int
    module: torch.nn.Module
    args: tuple
    kwargs: dict[str, Any]
    sigmas: tuple[float, float]
    weight: float | torch.Tensor
    guided: bool
    rescale: float
    uncond: torch.Tensor | None = None

    @property
    def alpha_bar(self) -> float:
        """abar of the input; pure noise counts as 1e-6, so that divisions by it stay finite."""
        return max(alpha_bar_of(self.sigmas[0]), 1e-6)


class Corrections:
    """The corrections of one run.

    Args:
        context: of the call.
        stats: of the call.
        aside: a context in which the hook lets evaluations of the denoiser pass.

    Attributes:
        step: set by the hook once the denoiser has run; None where this step is none of its affair.
    """

    def __init__(
        self, context: CallContext, stats: Stats, aside: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        self.step: StepInputs | None = None
        self._context = context
        self._stats = stats
        self._aside = aside
        self._random = torch.Generator().manual_seed(context.loss.seed) if context.loss is not None else None

    def characteristic(self, guided: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Characteristic Guidance's prediction where it converged, `guided` elsewhere; [B, C, H, W] in its dtype."""
        settings, state = cast(CharacteristicGuidance, self._context.characteristic), self._state()
        alpha_bar, kind = state.alpha_bar, self._prediction_type()
        sample = argument(state.args, state.kwargs, 0, "sample")[: cond.shape[0], : cond.shape[1]].to(wide(cond))

        def noise(prediction: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return noise_of(prediction, at, alpha_bar, kind)

        def predict(at_uncond: torch.Tensor, at_cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shifted_uncond, shifted_cond = self._evaluate(at_uncond, at_cond)
            return noise(shifted_uncond, at_uncond), noise(shifted_cond, at_cond)

        solution = solve(
            predict, sample, noise(uncond, sample), noise(cond, sample), state.weight, alpha_bar, settings,
            self._last_alpha_bar,
        )  # fmt: skip
        self._stats.characteristic.append(
            Convergence(state.index, solution.iterations, solution.residuals, solution.converged)
        )
        solved = prediction_of(solution.guided, sample, alpha_bar, kind).to(guided.dtype)
        return torch.where(solution.converged.view(-1, 1, 1, 1), solved, guided)

    def around_step(self, step: SchedulerStep, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The previous sample: the scheduler's step, renoised and corrected as this call asks.

        Args:
            step: the scheduler's own.
            prediction: as the pipeline combined it, [B, C, H, W].
            sample: in the scheduler's scale, [B, C, H, W].
        """
        settings, state, count = self._context.loss, self.step, self._context.num_steps()
        if state is None or settings is None or not settings.guides(state.index, count):
            return self._take_step(step, prediction, sample)
        if state.sigmas[0] == math.inf:  # pure noise (zero terminal SNR) has no picture in it to look at
            return self._take_step(step, prediction, sample)
        repeats = settings.repeats_of(state.index, count)
        sigma, next_sigma = state.sigmas
        scheduler, kind, exploding = self._context.scheduler, self._prediction_type(), self._exploding
        scale, next_scale = ((1.0 + level * level) ** 0.5 if exploding else 1.0 for level in state.sigmas)
        before = snapshot(scheduler) if repeats > 1 else {}
        dtype = wide(sample)
        for repeat in range(repeats):
            if repeat > 0:
                rewind(scheduler, before)
            previous = self._take_step(step, prediction, sample)
            with self._checkpointing(state.module, settings.checkpointing):
                loss, gradient, noise = loss_gradient(
                    settings, self._differentiable, sample.to(dtype) / scale, state.alpha_bar, kind,
                    self._context.decode, self._random,
                )  # fmt: skip
            self._stats.losses.append(loss)
            correction = update(settings, gradient, noise, state.alpha_bar, alpha_bar_of(next_sigma))
            previous = (previous.to(dtype) - next_scale * correction).to(previous.dtype)
            if repeat + 1 < repeats:
                # One draw for all samples, so that a batch of two is two batches of one.
                fresh = torch.randn((1, *sample.shape[1:]), generator=self._random).to(sample.device)
                sample = renoise(previous, sigma, next_sigma, fresh, exploding)
                prediction = self._guided(sample / scale).to(prediction.dtype)
        return previous

    def _take_step(self, step: SchedulerStep, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The scheduler's step. For CFG++ in a multistep solver with the unconditional prediction, which is what its
        history then holds, and the guided difference added as a first-order step would move it."""
        state = self.step
        if not self._context.renoises or state is None or state.uncond is None:
            return step(prediction, sample)
        sigma, next_sigma = state.sigmas
        _, moved = denoising(alpha_bar_of(sigma), self._prediction_type())
        factor = alpha_bar_of(next_sigma) ** 0.5 * (1.0 - next_sigma / sigma) * moved
        dtype = wide(sample)
        previous = step(state.uncond.to(prediction.dtype), sample)
        guided = factor * (prediction.to(dtype) - state.uncond.to(dtype))
        return (previous.to(dtype) + guided).to(previous.dtype)

    def _differentiable(self, latents: torch.Tensor) -> torch.Tensor:
        """The prediction that the loss guidance looks through."""
        state = self._state()
        if state.guided and cast(LossGuidance, self._context.loss).prediction == "conditional":
            if can_halve(state.module, state.kwargs):
                return self._evaluate(latents)[0]
            return self._evaluate(latents, latents)[1]
        # CFG++ denoises with lam, of which its step weight is a multiple: lam = omega (1 - sigma' / sigma).
        sigma, next_sigma = state.sigmas
        interpolates = hasattr(self._context.schedule, "renoises")
        return self._guided(latents, 1.0 - next_sigma / sigma if interpolates else 1.0)

    def _guided(self, latents: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """The guided prediction at other latents [B, C, H, W], with this step's weight, times a factor, and rates;
        differentiable."""
        state = self._state()
        if not state.guided:
            return self._evaluate(latents)[0]
        uncond, cond = self._evaluate(latents, latents)
        if self._context.renoises and not torch.is_grad_enabled():
            state.uncond = uncond
        dtype = wide(cond)
        guided = uncond.to(dtype) + factor * state.weight * (cond.to(dtype) - uncond.to(dtype))
        if state.rescale > 0.0:
            axes = list(range(1, cond.dim()))
            ratio = cond.to(dtype).std(axes, keepdim=True) / guided.std(axes, keepdim=True)
            guided = guided * (state.rescale * ratio + 1.0 - state.rescale)
        return guided

    def _evaluate(self, *latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The denoiser at other latents, with everything else as in this step and the layers stock.

        Args:
            latents: [B, C, H, W] each: one per group of the step's batch, or one for the conditional group alone.

        Returns:
            A prediction [B, C, H, W] for each; differentiable if gradients are on.
        """
        state = self._state()
        args, kwargs = copied(state.args), copied(state.kwargs)
        batch = argument(args, kwargs, 0, "sample").shape[0]
        if state.guided and len(latents) == 1:
            args, kwargs = second_half(args, batch), second_half(kwargs, batch)
        sample = argument(args, kwargs, 0, "sample")
        moved = torch.cat(latents).to(sample.dtype)
        if sample.shape[1] > moved.shape[1]:  # inpainting: mask and picture follow the latents
            moved = torch.cat([moved, sample[:, moved.shape[1] :]], 1)
        if args:
            args = (moved, *args[1:])
        else:
            kwargs = {**kwargs, "sample": moved}
        self._stats.samples += moved.shape[0]
        with self._aside():
            return state.module(*args, **kwargs)[0].chunk(len(latents))

    @contextlib.contextmanager
    def _checkpointing(self, module: Any, wanted: bool) -> Iterator[None]:
        """Gradient checkpointing of the denoiser, if wanted and not on already."""
        change = wanted and not module.is_gradient_checkpointing
        if change:
            module.enable_gradient_checkpointing()
        try:
            yield
        finally:
            if change:
                module.disable_gradient_checkpointing()

    @functools.cached_property
    def _last_alpha_bar(self) -> float | None:
        """abar at the end of the trained table; None where the scheduler has none. Asked once per call."""
        level = trained_level(self._context.scheduler)
        return None if level is None else alpha_bar_of(level)

    @functools.cached_property
    def _exploding(self) -> bool:
        """Whether samples are x0 + sigma e; asked once per call, as it may read a tensor."""
        return float(self._context.scheduler.init_noise_sigma) != 1.0

    def _prediction_type(self) -> str:
        return str(self._context.scheduler.config.prediction_type)

    def _state(self) -> StepInputs:
        return cast(StepInputs, self.step)
