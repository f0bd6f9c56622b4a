"""What the kernels move and multiply at real layer sizes, counted by the PTX simulator.

    python -m benchmarks.simulated [--filter WORDS] [--arch 80 90]

Every case calls a public operator with `backend="triton"` on CPU tensors inside `tests.ptxsim.simulated` and is a row
of `benchmarks/results/simulated.md`. Counts are exact and repeat; there are no times.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scfg_kernels
import torch
import triton
from scfg_kernels._launch import MAX_ONE_SWEEP
from torch.utils._pytree import tree_leaves

from tests.ptxsim import Traffic, simulated

OUT = Path(__file__).parent / "results" / "simulated.md"
ARCHITECTURES = (80, 90)
TOKENS = 77
REREAD = 1.05
SHARED_BY_ROW_BLOCKS = {"k", "v"}
OPERANDS = SHARED_BY_ROW_BLOCKS | {"q", "x", "top", "weight", "self_map", "cross_map", "between"}
"""Of matrix products, with m and w of the softmax, which other tiles of the result read again."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        op, sizes: what is counted.
        make: the operator's arguments.
        scores, values: multiply-adds times two of q k^T and of p v; 0 without tensor cores.
        sweeps: how often the kernel forms the scores.
    """

    op: str
    sizes: str
    make: Callable[[], Arguments]
    scores: int = 0
    values: int = 0
    sweeps: int = 1

    @property
    def name(self) -> str:
        return f"{self.op}/{self.sizes}"


@dataclass(frozen=True)
class Count:
    """What all launches of a case did together.

    Attributes:
        kernels: their names, one per launch.
        compulsory: bytes of inputs and results, once each.
        traffic: by argument of the kernels, scratch memory included.
        wavefronts, wavefronts_ideal: of shared memory, and the fewest for the same words.
        mma: work of the tensor-core instructions.
    """

    kernels: tuple[str, ...]
    compulsory: int
    traffic: dict[str, Traffic]
    wavefronts: int
    wavefronts_ideal: int
    mma: int

    @property
    def moved(self) -> int:
        """Bytes of all 32-byte sectors between L2 and the multiprocessors."""
        return sum(part.moved_bytes for part in self.traffic.values())

    def moved_once(self, names: Set[str]) -> int:
        """`moved`, with the arguments of these names counted once."""
        again = (part for name, part in self.traffic.items() if names & set(name.split("/")))
        return self.moved - sum(part.moved_bytes - part.unique_bytes for part in again)

    @property
    def touched(self) -> int:
        """Bytes of all sectors that were touched at all, scratch memory included."""
        return sum(part.unique_bytes for part in self.traffic.values())

    def reread(self) -> dict[str, float]:
        """How often operands are read that are read more than once."""
        times = {
            name: 32 * part.load_sectors / part.unique_load_bytes
            for name, part in self.traffic.items()
            if part.unique_load_bytes
        }
        return {name: factor for name, factor in times.items() if factor > REREAD}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _attention(op: str, sizes: str, heads: int, rows: int, keys: int, head_dim: int, samples: int = 2) -> Case:
    def make() -> Arguments:
        lengths = (rows, keys) if op == "attention_map" else (rows, keys, keys)
        return tuple(_random(samples, tokens, heads, head_dim).half().transpose(1, 2) for tokens in lengths), {}

    scores = 2 * samples * heads * rows * keys * head_dim
    sweeps = 1 if keys <= MAX_ONE_SWEEP else 2
    return Case(op, sizes, make, scores, 0 if op == "attention_map" else scores, sweeps)


def _propagate(sizes: str, heads: int, rows: int, keys: int, head_dim: int) -> Case:
    def make() -> Arguments:
        q, k = (_random(1, tokens, heads, head_dim).half().transpose(1, 2) for tokens in (rows, keys))
        return (q, k, _random(1, keys, TOKENS).softmax(-1)), {}

    return Case("propagate", sizes, make, 2 * heads * rows * keys * head_dim, 2 * rows * keys * TOKENS, 2)


def _complete(sizes: str, rows: int) -> Case:
    def make() -> Arguments:
        maps = _random(2, rows, rows).softmax(-1), _random(2, rows, TOKENS).softmax(-1)
        return maps, {"unconditional": 1}

    return Case("complete", sizes, make)


def _complete_from_qk(sizes: str, heads: int, tokens: int, head_dim: int) -> Case:
    """The unconditional sample has one column, the other TOKENS; every product forms the scores."""

    def make() -> Arguments:
        q, k = (_random(2, tokens, heads, head_dim).half().transpose(1, 2) for _ in range(2))
        return (q, k, _random(2, tokens, TOKENS).softmax(-1)), {"unconditional": 1}

    scores = 2 * 2 * heads * tokens * tokens * head_dim
    return Case("complete_from_qk", sizes, make, scores, 2 * 2 * tokens * tokens * (TOKENS + 1), 3)


def _predictions(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _random(1, 4, side, side).half(), _random(1, 4, side, side + 1)[..., :side].half().contiguous()


def _regions(op: str, sizes: str, side: int, layers: Sequence[int]) -> Case:
    def make() -> Arguments:
        tokens = [_random(1, TOKENS, n * n).softmax(1) for n in layers]
        start = [_random(1, n * n).sigmoid() for n in layers]
        maps = tokens, start, [(n, n) for n in layers], (side // 4, side // 4)
        return (maps, {}) if op == "segment" else ((*maps, *_predictions(side), torch.tensor(7.5)), {})

    return Case(op, sizes, make)


def _guide(sizes: str, side: int) -> Case:
    def make() -> Arguments:
        ids = torch.arange((side // 4) ** 2).view(1, side // 4, -1) % TOKENS
        return (*_predictions(side), ids, ids < 9, torch.tensor(7.5)), {"num_tokens": TOKENS}

    return Case("guide", sizes, make)


def _pixels(sizes: str, side: int) -> Case:
    rates = {"rate_min": 0.5, "rate_max": 2.0}
    return Case("guide_pixels", sizes, lambda: ((*_predictions(side), torch.tensor(7.5)), rates))


def _cases() -> Iterator[Case]:
    yield _attention("self_attention_map", "sd15-16x16", 8, 256, 256, 160)
    yield _attention("self_attention_map", "sd15-8x8", 8, 64, 64, 160)
    yield _attention("cross_attention_map", "sd15-16x16", 8, 256, TOKENS, 160)
    yield _attention("cross_attention_map", "sd15-8x8", 8, 64, TOKENS, 160)
    yield _attention("cross_attention_map", "sdxl-32x32", 20, 1024, TOKENS, 64)
    yield _attention("attention_map", "sd15-16x16", 8, 256, 256, 160)
    yield _attention("attention_map", "sd15-16x16-text", 8, 256, TOKENS, 160)
    yield _propagate("sdxl-64x64-16rows", 10, 16, 4096, 64)
    yield _complete("sd15-16x16", 256)
    yield _complete("sd15-8x8", 64)
    yield _complete("sdxl-32x32", 1024)
    yield _complete_from_qk("sd15-16x16", 8, 256, 160)
    yield _regions("segment", "sd15", 64, [16] * 5 + [8])
    yield _guide("sd15", 64)
    yield _guide("sdxl", 128)
    yield _regions("segment_and_guide", "sd15", 64, [16] * 5 + [8])
    yield _regions("segment_and_guide", "1024cells-6layers", 128, [32] * 6)
    yield _regions("segment_and_guide", "sdxl-60layers", 128, [32] * 60)
    yield _pixels("sd15", 64)
    yield _pixels("sdxl", 128)
    yield _attention("self_attention_map", "sdxl-32x32-half", 20, 1024, 1024, 64, samples=1)


CASES: tuple[Case, ...] = tuple(_cases())


def count(case: Case, arch: int) -> Count:
    """Execute a case."""
    arguments, options = case.make()
    with simulated(arch) as simulation:
        results = getattr(scfg_kernels, case.op)(*arguments, **options, backend="triton")
    tensors = [x for x in tree_leaves((arguments, results)) if isinstance(x, torch.Tensor)]
    traffic: dict[str, Traffic] = {}
    launches = simulation.launches
    for launch in launches:
        for name, part in launch.counters.traffic.items():
            traffic[name] = traffic.get(name, Traffic()) + part
    return Count(
        tuple(launch.kernel.removesuffix("_kernel") for launch in launches),
        sum(x.numel() * x.element_size() for x in tensors),
        traffic,
        sum(launch.counters.shared_wavefronts for launch in launches),
        sum(launch.counters.shared_wavefronts_ideal for launch in launches),
        sum(launch.counters.mma_flops for launch in launches),
    )


HEADER = (
    "operator/sizes", "sm", "launches", "compulsory MB", "moved", "K, V once", "operands once", "touched", "read again",
    "wavefronts", "MMA", "with sweep 2",
)  # fmt: skip
EXPLAINED = """\
fp16 predictions, queries, keys and values, fp32 maps, 77 text tokens, one image: two samples in attention and
completion, but one in sdxl-32x32-half, whose two halves are alike.

- compulsory: bytes of all inputs and results, once each. The next four columns are multiples of it.
- moved: all 32-byte sectors between L2 and the multiprocessors. K, V once: the same, without what blocks of rows read
  of K and V again. operands once: without what any tile of a matrix product reads again of its operands, Q by tiles of
  keys, with m and w of their softmax (top, weight), S, C and Y of the completion by products and blocks of rows.
  touched: every sector that was touched at all, once, scratch memory included.
- read again: operands of the kernel that are read more than 1.05 times, and how often.
- wavefronts: of shared memory, over the fewest for the same words; `wgmma` operands are not counted.
- MMA: work of the tensor-core instructions over that of the products in the formula; with sweep 2: over the same with
  the scores formed twice, where the kernel does so, which leaves padding.
"""


def row(case: Case, arch: int, counted: Count) -> tuple[str, ...]:
    """A line of the table."""
    again = ", ".join(f"{name} {factor:.3g}x" for name, factor in counted.reread().items())
    ideal = case.scores + case.values
    moved = (
        counted.moved, counted.moved_once(SHARED_BY_ROW_BLOCKS), counted.moved_once(OPERANDS), counted.touched,
    )  # fmt: skip
    return (
        case.name,
        str(arch),
        str(len(counted.kernels)),
        f"{counted.compulsory / 1e6:.3f}",
        *(f"{x / counted.compulsory:.2f}" for x in moved),
        again or "-",
        f"{counted.wavefronts / counted.wavefronts_ideal:.2f}" if counted.wavefronts_ideal else "-",
        f"{counted.mma / ideal:.2f}" if ideal else "-",
        f"{counted.mma / (ideal + (case.sweeps - 1) * case.scores):.2f}" if ideal else "-",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _kernels_commit() -> str:
    """The last commit that changed the kernels, which says more here than the present one."""
    command = ["git", "-C", str(OUT.parents[2]), "log", "-1", "--format=%h", "--", "kernels/**.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated", description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only cases whose name contains every one of these words")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=OUT, help="default: benchmarks/results/simulated.md")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if all(word in case.name for word in arguments.filter.split())]
    if not cases:
        parser.error(f"no case matches {arguments.filter!r}")
    began, rows = time.perf_counter(), []
    for case in cases:
        for arch in arguments.arch:
            rows.append(row(case, arch, count(case, arch)))
            print(f"[{time.perf_counter() - began:4.0f} s] {' | '.join(rows[-1])}", flush=True)
    if len(cases) == len(CASES) and tuple(arguments.arch) == ARCHITECTURES:
        title = "# The kernels in the simulator\n\n`python -m benchmarks.simulated`"
        source = f"Triton {triton.__version__}, kernels of commit {_kernels_commit()}. No GPU, no times."
        arguments.out.write_text(f"{title}, {source}\n\n{table(rows)}\n{EXPLAINED}", encoding="utf-8")
        print(f"wrote {arguments.out.name}")
    else:
        print("nothing written: not the whole table")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
