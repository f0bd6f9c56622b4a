"""atom and red on global and shared memory. Threads take their turns in order, so floating-point sums repeat."""

from __future__ import annotations

import numpy as np

from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..dtypes import PACKED, TYPES, UNSIGNED, bits_of, decode_value, encode_value, is_float
from ..errors import SimError
from ..memory import turns
from ..parser import Instruction
from ..shared import ATOMIC, EPOCH_MASK
from .memory_access import HINTS, ordering

_OPERATIONS = {
    "add": lambda old, value: old + value,
    "min": lambda old, value: np.fmin(old, value) if old.dtype.kind == "f" else np.minimum(old, value),
    "max": lambda old, value: np.fmax(old, value) if old.dtype.kind == "f" else np.maximum(old, value),
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "inc": lambda old, value: np.where(old >= value, old.dtype.type(0), old + old.dtype.type(1)),
    "cas": lambda old, expected, value: np.where(old == expected, value, old),
}
_KINDS = tuple(f"{letter}{bits}" for letter in "bus" for bits in (16, 32, 64))
_KINDS += ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")


@opcode("atom")
def atomic(decoder: Decoder, instruction: Instruction) -> Step:
    return _atomic(decoder, instruction, instruction.operands[0], instruction.operands[1:])


@opcode("red")
def reduction(decoder: Decoder, instruction: Instruction) -> Step:
    return _atomic(decoder, instruction, "", instruction.operands)


def _atomic(decoder: Decoder, instruction: Instruction, target: str, operands: tuple[str, ...]) -> Step:
    spaces = ("global", "shared", "shared::cta")
    returns = instruction.base == "atom"
    operations = [name for name in _OPERATIONS if returns or name not in ("exch", "cas")]
    ignored = (*HINTS, "noftz", *(("acq_rel",) if returns else ()))
    known = modifiers(instruction, ignore=ignored, known=(*spaces, *operations, *_KINDS, "v2", "v4", "v8"))
    (name,) = [m for m in known if m in operations] or [""]
    space = [m for m in known if m in spaces]
    kind = known[-1]
    if not name or len(space) != 1 or kind not in _KINDS:
        raise SimError(f"{instruction.opcode} is not supported")
    if (is_float(kind) or kind in PACKED) and name not in ("add", "min", "max"):
        raise SimError(f"{instruction.opcode} is not supported")
    count_operands(instruction, (3 if name == "cas" else 2) + bool(target))
    length = next((int(m[1:]) for m in known if m in ("v2", "v4", "v8")), 1)
    values = [decoder.vector_readers(operand, f"b{bits_of(kind)}") for operand in operands[1:]]
    writers = decoder.vector_writers(target, f"b{bits_of(kind)}") if target else [None] * length
    if any(len(vector) != length for vector in (*values, writers)):
        raise SimError(f"not all operands are vectors of {length}")
    global_memory = space[0] == "global"
    address = decoder.address(operands[0], 64 if global_memory else 32)
    operation = _on_bits(_OPERATIONS[name], kind)
    width = bits_of(kind) // 8
    if not global_memory:
        decoder.shared_widths.add(width)
    floating, semantics = is_float(kind) or kind in PACKED, ordering(instruction) or frozenset()

    def run(batch, mask: Mask) -> None:
        who = batch.select(mask)
        where = address(batch)[who.index]
        if length > 1 and (where % (width * length)).any():
            raise SimError("vector atomic at a misaligned address")
        for column, write in enumerate(writers):
            arguments = [np.broadcast_to(vector[column](batch), batch.size)[who.index] for vector in values]
            if global_memory:
                batch.counters.atomics += len(where)
                batch.counters.float_atomics += len(where) * floating
                old = batch.memory.atomic(where + column * width, operation, arguments, who.threads, semantics)
                if np.array_equal(operation(old, *arguments), old):
                    batch.note_poll(who)
                else:
                    batch.polls[:] = 0
            else:
                old = _shared_atomic(batch, who, where + column * width, operation, arguments)
            if write is not None:
                full = np.zeros(batch.size, UNSIGNED[width * 8])
                full[who.index] = old
                write(batch, full, mask)

    return run


def _on_bits(operation, kind: str):
    """The operation on bit patterns, as registers and memory hold them."""
    if kind in PACKED:
        element = PACKED[kind]
        single = _on_bits(operation, element)

        def function(*patterns: np.ndarray) -> np.ndarray:
            halves = [np.ascontiguousarray(p).view(UNSIGNED[16]) for p in patterns]
            return single(*halves).view(UNSIGNED[32])

        return function
    if TYPES[kind] == UNSIGNED[bits_of(kind)] and kind != "bf16":
        return operation
    return lambda *patterns: encode_value(
        operation(*(decode_value(np.ascontiguousarray(p), kind) for p in patterns)), kind
    )


def _shared_atomic(batch, who, addresses: np.ndarray, operation, arguments: list[np.ndarray]) -> np.ndarray:
    """Atomics do not race with each other, but with ordinary accesses of other warps they do."""
    width = arguments[0].itemsize
    offsets = batch.shared.locate(who.ctas, addresses, width, "atomic")
    batch.shared.count(addresses, width, who.threads)
    batch.shared.note_write(offsets, (who.tags & EPOCH_MASK) | ATOMIC, width)
    old = np.empty(len(addresses), arguments[0].dtype)
    for turn in turns(offsets):
        before = batch.shared.bytes.gather(offsets[turn], width, width)[:, 0]
        after = operation(before, *(argument[turn] for argument in arguments))
        batch.shared.bytes.scatter(offsets[turn], np.ascontiguousarray(after)[:, None])
        old[turn] = before
    return old
