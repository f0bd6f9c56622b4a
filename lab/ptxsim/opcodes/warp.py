"""Exchange between the threads of a warp: shuffles, votes, reductions."""

from __future__ import annotations

import numpy as np

from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..errors import SimError
from ..parser import Instruction


def _full_warps(batch, mask: Mask, members: np.ndarray) -> None:
    """Check that whole warps take part and that the member mask names every thread."""
    batch.active_warps(mask)
    if (np.asarray(members) != np.uint32(0xFFFFFFFF)).any():
        raise SimError("a member mask other than all threads is not supported")


@opcode("shfl")
def shuffle(decoder: Decoder, instruction: Instruction) -> Step:
    known = modifiers(instruction, known=("sync", "bfly", "up", "down", "idx", "b32"))
    count_operands(instruction, 5)
    if known[0] != "sync":
        raise SimError("shfl without .sync is not supported")
    mode = known[1]
    names = instruction.operands[0].split("|")
    write = decoder.writer(names[0], "b32")
    write_valid = decoder.writer(names[1], "pred") if len(names) == 2 else None
    read, lanes, control, members = (decoder.reader(operand, "b32") for operand in instruction.operands[1:])

    def run(batch, mask: Mask) -> None:
        _full_warps(batch, mask, members(batch))
        lane = batch.lane
        distance = np.asarray(lanes(batch)).astype(np.int64) & 31
        bounds = np.asarray(control(batch)).astype(np.int64)
        segment, clamp = bounds >> 8 & 31, bounds & 31
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "bfly":
            other = lane ^ distance
            valid = other <= last
        elif mode == "up":
            other = lane - distance
            valid = other >= last
        elif mode == "down":
            other = lane + distance
            valid = other <= last
        else:
            other = first | (distance & ~segment)
            valid = other <= last
        source = np.arange(batch.size) - lane + np.where(valid, other, lane)
        write(batch, np.broadcast_to(read(batch), batch.size)[source], mask)
        if write_valid is not None:
            write_valid(batch, valid, mask)

    return run


@opcode("vote")
def vote(decoder: Decoder, instruction: Instruction) -> Step:
    known = modifiers(instruction, known=("sync", "all", "any", "uni", "ballot", "pred", "b32"))
    count_operands(instruction, 3)
    mode = known[1]
    write = decoder.writer(instruction.operands[0], "b32" if mode == "ballot" else "pred")
    source = instruction.operands[1]
    read, negated = decoder.reader(source.lstrip("!"), "pred"), source.startswith("!")
    members = decoder.reader(instruction.operands[2], "b32")

    def run(batch, mask: Mask) -> None:
        _full_warps(batch, mask, members(batch))
        votes = np.broadcast_to(read(batch) ^ negated, batch.size).reshape(-1, 32)
        if mode == "ballot":
            result = (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        else:
            result = {"all": votes.all(1), "any": votes.any(1), "uni": votes.all(1) | ~votes.any(1)}[mode]
        write(batch, np.repeat(result, 32), mask)

    return run


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
_REDUCTIONS["xor"] = np.bitwise_xor


@opcode("redux")
def warp_reduce(decoder: Decoder, instruction: Instruction) -> Step:
    _, mode, kind = modifiers(instruction, known=("sync", *_REDUCTIONS, "u32", "s32", "b32"))
    count_operands(instruction, 3)
    write = decoder.writer(instruction.operands[0], kind)
    read = decoder.reader(instruction.operands[1], kind)
    members = decoder.reader(instruction.operands[2], "b32")

    def run(batch, mask: Mask) -> None:
        _full_warps(batch, mask, members(batch))
        values = np.broadcast_to(read(batch), batch.size).reshape(-1, 32)
        write(batch, np.repeat(_REDUCTIONS[mode].reduce(values, axis=1).astype(values.dtype), 32), mask)

    return run
