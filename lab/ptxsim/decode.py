"""From instructions to Python functions, once per program.

Every opcode family registers decoders with `@opcode(...)`. A decoder checks that it knows every modifier and returns an
executor `step(batch, mask)`; nothing about the text is looked at again while the kernel runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .dtypes import BOOL, SIGNED, TYPES, UNSIGNED, bits_of, decode_value, encode_value, is_float
from .errors import SimError
from .parser import Instruction, Program, elements, parse

if TYPE_CHECKING:
    from .machine import Batch

Mask = np.ndarray | None
Step = Callable[["Batch", Mask], None]
Reader = Callable[["Batch"], np.ndarray]
Writer = Callable[["Batch", np.ndarray, Mask], None]

_ADDRESS = re.compile(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\w+)\s*)?\]$")
_SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.[xyz]$|%laneid$|%warpid$|WARP_SZ$")


@dataclass(frozen=True)
class Branch:
    """Jump to an instruction, for the threads whose guard holds."""

    target: int
    guard: int | None
    negated: bool


@dataclass(frozen=True)
class Exit:
    """Leave the kernel."""

    guard: int | None
    negated: bool


@dataclass(frozen=True)
class Barrier:
    """Wait for all threads of the CTA."""


@dataclass
class Kernel:
    """A program ready to run."""

    program: Program
    code: list[Step | Branch | Exit | Barrier] = field(default_factory=list)
    shared_granule: int = 16
    asynchronous: bool = False  # has cp.async or wgmma
    warp_groups: bool = False  # has wgmma
    protocol: bool = False  # has what CTAs can talk to each other with: atomic or ordered accesses of global memory


PARAMETERS = 1 << 62
"""Address of the first parameter of a kernel; the next ones are 8 bytes apart, whatever their size."""
_DECODERS: dict[str, Callable[[Decoder, Instruction], Step]] = {}


def opcode(*bases: str) -> Callable:
    """Register the decoder of one or more operations."""

    def register(function: Callable[[Decoder, Instruction], Step]) -> Callable:
        for base in bases:
            _DECODERS[base] = function
        return function

    return register


class Decoder:
    """What the opcode decoders need to know about the program around an instruction."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.shared_widths: set[int] = set()
        self.parameter_addresses = {name: PARAMETERS + 8 * i for i, (name, _) in enumerate(program.parameters)}
        accumulators, operands = set(), set()
        for instruction in program.instructions:
            if instruction.opcode.startswith("wgmma.mma_async"):
                accumulators.update(elements(instruction.operands[0]))
                operands.update(elements(instruction.operands[1]) if instruction.operands[1][0] == "{" else [])
        self._accumulators = {self.program.registers[name][0] for name in accumulators}
        self._matrix_registers = self._accumulators | {self.program.registers[name][0] for name in operands}

    def register(self, name: str) -> tuple[int, int]:
        """Index and width of a register."""
        if name not in self.program.registers:
            raise SimError(f"`{name}` is no register")
        return self.program.registers[name]

    # ---- operands

    def reader(self, operand: str, kind: str, *, truncate: bool = False) -> Reader:
        """A function that gives an operand as values of a type (float32 for bf16); immediates as numpy scalars.

        Args:
            operand: register, special register, symbol or immediate.
            kind: PTX type, `s32`.
            truncate: allow a register wider than the type (st, cvt).
        """
        if operand in self.program.registers:
            return self._register_reader(operand, kind, truncate)
        if _SPECIAL.match(operand):
            return lambda batch: batch.special[operand].astype(TYPES[kind], copy=False)
        if operand in self.program.constants:
            return lambda batch: np.uint64(batch.parameters[operand])
        if operand in self.program.shared_symbols:
            return lambda batch: TYPES[kind].type(0)
        if operand in self.program.local_symbols:
            return lambda batch: TYPES[kind].type(self.program.local_symbols[operand])
        if operand in self.parameter_addresses and kind in ("b64", "u64"):
            return lambda batch: np.uint64(self.parameter_addresses[operand])
        value = immediate(operand, kind)
        return lambda batch: value

    def _register_reader(self, operand: str, kind: str, truncate: bool) -> Reader:
        index, bits = self.register(operand)
        if kind == "pred" or bits == 1:
            if kind != "pred" or bits != 1:
                raise SimError(f"register {operand} of {bits} bits is used as {kind}")
            return lambda batch: batch.registers[index]
        wanted = bits_of(kind)
        if wanted > bits or (wanted < bits and not truncate):
            raise SimError(f"register {operand} of {bits} bits is used as {kind}")
        unsigned, final = UNSIGNED[wanted], TYPES[kind]
        if wanted < bits:
            return lambda batch: decode_value(batch.registers[index].astype(unsigned), kind)
        if index in self._accumulators:
            return lambda batch: decode_value(_settled(batch, index), kind)
        if kind == "bf16":
            return lambda batch: decode_value(batch.registers[index], kind)
        if unsigned == final:
            return lambda batch: batch.registers[index]
        return lambda batch: batch.registers[index].view(final)

    def writer(self, operand: str, kind: str, *, extend: bool = False) -> Writer:
        """A function that sets a register from values of a type.

        Args:
            operand: register, or `_` to drop the value.
            kind: PTX type of the values.
            extend: allow a register wider than the type, extended with its sign or zeros (ld, cvt).
        """
        if operand == "_":
            return lambda batch, value, mask: None
        index, bits = self.register(operand)
        wanted = bits_of(kind)
        if (bits == 1) != (kind == "pred") or wanted > bits or (wanted < bits and not extend):
            raise SimError(f"register {operand} of {bits} bits is set as {kind}")
        matrix = index in self._matrix_registers

        def write(batch: Batch, value: np.ndarray, mask: Mask) -> None:
            value = encode_value(np.asarray(value), kind)
            if wanted < bits:
                source = SIGNED[wanted] if kind[0] == "s" else UNSIGNED[wanted]
                value = value.view(source).astype(SIGNED[bits]).view(UNSIGNED[bits])
            if matrix:
                _note_matrix_register(batch, index, mask)
            batch.write(index, value, mask)

        return write

    def vector_readers(self, operand: str, kind: str, **options: bool) -> list[Reader]:
        return [self.reader(element, kind, **options) for element in elements(operand)]

    def vector_writers(self, operand: str, kind: str, **options: bool) -> list[Writer]:
        return [self.writer(element, kind, **options) for element in elements(operand)]

    def address(self, operand: str, bits: int = 64) -> Reader:
        """A function that gives `[register + offset]` as int64. Shared addresses have 32 bits."""
        match = _ADDRESS.match(operand)
        if match is None:
            raise SimError(f"address `{operand}` is not supported")
        base, offset = match.group(1), int(match.group(2) or "0", 0)
        if base in self.program.registers:
            kind = "b32" if self.register(base)[1] == 32 else "b64"
            if bits == 64 and kind == "b32":
                raise SimError(f"32-bit register {base} as a 64-bit address")
            read = self.reader(base, kind)
        else:
            read = self.reader(base, "b64")

        def evaluate(batch: Batch) -> np.ndarray:
            value = read(batch)
            if not value.shape:
                value = np.full(batch.size, value)
            return value.astype(np.int64) + offset

        return evaluate


def immediate(text: str, kind: str) -> np.generic:
    """A constant operand as a numpy scalar: `0f3F800000`, `-5`, `0x10`, `true`."""
    if kind == "pred":
        if text not in ("true", "false") and not re.fullmatch(r"-?\d+", text):
            raise SimError(f"operand `{text}` is not supported")
        return np.bool_(text == "true" or (text != "false" and int(text) != 0))
    prefix = text[:2].lower()
    try:
        if (prefix == "0f" and bits_of(kind) == 32) or (prefix == "0d" and bits_of(kind) == 64):
            value = int(text[2:], 16)
        elif is_float(kind):
            raise ValueError
        else:
            value = int(text.rstrip("U"), 0)
    except ValueError:
        raise SimError(f"operand `{text}` is not supported as {kind}") from None
    bits = bits_of(kind)
    return np.array(value & ((1 << bits) - 1), UNSIGNED[bits]).view(TYPES[kind])[()]


def modifiers(instruction: Instruction, *, ignore: Iterable[str] = (), known: Iterable[str] = ()) -> tuple[str, ...]:
    """The modifiers without those that change nothing here; an error for any that is not in `known`.

    Modifiers with a `::` qualifier are matched whole, as in `L1::evict_last`.
    """
    ignored, accepted = set(ignore), set(known)
    result = tuple(m for m in instruction.modifiers if m not in ignored)
    for modifier in result:
        if modifier not in accepted:
            raise SimError(f"modifier .{modifier} of {instruction.base} is not supported")
    return result


def count_operands(instruction: Instruction, *allowed: int) -> int:
    """The number of operands, which must be one of the allowed ones."""
    if len(instruction.operands) not in allowed:
        raise SimError(f"{instruction.base} with {len(instruction.operands)} operands is not supported")
    return len(instruction.operands)


def _settled(batch: Batch, index: int) -> np.ndarray:
    """An accumulator register, which must not be in use by a wgmma."""
    pending = batch.state.get("wgmma_registers")
    if pending and index in pending:
        used = pending[index] if batch.active is None else pending[index] & batch.active
        if used.any():
            raise SimError("reads an accumulator of a wgmma that has not been waited for")
    _note_matrix_register(batch, index, batch.active)
    return batch.registers[index]


def _note_matrix_register(batch: Batch, index: int, mask: Mask) -> None:
    """Remember that something else than wgmma used one of its registers since the last wgmma.fence."""
    unfenced = batch.state.setdefault("unfenced_registers", {})
    if mask is None:
        unfenced[index] = np.ones(batch.size, bool)
    else:
        unfenced[index] = unfenced[index] | mask if index in unfenced else mask


def _guarded(step: Step, guard: int, negated: bool) -> Step:
    def run(batch: Batch, mask: Mask) -> None:
        active = batch.registers[guard]
        if negated:
            active = ~active
        if mask is not None:
            active = active & mask
        if active.all():
            step(batch, None)
        elif active.any():
            step(batch, active)

    return run


def _decode_one(decoder: Decoder, instruction: Instruction) -> Step | Branch | Exit | Barrier:
    guard = None
    if instruction.guard is not None:
        guard, bits = decoder.register(instruction.guard)
        if bits != 1:
            raise SimError(f"guard {instruction.guard} is no predicate")
    base, operands = instruction.base, instruction.operands
    if base == "bra":
        modifiers(instruction, ignore=("uni",))
        if operands[0] not in decoder.program.labels:
            raise SimError(f"no label {operands[0]}")
        return Branch(decoder.program.labels[operands[0]], guard, instruction.guard_negated)
    if base in ("ret", "exit"):
        modifiers(instruction, ignore=("uni",) if base == "ret" else ())
        return Exit(guard, instruction.guard_negated)
    if base in ("bar", "barrier") and "warp" not in instruction.modifiers:
        modifiers(instruction, ignore=("sync", "cta", "aligned") if base == "barrier" else ("sync", "cta"))
        whole = len(operands) == 1 or operands[1:] == (str(decoder.program.threads),)
        if guard is not None or operands[0] not in ("0", "0x0") or not whole or "sync" not in instruction.modifiers:
            raise SimError("only unguarded barrier 0 of the whole CTA is supported")
        return Barrier()
    if base not in _DECODERS:
        raise SimError(f"the simulator does not know {instruction.opcode}")
    step = _DECODERS[base](decoder, instruction)
    return step if guard is None else _guarded(step, guard, instruction.guard_negated)


@lru_cache(maxsize=256)
def decode(ptx: str) -> Kernel:
    """Parse and decode a module; the result does not depend on a launch and is kept.

    Raises:
        SimError: anything in the text is not known.
    """
    from . import opcodes  # noqa: F401  (registers the decoders)

    program = parse(ptx)
    decoder, kernel = Decoder(program), Kernel(program)
    for instruction in program.instructions:
        try:
            kernel.code.append(_decode_one(decoder, instruction))
        except SimError as error:
            raise program.error(error.reason, instruction) from None
        except (LookupError, ValueError) as error:
            raise program.error(f"cannot be decoded: {error!r}", instruction) from error
    kernel.shared_granule = min({16, *decoder.shared_widths})
    kernel.asynchronous = any(i.opcode.startswith(("cp.async", "wgmma")) for i in program.instructions)
    kernel.protocol = any(
        "global" in i.modifiers and (i.base in ("atom", "red") or {"acquire", "release"}.intersection(i.modifiers))
        for i in program.instructions
    )
    kernel.warp_groups = any(i.base == "wgmma" for i in program.instructions)
    return kernel


__all__ = ["BOOL", "Decoder", "Kernel", "Mask", "Step", "count_operands", "decode", "immediate", "modifiers", "opcode"]
