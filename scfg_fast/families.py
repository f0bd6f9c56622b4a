"""The diffusers pipelines that S-CFG runs in, and how to read one call of each.

All of them put two samples per image through one UNet, [unconditional; conditional], and combine the two in a line of
their own `__call__`. They differ in where a call keeps its numbers, in a third group of samples (perturbed-attention
guidance), and in what an empty negative prompt becomes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .config import SCFGConfig
from .guidance.steps import StepWeight
from .hooks import CallContext


@dataclass(frozen=True)
class Family:
    """Pipelines that are read alike.

    Attributes:
        name: for people.
        pipelines: class names in diffusers. Names, because importing thirty pipelines to ask about one takes seconds.
    """

    name: str
    pipelines: tuple[str, ...]


FAMILIES = (
    Family(
        "Stable Diffusion 1.x and 2.x",
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionDepth2ImgPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionPAGPipeline",
            "StableDiffusionPAGImg2ImgPipeline",
            "StableDiffusionPAGInpaintPipeline",
            "StableDiffusionControlNetPAGPipeline",
            "StableDiffusionControlNetPAGInpaintPipeline",
        ),
    ),
    Family(
        "Stable Diffusion XL",
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusionXLPAGPipeline",
            "StableDiffusionXLPAGImg2ImgPipeline",
            "StableDiffusionXLPAGInpaintPipeline",
            "StableDiffusionXLControlNetPAGPipeline",
            "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        ),
    ),
    Family("Kolors", ("KolorsPipeline", "KolorsPAGPipeline")),
)


def family_of(pipe: DiffusionPipeline) -> Family | None:
    """The family of a pipeline, or None. A subclass of a pipeline belongs to its family."""
    names = {cls.__name__ for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers.")}
    return next((family for family in FAMILIES if not names.isdisjoint(family.pipelines)), None)


def tokenizer_of(pipe: DiffusionPipeline) -> Any:
    """The tokenizer whose tokens are the columns of the cross-attention maps; None if the pipeline has none.

    SDXL joins the states of its two text encoders by channel, so both tokenizers count the same columns; its refiner
    has only the second.
    """
    return getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)


def read_call(
    pipe: Any, arguments: dict[str, Any], config: SCFGConfig, schedule: StepWeight | None = None
) -> CallContext | None:
    """What the hooks must know about one call.

    Args:
        pipe: a pipeline of one of `FAMILIES`.
        arguments: of its `__call__`, bound, with defaults.
        config: the configuration of this call.
        schedule: weight of each step, or None for `guidance_scale`.

    Returns:
        The context, or None if the call names no prompt (the pipeline's own check will say so).

    Raises:
        ValueError: `tokens="words"` without the prompt's text or without a tokenizer; or the schedule does not work
            with this scheduler or with `eta`.
    """
    prompt = arguments.get("prompt")
    embeds: Any = arguments.get("prompt_embeds")
    if isinstance(prompt, str):
        prompts: list[str] | None = [prompt]
    elif isinstance(prompt, (list, tuple)):
        prompts = list(prompt)
    else:
        prompts = None
    if prompts is None and embeds is None:
        return None
    if schedule is not None:
        schedule.check(pipe.scheduler, eta=float(arguments.get("eta") or 0.0))
    per_prompt = arguments.get("num_images_per_prompt") or 1
    samples = (len(prompts) if prompts is not None else embeds.shape[0]) * per_prompt
    mask = None
    if config.tokens == "words":
        tokenizer = tokenizer_of(pipe)
        known = getattr(tokenizer, "eos_token_id", None) is not None and tokenizer.padding_side == "right"
        if prompts is None or not known:
            raise ValueError(
                "scfg_fast: tokens='words' needs the prompt's text and a tokenizer of CLIP's layout (start, words, "
                "end, padding), which Kolors has not; use tokens='all'"
            )
        if hasattr(pipe, "maybe_convert_prompt"):
            prompts = pipe.maybe_convert_prompt(prompts, tokenizer)  # textual inversion: one word, several tokens
        mask = word_mask(tokenizer, prompts).repeat_interleave(per_prompt, 0).to(pipe._execution_device)
    return CallContext(
        samples=samples,
        guidance_scale=lambda: float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else 1.0,
        guidance_rescale=lambda: _guidance_rescale(pipe, arguments),
        num_steps=functools.partial(_num_steps, pipe, arguments),
        groups=lambda: 3 if getattr(pipe, "do_perturbed_attention_guidance", False) else 2,
        foreground=_foreground(pipe, arguments, config),
        token_mask=mask,
        schedule=schedule,
        scheduler=pipe.scheduler,
    )


def _guidance_rescale(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> float:
    """From the pipeline where it has the property, as callbacks may change it; some keep the bare argument; else 0."""
    return float(getattr(pipe, "guidance_rescale", None) or arguments.get("guidance_rescale") or 0.0)


def _num_steps(pipe: Any, arguments: dict[str, Any]) -> int:
    """Denoiser calls of this run. The adapter pipelines do not publish the number; theirs is the scheduler's, cut."""
    published = getattr(pipe, "num_timesteps", None)
    if published is not None:
        return published
    count, end = len(pipe.scheduler.timesteps), arguments.get("denoising_end")
    return max(1, round(count * end)) if isinstance(end, float) and 0.0 < end < 1.0 else count


def _foreground(pipe: DiffusionPipeline, arguments: dict[str, Any], config: SCFGConfig) -> str:
    """Which half the foreground is read from; see `SCFGConfig.foreground`."""
    if config.foreground != "auto":
        return config.foreground
    if not getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        return "unconditional"
    embeds = arguments.get("negative_prompt_embeds")
    if embeds is not None:  # as `encode_prompt` gives them; read once, before the run
        return "unconditional" if bool(embeds.any()) else "conditional"
    return "conditional" if arguments.get("negative_prompt") is None else "unconditional"


def word_mask(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """[len(prompts), T] bool: the tokens of the prompt's own words. A prompt without words keeps all its tokens."""
    ids = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    position = torch.arange(ids.shape[1])
    end = (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    mask = (position > 0) & (position < end)
    return mask | ~mask.any(1, keepdim=True)
