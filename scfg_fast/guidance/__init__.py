"""The guidance family around S-CFG: when to guide how much (schedules), and how to renoise (CFG++).

Every member is a *step weight*: at step i of a call it gives one number, the weight of the conditional direction, which
takes the place of `guidance_scale` in that step. So members compose with S-CFG's regions by multiplication, cost
nothing, and need no change to the scheduler.
"""

from __future__ import annotations

from .cfgpp import CFGPlusPlus
from .schedules import SHAPES, WeightSchedule
from .steps import Step, StepWeight, step_levels

__all__ = ["SHAPES", "CFGPlusPlus", "Step", "StepWeight", "WeightSchedule", "step_levels"]
