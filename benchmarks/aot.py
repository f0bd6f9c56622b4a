"""Compile the launch table ahead of time for GPUs that are not here, and report what the compilers made of it.

    python -m benchmarks.aot [--check] [--targets sm_80 ...] [--filter WORDS] [--processes N]

Every case calls a public operator with `backend="triton"` on CPU tensors while `lab.ptxsim.recorded` stands in for
the device, so arguments are specialised and configurations chosen as on the card. Registers and spills come from the
machine code: cubins are disassembled with the tools in the Triton wheel, AMD's assembly is read as it is.

Without options everything is compiled and `benchmarks/results/aot.json` written, with the rules of `faults` that are
broken. `--check` compares with that file: it ends with 1 if a rule is broken that was not before, if registers, spills
or shared memory grew by 10 % or more, or if occupancy fell by as much.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import scfg_kernels
import torch
import triton
from scfg_kernels._launch import (
    MAX_HEAD_DIM_FP32,
    DeviceLimits,
    LaunchConfig,
    attention_config,
    complete_config,
    flash_config,
    guide_config,
    in_one_sweep,
    pixel_config,
    propagate_config,
    resident_programs,
    segment_config,
)

from lab import ptxsim
from lab.ptxsim import FLOAT_ATOMIC, RecordedLaunch, recorded

from .gpu import grid
from .report import environment

OUT = Path(__file__).parent / "results" / "aot.json"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
SHARED_LIMITS = {"sm": 96 * 1024, "gfx": 64 * 1024}
"""Bytes a program may have: what all cards of a maker offer, rounded down."""
GROWTH_PERCENT = 10
TOKENS = grid.TOKENS
CELL = 4

# The launch table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What a case makes a device compile.

    Attributes:
        kernel: its name.
        config: what is chosen.
        dtype: of q, k, v or of the predictions.
        constants: what else of the case the kernel is compiled for. Equal variants are compiled once.
    """

    kernel: str
    config: LaunchConfig
    dtype: torch.dtype
    constants: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Case:
    """One operator at one class of sizes.

    Attributes:
        op: the public operator.
        sizes: what distinguishes the case, for example `"sd15-16x16"`; ends with the number of images if several.
        dtype: of q, k, v or of the predictions.
        call: calls the operator with tensors of these sizes.
        variant: what that compiles; a pure function.
        dot: whether it has matrix products for tensor cores.
        vectors: bytes that its widest loads have at least.
        wide_loops: whether no innermost loop loads less than 4 bytes at a time.
    """

    op: str
    sizes: str
    dtype: torch.dtype
    call: Callable[[], Any]
    variant: Callable[[DeviceLimits], Variant]
    dot: bool = False
    vectors: int = 16
    wide_loops: bool = True

    @property
    def name(self) -> str:
        return f"{self.op}/{self.sizes}/{str(self.dtype).removeprefix('torch.')}"


def _label(sizes: str, batch: int) -> str:
    return sizes if batch == 1 else f"{sizes}-b{batch}"


def _projected(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, N, d] as attention layers make it, a view of [B, N, H d]. Nothing is read, so nothing is filled."""
    return torch.empty((batch, tokens, heads, head_dim), dtype=dtype).transpose(1, 2)


def _attention(
    op: str, sizes: str, heads: int, rows: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float16,
    batch: int = 1,
) -> Case:  # fmt: skip
    with_output = op != "attention_map"

    def call() -> Any:
        shapes = (rows, keys, keys) if with_output else (rows, keys)
        operands = [_projected(2 * batch, tokens, heads, head_dim, dtype) for tokens in shapes]
        return getattr(scfg_kernels, op)(*operands, backend="triton")

    def variant(limits: DeviceLimits) -> Variant:
        if in_one_sweep(keys, dtype):
            one = attention_config(heads, keys, head_dim, limits)
            constants = head_dim, with_output, heads <= one.heads
            return Variant("cross_attention_map_kernel", one, dtype, constants)
        config = flash_config(2 * batch, heads, rows, keys, head_dim, dtype, limits)
        return Variant("self_attention_map_kernel", config, dtype, (head_dim, with_output))

    return Case(op, _label(sizes, batch), dtype, call, variant, dot=True)


def _propagate(
    sizes: str, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, batch: int = 1, text: int = TOKENS
) -> Case:
    def call() -> Any:
        q, k = (_projected(2 * batch, tokens, heads, head_dim, dtype) for _ in range(2))
        return scfg_kernels.propagate(q, k, torch.empty(2 * batch, tokens, text), backend="triton")

    def variant(limits: DeviceLimits) -> Variant:
        config = propagate_config(2 * batch, heads, tokens, text, head_dim, dtype, limits)
        return Variant("propagate_kernel", config, dtype, (head_dim,))

    return Case("propagate", _label(sizes, batch), dtype, call, variant, dot=True)


def _complete(sizes: str, rows: int, fidelity: str = "official", batch: int = 1, text: int = TOKENS) -> Case:
    def call() -> Any:
        own, cross = torch.empty(2 * batch, rows, rows), torch.empty(2 * batch, rows, text)
        return scfg_kernels.complete(own, cross, unconditional=batch, fidelity=fidelity, backend="triton")

    def variant(limits: DeviceLimits) -> Variant:
        config = complete_config(batch, rows, text, limits)
        kernel = "complete_whole_kernel" if rows <= config.block_m else "complete_kernel"
        return Variant(kernel, config, torch.float32, (fidelity,))

    return Case("complete", _label(sizes, batch), torch.float32, call, variant, dot=True)


def _complete_from_qk(
    sizes: str, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, batch: int = 1, text: int = TOKENS,
    fidelity: str = "official",
) -> Case:  # fmt: skip
    def call() -> Any:
        q, k = (_projected(2 * batch, tokens, heads, head_dim, dtype) for _ in range(2))
        cross = torch.empty(2 * batch, tokens, text)
        return scfg_kernels.complete_from_qk(
            q, k, cross, unconditional=batch, fidelity=fidelity, backend="triton"
        )  # fmt: skip

    def variant(limits: DeviceLimits) -> Variant:
        config = propagate_config(2 * batch, heads, tokens, text, head_dim, dtype, limits)
        return Variant("complete_from_qk_kernel", config, dtype, (head_dim, fidelity))

    return Case("complete_from_qk", _label(sizes, batch), dtype, call, variant, dot=True)


def _guidance(
    op: str, sizes: str, side: int, layers: Sequence[int], dtype: torch.dtype, channels: int = 4, masked: bool = False,
    paired: bool = False, lengths: tuple[int, int] | None = None, batch: int = 1, **options: Any,
) -> Case:  # fmt: skip
    """`segment`, `guide` or both; `layers`: side of each captured layer's map; `lengths`: of an oblong latent."""
    height, width = lengths or (side, side)
    cells = -(-height // CELL), -(-width // CELL)

    def call() -> Any:
        uncond, cond = torch.empty(2 * batch, channels, height, width, dtype=dtype).chunk(2)
        maps = (
            [torch.empty(batch, TOKENS, n * n) for n in layers],
            [torch.empty(batch, *(2,) * paired, n * n) for n in layers], [(n, n) for n in layers], cells,
        )  # fmt: skip
        mask = {"token_mask": torch.ones(batch, TOKENS, dtype=torch.bool)} if masked else {}
        scale = torch.tensor(7.5, dtype=torch.float32)
        if op == "segment":
            return scfg_kernels.segment(*maps, **mask, backend="triton")
        if op == "segment_and_guide":
            return scfg_kernels.segment_and_guide(*maps, uncond, cond, scale, **mask, **options, backend="triton")
        ids = torch.empty(batch, *cells, dtype=torch.int64)
        foreground = torch.empty(ids.shape, dtype=torch.bool)
        return scfg_kernels.guide(
            uncond, cond, ids, foreground, scale, num_tokens=TOKENS, **options, backend="triton"
        )  # fmt: skip

    def variant(limits: DeviceLimits) -> Variant:
        kernel, constants = f"{op}_kernel", (*dict.fromkeys(layers), masked, paired, *sorted(options.items()))
        if op == "segment":
            return Variant(kernel, segment_config(*cells), torch.float32, constants)
        programs = resident_programs(batch, limits) if op == "guide" else 1
        config = guide_config(channels, height, width, CELL, dtype.itemsize, programs)
        return Variant(kernel, config, dtype, constants)

    # A tile of predictions is lines of cells, four pixels each; segmentation reads the tokens and the foreground that
    # its parts left, 2 bytes and 1.
    vectors = min(16, CELL * dtype.itemsize) if op == "guide" else 16
    if side == 32:  # maps of 16 tokens and 8 x 8 cells are two values for each of 512 threads
        vectors = 8
    return Case(op, _label(sizes, batch), dtype, call, variant, vectors=vectors, wide_loops=op == "guide")


def _pixels(sizes: str, side: int, dtype: torch.dtype, channels: int = 4, batch: int = 1, **options: Any) -> Case:
    def call() -> Any:
        uncond, cond = torch.empty(2 * batch, channels, side, side, dtype=dtype).chunk(2)
        scale = torch.tensor(7.5, dtype=torch.float32)
        return scfg_kernels.guide_pixels(
            uncond, cond, scale, rate_min=0.5, rate_max=2.0, **options, backend="triton"
        )  # fmt: skip

    def variant(limits: DeviceLimits) -> Variant:
        config = pixel_config(channels, side**2, dtype.itemsize, resident_programs(batch, limits))
        return Variant("guide_pixels_kernel", config, dtype, tuple(sorted(options.items())))

    return Case("guide_pixels", _label(sizes, batch), dtype, call, variant)


def _named() -> Iterator[Case]:
    """Sizes and options beside those of the GPU benchmark, and bf16, whose builds are fp16's but for the type."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    own, cross, alone = "self_attention_map", "cross_attention_map", "attention_map"
    for dtype in (half, brain):
        yield _attention(own, "sd15-16x16", 8, 256, 256, 160, dtype)
        yield _attention(own, "sdxl-32x32", 20, 1024, 1024, 64, dtype)
        yield _attention(cross, "sd15-16x16", 8, 256, TOKENS, 160, dtype)
        yield _attention(cross, "sdxl-32x32", 20, 1024, TOKENS, 64, dtype)
    yield _attention(own, "sd21-24x24", 20, 576, 576, 64)
    yield _attention(own, "sd15-32x32", 8, 1024, 1024, 80)
    for batch in (1, 4):
        for heads, head_dim in ((8, 40), (16, 72), (8, 96), (8, 128)):
            yield _attention(own, f"head{head_dim}-32x32", heads, 1024, 1024, head_dim, half, batch)
    yield _attention(cross, "sd15-64x64", 8, 4096, TOKENS, 40)
    yield _attention(cross, "sd15-32x32", 8, 1024, TOKENS, 80)
    yield _attention(cross, "head72-300tokens", 16, 1024, 300, 72)
    yield _attention(cross, "head96", 8, 1024, TOKENS, 96)
    yield _attention(cross, "head128-128tokens", 8, 1024, 128, 128)
    yield _attention(cross, "sdxl-154tokens", 20, 1024, 2 * TOKENS, 64)
    yield _attention(alone, "sd15-16x16", 8, 256, 256, 160)
    yield _attention(alone, "sdxl-32x32", 20, 1024, 1024, 64)
    yield _propagate("sd15-64x64", 8, 4096, 40, half)
    yield _propagate("sdxl-64x64", 10, 4096, 64, brain)
    yield _propagate("sdxl-64x64-154tokens", 10, 4096, 64, half, text=2 * TOKENS)
    yield _complete("sd15-8x8", 64)
    yield _complete("sd15-16x16-paper", 256, "paper")
    for batch in (1, 16):
        for label, rows in (("sd15-8x8", 64), ("sd15-16x16", 256)):
            yield _complete(f"{label}-154tokens", rows, batch=batch, text=2 * TOKENS)
    yield _complete_from_qk("sd15-64x64", 8, 4096, 40, half)
    yield _complete_from_qk("sdxl-64x64", 10, 4096, 64, brain)
    yield _complete_from_qk("sdxl-64x64-paper", 10, 4096, 64, half, fidelity="paper")
    yield _complete_from_qk("sdxl-64x64-154tokens", 10, 4096, 64, half, text=2 * TOKENS)
    sd15 = [16] * 5 + [8]
    for batch in grid.BATCHES:  # in steps that keep their regions
        for dtype in (half, single):
            yield _guidance("guide", "sdxl", 128, [], dtype, batch=batch)
    yield _guidance("guide", "sdxl", 128, [], brain)
    for batch in (1, 16):
        yield _guidance("guide", "sdxl-rescaled", 128, [], half, batch=batch, rescale=0.7)
        yield _pixels("sdxl-rescaled", 128, half, batch=batch, rescale=0.7)
    yield _guidance("guide", "80x48cells", 0, [], half, lengths=(320, 192))
    yield _guidance("segment_and_guide", "sd15", 64, sd15, brain)
    yield _guidance("segment_and_guide", "sd15-unconditional-masked", 64, sd15, half, masked=True,
                    rewrite="unconditional")  # fmt: skip
    yield _guidance("segment_and_guide", "sd15-rescaled", 64, sd15, half, rescale=0.7)
    yield _guidance("segment_and_guide", "sd15-paper", 64, sd15, half, fidelity="paper", blur_sigma=0.0)
    yield _guidance("segment_and_guide", "sd15-64x96", 64, [16, 8], half, lengths=(64, 96))
    yield _guidance("segment_and_guide", "sdxl-60layers", 128, [32] * 60, half)
    yield _guidance("segment_and_guide", "1024cells-16channels", 128, [32] * 4, half, channels=16)
    yield _guidance("segment_and_guide", "4096cells-paired", 256, [64] * 2 + [32], half, channels=3, paired=True)
    yield _guidance("segment_and_guide", "4096cells", 256, [64] * 2 + [32], half)
    yield _guidance("segment_and_guide", "80x48cells", 0, [64] * 2 + [32], brain, lengths=(320, 192))
    yield _pixels("sdxl", 128, brain)
    for side, channels in ((32, 32), (64, 64)):  # latents of deep autoencoders, and packed ones
        yield _guidance("guide", f"{channels}channels", side, [], half, channels=channels)
        yield _guidance("segment_and_guide", f"{channels}channels", side, [side // 4], half, channels=channels)
        yield _pixels(f"{channels}channels", side, half, channels=channels)


def registered(case: grid.Case) -> Case:
    """A case of the GPU benchmark."""
    sizes, batch, dtype = case.sizes, case.batch, getattr(torch, case.dtype)
    if case.op in ("segment", "guide", "segment_and_guide"):
        layers = [layer.height for layer in sizes.layers]
        return _guidance(case.op, sizes.label, sizes.side, layers, dtype, sizes.channels, batch=batch)
    if case.op == "guide_pixels":
        return _pixels(sizes.label.removesuffix("-6of60layers"), sizes.side, dtype, sizes.channels, batch)
    layer = sizes.layers[0]
    if case.op == "complete":
        return _complete(sizes.label, layer.rows, batch=batch)
    if case.op == "propagate":
        return _propagate(sizes.label, layer.heads, layer.rows, layer.head_dim, dtype, batch)
    if case.op == "complete_from_qk":
        return _complete_from_qk(sizes.label, layer.heads, layer.rows, layer.head_dim, dtype, batch)
    keys = layer.rows if case.op == "self_attention_map" else layer.text
    label = f"{sizes.label}-text" if case.op == "attention_map" else sizes.label
    return _attention(case.op, label, layer.heads, layer.rows, keys, layer.head_dim, dtype, batch)


WITHOUT_HEADS = ("complete", "segment", "guide", "segment_and_guide", "guide_pixels")


def _cases() -> Iterator[Case]:
    """The GPU benchmark's operators in fp16 and fp32, and what it leaves out."""
    yield from _named()
    for case in grid.CASES:
        if case.op != "step" and case.dtype != "bfloat16":
            yield registered(case)
            if not case.sizes.layers or case.sizes.layers[0].head_dim <= MAX_HEAD_DIM_FP32 or case.op in WITHOUT_HEADS:
                yield registered(dataclasses.replace(case, dtype="float32"))


def limits_of(target: str) -> DeviceLimits:
    """As a launcher sees the device that `recorded` stands in for."""
    device = ptxsim.TARGETS[target][1]
    return DeviceLimits(target, device.multiprocessors, device.shared_memory)


def _table(cases: Iterator[Case]) -> Iterator[tuple[Case, str]]:
    """Cases with their targets, but for what an earlier case makes the target compile already."""
    seen = {target: set[Variant]() for target in TARGETS}
    for case in cases:
        for target in TARGETS:
            variant = case.variant(limits_of(target))
            if variant not in seen[target]:
                seen[target].add(variant)
                yield case, target


TABLE: tuple[tuple[Case, str], ...] = tuple(_table(_cases()))
CASES: dict[str, Case] = {case.name: case for case, _ in TABLE}

# What the compilers made ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Per multiprocessor: 32-bit registers, warps (waves), programs and bytes of shared memory; how registers and
    shared memory are handed out; lanes of a warp."""

    registers: int
    warps: int
    programs: int
    shared: int
    register_unit: int
    shared_reserved: int
    lanes: int


# NVIDIA: CUDA programming guide, technical specifications per compute capability; registers are handed out to warps in
# 256s, and the system takes 1 KiB of shared memory per program. AMD: CDNA3 and CDNA4 instruction set guides; four SIMDs
# of 512 registers per lane and 8 waves.
MULTIPROCESSORS = {
    "sm_80": Limits(65536, 64, 32, 167936, 256, 1024, 32),
    "sm_86": Limits(65536, 48, 16, 102400, 256, 1024, 32),
    "sm_89": Limits(65536, 48, 24, 102400, 256, 1024, 32),
    "sm_90": Limits(65536, 64, 32, 233472, 256, 1024, 32),
    "sm_100": Limits(65536, 64, 32, 233472, 256, 1024, 32),
    "sm_120": Limits(65536, 48, 24, 102400, 256, 1024, 32),
    "gfx942": Limits(4 * 512 * 64, 32, 32, 65536, 8 * 64, 0, 64),
    "gfx950": Limits(4 * 512 * 64, 32, 32, 163840, 8 * 64, 0, 64),
}


@dataclass(frozen=True)
class Build:
    """One kernel, compiled for one target.

    Attributes:
        kernel, grid, num_warps, num_stages: of the launch; a warp has 64 lanes on AMD.
        registers: vector registers per lane, accumulation registers included.
        spills: instructions that load or store spilled registers.
        loop_spills, innermost_spills: those of them in any loop, and in loops that contain no other.
        shared: bytes per program.
        occupancy: resident warps over the most the multiprocessor can have, by registers, warps and shared memory.
        matrix: what the products run on, `"mma"`, `"wgmma"`, `"tcgen05"`, `"mfma"`, or `""`.
        float_atomics: atomic operations on floating-point numbers.
        loads, stores: global accesses, by bytes per lane.
        innermost_loads: loads in innermost loops.
        instructions: all of them; `mix` counts some kinds.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    loop_spills: int
    innermost_spills: int
    shared: int
    occupancy: float
    matrix: str
    float_atomics: int
    loads: dict[int, int]
    innermost_loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    mix: dict[str, int] = field(default_factory=dict)


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """Theoretical share of a multiprocessor's warps that are resident."""
    limits = MULTIPROCESSORS[target]
    per_warp = math.ceil(max(registers, 1) * limits.lanes / limits.register_unit) * limits.register_unit
    programs = min(
        limits.registers // per_warp // num_warps,
        limits.warps // num_warps,
        limits.programs,
        limits.shared // (shared + limits.shared_reserved) if shared + limits.shared_reserved else limits.programs,
    )
    return programs * num_warps / limits.warps


@dataclass(frozen=True)
class Code:
    """Machine code: names of the instructions, and [first, last] of every loop."""

    instructions: list[str]
    loops: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str, label: str, instruction: str, branch: str) -> Code:
        """Parse lines with three regular expressions: a label (name), an instruction (name, operands), and in a
        branch's operands the label it goes to. A branch backwards closes a loop."""
        labels: dict[str, int] = {}
        found: list[str] = []
        loops = []
        for line in text.splitlines():
            if match := re.match(label, line):
                labels[match[1]] = len(found)
            elif match := re.match(instruction, line):
                target = re.search(branch, match[2])
                start = labels.get(target[1]) if target else None
                if start is not None and start < len(found):
                    loops.append((start, len(found)))
                found.append(match[1])
        return cls(found, loops)

    def in_loops(self) -> Code:
        """The instructions in any loop."""
        inside = [any(a <= i <= b for a, b in self.loops) for i in range(len(self.instructions))]
        return Code(list(itertools.compress(self.instructions, inside)), [])

    def in_innermost_loops(self) -> Code:
        """The instructions in loops that contain no other."""
        loops = self.loops
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return Code(self.instructions, inner).in_loops()

    def named(self, pattern: str) -> Counter[str]:
        """How often each instruction occurs whose name matches `pattern` from its beginning."""
        return Counter(filter(re.compile(pattern).match, self.instructions))

    def count(self, pattern: str) -> int:
        return self.named(pattern).total()


def _by_bytes(names: Counter[str], width: Callable[[str], int]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for name, count in names.items():
        total[width(name)] += count
    return dict(sorted(total.items()))


# NVIDIA's machine code is documented by name only (CUDA binary utilities); widths are suffixes.
_SASS = dict(
    label=r"\s*\.(L_\w+):",
    instruction=r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)",
    branch=r"\(\.(L_\w+)\)",
)
_SASS_MIX = {
    "matrix": r"(H|B|D|I|Q|O)G?MMA|UTC\w*MMA",
    "fma": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2",
    "special": r"MUFU",
    "async_copy": r"LDGSTS|UTMALDG|UBLKCP",
    "shared_load": r"LDS",
    "shared_store": r"STS",
    "shuffle": r"SHFL",
    "barrier": r"BAR|SYNCS",
    "atomic": r"ATOM|RED\b|REDG|REDAS",
    "branch": r"BRA",
}
_PTX_MATRIX = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"mma\.sync"}


def _sass_bytes(name: str) -> int:
    parts = name.split(".")
    if width := [int(part) // 8 for part in parts if part in ("64", "128", "256")]:
        return width[0]
    return 2 if "U16" in parts or "S16" in parts else 1 if "U8" in parts or "S8" in parts else 4


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _nvidia(launch: RecordedLaunch) -> dict[str, Any]:
    ptx = launch.files["ptx"].read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:  # the tools want a short name
        cubin.write(launch.files["cubin"].read_bytes())
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = Code.of(_tool("nvdisasm", "-c", cubin.name), **_SASS)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    loads = r"LDG(?!DEPBAR)"  # LDGSTS too
    return dict(
        registers=registers,
        spills=code.count("LDL|STL"),
        loop_spills=code.in_loops().count("LDL|STL"),
        innermost_spills=code.in_innermost_loops().count("LDL|STL"),
        matrix=next((name for name, pattern in _PTX_MATRIX.items() if re.search(pattern, ptx)), ""),
        float_atomics=len(FLOAT_ATOMIC.findall(ptx)),
        loads=_by_bytes(code.named(loads), _sass_bytes),
        innermost_loads=_by_bytes(code.in_innermost_loops().named(loads), _sass_bytes),
        stores=_by_bytes(code.named(r"STG"), _sass_bytes),
        instructions=len(code.instructions),
        mix={kind: code.count(pattern) for kind, pattern in _SASS_MIX.items()},
    )


_GCN = dict(
    label=r"\.(LBB\w+):", instruction=r"\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)(.*)", branch=r"\.(LBB\w+)"
)
_GCN_MIX = {
    "matrix": r"v_s?mfma|v_wmma",
    "fma": r"v_(pk_)?(fma|fmac|mul|add|sub)_f(16|32)",
    "special": r"v_(exp|log|rcp|rsq|sqrt)",
    "async_copy": r"(buffer|global)_load_lds",
    "shared_load": r"ds_read|ds_load",
    "shared_store": r"ds_write|ds_store",
    "shuffle": r"ds_b?permute|v_permlane|v_mov_b32_dpp",
    "barrier": r"s_barrier",
    "atomic": r"(buffer|global|flat|ds)_atomic|ds_(add|max|min)_",
    "branch": r"s_c?branch",
}
_GCN_FLOAT_ATOMIC = (
    r"(buffer|global|flat)_atomic_(pk_)?(add|fadd|min|max|fmin|fmax)_(b?f|num_f)|ds_(pk_)?add_(rtn_)?b?f"
)


def _gcn_bytes(name: str) -> int:
    if match := re.search(r"dwordx(\d)", name):
        return 4 * int(match[1])
    return 4 if "dword" in name else 2 if "short" in name else 1


def _amd(launch: RecordedLaunch) -> dict[str, Any]:
    text = launch.files["amdgcn"].read_text(encoding="utf-8")
    code = Code.of(text, **_GCN)

    def noted(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        return int(match[1]) if match else 0

    loads, spills = r"(buffer|global|flat)_load", r"scratch_(load|store)"
    return dict(
        registers=noted("vgpr_count"),
        # Spilled registers from the compiler's notes; scratch instructions say where. Scalar registers that are kept in
        # lanes of vector registers touch no memory and are not counted.
        spills=max(noted("vgpr_spill_count"), code.count(spills)),
        loop_spills=code.in_loops().count(spills),
        innermost_spills=code.in_innermost_loops().count(spills),
        matrix="mfma" if code.count(_GCN_MIX["matrix"]) else "",
        float_atomics=code.count(_GCN_FLOAT_ATOMIC),
        loads=_by_bytes(code.named(loads), _gcn_bytes),
        innermost_loads=_by_bytes(code.in_innermost_loops().named(loads), _gcn_bytes),
        stores=_by_bytes(code.named(r"(buffer|global|flat)_store"), _gcn_bytes),
        instructions=len(code.instructions),
        mix={kind: code.count(pattern) for kind, pattern in _GCN_MIX.items()},
    )


def analyse(launch: RecordedLaunch) -> Build:
    """Facts about one compiled launch."""
    facts = _amd(launch) if launch.target.startswith("gfx") else _nvidia(launch)
    return Build(
        kernel=launch.kernel, grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages,
        shared=launch.shared_bytes,
        occupancy=round(occupancy(launch.target, facts["registers"], launch.shared_bytes, launch.num_warps), 4),
        **facts,
    )  # fmt: skip


class CompilationError(RuntimeError):
    """A case was not compiled, or what was launched is not its variant."""


def compile_case(case: Case, target: str) -> list[Build]:
    """The builds of one call of the operator, one per launch."""
    expected = case.variant(limits_of(target))
    with recorded(target) as launches:
        case.call()
    for launch in launches:
        found, said = (launch.kernel, launch.num_warps), (expected.kernel, expected.config.num_warps)
        if found != said:
            raise CompilationError(f"{case.name} on {target}: launched {found}, the table says {said}")
    return [analyse(launch) for launch in launches]


def _compile_named(name: str, target: str) -> list[Build]:
    """`compile_case` in a process of its own, where a case cannot be sent."""
    return compile_case(CASES[name], target)


def compiled(table: Sequence[tuple[Case, str]], processes: int) -> Iterator[list[Build]]:
    """The builds of each entry, in order. The compilers use one core each, so there is a process per core.

    Raises:
        CompilationError: naming the entry that could not be compiled.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(min(processes, len(table)), mp_context=context)
    try:
        waiting = [pool.submit(_compile_named, case.name, target) for case, target in table]
        for (case, target), builds in zip(table, waiting, strict=True):
            try:
                yield builds.result()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise CompilationError(f"{case.name} on {target} was not compiled: {reason}") from error
    finally:
        pool.shutdown(cancel_futures=True)


# Rules ----------------------------------------------------------------------------------------------------------------


def faults(case: Case, target: str, builds: Sequence[Build]) -> list[str]:
    """The rules that a case's builds break, in words."""
    limit = SHARED_LIMITS[target[:3].rstrip("_")]
    found = [] if builds else ["no launch"]
    for build in builds:
        loops = build.innermost_loads
        rules = {
            f"{build.loop_spills} spill instructions in loops": build.loop_spills > 0,
            f"{build.shared} bytes of shared memory, {limit} allowed": build.shared > limit,
            "no program fits on a multiprocessor": build.occupancy == 0,
            "no tensor-core instruction": case.dot and not build.matrix,
            f"{build.float_atomics} floating-point atomics": build.float_atomics > 0,
            f"no {case.vectors}-byte load": max(build.loads, default=0) < case.vectors,
            f"loads below 4 bytes in innermost loops: {loops}": case.wide_loops and min(loops, default=16) < 4,
        }
        found += [f"{case.name} on {target}: {build.kernel}: {rule}" for rule, broken in rules.items() if broken]
    return found


def growth(name: str, now: Build, before: Build) -> list[str]:
    """Which of registers, spills and shared memory grew by 10 % or more, and whether occupancy fell by as much."""
    grown = []
    for what in ("registers", "spills", "shared"):
        old, new = getattr(before, what), getattr(now, what)
        if new > old and 100 * (new - old) >= GROWTH_PERCENT * old:
            grown.append(f"{name}: {now.kernel}: {what} grew from {old} to {new}")
    if 100 * (before.occupancy - now.occupancy) >= GROWTH_PERCENT * before.occupancy > 0:
        grown.append(f"{name}: {now.kernel}: occupancy fell from {before.occupancy:.0%} to {now.occupancy:.0%}")
    return grown


Table = dict[str, list[Build]]


def compare(now: Table, before: Table, whole: bool) -> list[str]:
    """`growth` of every build, and cases that only one of the two has (only the new ones unless `whole`)."""
    found = [f"{name} is not in the file" for name in now if name not in before]
    if whole:
        found += [f"{name} is in the file and was not compiled" for name in before if name not in now]
    for name in now.keys() & before.keys():
        if len(now[name]) != len(before[name]):
            found.append(f"{name}: {len(before[name])} launches became {len(now[name])}")
        for new, old in zip(now[name], before[name], strict=False):
            found += growth(name, new, old)
    return sorted(found)


# The file -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What the file holds: version of Triton, commit ("with changes" if there were some), broken rules in words, and
    builds by case and target."""

    triton: str
    commit: str
    broken: list[str]
    builds: Table


def write(record: Record, path: Path) -> None:
    """One line per build, so that a change of one is a change of one line."""
    entries = []
    for name, builds in sorted(record.builds.items()):
        lines = ",\n  ".join(json.dumps(asdict(build)) for build in builds)
        entries.append(f"{json.dumps(name)}: [\n  {lines}\n]")
    source = f'"triton": {json.dumps(record.triton)},\n"commit": {json.dumps(record.commit)},\n'
    head = f'{source}"broken": {json.dumps(sorted(record.broken), indent=1)},\n'
    every = ",\n".join(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{head}"builds": {{\n{every}\n}}\n}}\n', encoding="utf-8")


def read(path: Path = OUT) -> Record:
    """What `write` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    builds = {name: [_build(values) for values in found] for name, found in content["builds"].items()}
    return Record(content["triton"], content.get("commit", ""), content["broken"], builds)


def _build(values: dict[str, Any]) -> Build:
    widths = {name: {int(k): n for k, n in values[name].items()} for name in ("loads", "innermost_loads", "stores")}
    return Build(**{**values, **widths, "grid": tuple(values["grid"])})


def line(build: Build) -> str:
    """One build for the screen."""
    wide = "/".join(str(build.loads.get(n, 0)) for n in (16, 8, 4, 2))
    return (
        f"{build.registers:4} regs {build.spills:3} spills ({build.loop_spills} in loops, "
        f"{build.innermost_spills} innermost) {build.shared:6} B shared {100 * build.occupancy:4.0f} % occupancy  "
        f"{build.matrix or '-':7} x{build.mix['matrix']:<4} loads 16/8/4/2 B: {wide}  {build.instructions} instructions"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--filter", default="", help="only cases whose name contains every one of these words")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--out", type=Path, default=OUT, help="default: benchmarks/results/aot.json")
    arguments = parser.parse_args(argv)
    words = arguments.filter.split()
    wanted = [(case, t) for case, t in TABLE if t in arguments.targets and all(word in case.name for word in words)]
    if not wanted:
        parser.error(f"no case matches {arguments.filter!r}")
    whole = len(wanted) == len(TABLE)
    began = time.perf_counter()
    table: Table = {}
    broken: list[str] = []
    for (case, target), builds in zip(wanted, compiled(wanted, arguments.processes), strict=True):
        table[f"{case.name}/{target}"] = builds
        broken += faults(case, target, builds)
        for build in builds:
            print(f"[{len(table):3}/{len(wanted)}] {case.name:48} {target:7} {line(build)}", flush=True)
    print(f"{sum(map(len, table.values()))} builds in {time.perf_counter() - began:.0f} s")
    failures = broken
    if arguments.check:
        before = read(arguments.out)
        failures = [fault for fault in broken if fault not in before.broken]
        if before.triton == triton.__version__:
            failures += compare(table, before.builds, whole)
        else:
            print(f"no comparison of sizes: the file is from Triton {before.triton}, this is {triton.__version__}")
    elif whole:
        where = environment()
        commit = where["commit"] + " with changes" * where["dirty"]
        write(Record(triton.__version__, commit, broken, table), arguments.out)
        print(f"wrote {arguments.out.name}")
    else:
        print("nothing written: not the whole table")
    for failure in failures:
        print(f"{'FAILED' if arguments.check else 'BROKEN'} {failure}", file=sys.stderr)
    return 1 if arguments.check and failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
