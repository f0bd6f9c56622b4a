"""Runs hand-written PTX: whole kernels on numpy arrays, or one instruction on operands."""

from __future__ import annotations

import numpy as np

from lab.ptxsim import Counters, GlobalMemory, decode, launch
from lab.ptxsim.dtypes import TYPES, bits_of

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"


def kernel_text(body: str, parameters: int, threads: int, registers: str = "") -> str:
    """A kernel `test` with pointers p0, p1 ... in %rd0, %rd1 ..., the thread number in %t, and 8 times that in %o."""
    declared = ",\n".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [p{i}];" for i in range(parameters))
    return f"""{HEADER}.visible .entry test({declared})
.reqntid {threads}
{{
.reg .pred %p<99>; .reg .b16 %rs<99>; .reg .b32 %r<999>; .reg .b64 %rd<99>; .reg .b32 %t; .reg .b64 %o;
{registers}
{loads}
mov.u32 %t, %tid.x;
mul.wide.u32 %o, %t, 8;
{body}
ret;
}}
"""


def execute(ptx: str, *arrays: np.ndarray, shared: int = 0, grid: int = 1, **options) -> Counters:
    """Launch a kernel whose parameters point to the arrays, which it may change."""
    memory, counters = GlobalMemory(), Counters()
    pointers = [memory.add(array.reshape(-1).view(np.uint8), f"p{i}").base for i, array in enumerate(arrays)]
    launch(decode(ptx), memory, pointers, (grid, 1, 1), shared, counters, **options)
    memory.finish(counters)
    return counters


def run_body(body: str, *arrays: np.ndarray, threads: int = 32, shared: int = 0, grid: int = 1, **options) -> Counters:
    return execute(kernel_text(body, len(arrays), threads), *arrays, shared=shared, grid=grid, **options)


def evaluate(instruction: str, result: str, *operands: tuple[str, object]) -> np.ndarray:
    """One instruction on 32 threads: `evaluate("add.s32 d, a, b", "s32", ("s32", values), ("s32", values))`.

    Args:
        instruction: PTX with the destination `d` and sources `a`, `b`, `c`, `e`.
        result: type of d; `pred` gives 0 and 1.
        operands: type and up to 32 values per source; bf16, pred and packed types as bit patterns.
    """
    inputs, lines, declared = [], [], []
    for name, (kind, values) in zip("abce", operands, strict=False):
        bits = max(bits_of(kind), 16)
        wide = np.zeros(32, np.uint64)
        storage = np.dtype(f"u{bits // 8}") if kind not in TYPES or kind in ("pred", "bf16") else TYPES[kind]
        with np.errstate(all="ignore"):
            array = np.resize(np.asarray(values).astype(storage), 32)
        wide[:] = array.view(f"u{array.itemsize}")
        inputs.append(wide)
        number = len(inputs)
        if kind == "pred":
            declared.append(f".reg .pred {name};")
            loaded, after = "%r1", f"setp.ne.b32 {name}, %r1, 0;"
        else:
            declared.append(f".reg .b{bits} {name};")
            loaded, after = name, ""
        loaded_bits = max(bits, 32 if kind == "pred" else 16)
        lines.append(f"add.s64 %rd9, %rd{number}, %o; ld.global.b{loaded_bits} {loaded}, [%rd9]; {after}")
    width = 32 if result == "pred" else max(bits_of(result), 16)
    declared.append(f".reg .{'pred' if result == 'pred' else f'b{width}'} d;")
    output = np.zeros(32, np.uint64)
    finish = (
        "selp.b32 %r2, 1, 0, d; st.global.b32 [%rd9], %r2;" if result == "pred" else f"st.global.b{width} [%rd9], d;"
    )
    body = "\n".join([*lines, f"{instruction};", "add.s64 %rd9, %rd0, %o;", finish])
    execute(kernel_text(body, 1 + len(inputs), 32, "\n".join(declared)), output, *inputs)
    if result == "pred" or result not in TYPES or result == "bf16":
        return output.astype(f"u{width // 8}")
    return output.astype(f"u{width // 8}").view(TYPES[result])
