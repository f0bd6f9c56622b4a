"""Every parameter of S-CFG, with the value of the published code as default."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

CONFIG_NAME = "scfg_config.json"
_RATES = ("regions", "pixels", "none")
_FIDELITIES = ("official", "paper")
_LAYERS = ("auto", "all", "one-per-transformer")
_TOKENS = ("all", "words")
_FOREGROUNDS = ("auto", "unconditional", "conditional")
_REFERENCES = ("auto", "foreground", "image")
_COMBINATIONS = ("cfg", "apg", "cfg-zero")
_DOSES = ("as-published", "matched")
_BACKENDS = ("auto", "triton", "torch")

PAPER: dict[str, Any] = dict(fidelity="paper", blur_sigma=0.0, rate_min=None, rate_max=None, max_scale=None)
"""What the published equations change; see `SCFGConfig.paper`."""

DEEPFLOYD: dict[str, Any] = dict(rate_min=None, rate_max=None)
"""What the published code changes for DeepFloyd IF; see `SCFGConfig.deepfloyd`."""

PIXELS: dict[str, Any] = dict(rates="pixels", rate_min=5.0 / 7.5, rate_max=12.0 / 7.5)
"""The per-pixel rule with the published range; see `SCFGConfig.pixels`."""


@dataclass(frozen=True)
class SCFGConfig:
    """Parameters of semantic-aware classifier-free guidance. Immutable; use `replace` for a changed copy.

    Args:
        rates: `"regions"` for S-CFG; `"pixels"` for the attention-free rule (see `pixels`); or `"none"` for one weight
            over the whole image. Only `"regions"` captures anything.
        fidelity: `"official"` reproduces the published code, `"paper"` the published equations (see `paper`).
        cell: latent pixels per side of one cell of the region mask (R in the code).
        levels: downsampling factors of the attention layers to capture, or `"auto"`: `cell` and `2 * cell`, as far as
            the model has them.
        layers: which transformer blocks to capture: `"all"` at these levels; `"one-per-transformer"`, the middle block
            of every transformer at these levels, which is 6 of SDXL's 60 and all of SD 1.x and 2.x; `"auto"`, which is
            `"all"` in UNets, but of DeepFloyd IF the last three at each level, as in the code, and of a diffusion
            transformer four in the middle; or their names, as in `unet.named_modules()`.
        powers: R of the completion, (S + (R-1) S S)/R in `"official"`, mean of S^1..S^R in `"paper"`.
        blur_sigma: 3x3 smoothing of the maps and of the rate; acts as sigma * sqrt(2), as the published code does. 0
            for none.
        rate_min: lower clamp of a region's rate; None for no bound. With `"pixels"`, the rate of the strongest pixel.
        rate_max: upper clamp of a region's rate; None for no bound. With `"pixels"`, the rate of the weakest pixel.
        max_scale: upper bound of a region's rate * guidance_scale, applied last, so it wins over `rate_min`; None for
            no bound. At a guidance_scale of max_scale / rate_min or more every rate is max_scale / guidance_scale.
        start: fraction of the steps after which S-CFG begins; before it, plain guidance.
        stop: fraction of the steps at which it ends.
        reuse_every: find the regions at every n-th guided step and reuse them in between; the rates follow every step.
        tokens: `"all"`: start, end and padding tokens own regions too, as in the code; `"words"`: only the prompt's
            words do.
        foreground: the half of the batch whose start token decides what is foreground: `"unconditional"` as in the
            code, `"conditional"`, or `"auto"`: unconditional, unless the pipeline replaces an empty negative prompt by
            zeros (SDXL, Kolors). Zeros make that half attend to all tokens alike, which leaves no foreground at all.
        reference: whose mean guidance norm every region is brought to: `"foreground"`, `"image"` for that of the whole
            image, or `"auto"`: the foreground, but the image in the first stage of DeepFloyd IF with
            `fidelity="official"`, as in the code. `benchmark` is its former name and still accepted.
        dose: `"as-published"`, or `"matched"`: the rates of each step and image are multiplied by the one factor that
            makes its effective weight (`handle.stats.effective_weights`) the weight of the step, so that methods can be
            compared at one guidance_scale. The factor comes after the clamps, and before `guidance_rescale`.
        combine: how the two predictions are mixed: `"cfg"`, `"apg"` (arXiv 2410.02416) or `"cfg-zero"` (arXiv
            2503.18886), with the rates on its direction; see `scfg_fast.guidance.mixing`. `start` and `stop` are about
            the rates, not about this.
        eta: of APG, how much of the direction along the conditional prediction stays; 1 for all of it.
        adaptive_projected_guidance_momentum: of APG; None for none. The paper's are negative.
        adaptive_projected_guidance_rescale: of APG, the length of the direction above which it is shortened; 0 for
            none.
        zero_init_steps: of CFG-Zero*, how many steps begin the run with a prediction of zero.
        backend: `"auto"`, `"triton"` or `"torch"`. `"auto"` takes Triton for what its kernels can compute and torch for
            the rest; the others mean just that, or an error that lists every reason.

    Raises:
        ValueError: a value is out of range; the message lists every one.
    """

    rates: str = "regions"
    fidelity: str = "official"
    cell: int = 4
    levels: str | tuple[int, ...] = "auto"
    layers: str | tuple[str, ...] = "auto"
    powers: int = 4
    blur_sigma: float = 0.5
    rate_min: float | None = 0.8
    rate_max: float | None = 3.0
    max_scale: float | None = 15.0
    start: float = 0.0
    stop: float = 1.0
    reuse_every: int = 1
    tokens: str = "all"
    foreground: str = "auto"
    reference: str = "auto"
    dose: str = "as-published"
    combine: str = "cfg"
    eta: float = 1.0
    adaptive_projected_guidance_momentum: float | None = None
    adaptive_projected_guidance_rescale: float = 15.0
    zero_init_steps: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("levels", "layers"):
            value = getattr(self, name)
            if isinstance(value, (list, set, frozenset, range)):
                object.__setattr__(self, name, tuple(value))
        reasons = list(self._reasons())
        if reasons:
            raise ValueError("SCFGConfig: " + "; ".join(reasons))

    def _reasons(self):
        if self.rates not in _RATES:
            yield f"rates={self.rates!r} is unknown, use one of {_RATES}"
        if self.fidelity not in _FIDELITIES:
            yield f"fidelity={self.fidelity!r} is unknown, use one of {_FIDELITIES}"
        if self.tokens not in _TOKENS:
            yield f"tokens={self.tokens!r} is unknown, use one of {_TOKENS}"
        if self.foreground not in _FOREGROUNDS:
            yield f"foreground={self.foreground!r} is unknown, use one of {_FOREGROUNDS}"
        if self.reference not in _REFERENCES:
            yield f"reference={self.reference!r} is unknown, use one of {_REFERENCES}"
        if self.dose not in _DOSES:
            yield f"dose={self.dose!r} is unknown, use one of {_DOSES}"
        if self.combine not in _COMBINATIONS:
            yield f"combine={self.combine!r} is unknown, use one of {_COMBINATIONS}"
        for name in ("eta", "adaptive_projected_guidance_momentum", "adaptive_projected_guidance_rescale"):
            value = getattr(self, name)
            least = 0.0 if name == "adaptive_projected_guidance_rescale" else -float("inf")
            none = value is None and name == "adaptive_projected_guidance_momentum"
            if not none and not (_is_number(value) and least <= value and abs(value) < float("inf")):
                yield f"{name} must be a finite number{' of at least 0' if least == 0.0 else ''}, got {value!r}"
        if not _is_int(self.zero_init_steps) or self.zero_init_steps < 0:
            yield f"zero_init_steps must be an integer of at least 0, got {self.zero_init_steps!r}"
        if self.backend not in _BACKENDS:
            yield f"backend={self.backend!r} is unknown, use one of {_BACKENDS}"
        for name in ("cell", "powers", "reuse_every"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                yield f"{name} must be an integer of at least 1, got {value!r}"
        if _is_int(self.cell) and self.cell >= 1 and self.cell & (self.cell - 1):
            yield f"cell must be a power of two, got {self.cell}"
        if self.levels != "auto":
            factors = self.levels if isinstance(self.levels, tuple) else ()
            if not factors or not all(_is_int(r) and r >= 1 and r & (r - 1) == 0 for r in factors):
                yield f"levels must be 'auto' or a list of downsampling factors such as [4, 8], got {self.levels!r}"
        if self.layers not in _LAYERS:
            names = self.layers if isinstance(self.layers, tuple) else ()
            if not names or not all(isinstance(name, str) for name in names):
                yield f"layers must be one of {_LAYERS} or a list of transformer block names, got {self.layers!r}"
        if not _is_number(self.blur_sigma) or not 0.0 <= self.blur_sigma < float("inf"):
            yield f"blur_sigma must be a number of at least 0, got {self.blur_sigma!r}"
        for name in ("rate_min", "rate_max", "max_scale"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0.0 <= value < float("inf")):
                yield f"{name} must be a number of at least 0, or None for no bound, got {value!r}"
        if _is_number(self.rate_min) and _is_number(self.rate_max) and self.rate_min > self.rate_max:
            yield f"rate_min must not exceed rate_max, got {self.rate_min} and {self.rate_max}"
        if self.rates == "pixels" and None in (self.rate_min, self.rate_max):
            yield "rates='pixels' needs both rate_min and rate_max, the ends of its range"
        if not (_is_number(self.start) and _is_number(self.stop) and 0.0 <= self.start <= self.stop <= 1.0):
            yield f"start and stop must satisfy 0 <= start <= stop <= 1, got {self.start!r} and {self.stop!r}"

    @classmethod
    def official(cls, **overrides: Any) -> SCFGConfig:
        """The published code's behaviour (the defaults), with `overrides`."""
        return cls(**overrides)

    @classmethod
    def paper(cls, **overrides: Any) -> SCFGConfig:
        """The published equations: mean of the powers S^1..S^4, argmax masks, no smoothing, no clamps; with
        `overrides`.

        Where the paper is silent: the norm in eq. 13 is the region mean of per-pixel norms, the only reading under
        which a constant field has rate 1; the start token's map comes from the unconditional half and foreground is
        where it is below its spatial mean, as in the code; an empty foreground means rate 1; the captured layers are
        those of the code.
        """
        return cls(**{**PAPER, **overrides})

    @classmethod
    def deepfloyd(cls, **overrides: Any) -> SCFGConfig:
        """The published code for DeepFloyd IF, with `overrides`: the only clamp is `max_scale`.

        `enable(pipe)` and `supports(pipe)` take this for an IF pipeline where no configuration is given. What else
        differs there, the layers and the reference, is what `"auto"` means for IF.
        """
        return cls(**{**DEEPFLOYD, **overrides})

    @classmethod
    def pixels(cls, **overrides: Any) -> SCFGConfig:
        """The attention-free per-pixel rule of SAMG (arXiv 2604.26503), with `overrides`.

        The rate falls linearly with the energy of the guidance, mean over channels of (cond - uncond)^2, normalised to
        [0, 1] in each image: `rate_max` where it is least, `rate_min` where it is greatest. The range is the published
        one, scales 5 to 12 at a guidance_scale of 7.5 (SD 1.5 and SDXL).
        """
        return cls(**{**PIXELS, **overrides})

    def replace(self, **changes: Any) -> SCFGConfig:
        """A copy with `changes`. Raises ValueError for a name that is not a parameter."""
        changes = _renamed(changes)
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SCFGConfig:
        """Inverse of `to_dict`. Raises ValueError for a name that is not a parameter."""
        values = _renamed(values)
        _refuse_unknown(values)
        return cls(**values)

    @property
    def benchmark(self) -> str:
        """`reference`, by its former name."""
        return self.reference

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SCFGConfig:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"SCFGConfig: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `scfg_config.json` into `folder` (made if missing), whole or not at all. Returns its path."""
        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> SCFGConfig:
        """Read `scfg_config.json` from `folder`. Raises FileNotFoundError if it is not there."""
        return cls.from_json((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters by their present names: `benchmark` became `reference`."""
    if "benchmark" not in values:
        return values
    if "reference" in values:
        raise ValueError("SCFGConfig: benchmark is the former name of reference; give reference alone")
    return {"reference" if name == "benchmark" else name: value for name, value in values.items()}


def _accept_former_names(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of `SCFGConfig`, for parameters by their former names too."""

    @functools.wraps(init)
    def __init__(self: SCFGConfig, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **_renamed(kwargs))

    return __init__


SCFGConfig.__init__ = _accept_former_names(SCFGConfig.__init__)  # type: ignore[method-assign]


def _refuse_unknown(values: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(SCFGConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"SCFGConfig: unknown parameters {unknown}; known are {known}")
