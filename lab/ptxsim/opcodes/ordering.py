"""Fences and warp barriers. Threads of a batch see one memory, so fences only matter for the async proxy."""

from __future__ import annotations

from ..decode import Decoder, Mask, Step, modifiers, opcode
from ..errors import SimError
from ..parser import Instruction


@opcode("fence")
def fence(decoder: Decoder, instruction: Instruction) -> Step:
    known = modifiers(
        instruction,
        known=("proxy", "async", "shared::cta", "acq_rel", "sc", "cta", "gpu", "sys"),
    )
    if "proxy" not in known:
        return _nothing
    if "async" not in known:
        raise SimError(f"{instruction.opcode} is not supported")

    def run(batch, mask: Mask) -> None:
        if batch.check_races:
            who = batch.select(mask)
            batch.shared.fence(who.ctas, batch.warp[who.index], batch.epochs)

    return run


def _nothing(batch, mask: Mask) -> None:
    pass


@opcode("membar")
def memory_barrier(decoder: Decoder, instruction: Instruction) -> Step:
    modifiers(instruction, known=("cta", "gl", "sys"))
    return _nothing


@opcode("bar", "barrier")
def warp_barrier(decoder: Decoder, instruction: Instruction) -> Step:
    """`bar.warp.sync`; the barriers of the CTA are control instructions."""
    modifiers(instruction, known=("warp", "sync"))

    def run(batch, mask: Mask) -> None:
        batch.active_warps(mask)

    return run


@opcode("nanosleep")
def sleep(decoder: Decoder, instruction: Instruction) -> Step:
    modifiers(instruction, known=("u32",))
    return _nothing


@opcode("trap")
def trap(decoder: Decoder, instruction: Instruction) -> Step:
    modifiers(instruction)

    def run(batch, mask: Mask) -> None:
        raise SimError("the program trapped")

    return run
