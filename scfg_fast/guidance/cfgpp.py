r"""CFG++ as a step weight.

CFG++ interpolates, eps_lam = eps_u + lam (eps_c - eps_u) with lam in [0, 1], and renoises with eps_u. For one step of
DDIM or Euler that is the same as plain guidance with the weight

    omega_t = lam sigma / (sigma - sigma')            sigma = sqrt((1 - abar) / abar), variance preserving or exploding
    omega_t = lam t (1 - t') / (t - t')               flow matching, x = (1 - t) x0 + t e

exactly: the guided denoised sample moves by lam (D_c - D_u) and the renoising by nothing. A last step to sigma' = 0 has
omega = lam. So the scheduler stays as it is. Many steps mean small gaps and a large omega: **lam must be chosen for the
number of steps** (`mean_weight_of`, `lam_for_mean_weight`).

A multistep solver also extrapolates from earlier steps, and what it must extrapolate is the unconditional prediction
alone: then guidance that stays the same from step to step adds nothing to the extrapolation, and the solver agrees with
its own first-order form. (Two published forms of DPM-Solver++ 2M with CFG++ disagree on this; the other one mixes
guided and unconditional in the difference and guides by up to lam (D_c - D_u) / 2r too much.) That form is

    x' = step(x, eps_u) + alpha' lam (D_c - D_u)        alpha' = sqrt(abar')

with the scheduler's own step, so it needs no solver of its own either.

The published code reads abar one index early (it puts a 1 in front of the table), so its steps have levels up to 2.5 %
lower than the denoiser is told, 29 % in the last; here they are the scheduler's own.

Source: Chung et al., "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models", ICLR 2025 (arXiv
2406.08070), equations 9 to 13; the identity and the form for multistep solvers are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .steps import Step, step_levels

SCHEDULERS = ("DDIMScheduler", "DDIMExactInverseScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
"""First-order schedulers, for which the identity is exact."""

MULTISTEP_SCHEDULERS = ("DPMSolverMultistepScheduler",)
"""Schedulers whose step is taken with the unconditional prediction, and the guided difference added to its result."""


def step_weight(lam: float, sigma: float, next_sigma: float, *, flow: bool = False) -> float:
    """omega_t of one step; lam where the step goes nowhere and any weight does.

    Args:
        lam: interpolation weight of CFG++.
        sigma, next_sigma: noise levels before and after the step; times in [0, 1] if `flow`.
        flow: flow matching.
    """
    if next_sigma >= sigma:
        return lam
    return lam * (1.0 - next_sigma if flow else 1.0) / (1.0 - next_sigma / sigma)


@dataclass(frozen=True)
class CFGPlusPlus:
    """Renoise with the unconditional prediction, in an unmodified DDIM, Euler or DPM-Solver++ scheduler.

    `guidance_scale` only turns guidance on (any value above 1); the strength is `lam`.

    Args:
        lam: in [0, 1] in the paper (0.6 is its default); larger values are allowed.

    Raises:
        ValueError: lam is negative.
    """

    lam: float = 0.6
    needs_levels = True

    def __post_init__(self) -> None:
        if not self.lam >= 0.0:
            raise ValueError(f"CFGPlusPlus: lam must not be negative, got {self.lam}")

    def check(self, scheduler: Any, eta: float = 0.0) -> None:
        """Raise ValueError for a scheduler without a consistent form of CFG++, or with noise of its own (`eta`)."""
        if eta > 0.0:
            raise ValueError(f"CFGPlusPlus: the identity holds for deterministic steps, got eta={eta:g}; leave it at 0")
        name = type(scheduler).__name__
        advice = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
        if name not in SCHEDULERS and not self.renoises(scheduler):
            raise ValueError(
                f"CFGPlusPlus: {name} is neither a first-order nor a known multistep scheduler, so CFG++ is not "
                f"defined there. Use one of {', '.join((*SCHEDULERS, *MULTISTEP_SCHEDULERS))}: {advice}"
            )
        if self.renoises(scheduler) and scheduler.config.algorithm_type != "dpmsolver++":
            raise ValueError(
                f"CFGPlusPlus: {name} with algorithm_type={scheduler.config.algorithm_type!r} adds noise of its own or "
                "extrapolates the noise; use algorithm_type='dpmsolver++'"
            )
        if scheduler.config.get("clip_sample", False) or scheduler.config.get("thresholding", False):
            raise ValueError(
                f"CFGPlusPlus: {name} clips the denoised sample (clip_sample or thresholding), so the step weight is "
                f"not CFG++ there: {advice}"
            )

    def renoises(self, scheduler: Any) -> bool:
        """Whether the scheduler's step must be taken with the unconditional prediction; for others the weight does."""
        return type(scheduler).__name__ in MULTISTEP_SCHEDULERS

    def weight(self, step: Step) -> float:
        """omega_t of the step; in a multistep scheduler, the weight of its first-order form.

        Raises:
            ValueError: the scheduler publishes no noise levels.
        """
        if step.sigma is None or step.next_sigma is None:
            raise ValueError("CFGPlusPlus: this scheduler publishes no noise levels")
        return step_weight(self.lam, step.sigma, step.next_sigma, flow=step.flow)


def mean_weight_of(lam: float, levels: Sequence[tuple[float, float]], *, flow: bool = False) -> float:
    """Mean plain-guidance weight that CFG++ with `lam` amounts to over the steps of `step_levels`."""
    return sum(step_weight(lam, *pair, flow=flow) for pair in levels) / len(levels)


def lam_for_mean_weight(weight: float, scheduler: Any, num_inference_steps: int) -> float:
    """The lam that amounts to a mean plain-guidance weight with this scheduler and number of steps.

    Sets the scheduler's timesteps, as a pipeline call will again.

    Raises:
        ValueError: the scheduler is not one that CFG++ runs with.
    """
    CFGPlusPlus().check(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    found = step_levels(scheduler)
    if found is None:
        raise ValueError(f"{type(scheduler).__name__} publishes no noise levels")
    levels, flow = found
    return weight / mean_weight_of(1.0, levels, flow=flow)
