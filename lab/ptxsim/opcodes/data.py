"""Moves and selection."""

from __future__ import annotations

import numpy as np

from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..dtypes import TYPES, UNSIGNED, bits_of
from ..parser import Instruction, elements
from .common import elementwise

_KINDS = tuple(kind for kind in TYPES if not kind.endswith("8"))


@opcode("mov")
def move(decoder: Decoder, instruction: Instruction) -> Step:
    """Register moves, and packing `d, {a, b}` and unpacking `{a, b}, d` of vectors."""
    (kind,) = modifiers(instruction, known=_KINDS)
    count_operands(instruction, 2)
    target, source = instruction.operands
    if kind != "pred":
        kind = f"b{bits_of(kind)}"
    if source.startswith("{"):
        return _pack(decoder, target, elements(source), bits_of(kind))
    if target.startswith("{"):
        return _unpack(decoder, elements(target), source, bits_of(kind))
    return elementwise(decoder, instruction.operands, lambda value: value, kind, (kind,))


def _pack(decoder: Decoder, target: str, parts: list[str], bits: int) -> Step:
    each = bits // len(parts)
    wide = UNSIGNED[bits]
    write = decoder.writer(target, f"b{bits}")
    readers = [decoder.reader(part, f"b{each}") for part in parts]

    def run(batch, mask: Mask) -> None:
        value = readers[0](batch).astype(wide)
        for place, read in enumerate(readers[1:], 1):
            value = value | (read(batch).astype(wide) << wide.type(place * each))
        write(batch, value, mask)

    return run


def _unpack(decoder: Decoder, parts: list[str], source: str, bits: int) -> Step:
    each = bits // len(parts)
    narrow, wide = UNSIGNED[each], UNSIGNED[bits]
    read = decoder.reader(source, f"b{bits}")
    writers = [decoder.writer(part, f"b{each}") for part in parts]

    def run(batch, mask: Mask) -> None:
        value = read(batch)
        for place, write in enumerate(writers):
            write(batch, (value >> wide.type(place * each)).astype(narrow), mask)

    return run


@opcode("selp")
def select(decoder: Decoder, instruction: Instruction) -> Step:
    (kind,) = modifiers(instruction, known=tuple(k for k in _KINDS if k != "pred"))
    count_operands(instruction, 4)
    kind = f"b{bits_of(kind)}"
    return elementwise(decoder, instruction.operands, lambda a, b, p: np.where(p, a, b), kind, (kind, kind, "pred"))


@opcode("createpolicy")
def create_policy(decoder: Decoder, instruction: Instruction) -> Step:
    """Cache policies: hints, dropped."""
    modifiers(instruction, known=("fractional", "L2::evict_last", "L2::evict_first", "b64"))
    count_operands(instruction, 2)
    write = decoder.writer(instruction.operands[0], "b64")
    return lambda batch, mask: write(batch, np.zeros(batch.size, np.uint64), mask)
