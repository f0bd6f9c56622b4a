"""The guidance methods that have a name: what `--guidance` and `compare --methods` take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GUIDANCE_NAMES = {"scfg": "S-CFG", "cfg": "CFG"}

RATE_METHODS = ("cfg", "scfg", "paper", "pixels")

WEIGHT_METHODS = (
    "linear", "cosine", "inverse-linear", "sine", "v", "lambda", "clamp-linear", "clamp-cosine", "power-cosine",
    "interval", "cfgpp",
)  # fmt: skip

METHODS = (*RATE_METHODS, *WEIGHT_METHODS, "characteristic")


def method(text: str) -> tuple[str, ...]:
    """A method by name: some of `METHODS`, joined by +, at most one of a kind.

    Raises:
        ValueError: a name is unknown, or two are of one kind.
    """
    parts = tuple(text.lower().split("+"))
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is unknown; use {', '.join(METHODS)}")
    for kind in (RATE_METHODS, WEIGHT_METHODS, ("characteristic",)):
        if sum(part in kind for part in parts) > 1:
            raise ValueError(f"{text!r}: at most one of {', '.join(kind)}")
    return parts


def set_method(pipe: Any, handle: Any, parts: Sequence[str], values: Mapping[str, Any], config: Any) -> str:
    """Configure an enabled pipeline for the calls that follow.

    Args:
        pipe: the pipeline, for its scheduler.
        handle: what `enable(pipe)` returned.
        parts: as `method` returns them.
        values: keyword arguments of the calls: guidance_scale and num_inference_steps are read.
        config: the `SCFGConfig` that `scfg`, `paper` and `pixels` begin with.

    Returns:
        The method's name for people.

    Raises:
        ValueError: no strength of CFG++ has the mean weight guidance_scale over these steps.
    """
    from .config import PAPER, PIXELS, SCFGConfig
    from .guidance import CFGPlusPlus, CharacteristicGuidance, WeightSchedule
    from .guidance.cfgpp import lam_for_mean_weight

    names = []
    handle.config, handle.schedule, handle.characteristic = SCFGConfig(rates="none"), None, None
    for part in parts:
        if part in ("scfg", "paper"):
            handle.config = config if part == "scfg" else config.replace(**PAPER)
            names.append(GUIDANCE_NAMES["scfg"] + (", paper" if part == "paper" else ""))
        elif part == "pixels":
            handle.config = config.replace(**PIXELS)
            names.append("per pixel")
        elif part == "characteristic":
            handle.characteristic = CharacteristicGuidance()
            names.append("characteristic")
        elif part == "cfgpp":
            # The strength whose mean weight over these steps is the guidance scale: columns of equal dose.
            scale, steps = values["guidance_scale"], values["num_inference_steps"]
            handle.schedule = CFGPlusPlus(lam_for_mean_weight(scale, pipe.scheduler, steps))
            names.append(f"CFG++ {handle.schedule.lam:.2f}")
        elif part == "interval":
            handle.schedule = WeightSchedule(interval=(0.2, 0.8))
            names.append("interval 0.2 to 0.8")
        elif part != "cfg":
            handle.schedule = WeightSchedule(part, floor=2.0 if part.startswith("clamp") else 0.0)
            names.append(part)
    return " + ".join(names) or GUIDANCE_NAMES["cfg"]
