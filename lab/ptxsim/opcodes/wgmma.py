"""wgmma: matrix products of a warp group (four warps) with operands in shared memory (sm_90).

The product is computed when it is issued. Until it is waited for, its accumulators must not be read, the shared memory
it reads must not be written, and registers it takes must have been fenced (`wgmma.fence`).

A descriptor holds, in units of 16 bytes, the start address (bits 0 to 13), the leading (16 to 29) and the stride byte
offset (32 to 45), and the swizzle (62, 63: none, 128, 64, 32 bytes). Swizzling exchanges address bits 4 to 6 with 7 to
9.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..asynchronous import CommitGroups
from ..decode import Decoder, Mask, Step, modifiers, opcode
from ..errors import SimError
from ..parser import Instruction, elements
from ..shared import MANY, MATRIX_READ
from .matrix import a_fragment, operand_values

_SHAPE = re.compile(r"m64n(\d+)k(\d+)$")
_ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}
_SWIZZLE_BITS = {0: 0, 1: 7, 2: 3, 3: 1}


@dataclass
class _Product:
    granules: np.ndarray  # (warp groups, n): what each group reads of shared memory
    registers: list[int]  # accumulators


def _queue(batch) -> CommitGroups[_Product]:
    if "products" not in batch.state:
        batch.state["products"] = CommitGroups(batch.size // 128)
        batch.state.setdefault("wgmma_registers", {})
    return batch.state["products"]


def _groups(batch, mask: Mask) -> np.ndarray:
    """Active warp groups."""
    if batch.threads % 128:
        raise SimError("wgmma needs whole groups of four warps")
    groups = batch.active_warps(mask, 128)
    return np.arange(batch.size // 128) if groups is None else groups


@cache
def tile_addresses(descriptor: int, rows: int, depth: int, size: int, major_rows: bool) -> np.ndarray:
    """Shared-memory byte address of each element (rows, depth) of an operand tile.

    Args:
        descriptor: the 64-bit matrix descriptor.
        rows: extent along M or N.
        depth: extent along K.
        size: bytes per element.
        major_rows: consecutive elements run along M or N ("transposed") instead of along K.
    """
    if descriptor >> 49 & 7:
        raise SimError("matrix descriptors with a base offset are not supported")
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptor >> 62 & 3
    row_bytes = _ROW_BYTES[swizzle]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if major_rows:
        along = row * size
        address = (
            start + along // row_bytes * leading + along % row_bytes + column // 8 * stride + column % 8 * row_bytes
        )
    else:
        along = column * size
        within = along if swizzle else along // 16 * leading + along % 16
        address = start + row // 8 * stride + row % 8 * row_bytes + within
    return address ^ (((address >> 7) & _SWIZZLE_BITS[swizzle]) << 4)


@opcode("wgmma")
def warp_group_matrix(decoder: Decoder, instruction: Instruction) -> Step:
    what = instruction.modifiers
    if what[1:] == ("sync", "aligned"):
        if what[0] == "fence":
            return _fence
        if what[0] == "commit_group":
            return lambda batch, mask: _queue(batch).commit(_groups(batch, mask))
        if what[0] == "wait_group":
            newest = int(instruction.operands[0], 0)
            return lambda batch, mask: _wait(batch, mask, newest)
    return _issue(decoder, instruction)


def _fence(batch, mask: Mask) -> None:
    unfenced = batch.state.setdefault("unfenced_registers", {})
    fenced = batch.state.setdefault("fenced", np.zeros(batch.size // 128, bool))
    fenced[_groups(batch, mask)] = True
    if mask is None:
        unfenced.clear()
    else:
        for index in unfenced:
            unfenced[index] = unfenced[index] & ~mask


def _wait(batch, mask: Mask, newest: int) -> None:
    queue = _queue(batch)
    active = None if mask is None else mask.reshape(-1, 128)[:, 0]
    _groups(batch, mask)
    finished = list(queue.wait(active, newest))
    in_use: dict[int, np.ndarray] = {}
    for entry in queue.pending:
        threads = np.zeros((batch.size // 128, 128), bool)
        threads[entry.owners] = True
        for register in entry.payload.registers:
            in_use[register] = in_use[register] | threads.reshape(-1) if register in in_use else threads.reshape(-1)
    batch.state["wgmma_registers"] = in_use
    if not batch.check_races:
        return
    for entry in finished:
        index = entry.payload.granules[entry.rows]
        batch.shared.flags[index] &= ~MATRIX_READ
        tags = batch.tags.reshape(-1, 128)[entry.owners, 0] | MANY
        batch.shared.note_matrix_end(index, tags[:, None])
    for entry in queue.pending:
        batch.shared.flags[entry.payload.granules[entry.rows]] |= MATRIX_READ


def _issue(decoder: Decoder, instruction: Instruction) -> Step:
    known = modifiers(
        instruction,
        known=("mma_async", "sync", "aligned", "f32", "f16", "bf16", "tf32", *_shapes(instruction)),
    )
    if len(known) != 7 or known[:3] != ("mma_async", "sync", "aligned") or known[4] != "f32" or known[5] != known[6]:
        raise SimError(f"{instruction.opcode} is not supported")
    kind = known[5]
    columns, depth = map(int, _SHAPE.match(known[3]).groups())
    size = 4 if kind == "tf32" else 2
    if depth * size != 32:
        raise SimError(f"{instruction.opcode} is not supported")
    operands = instruction.operands
    accumulators = [decoder.register(name)[0] for name in elements(operands[0])]
    if len(accumulators) != columns // 2:
        raise SimError("the accumulators do not fit the shape")
    in_registers = operands[1].startswith("{")
    a_readers = decoder.vector_readers(operands[1], "b32") if in_registers else [decoder.reader(operands[1], "b64")]
    a_registers = [decoder.register(name)[0] for name in elements(operands[1])] if in_registers else []
    b_reader = decoder.reader(operands[2], "b64")
    keep = decoder.reader(operands[3], "pred")
    sign_a, sign_b, *transposes = (int(value) for value in operands[4:])
    if {sign_a, sign_b} - {1, -1} or len(transposes) not in (0, 1 if in_registers else 2):
        raise SimError("these wgmma operands are not supported")
    a_major_rows = bool(transposes[0]) if transposes and not in_registers else False
    b_major_rows = bool(transposes[-1]) if transposes else False
    decoder.shared_widths.add(16)
    pick_a = a_fragment(depth, 4 // size)

    def run(batch, mask: Mask) -> None:
        groups = _groups(batch, mask)
        queue = _queue(batch)
        if "fenced" not in batch.state or not batch.state["fenced"][groups].all():
            raise SimError("the first wgmma comes before any wgmma.fence")
        _check_fenced(batch, groups, a_registers, "wgmma takes a register")
        kept = np.broadcast_to(keep(batch), batch.size).reshape(-1, 128)[groups]
        if (kept != kept[:, :1]).any():
            raise SimError("the accumulate flag differs within a warp group")
        _check_fenced(batch, groups, accumulators, "wgmma accumulates in a register")
        granules: list[np.ndarray] = []
        if in_registers:
            registers = np.stack([read(batch) for read in a_readers], 1).reshape(-1, 4, 32, len(a_readers))[groups]
            left = operand_values(registers, kind).reshape(len(groups), 4, -1)[:, :, pick_a]
            left = left.reshape(len(groups), 64, depth)
        else:
            left = _tile(batch, groups, a_readers[0](batch), 64, depth, kind, a_major_rows, granules)
        right = _tile(batch, groups, b_reader(batch), columns, depth, kind, b_major_rows, granules)
        product = np.matmul(left, right.transpose(0, 2, 1)) * np.float32(sign_a * sign_b)
        batch.counters.mma_flops += 2 * 64 * columns * depth * len(groups)
        _accumulate(batch, groups, mask, accumulators, product, kept[:, :1, None])
        reads = np.concatenate(granules, 1)
        if batch.check_races:
            batch.shared.flags[reads] |= MATRIX_READ
        threads = np.zeros((batch.size // 128, 128), bool)
        threads[groups] = True
        pending = batch.state["wgmma_registers"]
        for register in accumulators:
            pending[register] = pending[register] | threads.reshape(-1) if register in pending else threads.reshape(-1)
        queue.add(groups, _Product(reads, accumulators))

    return run


def _shapes(instruction: Instruction) -> list[str]:
    return [m for m in instruction.modifiers if _SHAPE.match(m)]


def _check_fenced(batch, groups: np.ndarray, registers: list[int], what: str) -> None:
    unfenced = batch.state.get("unfenced_registers", {})
    for index in registers:
        if index in unfenced and unfenced[index].reshape(-1, 128)[groups].any():
            raise SimError(f"{what} that was used since the last wgmma.fence")


def _tile(batch, groups, descriptors, rows: int, depth: int, kind: str, major_rows: bool, granules: list) -> np.ndarray:
    """An operand (warp groups, rows, depth) from shared memory, checked; adds what was read to `granules`."""
    size = 4 if kind == "tf32" else 2
    per_group = np.broadcast_to(descriptors, batch.size).reshape(-1, 128)[groups]
    if (per_group != per_group[:, :1]).any():
        raise SimError("the matrix descriptor differs within a warp group")
    addresses = np.stack([tile_addresses(int(d), rows, depth, size, major_rows).reshape(-1) for d in per_group[:, 0]])
    ctas = batch.cta[groups * 128][:, None]
    chunks = np.unique(addresses[0] // 16) * 16 + (addresses[:, :1] - addresses[0, 0])
    offsets = batch.shared.locate(ctas, chunks, 16, "wgmma")
    index = batch.shared.granules(offsets.reshape(-1), 16).reshape(len(groups), -1)
    tags = np.broadcast_to(batch.tags.reshape(-1, 128)[groups, :1], index.shape)
    batch.shared.matrix_read(index, tags)
    granules.append(index)
    element = batch.shared.bytes.gather((ctas * batch.shared.stride + addresses).reshape(-1), size, size)
    registers = element.reshape(len(groups), rows * depth)
    return operand_values(registers, kind).reshape(len(groups), rows, depth)


def _accumulate(batch, groups, mask: Mask, accumulators: list[int], product: np.ndarray, kept: np.ndarray) -> None:
    """D (64, n) back to registers: warp w has rows 16w to 16w+15, register i the columns of block i // 4."""
    lane = np.arange(32)
    count = len(groups)
    tiles = product.reshape(count, 4, 16, -1)
    for number, index in enumerate(accumulators):
        block, quarter = divmod(number, 4)
        values = tiles[:, :, lane // 4 + 8 * (quarter >> 1), 8 * block + lane % 4 * 2 + (quarter & 1)]
        full = batch.registers[index].view(np.float32).reshape(-1, 128).copy()
        full[groups] = np.where(kept[:, :, 0], full[groups], np.float32(0)) + values.reshape(count, 128)
        batch.registers[index] = full.reshape(-1).view(np.uint32)
