"""The guidance family around S-CFG: when to guide how much (schedules), how to renoise (CFG++), how to mix the two
predictions without error (Characteristic Guidance), and what to want beyond the prompt (loss guidance).

Schedules and CFG++ are *step weights*: at step i of a call they give one number, the weight of the conditional
direction, which takes the place of `guidance_scale` in that step. They compose with S-CFG's regions by multiplication
and cost nothing. The other two evaluate the denoiser again.
"""

from __future__ import annotations

from .augment import Augment
from .cfgpp import CFGPlusPlus
from .characteristic import CharacteristicGuidance, CharacteristicSolver
from .loss import LossGuidance
from .schedules import SHAPES, WeightSchedule
from .steps import Step, StepWeight, step_levels

__all__ = [
    "SHAPES",
    "Augment",
    "CFGPlusPlus",
    "CharacteristicGuidance",
    "CharacteristicSolver",
    "LossGuidance",
    "Step",
    "StepWeight",
    "WeightSchedule",
    "step_levels",
]
