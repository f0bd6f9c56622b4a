"""What is known of a pipeline call, and what is reported of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.maps import StepMaps
from ..guidance.characteristic import CharacteristicGuidance
from ..guidance.loss import LossGuidance
from ..guidance.steps import StepWeight
from .rates import GivenRates


class SCFGWarning(UserWarning):
    """S-CFG left a step or a layer to plain guidance; the message says why and what to do."""


class SCFGError(RuntimeError):
    """Under `strict=True`: what would have been an `SCFGWarning`."""


@dataclass(frozen=True)
class Convergence:
    """How one step of Characteristic Guidance went; tensors on the denoiser's device.

    Attributes:
        step: index of the denoising step.
        iterations: [B] int64, evaluations that each sample used.
        residuals: [K, B], RMS residual after each evaluation.
        converged: [B] bool; the others were left to plain guidance.
    """

    step: int
    iterations: torch.Tensor
    residuals: torch.Tensor
    converged: torch.Tensor


@dataclass
class Stats:
    """What the last pipeline call did.

    Attributes:
        layers: names of the captured transformer blocks.
        backend: operator -> `"torch"` or `"triton"` for this pipeline's device and dtype; empty before the first call.
            Operands beyond a kernel's limits (see `SCFGConfig.backend`) are computed by torch all the same.
        bytes: bytes of maps kept from the layers to the end of a step (the largest step).
        steps_applied: denoising steps guided by S-CFG; steps of all runs, where a call has several.
        steps_skipped: reason -> number of steps that were left to plain guidance.
        weights: weight of the conditional direction in every step so far: the schedule's, or `guidance_scale`.
        distances: for every step (||g - u||, ||t - u||), [B] each, on the denoiser's device, or None where the step is
            plain; see `effective_weights`.
        images: B, images of the call.
        samples: samples that the denoiser computed; a step whose weight is 1 needs half, Characteristic and loss
            guidance need more. A backward pass is not counted.
        characteristic: one entry per step that Characteristic Guidance was solved in.
        losses: [B] tensors, the loss at every evaluation of loss guidance in order; see `loss_curve`.
    """

    layers: tuple[str, ...] = ()
    backend: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    steps_applied: int = 0
    steps_skipped: dict[str, int] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    distances: list[tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=list, repr=False)
    images: int = 0
    samples: int = 0
    characteristic: list[Convergence] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    @property
    def loss_curve(self) -> list[list[float]]:
        """`losses` on the host: one list per evaluation with a number per image."""
        return [loss.tolist() for loss in self.losses]

    @property
    def effective_weights(self) -> list[torch.Tensor]:
        """The dose of every step so far and image, [B] each: ||g - u|| / ||t - u|| with u, t the denoiser's two
        predictions and g the one that the scheduler gets, norms over the whole latent; 1 where t = u.

        Plain guidance of scale s has s, the conditional prediction alone 1. `guidance_rescale` is part of g, what
        perturbed attention adds is not. Reading it waits for no device; a plain step's tensor is on the CPU.
        """
        return [
            torch.full((self.images,), weight) if pair is None else torch.where(pair[1] > 0.0, pair[0] / pair[1], 1.0)
            for weight, pair in zip(self.weights, self.distances, strict=True)
        ]

    @property
    def effective_weight(self) -> float:
        """Mean of `effective_weights` over steps and images: the dose to match when methods are compared. Reading it
        waits for the device; nan before the first step."""
        weights = self.effective_weights
        return sum(float(weight.double().mean()) for weight in weights) / len(weights) if weights else float("nan")

    @property
    def mean_weight(self) -> float:
        """Mean of `weights`, without what rates and rules add (`effective_weight`); nan before the first step."""
        return sum(self.weights) / len(self.weights) if self.weights else float("nan")


@dataclass(frozen=True)
class CallContext:
    """What the hooks must know about the pipeline call; callables are read at every step, because callbacks may change
    them.

    Attributes:
        samples: images in this call (prompts times images per prompt).
        guidance_scale: s as the pipeline will use it in this step for this denoiser; at most 1 means that guidance is
            off.
        guidance_rescale: phi of the pipeline; above 0 it reads the conditional half again.
        num_steps: denoising steps of this call.
        groups: samples per image that the denoiser gets: 2, [unconditional; conditional], or 3 with a perturbed one
            after them, which the pipeline compares with the conditional one.
        foreground: "unconditional" or "conditional", the half whose start token decides the foreground.
        token_mask: [samples, T] bool, which tokens may own regions, or None.
        schedule: rule for the weight of each step, or None for guidance_scale.
        scheduler: the pipeline's, whose noise levels the schedule may ask for.
        characteristic: settings of Characteristic Guidance, or None.
        loss: settings of loss guidance, or None.
        decode: x0 [B, C, H, W] fp32 in latents -> pictures [B, 3, 8H, 8W] in about [0, 1]; for a loss in pixels.
        two_pass: whether the denoiser is called twice per step on the same latents, conditional first.
        rereads: whether the conditional prediction must be left alone, because the pipeline uses it for more than the
            guidance, or so that rates of 1 are stock to the bit (transformers); `guidance_rescale` and a third group
            need not be said.
        size: (H, W) of the latents, where they are packed and the denoiser is not told.
        switch: the arguments that turn guidance on, for messages.
        rates: the user's, in the place of S-CFG's or on top of them, or None.
        watcher: gets (step, maps, token_index [B, h, w], foreground [B, h, w]) of every step with maps, or None.
        watches_only: whether the predictions stay as they are.
        undone_by: what the pipeline does to the guided prediction that cancels rates, or "".
    """

    samples: int
    guidance_scale: Callable[[torch.nn.Module], float]
    guidance_rescale: Callable[[], float]
    num_steps: Callable[[], int]
    groups: Callable[[], int] = lambda: 2
    foreground: str = "unconditional"
    token_mask: torch.Tensor | None = None
    schedule: StepWeight | None = None
    scheduler: Any = None
    characteristic: CharacteristicGuidance | None = None
    loss: LossGuidance | None = None
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    two_pass: bool = False
    rereads: bool = False
    size: tuple[int, int] | None = None
    switch: str = "guidance_scale > 1"
    rates: GivenRates | None = None
    watcher: Callable[[int, StepMaps, torch.Tensor, torch.Tensor], None] | None = None
    watches_only: bool = False
    undone_by: str = ""

    @property
    def renoises(self) -> bool:
        """Whether CFG++ takes the scheduler's steps apart."""
        return bool(getattr(self.schedule, "renoises", lambda _: False)(self.scheduler))

    @property
    def corrects(self) -> bool:
        """Whether a method needs more of a step than its prediction: noise levels, and the denoiser again."""
        return self.renoises or self.characteristic is not None or self.loss is not None

    @property
    def needs_levels(self) -> bool:
        """Whether anything asks for noise levels."""
        return self.corrects or (self.schedule is not None and self.schedule.needs_levels)
