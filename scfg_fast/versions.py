"""What needs a newer diffusers than the package itself, as a table.

What a version cannot do is refused with the version that can: by `supports` for a pipeline, by the import for a module.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """A feature, and the first diffusers in which it works.

    Attributes:
        feature: for people.
        version: of diffusers.
        why: what goes wrong below it.
        pipelines: class names in diffusers.
        modules: of scfg_fast.
    """

    feature: str
    version: str
    why: str
    pipelines: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


GATES = (
    Gate("modular pipelines", "0.36.0", "its guiders return other things", modules=("scfg_fast.guider",)),
    Gate(
        "Chroma", "0.36.0", "it adds the text's mask to the attention scores as a number",
        ("ChromaPipeline", "ChromaImg2ImgPipeline"),
    ),
    Gate("FLUX.2 klein base", "0.37.0", "the pipeline is not in it", ("Flux2KleinPipeline",)),
    Gate("Qwen-Image", "0.37.0", "its transformer is told the lengths of the texts otherwise", ("QwenImagePipeline",)),
    Gate(
        "Flux from a picture (img2img, inpainting)", "0.38.0", "it leaves out a negative prompt given as embeddings",
        ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    ),
)  # fmt: skip


def installed_diffusers() -> str:
    """Version of diffusers, without importing it."""
    return importlib.metadata.version("diffusers")


def reason_against(name: str) -> str | None:
    """Why a pipeline's class or a module of ours cannot be used with the installed diffusers; None if it can."""
    installed = installed_diffusers()
    for gate in GATES:
        if name in (*gate.pipelines, *gate.modules) and release(installed) < release(gate.version):
            needs = f"{name} needs diffusers {gate.version} or newer, and {installed} is installed: {gate.why}"
            return f"{needs}; pip install 'diffusers>={gate.version}'"
    return None


def release(version: str) -> tuple[int, ...]:
    """0.38.0.dev0 -> (0, 38, 0): a development version counts as the release that it becomes."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
