"""Comparison into predicates."""

from __future__ import annotations

from ..decode import Decoder, Mask, Step, count_operands, modifiers, opcode
from ..errors import SimError
from ..parser import Instruction
from .floating import FLOAT_KINDS
from .integer import BIT_KINDS, INTEGER_KINDS, LOGIC

_COMPARISONS = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "equ": lambda a, b: (a == b) | (a != a) | (b != b),
    "neu": lambda a, b: a != b,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
_COMPARISONS |= {"lo": _COMPARISONS["lt"], "ls": _COMPARISONS["le"], "hi": _COMPARISONS["gt"], "hs": _COMPARISONS["ge"]}


@opcode("setp")
def compare(decoder: Decoder, instruction: Instruction) -> Step:
    """`setp.cmp{.bool}.type p|q, a, b{, c}`; q gets the opposite comparison."""
    known = modifiers(
        instruction,
        ignore=("ftz",),
        known=(*_COMPARISONS, "and", "or", "xor", *INTEGER_KINDS, *BIT_KINDS[:3], *FLOAT_KINDS),
    )
    comparison, kind = _COMPARISONS[known[0]], known[-1]
    if kind in FLOAT_KINDS and known[0] in ("lo", "ls", "hi", "hs"):
        raise SimError(f"setp.{known[0]} does not compare floats")
    combine = LOGIC[known[1]] if len(known) == 3 else None
    count_operands(instruction, 4 if combine else 3)
    names = instruction.operands[0].split("|")
    writers = [decoder.writer(name, "pred") for name in names]
    left, right = (decoder.reader(operand, kind) for operand in instruction.operands[1:3])
    third = instruction.operands[3] if combine else "true"
    negated = third.startswith("!")
    extra = decoder.reader(third.lstrip("!"), "pred")

    def run(batch, mask: Mask) -> None:
        result = comparison(left(batch), right(batch))
        for write, value in zip(writers, (result, ~result), strict=False):
            if combine:
                with_what = extra(batch)
                value = combine(value, ~with_what if negated else with_what)
            write(batch, value, mask)

    return run
