"""ld and st of every state space."""

from __future__ import annotations

import numpy as np

from ..decode import PARAMETERS, Decoder, Mask, Step, modifiers, opcode
from ..dtypes import UNSIGNED, bits_of
from ..errors import SimError
from ..parser import Instruction, elements
from ..visibility import ACQUIRE, RELEASE

# Caching and ordering hints: they change nothing in a simulator without caches.
HINTS = ("nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "volatile", "weak", "relaxed", "acquire", "release")
HINTS += ("cta", "gpu", "sys", "cluster", "L1::evict_last", "L1::evict_first", "L1::evict_normal", "L1::no_allocate")
HINTS += (
    "L1::evict_unchanged",
    "L2::cache_hint",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "L2::evict_last",
    "L2::evict_first",
)
_SPACES = {"param": "param", "global": "global", "local": "local", "shared": "shared", "shared::cta": "shared"}
_KINDS = (*(f"{letter}{bits}" for letter in "bus" for bits in (8, 16, 32, 64)), "f32", "f64")


def ordering(instruction: Instruction) -> frozenset[str] | None:
    """What a load, a store or an atomic operation orders between CTAs; None for an ordinary (weak) access."""
    if not {"relaxed", "volatile", "acquire", "release", "acq_rel"}.intersection(instruction.modifiers):
        return None
    return frozenset(() if "cta" in instruction.modifiers else instruction.modifiers) & (ACQUIRE | RELEASE)


def _access(instruction: Instruction) -> tuple[str, str, int]:
    """Space, element type and vector length."""
    accepted = [space for space in _SPACES if space != "param" or instruction.base == "ld"]
    known = modifiers(instruction, ignore=HINTS, known=(*accepted, *_KINDS, "v2", "v4", "v8"))
    spaces = [_SPACES[m] for m in known if m in _SPACES]
    if len(spaces) != 1:
        raise SimError("generic addresses are not supported")
    length = next((int(m[1:]) for m in known if m in ("v2", "v4", "v8")), 1)
    return spaces[0], known[-1], length


def _check_operands(instruction: Instruction) -> None:
    hint = "L2::cache_hint" in instruction.modifiers
    if len(instruction.operands) != 2 + hint:
        raise SimError(f"{instruction.base} with {len(instruction.operands)} operands is not supported")


@opcode("ld")
def load(decoder: Decoder, instruction: Instruction) -> Step:
    space, kind, length = _access(instruction)
    _check_operands(instruction)
    target, source = instruction.operands[:2]
    if len(elements(target)) != length:
        raise SimError(f"{length} elements into {len(elements(target))} registers")
    unit = bits_of(kind) // 8
    if kind[0] == "f":
        kind = f"b{bits_of(kind)}"
    writers = decoder.vector_writers(target, kind, extend=True)
    if space == "param":
        return _load_parameter(decoder, source, writers[0], kind, length)
    width, unsigned = unit * length, UNSIGNED[unit * 8]
    address = decoder.address(source, 64 if space == "global" else 32)
    if space == "shared":
        decoder.shared_widths.add(min(width, 16))
    semantics = ordering(instruction)

    def run(batch, mask: Mask) -> None:
        who = batch.select(mask)
        where = address(batch)[who.index]
        if semantics is not None:
            batch.note_poll(who)
        if space == "global":
            values = batch.memory.read(where, width, unit, who.threads, semantics)
        elif space == "shared":
            values = batch.shared.gather(who, where, width, unit)
        else:
            values = batch.local.gather(_local(batch, who.threads, where, width), width, unit)
        for column, write in enumerate(writers):
            if mask is None:
                write(batch, np.ascontiguousarray(values[:, column]), None)
            else:
                full = np.zeros(batch.size, unsigned)
                full[who.index] = values[:, column]
                write(batch, full, mask)

    return run


def _load_parameter(decoder: Decoder, source: str, write, kind: str, length: int) -> Step:
    name = source.strip("[] ")
    unsigned = UNSIGNED[bits_of(kind)]
    limit = (1 << bits_of(kind)) - 1
    if length == 1 and name in decoder.program.registers:
        return _load_chosen_parameter(decoder, name, write, unsigned)
    if length != 1 or name not in dict(decoder.program.parameters):
        raise SimError(f"parameter `{source}` is not supported")
    return lambda batch, mask: write(batch, np.full(batch.size, batch.parameters[name] & limit, unsigned), mask)


def _load_chosen_parameter(decoder: Decoder, register: str, write, unsigned: type) -> Step:
    """A parameter whose address is in a register: which of several it is was decided before."""
    address, widths = decoder.reader(register, "b64"), [size for _, size in decoder.program.parameters]

    def run(batch, mask: Mask) -> None:
        who = batch.select(mask)
        number, beside = np.divmod(address(batch)[who.index].astype(np.int64) - PARAMETERS, 8)
        if beside.any() or (number < 0).any() or (number >= len(widths)).any():
            raise SimError("loads from the address of no parameter")
        if any(widths[i] != np.dtype(unsigned).itemsize for i in np.unique(number)):
            raise SimError("loads a part of a parameter")
        values = np.array(list(batch.parameters.values())[: len(widths)], np.uint64)
        full = np.zeros(batch.size, unsigned)
        full[who.index] = values[number].astype(unsigned)
        write(batch, full, mask)

    return run


@opcode("st")
def store(decoder: Decoder, instruction: Instruction) -> Step:
    space, kind, length = _access(instruction)
    _check_operands(instruction)
    target, source = instruction.operands[:2]
    if len(elements(source)) != length:
        raise SimError("this store is not supported")
    kind = f"b{bits_of(kind)}"
    unit = bits_of(kind) // 8
    width, unsigned = unit * length, UNSIGNED[unit * 8]
    readers = decoder.vector_readers(source, kind, truncate=True)
    address = decoder.address(target, 64 if space == "global" else 32)
    if space == "shared":
        decoder.shared_widths.add(min(width, 16))
    semantics = ordering(instruction)

    def run(batch, mask: Mask) -> None:
        who = batch.select(mask)
        where = address(batch)[who.index]
        values = np.empty((len(where), length), unsigned)
        for column, read in enumerate(readers):
            value = read(batch)
            values[:, column] = value[who.index] if value.shape else value
        if space == "global":
            batch.memory.write(where, values, who.threads, semantics)
        elif space == "shared":
            batch.shared.scatter(who, where, values)
        else:
            batch.local.scatter(_local(batch, who.threads, where, width), values)

    return run


def _local(batch, threads: np.ndarray, addresses: np.ndarray, width: int) -> np.ndarray:
    """Offsets of a thread's local memory in the batch's."""
    size = batch.kernel.program.local_bytes
    if (addresses < 0).any() or (addresses + width > size).any():
        raise SimError(f"local access out of bounds of {size} bytes")
    if (addresses % width).any():
        raise SimError(f"local access of {width} bytes at a misaligned address")
    return threads * max(size, 16) + addresses
