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

MIX_METHODS = ("apg", "cfg-zero")

KINDS = (RATE_METHODS, WEIGHT_METHODS, MIX_METHODS, ("matched",), ("characteristic",))

METHODS = tuple(name for kind in KINDS for name in kind)

NUMBERS = {"clamp-linear": "FLOOR", "clamp-cosine": "FLOOR", "interval": "START:STOP"}
"""The methods that take numbers, after a colon each."""

METHODS_HELP = ", ".join(f"{name}:{NUMBERS[name]}" if name in NUMBERS else name for name in METHODS)

APG: dict[str, Any] = dict(combine="apg", eta=0.0, adaptive_projected_guidance_momentum=-0.5)
"""The paper's: nothing along the conditional prediction, negative momentum."""


def method(text: str) -> tuple[str, ...]:
    """A method by name: some of `METHODS` with their numbers, joined by +, at most one of a kind.

    Raises:
        ValueError: a name is unknown, its numbers are missing or none, or two are of one kind.
    """
    parts = tuple(text.lower().split("+"))
    names = [part.split(":")[0] for part in parts]
    for part, name in zip(parts, names, strict=True):
        if name not in METHODS:
            raise ValueError(f"{name!r} is unknown; use {METHODS_HELP}")
        wanted = f"{name}:{NUMBERS[name]}" if name in NUMBERS else name
        if part.count(":") != wanted.count(":") or not all(_is_number(number) for number in part.split(":")[1:]):
            raise ValueError(f"{part!r}: write {wanted}" + (", in numbers" if name in NUMBERS else ""))
    for kind in KINDS:
        if sum(name in kind for name in names) > 1:
            raise ValueError(f"{text!r}: at most one of {', '.join(kind)}")
    return parts


def _is_number(text: str) -> bool:
    try:
        return 0.0 <= float(text) < float("inf")
    except ValueError:
        return False


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
        ValueError: no strength of CFG++ has the mean weight guidance_scale over these steps; or an interval ends before
            it starts.
    """
    from .config import PAPER, PIXELS, SCFGConfig
    from .guidance import CFGPlusPlus, CharacteristicGuidance, WeightSchedule
    from .guidance.cfgpp import lam_for_mean_weight

    names = []
    handle.config, handle.schedule, handle.characteristic = SCFGConfig(rates="none"), None, None
    # The rates' configuration first: the others change it.
    for part in sorted(parts, key=lambda part: METHODS.index(part.split(":")[0])):
        if part in ("scfg", "paper"):
            handle.config = config if part == "scfg" else config.replace(**PAPER)
            names.append(GUIDANCE_NAMES["scfg"] + (", paper" if part == "paper" else ""))
        elif part == "pixels":
            handle.config = config.replace(**PIXELS)
            names.append("per pixel")
        elif part in MIX_METHODS:
            rule = APG if part == "apg" else dict(combine=part)
            handle.config = handle.config.replace(**rule)
            names.append({"apg": "APG", "cfg-zero": "CFG-Zero*"}[part])
        elif part == "matched":
            handle.config = handle.config.replace(dose="matched")
            names.append("matched dose")
        elif part == "characteristic":
            handle.characteristic = CharacteristicGuidance()
            names.append("characteristic")
        elif part == "cfgpp":
            # The strength whose mean weight over these steps is the guidance scale: columns of equal dose.
            scale, steps = values["guidance_scale"], values["num_inference_steps"]
            handle.schedule = CFGPlusPlus(lam_for_mean_weight(scale, pipe.scheduler, steps))
            names.append(f"CFG++ {handle.schedule.lam:.2f}")
        elif part != "cfg":
            name, *numbers = part.split(":")
            if name == "interval":
                handle.schedule = WeightSchedule(interval=(float(numbers[0]), float(numbers[1])))
            else:
                handle.schedule = WeightSchedule(name, floor=float(numbers[0]) if numbers else 0.0)
            names.append(part.replace(":", " "))
    return " + ".join(names) or GUIDANCE_NAMES["cfg"]
