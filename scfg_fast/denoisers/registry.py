"""Which description reads a model."""

from __future__ import annotations

from typing import Any, cast

import torch

from .base import Denoiser
from .transformers import TRANSFORMERS
from .unet import JointUNet, UNet


def denoiser_of(model: torch.nn.Module) -> Denoiser | None:
    """How a model is read, or None for one that S-CFG does not know. A subclass is read as its base."""
    for cls in type(model).__mro__:
        if cls.__name__ == "UNet2DConditionModel":
            return JointUNet() if "SimpleCrossAttn" in str(cast(Any, model.config).mid_block_type) else UNet()
        if cls.__name__ in TRANSFORMERS and cls.__module__.startswith("diffusers."):
            return TRANSFORMERS[cls.__name__]
    return None
