"""Combinations of a pipeline, a scheduler and methods that are refused, with every reason."""

from __future__ import annotations

from typing import Any

import torch

from ..config import SCFGConfig
from ..guidance.characteristic import CharacteristicGuidance
from ..guidance.loss import LossGuidance
from ..guidance.predictions import PREDICTION_TYPES
from ..guidance.steps import StepWeight
from .families import Family

LOSS_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Schedulers whose next step starts from the sample that it is given, corrected or not."""


def check_combination(
    config: SCFGConfig,
    rescale: float,
    schedule: StepWeight | None,
    characteristic: CharacteristicGuidance | None,
    loss: LossGuidance | None,
) -> None:
    """Refuse what a rule other than plain mixing does not go with; `rescale` is guidance_rescale."""
    if config.combine == "cfg":
        return
    reasons = []
    if hasattr(schedule, "renoises"):
        reasons.append("CFG++ renoises with the unconditional prediction, for plain mixing alone; use a WeightSchedule")
    if characteristic is not None:
        reasons.append("Characteristic Guidance solves for plain mixing; leave one of them out")
    if loss is not None:
        reasons.append("loss guidance differentiates plain mixing; leave one of them out")
    if config.combine == "cfg-zero" and config.zero_init_steps > 0 and rescale > 0.0:
        reasons.append("guidance_rescale divides by the spread of a prediction of zero; use zero_init_steps=0")
    if reasons:
        raise ValueError(f"scfg_fast: combine={config.combine!r}: {'; '.join(reasons)}")


def check_inversion(
    config: SCFGConfig,
    schedule: StepWeight | None,
    characteristic: CharacteristicGuidance | None,
    loss: LossGuidance | None,
) -> None:
    """Refuse what depends on the place in the run, which an inversion goes through backwards, or moves the sample."""
    wrong = []
    if schedule is not None and not hasattr(schedule, "renoises"):
        wrong.append(f"schedule={type(schedule).__name__}")
    if (config.start, config.stop, config.reuse_every) != (0.0, 1.0, 1):
        wrong.append("start, stop or reuse_every")
    if config.combine != "cfg":
        wrong.append(f"combine={config.combine!r}")
    wrong += [name for name, there in (("characteristic", characteristic), ("loss", loss)) if there is not None]
    if wrong:
        raise ValueError(
            f"scfg_fast: an inversion goes through the run backwards and cannot take {', '.join(wrong)}; use S-CFG "
            "throughout, CFGPlusPlus, or plain guidance"
        )


def check_corrections(
    pipe: Any,
    family: Family,
    arguments: dict[str, Any],
    schedule: StepWeight | None,
    characteristic: CharacteristicGuidance | None,
    loss: LossGuidance | None,
) -> None:
    """Refuse what Characteristic Guidance, loss guidance and CFG++ in multistep solvers do not go with."""
    scheduler = pipe.scheduler
    name = type(scheduler).__name__
    renoises = bool(getattr(schedule, "renoises", lambda _: False)(scheduler))
    wanted = [
        what
        for what, there in (
            ("Characteristic Guidance", characteristic is not None),
            ("loss guidance", loss is not None),
            (f"CFG++ in {name}", renoises),
        )
        if there
    ]
    if not wanted:
        return
    what = " and ".join(wanted)
    if family.denoisers != ("unet",):
        raise ValueError(f"scfg_fast: {what}: for pipelines with a UNet, this is {family.name}; use a schedule, or CFG")
    reasons = []
    if family.variance:
        reasons.append("the denoiser predicts a variance beside the noise; use a schedule, or CFG")
    if characteristic is not None and (loss is not None or renoises):
        reasons.append("an implicit solution has no gradient and no unconditional part here; use one at a time")
    if float(arguments.get("pag_scale") or 0.0) > 0.0:
        reasons.append("perturbed-attention guidance adds a third prediction; set pag_scale=0")
    if "FlowMatch" in name or name.startswith("EDM") or scheduler.config.get("use_flow_sigmas", False):
        reasons.append(f"{name} is not a variance-preserving or -exploding scheduler; use DDIMScheduler, for example")
    elif scheduler.config.get("prediction_type") not in PREDICTION_TYPES:
        reasons.append(f"{name} predicts {scheduler.config.get('prediction_type')!r}, known are {PREDICTION_TYPES}")
    if loss is not None and name not in LOSS_SCHEDULERS:
        reasons.append(
            f"{name} recomputes samples from a memory of its own and would discard corrections; use one of "
            f"{', '.join(LOSS_SCHEDULERS)}"
        )
    if loss is not None and _weights_move(pipe.unet):
        reasons.append(
            "the denoiser is offloaded layer by layer, and its backward pass needs all weights; use "
            "enable_model_cpu_offload() and space='latents'"
        )
    vae = getattr(pipe, "vae", None)
    if loss is not None and loss.space == "pixels":
        if vae is None:
            reasons.append("the pipeline has no vae to decode with; use space='latents'")
        elif overflows(pipe):
            reasons.append("this vae overflows in fp16; use space='latents' or a vae made for fp16")
        elif vars(vae).get("_hf_hook") is not None or _weights_move(vae):
            reasons.append(
                "offloading would take the denoiser's weights away between its forward and backward pass when the vae "
                "decodes; use space='latents'"
            )
    if reasons:
        raise ValueError(f"scfg_fast: {what}: {'; '.join(reasons)}")


def overflows(pipe: Any) -> bool:
    """Whether the vae is in fp16 and of the kind that its own pipelines (SDXL, Kolors) upcast for that."""
    upcast = getattr(pipe.vae.config, "force_upcast", False) and hasattr(pipe, "upcast_vae")
    return bool(upcast) and pipe.vae.dtype == torch.float16


def _weights_move(denoiser: torch.nn.Module) -> bool:
    """Whether layers of the denoiser leave the device after their forward pass (sequential or group offloading)."""
    for module in denoiser.modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and "group_offloading" in registry.hooks:
            return True
        if module is not denoiser and getattr(vars(module).get("_hf_hook"), "offload", False):
            return True
    return False
