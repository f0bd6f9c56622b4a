"""Helpers of the arithmetic families."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import Decoder, Mask, Step
from ..dtypes import UNSIGNED, bits_of


def elementwise(
    decoder: Decoder,
    operands: tuple[str, ...],
    function: Callable[..., np.ndarray],
    result: str,
    sources: tuple[str, ...],
) -> Step:
    """`operands[0] = function(*operands[1:])` with a type for the result and for each source."""
    write = decoder.writer(operands[0], result)
    readers = [decoder.reader(operand, kind) for operand, kind in zip(operands[1:], sources, strict=True)]
    if len(readers) == 1:
        (only,) = readers
        return lambda batch, mask: write(batch, function(only(batch)), mask)
    if len(readers) == 2:
        left, right = readers
        return lambda batch, mask: write(batch, function(left(batch), right(batch)), mask)

    def run(batch, mask: Mask) -> None:
        write(batch, function(*(read(batch) for read in readers)), mask)

    return run


def packed(decoder: Decoder, operands: tuple[str, ...], function: Callable[..., np.ndarray], element: str) -> Step:
    """The same on two elements per register (f16x2, bf16x2, f32x2)."""
    from ..dtypes import decode_value, encode_value

    half = bits_of(element)
    kind = f"b{2 * half}"
    write = decoder.writer(operands[0], kind)
    readers = [decoder.reader(operand, kind) for operand in operands[1:]]
    narrow, wide, shift = UNSIGNED[half], UNSIGNED[2 * half], UNSIGNED[2 * half].type(half)

    def run(batch, mask: Mask) -> None:
        values = [read(batch) for read in readers]
        low = function(*(decode_value(v.astype(narrow), element) for v in values))
        high = function(*(decode_value((v >> shift).astype(narrow), element) for v in values))
        joined = encode_value(low, element).astype(wide) | (encode_value(high, element).astype(wide) << shift)
        write(batch, joined, mask)

    return run
