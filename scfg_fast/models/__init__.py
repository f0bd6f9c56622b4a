"""The text-to-image model that ships with the package.

It is small and draws emoji-like scenes, but it is a complete diffusers pipeline: use it to try guidance, to test, and
to measure on a machine without a model hub. What it can draw and how it was made is in ``scenes256/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["BUNDLED_CALL", "bundled_model_path", "bundled_pipeline"]

BUNDLED_CALL = {"guidance_scale": 5.0, "num_inference_steps": 25, "height": 256, "width": 256}
"""Keyword arguments of a pipeline call that suit the bundled model."""

_FOLDER = Path(__file__).parent / "scenes256"
_WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def bundled_model_path() -> Path:
    """Folder of the bundled model, for ``StableDiffusionPipeline.from_pretrained(bundled_model_path())``.

    Raises:
        FileNotFoundError: if a weight file is missing, as in an installation without package data.
    """
    missing = [name for name in ("model_index.json", *_WEIGHTS) if not (_FOLDER / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the bundled model in {_FOLDER} lacks {', '.join(missing)}; install the package again: "
            "pip install --force-reinstall --no-deps scfg_fast"
        )
    return _FOLDER


def bundled_pipeline(**options: Any) -> Any:
    """The bundled model as a ``StableDiffusionPipeline``, checked: every weight is in its place, and none is left over.

    Args:
        options: of ``from_pretrained``, such as ``torch_dtype``.

    Raises:
        FileNotFoundError: a weight file is missing.
        ValueError: a weight is missing, has another shape or no place, in these versions of diffusers and transformers.
    """
    from .loading import load_pipeline

    return load_pipeline(bundled_model_path(), exact=True, **options)
