"""What decides the bits of a job: the content of run.json. The number of workers is not among it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .._version import __version__
from .errors import ModelError


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"scfg_fast": __version__, "torch": version("torch"), "diffusers": version("diffusers")}


@dataclass(frozen=True)
class Settings:
    """Everything but the rows that an image depends on.

    Attributes:
        model: `bundled`, a diffusers folder or a hub id.
        load: name of the function that loads the pipeline instead, or None.
        device: as for `--device`; None for the best there is where the worker runs.
        dtype: `fp32`, `fp16`, `bf16`; None for fp16 on a GPU, else fp32.
        guidance: methods joined by +, as for `--guidance`.
        config: `SCFGConfig.to_dict()`; None for the pipeline's published values.
        call: keyword arguments of every call, where a row names no other.
        batch_size: images per micro-batch.
        seed: from which the seeds of rows without one are made.
        versions: of the packages that make the image.
    """

    model: str = "bundled"
    load: str | None = None
    device: str | None = None
    dtype: str | None = None
    guidance: str = "scfg"
    config: dict[str, Any] | None = None
    call: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 4
    seed: int = 0
    versions: dict[str, str] = field(default_factory=_versions)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def differences(self, before: dict[str, Any]) -> Iterator[str]:
        """What is other than in the run.json of an earlier run, as phrases."""
        now = self.to_dict()
        for name in sorted(set(now) | set(before)):
            if now.get(name) != before.get(name):
                yield f"{name} was {before.get(name)!r} and is {now.get(name)!r}"


Loader = Callable[[], Any]
"""Returns a pipeline on its device; runs once in every worker."""


def load_pipeline(settings: Settings) -> Any:
    """The pipeline of a job, on its device: safetensors only, no code from the model's folder.

    Raises:
        ModelError: it cannot be loaded, or not be moved to the device.
    """
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    from ..env import default_device
    from ..models import bundled_pipeline
    from ..models.loading import load_pipeline as load_saved
    from ..models.loading import without_bars

    device = settings.device or default_device()
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[settings.dtype or ("fp32" if device == "cpu" else "fp16")]
    options: dict[str, Any] = {"torch_dtype" if diffusers.__version__.startswith("0.") else "dtype": dtype}
    try:
        with without_bars():
            if settings.model == "bundled":
                return bundled_pipeline(**options).to(device)
            local = os.path.isdir(settings.model)
            folder = settings.model if local else DiffusionPipeline.download(settings.model, use_safetensors=True)
            return load_saved(folder, **options).to(device)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(f"the model {settings.model!r} cannot be loaded on {device}: {text}") from error
