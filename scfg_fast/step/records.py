"""Where a call is: its run, the step that is open in it, and the evaluations that belong to the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ..capture.layers import BlockInfo
from ..capture.maps import BlockMaps
from ..denoisers.install import HookedDenoiser
from ..layouts import Geometry
from .combiner import Combiner
from .corrections import Corrections
from .finder import RegionFinder
from .plan import StepPlan

Left = list[tuple[BlockInfo, BlockMaps]]


@dataclass
class Run:
    """One way through the timesteps; the next begins with another.

    Attributes:
        corrections: of this run.
        levels: noise levels before and after each step, where something asks, and whether they are flow times.
        finders: regions, one finder for each window of a step, and what combines the predictions of the window.
        guided_steps: steps guided so far.
    """

    corrections: Corrections
    levels: tuple[list[tuple[float, float]], bool]
    finders: list[tuple[RegionFinder, Combiner]] = field(default_factory=list)
    guided_steps: int = 0


@dataclass
class Evaluation:
    """One evaluation of the denoiser that belongs to a step.

    Attributes:
        hooked: the denoiser.
        plan: of the step.
        window: which of the step's windows this is, from 0.
        finder: regions of this window.
        combiner: of its predictions.
        geometry: of the latents.
        sample: the object that the denoiser was called with.
        args, kwargs: of the call, where a correction needs them.
        branch: "both" groups of samples, or which of two passes this is.
        finds: whether captured layers leave maps.
        first: the conditional pass, in the unconditional one.
        left: what the blocks left.
        prediction: [B, C, H, W] of a conditional pass, until the unconditional one.
    """

    hooked: HookedDenoiser
    plan: StepPlan
    window: int
    finder: RegionFinder
    combiner: Combiner
    geometry: Geometry
    sample: Any
    args: tuple
    kwargs: dict[str, Any]
    branch: str
    finds: bool
    first: Evaluation | None = None
    left: Left = field(default_factory=list)
    prediction: torch.Tensor | None = None


@dataclass
class OpenStep:
    """The step that evaluations belong to now.

    Attributes:
        plan: what it does.
        batch: samples that the denoiser got in its first window.
        windows: how many windows it has had.
        counted: whether it stands in the statistics.
        waiting: conditional passes without their unconditional one.
    """

    plan: StepPlan
    batch: int
    windows: int = 0
    counted: bool = False
    waiting: list[Evaluation] = field(default_factory=list)


def joined(evaluation: Evaluation, foreground: str) -> tuple[torch.Tensor, Left]:
    """[u; t] and what the blocks left for both, of one evaluation or of two passes."""
    prediction, left, first = cast(torch.Tensor, evaluation.prediction), evaluation.left, evaluation.first
    if first is None:
        return prediction, left
    both = torch.cat([prediction, cast(torch.Tensor, first.prediction)])
    first.prediction = None
    if foreground != "unconditional":
        return both, first.left
    pairs = zip(first.left, left, strict=True)
    return both, [(info, BlockMaps(cond.tokens, uncond.start)) for (info, cond), (_, uncond) in pairs]


def are_one(sample: Any, other: Any) -> bool:
    """Whether two passes got the same latents: one object, or one piece of memory."""
    if sample is other:
        return True
    if not isinstance(sample, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    same_memory = sample.untyped_storage()._cdata == other.untyped_storage()._cdata
    like = (torch.Tensor.storage_offset, torch.Tensor.size, torch.Tensor.stride)
    return same_memory and sample.dtype == other.dtype and all(of(sample) == of(other) for of in like)
