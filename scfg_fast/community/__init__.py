"""Files for `DiffusionPipeline.from_pretrained(model, custom_pipeline=FILE)`: a stock pipeline with S-CFG on.

Engines that load pipelines by name serve S-CFG through them, with `scfg_kwargs` in the request; see docs/batch.md.
There is a file for the first pipeline of every family. For another one:

    python -m scfg_fast.community StableDiffusionXLImg2ImgPipeline > scfg.py
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
FILES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "kolors": "KolorsPipeline",
    "deepfloyd_if": "IFPipeline",
    "deepfloyd_if_stage_2": "IFSuperResolutionPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "aura_flow": "AuraFlowPipeline",
    "pixart_alpha": "PixArtAlphaPipeline",
    "hunyuan_dit": "HunyuanDiTPipeline",
    "sana": "SanaPipeline",
    "ltx_video": "LTXPipeline",
    "flux": "FluxPipeline",
    "flux2_klein": "Flux2KleinPipeline",
    "chroma": "ChromaPipeline",
    "qwen_image": "QwenImagePipeline",
    "cogview4": "CogView4Pipeline",
    "lumina2": "Lumina2Pipeline",
    "z_image": "ZImagePipeline",
    "wan": "WanPipeline",
}
"""File -> class in diffusers, a row for every family."""

_TEMPLATE = '''"""{name} of diffusers with S-CFG on, for `from_pretrained(model, custom_pipeline=FILE)`.

Written by `python -m scfg_fast.community`. `scfg_kwargs` of a call overrides any parameter of `SCFGConfig`;
`{{"enabled": False}}` is plain guidance.
"""

# mypy: ignore-errors

import functools

from diffusers import {name}

import scfg_fast


class SCFG{name}({name}):
    @functools.wraps({name}.__init__)  # diffusers reads the components from the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scfg_fast.enable(self)
'''


def source_of(pipeline: str) -> str:
    """The file for a pipeline class of diffusers that scfg_fast supports.

    Raises:
        ValueError: no family has it.
    """
    from ..pipelines.families import FAMILIES

    known = [name for family in FAMILIES for name in family.pipelines]
    if pipeline not in known:
        raise ValueError(f"{pipeline} is not supported; these are: {', '.join(known)}")
    return _TEMPLATE.format(name=pipeline)


def write_all() -> None:
    """Write the files of this folder."""
    for name, pipeline in FILES.items():
        (FOLDER / f"{name}.py").write_text(source_of(pipeline), encoding="utf-8")
