"""Floating-point arithmetic.

float16 and bfloat16 are computed in float32 or wider and rounded once; fma is computed in float64 (float32 and below),
so that it can differ from the device in the last bit only where rounding twice matters. The `.approx` functions are
correctly rounded here; on the device they are a few units off.
"""

from __future__ import annotations

import functools

import numpy as np

from ..decode import Decoder, Step, count_operands, modifiers, opcode
from ..dtypes import PACKED, flush_subnormals
from ..errors import SimError
from ..parser import Instruction
from .common import elementwise, packed

FLOAT_KINDS = ("f16", "bf16", "f32", "f64")


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    exact = np.asarray(a).astype(np.float64) * b + c
    return exact.astype(np.result_type(a, b, c))


def _min_max(choose, *, nan: bool, xorsign: bool):
    def function(*values: np.ndarray) -> np.ndarray:
        if xorsign:
            a, b = values
            return np.copysign(choose(np.abs(a), np.abs(b)), np.where(np.signbit(a) != np.signbit(b), -1, 1)).astype(
                a.dtype
            )
        return functools.reduce(choose, values)

    return function


FLOAT_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": fused_multiply_add,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
    "rcp": lambda a: 1 / a.astype(np.float64),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "copysign": lambda a, b: np.copysign(b, a),
}
_ARITY = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "div": 2, "min": 2, "max": 2, "copysign": 2}
# Round to nearest even is the only mode; approximations are computed exactly.
_ROUNDING = {"add": ("rn",), "sub": ("rn",), "mul": ("rn",), "fma": ("rn",), "div": ("rn", "full", "approx")}
_ROUNDING |= {"sqrt": ("rn", "approx"), "rcp": ("rn", "approx")}
_ROUNDING |= dict.fromkeys(("rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), ("approx",))
_OPTIONS = {base: ("ftz", "sat") for base in ("add", "sub", "mul", "fma")}
_OPTIONS |= {"min": ("ftz", "NaN", "xorsign", "abs"), "max": ("ftz", "NaN", "xorsign", "abs")}
_OPTIONS |= {"tanh": (), "copysign": ()}


@opcode("fma", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", "copysign")
def decode_float(decoder: Decoder, instruction: Instruction) -> Step:
    """Any float operation; integer.py sends those whose name it shares here."""
    base = instruction.base
    options = _OPTIONS.get(base, ("ftz",))
    known = modifiers(instruction, ignore=_ROUNDING.get(base, ()), known=(*FLOAT_KINDS, *PACKED, *options))
    kind = known[-1]
    kinds = [m for m in known if m in FLOAT_KINDS or m in PACKED]
    function = _function(base, known)
    arity = _ARITY.get(base, 1)
    if base in ("min", "max") and len(instruction.operands) == 4:
        arity = 3
    count_operands(instruction, arity + 1)
    if "ftz" in known:
        plain = function
        function = lambda *v: flush_subnormals(plain(*(flush_subnormals(x) for x in v)))  # noqa: E731
    if "sat" in known:
        unbounded = function
        function = lambda *v: _saturate(unbounded(*v))  # noqa: E731
    if kind in PACKED:
        if len(kinds) != 1:
            raise SimError(f"{instruction.opcode} is not supported")
        return packed(decoder, instruction.operands, function, PACKED[kind])
    if len(kinds) == 2:  # mixed precision: add.f32.f16 d, a(f16), c(f32); fma.f32.f16 d, a(f16), b(f16), c(f32)
        if kinds[0] != "f32" or kind not in ("f16", "bf16") or base not in ("add", "sub", "fma"):
            raise SimError(f"{instruction.opcode} is not supported")
        narrow = (kind,) * (arity - 1)
        widened = lambda *v: function(*(x.astype(np.float32) for x in v))  # noqa: E731
        return elementwise(decoder, instruction.operands, widened, "f32", (*narrow, "f32"))
    return elementwise(decoder, instruction.operands, function, kind, (kind,) * arity)


def _saturate(value: np.ndarray) -> np.ndarray:
    """`.sat`: clamp to [0, 1], NaN to 0."""
    return np.clip(np.where(np.isnan(value), value.dtype.type(0), value), value.dtype.type(0), value.dtype.type(1))


def _function(base: str, known: tuple[str, ...]):
    if base not in ("min", "max"):
        return FLOAT_ARITHMETIC[base]
    nan, xorsign = "NaN" in known, "xorsign" in known
    if xorsign != ("abs" in known):
        raise SimError(f"{base} with {known} is not supported")
    propagate, ignore = (np.minimum, np.fmin) if base == "min" else (np.maximum, np.fmax)
    return _min_max(propagate if nan else ignore, nan=nan, xorsign=xorsign)
