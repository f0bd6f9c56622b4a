"""PTX value types on numpy: registers hold unsigned bit patterns, arithmetic views or converts them.

`bf16` has no numpy type: it is computed in float32 and rounded to nearest even when it is written.
"""

from __future__ import annotations

import numpy as np

UNSIGNED = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
SIGNED = {8: np.dtype(np.int8), 16: np.dtype(np.int16), 32: np.dtype(np.int32), 64: np.dtype(np.int64)}
FLOATING = {16: np.dtype(np.float16), 32: np.dtype(np.float32), 64: np.dtype(np.float64)}
BOOL = np.dtype(bool)

TYPES: dict[str, np.dtype] = {"pred": BOOL, "bf16": UNSIGNED[16]}
TYPES |= {f"{letter}{bits}": UNSIGNED[bits] for letter in "bu" for bits in UNSIGNED}
TYPES |= {f"s{bits}": SIGNED[bits] for bits in SIGNED} | {f"f{bits}": FLOATING[bits] for bits in FLOATING}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}

# What a register holds before anything is written to it: NaN in every float type, and no valid address.
POISON = {16: np.uint16(0x7FFF), 32: np.uint32(0x7FFF7FFF), 64: np.uint64(0x7FFF7FFF7FFF7FFF)}


def bits_of(kind: str) -> int:
    """Width of a type in bits: 32 for `u32`, `f32`, `f16x2`."""
    if kind in PACKED:
        return 2 * bits_of(PACKED[kind])
    return 1 if kind == "pred" else TYPES[kind].itemsize * 8


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind == "bf16"


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray, *, toward_zero: bool = False) -> np.ndarray:
    """float32 to bfloat16 bit patterns: nearest even, or truncation; NaN becomes 0x7FFF as on the device."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    increment = np.uint32(0) if toward_zero else ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded = ((bits + increment) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def to_f16(values: np.ndarray, *, toward_zero: bool = False) -> np.ndarray:
    """To float16, nearest even or toward zero."""
    result = values.astype(np.float16)
    if toward_zero:
        too_large = np.abs(result.astype(np.float64)) > np.abs(values.astype(np.float64))
        result = np.where(too_large, np.nextafter(result, np.float16(0)), result)
    return result


def tf32_operand(bits: np.ndarray) -> np.ndarray:
    """What the tensor core reads from a 32-bit register as TF32: the upper 19 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """`cvt.rna.tf32.f32`: to 10 bits of mantissa, nearest, ties away from zero."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits)


def flush_subnormals(values: np.ndarray) -> np.ndarray:
    """`.ftz`: subnormal float32 to zero of the same sign."""
    if values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def decode_value(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bit patterns to the type that arithmetic uses (float32 for bf16)."""
    return bf16_to_f32(bits) if kind == "bf16" else bits.view(TYPES[kind])


def encode_value(values: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `decode_value`, in unsigned bit patterns of the type's own width."""
    if kind == "bf16":
        return f32_to_bf16(values)
    if kind == "pred":
        return values
    wanted = TYPES[kind]
    if values.dtype != wanted:
        values = values.astype(wanted)
    return np.ascontiguousarray(values).view(UNSIGNED[wanted.itemsize * 8])
