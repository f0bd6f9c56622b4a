"""mma.sync on registers, and ldmatrix and stmatrix, which move its fragments.

Fragment layouts are those of the PTX ISA, with group = lane // 4 and t = lane % 4. A and B are gathered into dense
matrices by one indexing operation, multiplied in float32, and added to C.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..dtypes import bf16_to_f32, tf32_operand
from ..errors import SimError
from ..parser import Instruction

_SHAPES = {"m16n8k8", "m16n8k16", "m16n8k4"}
_TO_F32 = {"f16": lambda bits: bits.view(np.float16).astype(np.float32), "bf16": bf16_to_f32, "tf32": tf32_operand}


def operand_values(registers: np.ndarray, kind: str) -> np.ndarray:
    """Registers (..., n) of uint32 as float32 elements: two per register in order, or one for tf32."""
    return _TO_F32[kind](registers if kind == "tf32" else np.ascontiguousarray(registers).view(np.uint16))


@cache
def a_fragment(columns: int, per_register: int) -> np.ndarray:
    """For each cell (16, columns) of A: which flat (lane, register, element) holds it."""
    registers = columns // 8 * 2 if per_register == 2 else columns // 4 * 2
    return _invert(
        16, columns, registers, per_register, lambda g, t, r, e: (g + 8 * (r & 1), _column(t, r >> 1, e, per_register))
    )


@cache
def b_fragment(rows: int, per_register: int) -> np.ndarray:
    """For each cell (rows, 8) of B: which flat (lane, register, element) holds it."""
    registers = rows // 8 if per_register == 2 else rows // 4
    return _invert(rows, 8, registers, per_register, lambda g, t, r, e: (_column(t, r, e, per_register), g))


def _column(t: int, block: int, element: int, per_register: int) -> int:
    return t * 2 + element + 8 * block if per_register == 2 else t + 4 * block


def _invert(rows: int, columns: int, registers: int, per_register: int, place) -> np.ndarray:
    index = np.zeros((rows, columns), np.int64)
    for lane in range(32):
        for register in range(registers):
            for element in range(per_register):
                row, column = place(lane // 4, lane % 4, register, element)
                index[row, column] = (lane * registers + register) * per_register + element
    return index


@cache
def c_fragment() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the accumulator (16, 8) for each (lane, register)."""
    lane, register = np.arange(32)[:, None], np.arange(4)
    return lane // 4 + 8 * (register >> 1), lane % 4 * 2 + (register & 1)


def warp_registers(batch, readers, warps: np.ndarray | None) -> np.ndarray:
    """Registers as (warps, 32, n)."""
    stacked = np.empty((batch.size, len(readers)), np.uint32)
    for column, read in enumerate(readers):
        stacked[:, column] = read(batch)
    stacked = stacked.reshape(-1, 32, len(readers))
    return stacked if warps is None else stacked[warps]


def write_warps(batch, write, values: np.ndarray, warps: np.ndarray | None, mask: Mask) -> None:
    """Set a register from values (warps, 32) of the active warps."""
    if warps is not None:
        full = np.zeros((batch.size // 32, 32), values.dtype)
        full[warps] = values
        values = full
    write(batch, values.reshape(-1), mask)


@opcode("mma")
def multiply_accumulate(decoder: Decoder, instruction: Instruction) -> Step:
    known = modifiers(instruction, known=("sync", "aligned", *_SHAPES, "row", "col", "f32", *_TO_F32))
    count_operands(instruction, 4)
    if len(known) != 9 or known[:2] != ("sync", "aligned") or known[3:6] != ("row", "col", "f32") or known[8] != "f32":
        raise SimError(f"{instruction.opcode} is not supported")
    shape, kind = known[2], known[6]
    depth = int(shape.partition("k")[2])
    if known[7] != kind or depth not in ((4, 8) if kind == "tf32" else (8, 16)):
        raise SimError(f"{instruction.opcode} is not supported")
    per_register = 1 if kind == "tf32" else 2
    pick_a, pick_b = a_fragment(depth, per_register), b_fragment(depth, per_register)
    rows, columns = c_fragment()
    writers = decoder.vector_writers(instruction.operands[0], "b32")
    a, b, c = (decoder.vector_readers(operand, "b32") for operand in instruction.operands[1:])
    if (len(a), len(b), len(c), len(writers)) != (
        pick_a.size // 32 // per_register,
        pick_b.size // 32 // per_register,
        4,
        4,
    ):
        raise SimError("the operands do not fit the shape")

    def run(batch, mask: Mask) -> None:
        warps = batch.active_warps(mask)
        left, right, start = (warp_registers(batch, readers, warps) for readers in (a, b, c))
        count = len(left)
        left = operand_values(left, kind).reshape(count, -1)[:, pick_a]
        right = operand_values(right, kind).reshape(count, -1)[:, pick_b]
        product = np.matmul(left, right)[:, rows, columns]
        result = start.view(np.float32) + product
        batch.counters.mma_flops += 2 * 16 * 8 * depth * count
        for register, write in enumerate(writers):
            values = np.ascontiguousarray(result[:, :, register]).view(np.uint32)
            write_warps(batch, write, values, warps, mask)

    return run


@opcode("ldmatrix")
def load_matrix(decoder: Decoder, instruction: Instruction) -> Step:
    """Load 8 x 8 matrices of 16 bits; threads 8i to 8i+7 give the row addresses of matrix i."""
    count, transposed = _matrices(instruction)
    writers = decoder.vector_writers(instruction.operands[0], "b32")
    address = decoder.address(instruction.operands[1], 32)
    decoder.shared_widths.add(16)
    if len(writers) != count:
        raise SimError("the operands do not fit the shape")
    group, pair = np.arange(32) // 4, np.arange(32) % 4 * 2

    def run(batch, mask: Mask) -> None:
        warps = batch.active_warps(mask)
        for number, write in enumerate(writers):
            who, where, phase = _rows(batch, address(batch), warps, number)
            offsets = batch.shared.locate(who.ctas, where, 16, "ldmatrix")
            batch.shared.count(where, 16, phase)
            batch.shared.note_read(offsets, who.tags, 16)
            matrix = batch.shared.bytes.gather(offsets, 16, 2).reshape(-1, 8, 8)
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            pairs = np.ascontiguousarray(matrix).view(np.uint32)  # (warps, 8, 4)
            write_warps(batch, write, pairs[:, group, pair // 2], warps, mask)

    return run


@opcode("stmatrix")
def store_matrix(decoder: Decoder, instruction: Instruction) -> Step:
    """The inverse of ldmatrix."""
    count, transposed = _matrices(instruction)
    readers = decoder.vector_readers(instruction.operands[1], "b32")
    address = decoder.address(instruction.operands[0], 32)
    decoder.shared_widths.add(16)
    if len(readers) != count:
        raise SimError("the operands do not fit the shape")

    def run(batch, mask: Mask) -> None:
        warps = batch.active_warps(mask)
        registers = warp_registers(batch, readers, warps)
        for number in range(count):
            who, where, phase = _rows(batch, address(batch), warps, number)
            fragment = np.ascontiguousarray(registers[:, :, number]).view(np.uint16).reshape(-1, 8, 8)
            rows = fragment.transpose(0, 2, 1) if transposed else fragment
            offsets = batch.shared.locate(who.ctas, where, 16, "stmatrix")
            batch.shared.count(where, 16, phase)
            batch.shared.note_write(offsets, who.tags, 16)
            if not batch.shared.bytes.scatter(offsets, np.ascontiguousarray(rows).reshape(-1, 8)):
                raise SimError("one stmatrix writes different values to one shared address")

    return run


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    known = modifiers(
        instruction, known=("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16")
    )
    count_operands(instruction, 2)
    match = re.search(r"\.m8n8\.x([124])\.", instruction.opcode)
    if match is None:
        raise SimError(f"{instruction.opcode} is not supported")
    return int(match.group(1)), "trans" in known


def _rows(batch, addresses: np.ndarray, warps: np.ndarray | None, number: int):
    """The threads that give the row addresses of a matrix, these addresses, and threads of one phase per warp."""
    warps = np.arange(batch.size // 32) if warps is None else warps
    threads = (warps[:, None] * 32 + np.arange(8 * number, 8 * number + 8)).reshape(-1)
    mask = np.zeros(batch.size, bool)
    mask[threads] = True
    phase = (warps[:, None] * 32 + np.arange(8)).reshape(-1)
    return batch.select(mask), addresses[threads], phase
