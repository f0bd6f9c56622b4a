"""The diffusers pipelines that S-CFG runs in, as a table.

All of them combine an unconditional and a conditional prediction in a line of their own `__call__`. Most put two
samples per image through the denoiser, [unconditional; conditional], some run it twice per step, conditional first.
They differ in where a call keeps its numbers, in a third group of samples (perturbed-attention guidance), and in what
an empty negative prompt becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..config import SCFGConfig
from ..denoisers.install import unwrap
from ..versions import reason_against
from .interception import ancestry


def _property_scale(pipe: Any, arguments: dict[str, Any], denoiser: torch.nn.Module) -> float:
    """The pipeline's property, which callbacks may change. A subclass with a loop of its own may not set what the
    property reads: there it is the argument."""
    try:
        return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else 1.0
    except AttributeError:
        return float(arguments["guidance_scale"])


def argument_scale(pipe: Any, arguments: dict[str, Any], denoiser: torch.nn.Module) -> float:
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
        reference: what `reference="auto"` means in the published code.
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
    reference: str = "foreground"
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
        "DeepFloyd IF, stage I", ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"), scale=argument_scale,
        config=SCFGConfig.deepfloyd(), reference="image", variance=True,
    ),
    Family(
        "DeepFloyd IF, stage II",
        ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
        scale=argument_scale, config=SCFGConfig.deepfloyd(), variance=True,
    ),
    Family(
        "Stable Diffusion 3",
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        ("transformer",),
    ),
    Family("AuraFlow", ("AuraFlowPipeline",), ("transformer",), scale=argument_scale),
    Family("PixArt", ("PixArtAlphaPipeline", "PixArtSigmaPipeline"), ("transformer",), scale=argument_scale),
    Family("HunyuanDiT", ("HunyuanDiTPipeline",), ("transformer",), scale=argument_scale),
    Family("Sana", ("SanaPipeline",), ("transformer",), scale=argument_scale),
    Family("LTX-Video", ("LTXPipeline",), ("transformer",)),
    Family(
        "Flux", ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"), ("transformer",), True, _true_scale,
        packed=True, switch=TRUE_CFG,
    ),
    Family("FLUX.2 klein base", ("Flux2KleinPipeline",), ("transformer",), True, argument_scale, packed=True),
    Family(
        "Chroma", ("ChromaPipeline", "ChromaImg2ImgPipeline"), ("transformer",), True, argument_scale, packed=True
    ),
    Family(
        "Qwen-Image", ("QwenImagePipeline",), ("transformer",), True, _true_scale, switch=TRUE_CFG,
        undone_by=SAME_LENGTH,
    ),
    Family("CogView4", ("CogView4Pipeline",), ("transformer",), True),
    Family("Lumina 2", ("Lumina2Pipeline",), ("transformer",), True, argument_scale),
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


def why_not(pipe: DiffusionPipeline) -> str | None:
    """Why a pipeline cannot be guided: it is of no family, or needs a newer diffusers. None if it can."""
    name = type(pipe).__name__
    if (stock := stock_class(pipe)) is not None:
        return reason_against(stock.__name__)
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


def scale_of(pipe: DiffusionPipeline) -> Callable[[Any, dict[str, Any], torch.nn.Module], float]:
    """How the class of this pipeline reads its guidance scale; see `Family.scale`."""
    if cast(type, stock_class(pipe)).__name__ in ARGUMENT_SCALE:
        return argument_scale
    return cast(Family, family_of(pipe)).scale


def denoisers_of(pipe: Any) -> list[Any]:
    """The denoisers that a pipeline of one of `FAMILIES` calls, as it holds them."""
    family = cast(Family, family_of(pipe))
    return [there for there in (getattr(pipe, name, None) for name in family.denoisers) if there is not None]


def default_config(pipe: DiffusionPipeline) -> SCFGConfig:
    """The published values for a pipeline, or of Stable Diffusion for one of no family."""
    family = family_of(pipe)
    return SCFGConfig() if family is None else family.config


def with_reference(pipe: DiffusionPipeline, config: SCFGConfig) -> SCFGConfig:
    """The configuration with `reference` settled for this pipeline; the paper has one rule for all."""
    if config.reference != "auto":
        return config
    published = cast(Family, family_of(pipe)).reference
    return config.replace(reference=published if config.fidelity == "official" else "foreground")


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
