"""Integer arithmetic, logic, shifts, bit fields."""

from __future__ import annotations

import functools

import numpy as np

from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..dtypes import SIGNED, UNSIGNED, bits_of
from ..errors import SimError
from ..parser import Instruction
from .common import elementwise, packed
from .floating import decode_float

INTEGER_KINDS = ("u16", "s16", "u32", "s32", "u64", "s64")
PACKED_KINDS = {"s16x2": "s16", "u16x2": "u16"}
BIT_KINDS = ("b16", "b32", "b64", "pred")


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the exact product."""
    bits = max(np.asarray(a).itemsize, np.asarray(b).itemsize) * 8
    signed = np.asarray(a).dtype.kind == "i"
    if bits < 64:
        wide = (SIGNED if signed else UNSIGNED)[bits * 2]
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    product = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    high = np.asarray(product >> 64)
    return np.array([int(v) for v in high.ravel()], SIGNED[64] if signed else UNSIGNED[64]).reshape(high.shape)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient toward zero; all ones for a zero divisor."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        inexact = quotient * safe != a
        quotient = quotient + (inexact & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Remainder with the sign of the dividend."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, np.fmod(a, safe))


INTEGER_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": lambda *values: functools.reduce(np.minimum, values),
    "max": lambda *values: functools.reduce(np.maximum, values),
    "neg": lambda a: -a,
    "abs": np.abs,
    "div": divide,
    "rem": remainder,
}


@opcode("add", "sub", "min", "max", "neg", "abs", "div", "rem")
def arithmetic(decoder: Decoder, instruction: Instruction) -> Step:
    kind = instruction.modifiers[-1]
    if instruction.base == "add" and "cc" in instruction.modifiers:
        return _with_carry(decoder, instruction)
    if kind in PACKED_KINDS and instruction.base in ("add", "sub", "min", "max", "neg"):
        modifiers(instruction, known=(kind,))
        count_operands(instruction, 2 if instruction.base == "neg" else 3)
        return packed(decoder, instruction.operands, INTEGER_ARITHMETIC[instruction.base], PACKED_KINDS[kind])
    if kind not in INTEGER_KINDS:
        return decode_float(decoder, instruction)
    modifiers(instruction, known=(kind,))
    arity = {"neg": 2, "abs": 2}.get(instruction.base, 3)
    count_operands(instruction, arity)
    function = INTEGER_ARITHMETIC[instruction.base]
    return elementwise(decoder, instruction.operands, function, kind, (kind,) * (arity - 1))


@opcode("mul")
def multiply(decoder: Decoder, instruction: Instruction) -> Step:
    kind = instruction.modifiers[-1]
    if kind not in INTEGER_KINDS:
        return decode_float(decoder, instruction)
    count_operands(instruction, 3)
    return _multiply(decoder, instruction, ())


@opcode("mad")
def multiply_add(decoder: Decoder, instruction: Instruction) -> Step:
    if "cc" in instruction.modifiers:
        return _with_carry(decoder, instruction)
    count_operands(instruction, 4)
    return _multiply(decoder, instruction, (instruction.operands[3],))


def _multiply(decoder: Decoder, instruction: Instruction, addend: tuple[str, ...]) -> Step:
    part, kind = modifiers(instruction, known=(*INTEGER_KINDS, "lo", "hi", "wide"))
    result, product = kind, (lambda a, b: a * b)
    if part == "wide":
        result = f"{kind[0]}{bits_of(kind) * 2}"
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[bits_of(result)]
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    elif part == "hi":
        product = multiply_high
    operands = (*instruction.operands[:3], *addend)
    if addend:
        function = lambda a, b, c: product(a, b) + c  # noqa: E731
        return elementwise(decoder, operands, function, result, (kind, kind, result))
    return elementwise(decoder, operands, product, result, (kind, kind))


@opcode("addc", "madc")
def _with_carry(decoder: Decoder, instruction: Instruction) -> Step:
    """32-bit extended-precision sums through the carry flag."""
    base = instruction.base
    uses_carry, product = base.endswith("c"), base.startswith("mad")
    known = modifiers(instruction, known=("cc", *(("lo", "hi") if product else ()), "u32", "s32"))
    if known[-1] not in ("u32", "s32"):
        raise SimError("only 32-bit carry chains are supported")
    sets_carry = "cc" in known
    count_operands(instruction, 4 if product else 3)
    if product and "hi" in known and known[-1] == "s32":
        raise SimError("signed mad.hi with carry is not supported")
    write = decoder.writer(instruction.operands[0], "u32")
    readers = [decoder.reader(operand, "u32") for operand in instruction.operands[1:]]
    mask32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)

    def run(batch, mask: Mask) -> None:
        values = [read(batch).astype(np.uint64) for read in readers]
        carry = batch.carry.astype(np.uint64) if uses_carry else np.uint64(0)
        if product:
            full = values[0] * values[1]
            total = (full >> shift if "hi" in known else full & mask32) + values[2] + carry
        else:
            total = values[0] + values[1] + carry
        write(batch, (total & mask32).astype(np.uint32), mask)
        if sets_carry:
            flag = (total >> shift & np.uint64(1)).astype(np.uint32)
            batch.carry = flag if mask is None else np.where(mask, flag, batch.carry)

    return run


LOGIC = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "not": lambda a: ~a}


@opcode("and", "or", "xor", "not")
def logic(decoder: Decoder, instruction: Instruction) -> Step:
    (kind,) = modifiers(instruction, known=BIT_KINDS)
    arity = count_operands(instruction, 2 if instruction.base == "not" else 3)
    return elementwise(decoder, instruction.operands, LOGIC[instruction.base], kind, (kind,) * (arity - 1))


def shift_left(values: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Left shift; amounts of the width and more give 0."""
    bits = values.dtype.itemsize * 8
    shifted = values << np.minimum(amount, bits - 1).astype(values.dtype)
    return np.where(amount >= bits, values.dtype.type(0), shifted)


def shift_right(values: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Right shift, arithmetic for signed types; amounts are clamped to the width."""
    bits = values.dtype.itemsize * 8
    shifted = values >> np.minimum(amount, bits - 1).astype(values.dtype)
    return shifted if values.dtype.kind == "i" else np.where(amount >= bits, values.dtype.type(0), shifted)


@opcode("shl", "shr")
def shift(decoder: Decoder, instruction: Instruction) -> Step:
    (kind,) = modifiers(instruction, known=(*INTEGER_KINDS, *BIT_KINDS[:3]))
    count_operands(instruction, 3)
    function = shift_left if instruction.base == "shl" else shift_right
    return elementwise(decoder, instruction.operands, function, kind, (kind, "u32"))


@opcode("shf")
def funnel_shift(decoder: Decoder, instruction: Instruction) -> Step:
    """Shift of the 64 bits `b:a`; the upper word of a left shift, the lower word of a right shift."""
    direction, mode, _ = modifiers(instruction, known=("l", "r", "wrap", "clamp", "b32"))
    count_operands(instruction, 4)

    def function(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        count = (amount & np.uint32(31)) if mode == "wrap" else np.minimum(amount, np.uint32(32))
        joined = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        if direction == "l":
            return ((joined << count.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return (joined >> count.astype(np.uint64)).astype(np.uint32)

    return elementwise(decoder, instruction.operands, function, "b32", ("b32", "b32", "u32"))


@opcode("bfe")
def extract_field(decoder: Decoder, instruction: Instruction) -> Step:
    (kind,) = modifiers(instruction, known=("u32", "s32", "u64", "s64"))
    count_operands(instruction, 4)
    bits = bits_of(kind)

    def function(values: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        start = position & np.uint32(255)
        size = np.minimum(length & np.uint32(255), np.maximum(bits - start.astype(np.int64), 0)).astype(np.uint32)
        left = (bits - start - size).astype(np.uint32)
        moved = shift_left(values, left)
        if kind[0] == "u":
            return np.where(size == 0, values.dtype.type(0), shift_right(moved, np.uint32(bits) - size))
        beyond = (length & np.uint32(255)) + start > bits  # the field is filled with the sign
        signed = shift_right(moved, np.uint32(bits) - size)
        full = shift_right(values, np.minimum(start, np.uint32(bits - 1)))
        return np.where((length & np.uint32(255)) == 0, values.dtype.type(0), np.where(beyond, full, signed))

    return elementwise(decoder, instruction.operands, function, kind, (kind, "u32", "u32"))


@opcode("bfi")
def insert_field(decoder: Decoder, instruction: Instruction) -> Step:
    (kind,) = modifiers(instruction, known=("b32", "b64"))
    count_operands(instruction, 5)

    def function(field: np.ndarray, into: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        one = into.dtype.type(1)
        start, size = position & np.uint32(255), length & np.uint32(255)
        window = shift_left(shift_left(np.broadcast_to(one, into.shape), size) - one, start)
        return (into & ~window) | (shift_left(field, start) & window)

    return elementwise(decoder, instruction.operands, function, kind, (kind, kind, "u32", "u32"))


def _by_bits(function):
    return lambda a: function(
        np.unpackbits(np.ascontiguousarray(a[..., None]).view(np.uint8), axis=-1, bitorder="little")
    )


_BIT_COUNTS = {
    "popc": _by_bits(lambda bits: bits.sum(-1).astype(np.uint32)),
    "clz": _by_bits(lambda bits: np.where(bits.any(-1), bits[..., ::-1].argmax(-1), bits.shape[-1]).astype(np.uint32)),
}


@opcode("popc", "clz")
def count_bits(decoder: Decoder, instruction: Instruction) -> Step:
    (kind,) = modifiers(instruction, known=("b32", "b64"))
    count_operands(instruction, 2)
    return elementwise(decoder, instruction.operands, _BIT_COUNTS[instruction.base], "u32", (kind,))


@opcode("brev")
def reverse_bits(decoder: Decoder, instruction: Instruction) -> Step:
    (kind,) = modifiers(instruction, known=("b32", "b64"))
    count_operands(instruction, 2)

    def function(bits: np.ndarray) -> np.ndarray:
        return np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(UNSIGNED[bits_of(kind)])[..., 0]

    return elementwise(decoder, instruction.operands, _by_bits(function), kind, (kind,))


@opcode("lop3")
def lookup_logic(decoder: Decoder, instruction: Instruction) -> Step:
    modifiers(instruction, known=("b32",))
    count_operands(instruction, 5)
    table = int(instruction.operands[4], 0)

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return elementwise(decoder, instruction.operands[:4], function, "b32", ("b32",) * 3)


@opcode("prmt")
def permute_bytes(decoder: Decoder, instruction: Instruction) -> Step:
    modifiers(instruction, known=("b32",))
    count_operands(instruction, 4)

    def function(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        joined = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros_like(joined)
        for place in range(4):
            nibble = (selector >> np.uint32(4 * place)).astype(np.uint64) & np.uint64(15)
            byte = (joined >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * place))
        return result.astype(np.uint32)

    return elementwise(decoder, instruction.operands, function, "b32", ("b32",) * 3)
