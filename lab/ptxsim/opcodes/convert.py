"""Conversions between types."""

from __future__ import annotations

import numpy as np

from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..dtypes import TYPES, bits_of, f32_to_bf16, flush_subnormals, is_float, round_to_tf32, to_f16
from ..errors import SimError
from ..parser import Instruction

_INTEGERS = tuple(f"{letter}{bits}" for letter in "us" for bits in (8, 16, 32, 64))
_FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(values: np.ndarray, kind: str, round_: np.ufunc) -> np.ndarray:
    """Round and clamp to the range; NaN gives 0, or the sign bit alone if a 64-bit type takes part."""
    wanted = TYPES[kind]
    limits = np.iinfo(wanted)
    wide = values.astype(np.float64)
    rounded = round_(wide)
    inside = (rounded >= float(limits.min)) & (rounded < float(limits.max) + (1 if wanted.itemsize < 8 else 0))
    result = np.where(inside, rounded, 0).astype(wanted)
    result = np.where(rounded >= float(limits.max), wanted.type(limits.max), result)
    result = np.where(rounded < float(limits.min), wanted.type(limits.min), result)
    if values.dtype == np.float64 or wanted.itemsize == 8:
        nan = wanted.type(limits.min) if wanted.kind == "i" else wanted.type(1 << (wanted.itemsize * 8 - 1))
        return np.where(np.isnan(wide), nan, result)
    return np.where(np.isnan(wide), wanted.type(0), result)


@opcode("cvt")
def convert(decoder: Decoder, instruction: Instruction) -> Step:
    known = modifiers(
        instruction,
        known=(*_INTEGERS, *_FLOATS, *_TO_INTEGER, "rn", "rz", "rna", "ftz", "sat", "relu", "f16x2", "bf16x2", "tf32"),
    )
    target, source = known[-2:]
    options = set(known[:-2])
    if target in ("f16x2", "bf16x2"):
        return _pack(decoder, instruction, target, source, options)
    count_operands(instruction, 2)
    function = _conversion(target, source, options)
    read = decoder.reader(instruction.operands[1], source, truncate=True)
    if target == "tf32" or target == "bf16":
        write = decoder.writer(instruction.operands[0], "b32" if target == "tf32" else "b16")
    else:
        write = decoder.writer(instruction.operands[0], target, extend=True)
    return lambda batch, mask: write(batch, function(read(batch)), mask)


def _conversion(target: str, source: str, options: set[str]):
    """A function from values of the source type to values of the target type (bit patterns for bf16 and tf32)."""
    toward_zero, relu, flush = "rz" in options, "relu" in options, "ftz" in options
    unused = options - {"rn", "rz", "relu", "ftz"}
    if target == "tf32" and source == "f32" and options == {"rna"}:
        return round_to_tf32
    if is_float(source) and not is_float(target):
        (rounding,) = [o for o in options if o in _TO_INTEGER] or [None]
        if rounding is None or unused - {rounding, "sat"}:
            raise SimError(f"conversion from {source} to {target} with {sorted(options)} is not supported")
        round_ = _TO_INTEGER[rounding]
        return lambda v: float_to_integer(flush_subnormals(v) if flush else v, target, round_)
    if not is_float(source) and not is_float(target):
        return _integer_to_integer(target, options)
    rounding = [o for o in options if o in _TO_INTEGER]
    if rounding and source == target:  # cvt.rmi.f32.f32 is floor
        round_ = _TO_INTEGER[rounding[0]]
        return lambda v: round_(flush_subnormals(v) if flush else v)
    if unused - {"sat"} or (toward_zero and bits_of(target) != 16):
        raise SimError(f"conversion from {source} to {target} with {sorted(options)} is not supported")
    if relu and target not in ("f16", "bf16"):
        raise SimError("cvt.relu is only supported to f16 and bf16")

    def function(values: np.ndarray) -> np.ndarray:
        if flush:
            values = flush_subnormals(values)
        if relu:
            values = np.where(values < 0, values.dtype.type(0), values)
        if target == "bf16":
            return f32_to_bf16(values.astype(np.float32), toward_zero=toward_zero)
        result = to_f16(values, toward_zero=toward_zero) if target == "f16" else values.astype(TYPES[target])
        if "sat" in options:
            result = np.clip(np.where(np.isnan(result), 0, result), 0, 1).astype(result.dtype)
        return result

    return function


def _integer_to_integer(target: str, options: set[str]):
    wanted = TYPES[target]
    if options - {"sat"}:
        raise SimError(f"integer conversion with {sorted(options)} is not supported")
    if "sat" not in options:
        return lambda v: v.astype(wanted)
    limits = np.iinfo(wanted)

    def function(values: np.ndarray) -> np.ndarray:
        own = np.iinfo(values.dtype)
        low, high = max(limits.min, own.min), min(limits.max, own.max)
        return np.clip(values, values.dtype.type(low), values.dtype.type(high)).astype(wanted)

    return function


def _pack(decoder: Decoder, instruction: Instruction, target: str, source: str, options: set[str]) -> Step:
    """`cvt.rn.f16x2.f32 d, a, b`: a becomes the upper half."""
    if source != "f32" or options - {"rn", "rz", "relu", "ftz"}:
        raise SimError(f"conversion from {source} to {target} with {sorted(options)} is not supported")
    count_operands(instruction, 3)
    element = target.removesuffix("x2")
    one = _conversion(element, source, options)
    write = decoder.writer(instruction.operands[0], "b32")
    high, low = (decoder.reader(operand, "f32") for operand in instruction.operands[1:])

    def run(batch, mask: Mask) -> None:
        upper, lower = (np.atleast_1d(one(np.asarray(read(batch)))).view(np.uint16) for read in (high, low))
        write(batch, lower.astype(np.uint32) | (upper.astype(np.uint32) << np.uint32(16)), mask)

    return run
