"""The diffusers pipelines that S-CFG runs in, and how to read one call of each.

All of them combine an unconditional and a conditional prediction in a line of their own `__call__`. Most put two
samples per image through the denoiser, [unconditional; conditional], some run it twice per step, conditional first.
They differ in where a call keeps its numbers, in a third group of samples (perturbed-attention guidance), and in what
an empty negative prompt becomes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .config import SCFGConfig
from .denoisers import UNet, denoiser_of
from .guidance.characteristic import CharacteristicGuidance
from .guidance.loss import LossGuidance
from .guidance.predictions import PREDICTION_TYPES
from .guidance.steps import StepWeight
from .hooks import CallContext
from .install import unwrap
from .interception import ancestry, described


def _property_scale(pipe: Any, arguments: dict[str, Any], denoiser: torch.nn.Module) -> float:
    """The pipeline's property, which callbacks may change. A subclass with a loop of its own may not set what the
    property reads: there it is the argument."""
    try:
        return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else 1.0
    except AttributeError:
        return float(arguments["guidance_scale"])


def _argument_scale(pipe: Any, arguments: dict[str, Any], denoiser: torch.nn.Module) -> float:
    """The bare argument, which no callback changes. Guidance may still be switched off by the property."""
    return float(arguments["guidance_scale"]) if getattr(pipe, "do_classifier_free_guidance", True) else 1.0


def _true_scale(pipe: Any, arguments: dict[str, Any], denoiser: torch.nn.Module) -> float:
    """Of pipelines for distilled models, which are guided only if there is a negative prompt too."""
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    return float(arguments["true_cfg_scale"]) if negative else 1.0


def _offset_scale(pipe: Any, arguments: dict[str, Any], denoiser: torch.nn.Module) -> float:
    """Of pipelines that compute t + s (t - u), which is the scale s + 1 everywhere else."""
    return float(pipe.guidance_scale) + 1.0 if pipe.do_classifier_free_guidance else 1.0


def _wan_scale(pipe: Any, arguments: dict[str, Any], denoiser: torch.nn.Module) -> float:
    """Wan 2.2 has a scale for each of its two denoisers."""
    if not pipe.do_classifier_free_guidance:
        return 1.0
    early, late = arguments["guidance_scale"], arguments.get("guidance_scale_2")
    return float(early if late is None or denoiser is unwrap(pipe.transformer) else late)


ARGUMENT_SCALE = frozenset({
    "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
})  # fmt: skip
"""Classes whose guidance line reads the argument `guidance_scale`, where others of their family read the property. A
test compares this with the source of the installed diffusers."""

SAME_LENGTH = "sets every guided token back to the length of the conditional prediction"
TRUE_CFG = "true_cfg_scale > 1 and a negative_prompt; without them the model's own distilled guidance is all there is"


@dataclass(frozen=True)
class Family:
    """Pipelines that are read alike.

    Attributes:
        name: for people.
        pipelines: class names in diffusers. Names, because importing thirty pipelines to ask about one takes seconds.
        denoisers: attributes of the pipeline that hold one, those that are not None in use.
        two_pass: whether the denoiser is called twice per step, conditional first.
        scale: guidance_scale s as the pipeline uses it in this step; at most 1 for no guidance. Takes the pipeline, the
            arguments of the call, and the denoiser.
        packed: whether latents are packed patches, and the denoiser is not told their size.
        undone_by: what the pipeline does to the guided prediction that cancels most of any rate, or "".
        switch: the arguments that turn guidance on, for messages.
        config: what `enable` takes where no configuration is given: the published values.
        benchmark: what `benchmark="auto"` means in the published code.
        variance: whether the denoiser predicts a variance beside the noise.
    """

    name: str
    pipelines: tuple[str, ...]
    denoisers: tuple[str, ...] = ("unet",)
    two_pass: bool = False
    scale: Callable[[Any, dict[str, Any], torch.nn.Module], float] = _property_scale
    packed: bool = False
    undone_by: str = ""
    switch: str = "guidance_scale > 1"
    config: SCFGConfig = field(default_factory=SCFGConfig)
    benchmark: str = "foreground"
    variance: bool = False


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
    Family(
        "DeepFloyd IF, stage I", ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"), scale=_argument_scale,
        config=SCFGConfig.deepfloyd(), benchmark="image", variance=True,
    ),
    Family(
        "DeepFloyd IF, stage II",
        ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
        scale=_argument_scale, config=SCFGConfig.deepfloyd(), variance=True,
    ),
    Family(
        "Stable Diffusion 3",
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        ("transformer",),
    ),
    Family("PixArt", ("PixArtAlphaPipeline", "PixArtSigmaPipeline"), ("transformer",), scale=_argument_scale),
    Family("HunyuanDiT", ("HunyuanDiTPipeline",), ("transformer",), scale=_argument_scale),
    Family("Sana", ("SanaPipeline",), ("transformer",), scale=_argument_scale),
    Family("LTX-Video", ("LTXPipeline",), ("transformer",)),
    Family(
        "Flux", ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"), ("transformer",), True, _true_scale,
        packed=True, switch=TRUE_CFG,
    ),
    Family("FLUX.2 klein base", ("Flux2KleinPipeline",), ("transformer",), True, _argument_scale, packed=True),
    Family(
        "Chroma", ("ChromaPipeline", "ChromaImg2ImgPipeline"), ("transformer",), True, _argument_scale, packed=True
    ),
    Family(
        "Qwen-Image", ("QwenImagePipeline",), ("transformer",), True, _true_scale, switch=TRUE_CFG,
        undone_by=SAME_LENGTH,
    ),
    Family("CogView4", ("CogView4Pipeline",), ("transformer",), True),
    Family("Lumina 2", ("Lumina2Pipeline",), ("transformer",), True, _argument_scale),
    Family(
        "Z-Image", ("ZImagePipeline", "ZImageImg2ImgPipeline"), ("transformer",), scale=_offset_scale,
    ),
    Family("Wan", ("WanPipeline",), ("transformer", "transformer_2"), True, _wan_scale),
)  # fmt: skip


WHY_NOT = (
    ("InstructPix2Pix", "guides by text and by picture, in three groups of samples with a scale each"),
    ("LatentConsistencyModel", "is distilled: guidance is an input of its denoiser, there are no two predictions"),
    ("Onnx", "runs its denoiser outside of torch; load the torch weights with StableDiffusionPipeline"),
    ("FluxFill", "is guidance-distilled: there are no two predictions"),
    ("FluxControlPipeline", "is guidance-distilled: there are no two predictions"),
)
"""Part of a class name -> why pipelines with it are not supported; for those that people ask about."""


def why_not(pipe: DiffusionPipeline) -> str:
    """Why a pipeline of no family is not supported, in a sentence."""
    name = type(pipe).__name__
    known = next((reason for part, reason in WHY_NOT if part in name), None)
    families = ", ".join(family.name for family in FAMILIES)
    because = f": it {known}" if known else ""
    return f"{name} is not supported{because}; this version supports {families} pipelines"


def stock_class(pipe: DiffusionPipeline) -> type | None:
    """The class of diffusers that a pipeline is of, or derived from, and that a family has; or None."""
    names = {name for family in FAMILIES for name in family.pipelines}
    found = (cls for cls in ancestry(type(pipe)) if cls.__name__ in names and cls.__module__.startswith("diffusers."))
    return next(found, None)


def family_of(pipe: DiffusionPipeline) -> Family | None:
    """The family of a pipeline, or None. A subclass of a pipeline belongs to its family."""
    stock = stock_class(pipe)
    return next((family for family in FAMILIES if stock is not None and stock.__name__ in family.pipelines), None)


def tokenizer_of(pipe: DiffusionPipeline) -> Any:
    """The tokenizer whose tokens are the columns of the cross-attention maps; None if the pipeline has none.

    SDXL joins the states of its two text encoders by channel, so both tokenizers count the same columns; its refiner
    has only the second.
    """
    return getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)


def read_arguments(
    pipe: DiffusionPipeline, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call by name, as the pipeline of diffusers would get them.

    What a call takes as `**kwargs` counts as named. What it does not name has the default of the stock class.

    Returns:
        The arguments, or None if they do not fit the call.
    """
    try:
        bound = inspect.signature(described(call)).bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    stock = inspect.signature(described(cast(Any, stock_class(pipe)).__call__)).parameters.values()
    arguments = {p.name: p.default for p in stock if p.default is not p.empty}
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(bound.arguments[name])
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[name] = bound.arguments[name]
    return arguments


def names_a_prompt(pipe: DiffusionPipeline, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt, or its embeddings, can be read from the arguments of a call."""
    arguments = read_arguments(pipe, call, args, kwargs) or {}
    return any(arguments.get(name) is not None for name in ("prompt", "prompt_embeds"))


def read_call(
    pipe: Any,
    arguments: dict[str, Any],
    config: SCFGConfig,
    schedule: StepWeight | None = None,
    characteristic: CharacteristicGuidance | None = None,
    loss: LossGuidance | None = None,
) -> CallContext | None:
    """What the hooks must know about one call.

    Args:
        pipe: a pipeline of one of `FAMILIES`.
        arguments: of its `__call__`, bound, with defaults.
        config: the configuration of this call.
        schedule: weight of each step, or None for `guidance_scale`.
        characteristic, loss: settings of Characteristic Guidance and of loss guidance, or None.

    Returns:
        The context, or None if the call names no prompt (the pipeline's own check will say so).

    Raises:
        ValueError: `tokens="words"` without the prompt's text or without a tokenizer; or the schedule does not work
            with this scheduler or with `eta`; or methods are combined that do not go together.
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
    if type(pipe.scheduler).__name__ == "DDIMExactInverseScheduler":
        _check_inversion(config, schedule, characteristic, loss)
    family = cast(Family, family_of(pipe))
    scale = _argument_scale if cast(type, stock_class(pipe)).__name__ in ARGUMENT_SCALE else family.scale
    _check_corrections(pipe, family, arguments, schedule, characteristic, loss)
    per_prompt = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
    samples = len(prompts if prompts is not None else embeds) * per_prompt
    mask = None
    if config.tokens == "words":
        tokenizer: Any = tokenizer_of(pipe) if family.denoisers == ("unet",) else None
        ends = (getattr(tokenizer, name, None) is not None for name in ("bos_token_id", "eos_token_id"))
        known = all(ends) and tokenizer.padding_side == "right"
        if prompts is None or not known:
            raise ValueError(
                "scfg_fast: tokens='words' needs the prompt's text and a tokenizer of CLIP's layout (start, words, "
                f"end, padding), and a UNet; this is {family.name}. Use tokens='all'"
            )
        if hasattr(pipe, "maybe_convert_prompt"):
            prompts = pipe.maybe_convert_prompt(prompts, tokenizer)  # textual inversion: one word, several tokens
        mask = word_mask(tokenizer, prompts).repeat_interleave(per_prompt, 0).to(pipe._execution_device)
    return CallContext(
        samples=samples,
        guidance_scale=functools.partial(scale, pipe, arguments),
        guidance_rescale=lambda: _guidance_rescale(pipe, arguments),
        num_steps=functools.partial(_num_steps, pipe, arguments),
        groups=lambda: 3 if getattr(pipe, "do_perturbed_attention_guidance", False) else 2,
        foreground=_foreground(pipe, family, arguments, config),
        token_mask=mask,
        schedule=schedule,
        scheduler=pipe.scheduler,
        characteristic=characteristic,
        loss=loss,
        decode=_decoder(pipe) if loss is not None and loss.space == "pixels" else None,
        two_pass=family.two_pass,
        rereads=not isinstance(denoiser_of(unwrap(denoisers_of(pipe)[0])), UNet),
        size=_packed_size(pipe, arguments) if family.packed else None,
        switch=family.switch,
        undone_by=family.undone_by,
    )


def denoisers_of(pipe: Any) -> list[Any]:
    """The denoisers that a pipeline of one of `FAMILIES` calls, as it holds them."""
    family = cast(Family, family_of(pipe))
    return [there for there in (getattr(pipe, name, None) for name in family.denoisers) if there is not None]


def _packed_size(pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of latents that are packed in patches of 2 x 2: the picture's, in whole patches."""
    factor, default = 2 * pipe.vae_scale_factor, pipe.default_sample_size * pipe.vae_scale_factor
    height, width = (2 * (int(arguments.get(name) or default) // factor) for name in ("height", "width"))
    return height, width


def default_config(pipe: DiffusionPipeline) -> SCFGConfig:
    """The published values for a pipeline, or of Stable Diffusion for one of no family."""
    family = family_of(pipe)
    return SCFGConfig() if family is None else family.config


def with_benchmark(pipe: DiffusionPipeline, config: SCFGConfig) -> SCFGConfig:
    """The configuration with `benchmark` settled for this pipeline; the paper has one rule for all."""
    if config.benchmark != "auto":
        return config
    published = cast(Family, family_of(pipe)).benchmark
    return config.replace(benchmark=published if config.fidelity == "official" else "foreground")


def cells_of(pipe: Any, config: SCFGConfig) -> SCFGConfig:
    """The configuration with `cell` in latent pixels of this pipeline.

    A cell is meant for autoencoders that shrink eight times. Where a transformer's shrinks more, it has as many times
    fewer latent pixels; at least one.
    """
    if cast(Family, family_of(pipe)).denoisers == ("unet",):
        return config
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    factor = next((value for value in (getattr(pipe, name, None) for name in names) if value), 8)
    return config.replace(cell=max(1, 8 * config.cell // factor)) if factor > 8 else config


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


def _check_inversion(
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
    wrong += [name for name, there in (("characteristic", characteristic), ("loss", loss)) if there is not None]
    if wrong:
        raise ValueError(
            f"scfg_fast: an inversion goes through the run backwards and cannot take {', '.join(wrong)}; use S-CFG "
            "throughout, CFGPlusPlus, or plain guidance"
        )


def _check_corrections(
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


def _decoder(pipe: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """x0 in latents [B, C, H, W] -> pictures [B, 3, 8H, 8W] in about [0, 1], unclamped and differentiable."""
    vae = pipe.vae
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        scaled = latents / vae.config.scaling_factor
        if mean is not None and deviation is not None:
            shape = (1, -1, 1, 1)
            scaled = scaled * scaled.new_tensor(deviation).view(shape) + scaled.new_tensor(mean).view(shape)
        scaled = scaled + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float() / 2.0 + 0.5

    return decode


def _guidance_rescale(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> float:
    """From the pipeline where it has the property, as callbacks may change it; some keep the bare argument; else 0."""
    rescale = getattr(pipe, "guidance_rescale", None)
    return float((arguments.get("guidance_rescale") if rescale is None else rescale) or 0.0)


def _num_steps(pipe: Any, arguments: dict[str, Any]) -> int:
    """Denoiser calls of this run. The adapter and IF pipelines do not publish the number; theirs is the scheduler's,
    cut."""
    published = getattr(pipe, "num_timesteps", None)
    if published is not None:
        return published
    count, end = len(pipe.scheduler.timesteps), arguments.get("denoising_end")
    if arguments.get("strength") is not None:  # image to image starts late
        count = min(int(count * arguments["strength"]), count)
    return max(1, round(count * end)) if isinstance(end, float) and 0.0 < end < 1.0 else count


def _foreground(pipe: DiffusionPipeline, family: Family, arguments: dict[str, Any], config: SCFGConfig) -> str:
    """Which half the foreground is read from; see `SCFGConfig.foreground`."""
    if config.foreground != "auto":
        return config.foreground
    if family.denoisers != ("unet",):
        denoiser = denoiser_of(unwrap(denoisers_of(pipe)[0]))
        return getattr(denoiser, "foreground", None) or "unconditional"
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
