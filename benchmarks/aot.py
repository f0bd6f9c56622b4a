"""Compile the launch table ahead of time for GPUs that are not here, and report what the compilers made of it.

    python -m benchmarks.aot [--check] [--targets sm_80 ...] [--filter WORDS] [--processes N]

Every case calls a public operator with `backend="triton"` on CPU tensors while `lab.ptxsim.recorded` stands in for
the device, so arguments are specialised and configurations chosen as on the card. Registers and spills come from the
machine code: cubins are disassembled with the tools in the Triton wheel, AMD's assembly is read as it is.

The rules of `faults` are the gate: no spills in loops, shared memory that every card has, tensor cores, no
floating-point atomics. The command ends with 1 if one is broken. Registers and counts of instructions are a report,
`benchmarks/results/aot.json`, which the command writes unless `--check` is given.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scfg_kernels
import torch
import triton

from lab.ptxsim import FLOAT_ATOMIC, RecordedLaunch, recorded

from .report import environment

OUT = Path(__file__).parent / "results" / "aot.json"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
SHARED_LIMITS = {"sm": 96 * 1024, "gfx": 64 * 1024}
"""Bytes a program may have: what all cards of a maker offer, rounded down."""
TOKENS = 77
CELL = 4

# The launch table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operator at one class of sizes.

    Attributes:
        op: the public operator.
        sizes: what distinguishes the case, for example `"sd15-16x16"`; ends with the number of images if several.
        dtype: of q, k, v or of the predictions.
        call: calls the operator with tensors of these sizes.
        dot: whether it has matrix products for tensor cores.
    """

    op: str
    sizes: str
    dtype: torch.dtype
    call: Callable[[], Any]
    dot: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}/{self.sizes}/{str(self.dtype).removeprefix('torch.')}"


def _label(sizes: str, batch: int) -> str:
    return sizes if batch == 1 else f"{sizes}-b{batch}"


def _projected(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, N, d] as attention layers make it, a view of [B, N, H d]. Nothing is read, so nothing is filled."""
    return torch.empty((batch, tokens, heads, head_dim), dtype=dtype).transpose(1, 2)


def _attention(
    sizes: str, heads: int, rows: int, head_dim: int, dtype: torch.dtype = torch.float16, batch: int = 1
) -> Case:
    """Both maps of a block, with the log-sum-exp of its attention."""

    def call() -> Any:
        q = _projected(2 * batch, rows, heads, head_dim, dtype)
        own, text = (_projected(2 * batch, tokens, heads, head_dim, dtype) for tokens in (rows, TOKENS))
        lse = torch.empty(2 * batch, heads, rows)
        return scfg_kernels.attention_maps(q, own, lse, q, text, lse, backend="triton")

    return Case("attention_maps", _label(sizes, batch), dtype, call, dot=True)


def _map(sizes: str, heads: int, rows: int, head_dim: int, dtype: torch.dtype) -> Case:
    """One map, and its log-sum-exp."""

    def call() -> Any:
        q, k = (_projected(2, rows, heads, head_dim, dtype) for _ in range(2))
        return scfg_kernels.attention_map(q, k, backend="triton")

    return Case("attention_map", sizes, dtype, call, dot=True)


def _joint(sizes: str, heads: int, side: int, pool: int, text: int, head_dim: int, dtype: torch.dtype) -> Case:
    """A joint layer of a transformer: the log-sum-exp, and both maps with pooled keys and a bias."""

    def call() -> Any:
        q, keys, image = (_projected(2, tokens, heads, head_dim, dtype) for tokens in (side**2, text, side**2))
        bias = torch.empty(2, text)
        return scfg_kernels.joint_attention_maps(
            q, keys, image, grid=(side, side), pool=pool, bias=bias, backend="triton"
        )  # fmt: skip

    return Case("joint_attention_maps", sizes, dtype, call, dot=True)


def _complete(sizes: str, sides: Sequence[int], fidelity: str = "official", batch: int = 1, text: int = TOKENS) -> Case:
    def call() -> Any:
        own = [torch.empty(2 * batch, side**2, side**2) for side in sides]
        cross = [torch.empty(2 * batch, text, side**2).mT for side in sides]
        return scfg_kernels.complete(own, cross, unconditional=batch, fidelity=fidelity, backend="triton")

    return Case("complete", _label(sizes, batch), torch.float32, call, dot=True)


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

    return Case(op, _label(sizes, batch), dtype, call)


def _pixels(sizes: str, side: int, dtype: torch.dtype, channels: int = 4, batch: int = 1, **options: Any) -> Case:
    def call() -> Any:
        uncond, cond = torch.empty(2 * batch, channels, side, side, dtype=dtype).chunk(2)
        scale = torch.tensor(7.5, dtype=torch.float32)
        return scfg_kernels.guide_pixels(
            uncond, cond, scale, rate_min=0.5, rate_max=2.0, **options, backend="triton"
        )  # fmt: skip

    return Case("guide_pixels", _label(sizes, batch), dtype, call)


def _cases() -> Iterator[Case]:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for dtype in (half, single):
        yield _attention("sd15-16x16", 8, 256, 160, dtype)
        yield _attention("sdxl-32x32", 20, 1024, 64, dtype)
        yield _joint("sd3", 24, 64, 2, 333, 64, dtype)
    yield _attention("sdxl-32x32", 20, 1024, 64, batch=4)
    yield _attention("sd15-16x16", 8, 256, 160, batch=16)
    for heads, head_dim in ((8, 40), (8, 80), (8, 96), (8, 256)):
        yield _attention(f"head{head_dim}-32x32", heads, 1024, head_dim)
    yield _map("sdxl-32x32", 20, 1024, 64, half)
    yield _joint("flux", 24, 64, 2, 512, 128, brain)
    yield _complete("sd15", [16] * 5 + [8])
    yield _complete("sd15-paper", [16] * 5 + [8], "paper")
    yield _complete("sd15", [16] * 5 + [8], batch=16)
    yield _complete("sdxl-10layers", [32] * 10)
    yield _complete("sdxl-20tokens", [32], text=20)
    sd15 = [16] * 5 + [8]
    for dtype in (half, single):
        yield _guidance("guide", "sd15", 64, [], dtype)
        yield _guidance("guide", "sdxl", 128, [], dtype)
        yield _guidance("segment_and_guide", "sd15", 64, sd15, dtype)
        yield _guidance("segment_and_guide", "sdxl-6of60layers", 128, [32] * 6, dtype)
        yield _pixels("sd15", 64, dtype)
        yield _pixels("sdxl", 128, dtype)
    yield _guidance("guide", "sdxl", 128, [], brain, batch=16)
    yield _guidance("guide", "80x48cells", 0, [], half, lengths=(320, 192))
    yield _guidance("segment", "sd15", 64, sd15, single)
    yield _guidance("segment_and_guide", "sd15-unconditional-masked", 64, sd15, half, masked=True,
                    rewrite="unconditional")  # fmt: skip
    yield _guidance("segment_and_guide", "sdxl-60layers", 128, [32] * 60, half)
    yield _guidance("segment_and_guide", "sd15-paper", 64, sd15, half, fidelity="paper", blur_sigma=0.0)
    yield _guidance("segment_and_guide", "4096cells-paired", 256, [64] * 2 + [32], half, channels=3, paired=True)
    yield _guidance("segment_and_guide", "80x48cells", 0, [64] * 2 + [32], brain, lengths=(320, 192))
    yield _pixels("64channels", 64, half, channels=64)


CASES: dict[str, Case] = {case.name: case for case in _cases()}
TABLE: tuple[tuple[Case, str], ...] = tuple((case, target) for case in CASES.values() for target in TARGETS)

# What the compilers made ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """One kernel, compiled for one target.

    Attributes:
        kernel, grid, num_warps: of the launch; a warp has 64 lanes on AMD.
        registers: vector registers per lane, accumulation registers included.
        spills: instructions that load or store spilled registers.
        loop_spills: those of them in loops.
        shared: bytes per program.
        matrix: what the products run on, `"mma"`, `"wgmma"`, `"tcgen05"`, `"mfma"`, or `""`.
        float_atomics: atomic operations on floating-point numbers.
        loads, stores: global accesses, by bytes per lane.
        instructions, innermost: all of them, and those in loops that contain no other loop.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    registers: int
    spills: int
    loop_spills: int
    shared: int
    matrix: str
    float_atomics: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    innermost: int


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
        matrix=next((name for name, pattern in _PTX_MATRIX.items() if re.search(pattern, ptx)), ""),
        float_atomics=len(FLOAT_ATOMIC.findall(ptx)),
        loads=_by_bytes(code.named(loads), _sass_bytes),
        stores=_by_bytes(code.named(r"STG"), _sass_bytes),
        instructions=len(code.instructions),
        innermost=len(code.in_innermost_loops().instructions),
    )


_GCN = dict(
    label=r"\.(LBB\w+):", instruction=r"\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)(.*)", branch=r"\.(LBB\w+)"
)
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
        matrix="mfma" if code.count(r"v_s?mfma|v_wmma") else "",
        float_atomics=code.count(_GCN_FLOAT_ATOMIC),
        loads=_by_bytes(code.named(loads), _gcn_bytes),
        stores=_by_bytes(code.named(r"(buffer|global|flat)_store"), _gcn_bytes),
        instructions=len(code.instructions),
        innermost=len(code.in_innermost_loops().instructions),
    )


def analyse(launch: RecordedLaunch) -> Build:
    """Facts about one compiled launch."""
    facts = _amd(launch) if launch.target.startswith("gfx") else _nvidia(launch)
    return Build(
        kernel=launch.kernel, grid=launch.grid, num_warps=launch.num_warps, shared=launch.shared_bytes, **facts
    )


class CompilationError(RuntimeError):
    """A case was not compiled."""


def compile_case(case: Case, target: str) -> list[Build]:
    """The builds of one call of the operator, one for every kernel that it launches."""
    with recorded(target) as launches:
        case.call()
    return list({(build.kernel, build.grid, build.instructions): build for build in map(analyse, launches)}.values())


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
    start = f"{case.name} on {target}"
    found = [] if builds else [f"{start}: no launch"]
    if case.dot and not any(build.matrix for build in builds):
        found.append(f"{start}: no tensor-core instruction")
    for build in builds:
        rules = {
            f"{build.loop_spills} spill instructions in loops": build.loop_spills > 0,
            f"{build.shared} bytes of shared memory, {limit} allowed": build.shared > limit,
            f"{build.float_atomics} floating-point atomics": build.float_atomics > 0,
        }
        found += [f"{start}: {build.kernel}: {rule}" for rule, broken in rules.items() if broken]
    return found


# The file -------------------------------------------------------------------------------------------------------------


def write(table: dict[str, list[Build]], path: Path) -> None:
    """One line per build: a change of one is a change of one line."""
    where = environment()
    lines = [json.dumps({"case": name} | asdict(build)) for name in sorted(table) for build in table[name]]
    source = {"triton": triton.__version__, "commit": where["commit"] + " with changes" * where["dirty"]}
    path.write_text(f'{json.dumps(source)[:-1]}, "builds": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def line(build: Build) -> str:
    """One build for the screen."""
    wide = "/".join(str(build.loads.get(n, 0)) for n in (16, 8, 4, 2))
    return (
        f"{build.kernel.removesuffix('_kernel'):16} {build.registers:4} regs {build.spills:3} spills "
        f"({build.loop_spills} in loops) {build.shared:6} B shared {build.matrix or '-':7} loads 16/8/4/2 B: {wide}  "
        f"{build.instructions} instructions, {build.innermost} in innermost loops"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="the rules alone: write no file")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--filter", default="", help="only cases whose name contains every one of these words")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--out", type=Path, default=OUT, help="default: benchmarks/results/aot.json")
    arguments = parser.parse_args(argv)
    words = arguments.filter.split()
    wanted = [(case, t) for case, t in TABLE if t in arguments.targets and all(word in case.name for word in words)]
    if not wanted:
        parser.error(f"no case matches {arguments.filter!r}")
    began = time.perf_counter()
    table: dict[str, list[Build]] = {}
    broken: list[str] = []
    for (case, target), builds in zip(wanted, compiled(wanted, arguments.processes), strict=True):
        table[f"{case.name}/{target}"] = builds
        broken += faults(case, target, builds)
        for build in builds:
            print(f"[{len(table):3}/{len(wanted)}] {case.name:48} {target:7} {line(build)}", flush=True)
    print(f"{sum(map(len, table.values()))} builds in {time.perf_counter() - began:.0f} s")
    if len(wanted) < len(TABLE):
        print("nothing written: not the whole table")
    elif not arguments.check:
        write(table, arguments.out)
        print(f"wrote {arguments.out.name}")
    for fault in broken:
        print(f"BROKEN {fault}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
