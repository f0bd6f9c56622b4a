"""cp.async: copies from global to shared memory that are there only after they were waited for.

The source is read when the instruction is issued. The destination is marked in flight, so that any access to it is an
error, and gets its bytes when its thread waits for the group; other warps then still need a barrier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..asynchronous import CommitGroups
from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..errors import SimError
from ..parser import Instruction
from ..shared import IN_FLIGHT, UNFENCED
from .memory_access import HINTS


@dataclass
class _Copy:
    offsets: np.ndarray  # in the batch's shared memory
    data: np.ndarray  # (n, k)


def _copies(batch) -> CommitGroups[_Copy]:
    if "copies" not in batch.state:
        batch.state["copies"] = CommitGroups(batch.size)
    return batch.state["copies"]


@opcode("cp")
def copy(decoder: Decoder, instruction: Instruction) -> Step:
    if instruction.modifiers[:1] != ("async",) or "bulk" in instruction.modifiers:
        raise SimError(f"the simulator does not know {instruction.opcode}")
    if instruction.modifiers[1:] == ("commit_group",):
        return lambda batch, mask: _copies(batch).commit(batch.select(mask).index)
    if instruction.modifiers[1:] in (("wait_group",), ("wait_all",)):
        newest = int(instruction.operands[0], 0) if instruction.operands else -1
        return lambda batch, mask: _wait(batch, mask, newest)
    return _issue(decoder, instruction)


def _issue(decoder: Decoder, instruction: Instruction) -> Step:
    modifiers(instruction, ignore=HINTS, known=("async", "shared", "shared::cta", "global"))
    hint = "L2::cache_hint" in instruction.modifiers
    count = count_operands(instruction, 3 + hint, 4 + hint)
    size = int(instruction.operands[2], 0)
    if size not in (4, 8, 16):
        raise SimError(f"cp.async of {size} bytes")
    target = decoder.address(instruction.operands[0], 32)
    source = decoder.address(instruction.operands[1])
    read_size = decoder.reader(instruction.operands[3] if count == 4 + hint else str(size), "u32")
    decoder.shared_widths.add(size)
    unit = 4

    def run(batch, mask: Mask) -> None:
        who = batch.select(mask)
        where, origin = target(batch)[who.index], source(batch)[who.index]
        sizes = np.broadcast_to(read_size(batch), batch.size)[who.index]
        copied = sizes > 0
        if (sizes[copied] != size).any():
            raise SimError("cp.async that fills up a part with zeros is not supported")
        data = np.zeros((len(where), size // unit), np.uint32)
        if copied.any():
            data[copied] = batch.memory.read(origin[copied], size, unit, who.threads[copied])
        offsets = batch.shared.locate(who.ctas, where, size, "cp.async")
        batch.shared.count(where, size, who.threads)
        batch.shared.note_write(offsets, who.tags, size, IN_FLIGHT | UNFENCED)
        _copies(batch).add(who.threads, _Copy(offsets, data))

    return run


def _wait(batch, mask: Mask, newest: int) -> None:
    for entry in _copies(batch).wait(mask, newest):
        offsets, data = entry.payload.offsets[entry.rows], entry.payload.data[entry.rows]
        batch.shared.bytes.scatter(offsets, data)
        if batch.check_races:
            index = batch.shared.granules(offsets, data.shape[1] * 4)
            batch.shared.land(index, np.repeat(batch.tags[entry.owners], len(index) // len(offsets)))
