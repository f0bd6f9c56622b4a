"""Opcode families; importing the package registers their decoders."""

from . import (
    async_copy,
    atomics,
    compare,
    convert,
    data,
    floating,
    integer,
    matrix,
    memory_access,
    ordering,
    warp,
    wgmma,
)

__all__ = [
    "async_copy",
    "atomics",
    "compare",
    "convert",
    "data",
    "floating",
    "integer",
    "matrix",
    "memory_access",
    "ordering",
    "warp",
    "wgmma",
]
