"""What the kernels move and multiply at real layer sizes, counted by the PTX simulator.

    python -m benchmarks.simulated [--filter WORDS] [--arch 80 90]

Every case calls a public operator with `backend="triton"` on CPU tensors inside `lab.ptxsim.simulated` and is a row
of `benchmarks/results/simulated.md`. Counts are exact and repeat; there are no times. What was counted is compared with
the torch twin and fp64 as well: if a result is further off than the bounds allow, the command ends with 1 and writes
nothing.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scfg_kernels
import torch
import triton
from scfg_kernels.testing import assert_as_accurate_as, assert_masks_agree
from torch.utils._pytree import tree_leaves, tree_map_only

from lab.ptxsim import Traffic, simulated

from . import registry

OUT = Path(__file__).parent / "results" / "simulated.md"
ARCHITECTURES = (80, 90)
TOKENS = 77
REREAD = 1.05
TF32_PRODUCTS = 3
"""Of a product of fp32 operands."""
SHARED_BY_ROW_BLOCKS = {"k", "v"}
OPERANDS = SHARED_BY_ROW_BLOCKS | {
    "q", "x", "q1", "q2", "k1", "k2", "lse1", "lse2", "cross_map", "between",
    "self_maps[0]", "cross_maps[0]", "previous",
}  # fmt: skip
"""Of matrix products, with m and w of the softmax, which other tiles of the result read again."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        op, sizes: what is counted.
        make: the operator's arguments.
        scores, values: multiply-adds times two of q k^T and of the products with V, C or X; 0 without tensor cores. Of
            fp32 operands `TF32_PRODUCTS` times as many.
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


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _projections(
    samples: int, lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, H, N, d] as views of [B, N, H d]."""
    made = (_random(seed, samples, tokens, heads, head_dim) for seed, tokens in enumerate(lengths))
    return tuple(x.to(dtype).transpose(1, 2) for x in made)


def _attention(sizes: str, heads: int, rows: int, head_dim: int, dtype: torch.dtype = torch.float16) -> Case:
    """Both maps of a block."""

    def make() -> Arguments:
        q1, k1, q2, k2 = _projections(2, (rows, rows, rows, TOKENS), heads, head_dim, dtype)
        lse = [scfg_kernels.attention_with_lse(q, k, k)[1] for q, k in ((q1, k1), (q2, k2))]
        return (q1, k1, lse[0], q2, k2, lse[1]), {}

    scores = 2 * 2 * heads * rows * (rows + TOKENS) * head_dim * (TF32_PRODUCTS if dtype == torch.float32 else 1)
    return Case("attention_maps", sizes, make, scores)


def _joint(sizes: str, heads: int, side: int, pool: int, text: int, head_dim: int) -> Case:
    """Pooled queries of one sample; the softmax is another pass over the scores."""

    def make() -> Arguments:
        operands = _projections(1, (side**2, text, side**2), heads, head_dim)
        return operands, {"grid": (side, side), "pool": pool}

    scores = 2 * heads * (side // pool) ** 2 * (side**2 + text) * head_dim
    return Case("joint_attention_maps", sizes, make, scores, 0, 2)


def _completion_work(tokens: int, products: int) -> int:
    """Of both products of both samples: the unconditional one has one column, the other TOKENS. `products`: of TF32."""
    return products * 2 * 2 * tokens**2 * (TOKENS + 1)


def _complete(sizes: str, rows: int) -> Case:
    def make() -> Arguments:
        maps = _random(0, 2, rows, rows).softmax(-1), _random(1, 2, rows, TOKENS).softmax(-1)
        return maps, {"unconditional": 1}

    return Case("complete", sizes, make, values=_completion_work(rows, 1))


def _predictions(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _random(0, 1, 4, side, side).half(), _random(1, 1, 4, side, side).half()


def _regions(op: str, sizes: str, side: int, layers: Sequence[int]) -> Case:
    def make() -> Arguments:
        tokens = [_random(i, 1, TOKENS, n * n).softmax(1) for i, n in enumerate(layers)]
        start = [_random(i, 1, n * n).sigmoid() for i, n in enumerate(layers)]
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
    yield _attention("sd15-16x16", 8, 256, 160)
    yield _attention("sd15-8x8", 8, 64, 160)
    yield _attention("16x16-head64-fp32", 8, 256, 64, torch.float32)
    yield _attention("sdxl-32x32", 20, 1024, 64)
    yield _joint("sd3-16x16-2heads", 2, 16, 2, 333, 64)
    yield _complete("sd15-16x16", 256)
    yield _complete("sd15-8x8", 64)
    yield _complete("sdxl-32x32", 1024)
    yield _regions("segment", "sd15", 64, [16] * 5 + [8])
    yield _guide("sd15", 64)
    yield _guide("sdxl", 128)
    yield _regions("segment_and_guide", "sd15", 64, [16] * 5 + [8])
    yield _regions("segment_and_guide", "1024cells-6layers", 128, [32] * 6)
    yield _regions("segment_and_guide", "sdxl-60layers", 128, [32] * 60)
    yield _pixels("sd15", 64)
    yield _pixels("sdxl", 128)


CASES: tuple[Case, ...] = tuple(_cases())


class DisagreementError(RuntimeError):
    """The results that were counted are not the twin's within the bounds."""


def _check_regions(arguments: tuple[Any, ...], ids: torch.Tensor, foreground: torch.Tensor) -> None:
    """Against the literal reference in fp64: equal, but for a few cells that are near-ties there."""
    tokens, start, sizes, cells = arguments[:4]
    completed = []
    for layer, first in zip(tokens, start, strict=True):
        others = (1.0 - first.double()) / (TOKENS - 1)  # of the unconditional map, whose rows sum to 1
        columns = torch.stack([first.double(), *[others] * (TOKENS - 1)], -1)
        completed.append(torch.cat([columns, layer.double().mT]))
    inputs = {"completed": completed, "sizes": sizes, "grid": cells}
    reference = registry.OPERATORS["segment"].reference(inputs)
    for name, actual in (("ids", ids), ("foreground", foreground)):
        few = math.ceil(registry.TIES_ALLOWED * actual.numel())
        margin = reference[f"{name}_margin"]
        assert_masks_agree(
            actual, reference[name], margin, band=registry.TIE_BAND, max_crossings=few, name=name
        )  # fmt: skip


def verify(case: Case, arguments: tuple[Any, ...], options: dict[str, Any], results: Any) -> None:
    """Compare results: numbers with the torch twin's error against fp64, regions with the literal reference.

    Raises:
        DisagreementError: with the case's name and the comparer's words.
    """
    operator = getattr(scfg_kernels, case.op)
    try:
        if case.op in ("segment", "segment_and_guide"):
            *results, ids, foreground = results
            _check_regions(arguments, ids, foreground)
            if case.op == "segment":
                return
            # The prediction, given the regions that were found.
            operator, options = scfg_kernels.guide, {"num_tokens": TOKENS}
            arguments = (*arguments[4:6], ids, foreground, arguments[6])
        in_double = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)
        if case.op == "complete":  # one TF32 product, two times: 11 bits of every operand
            for found, truth in zip(results, operator(*in_double, **options, backend="torch"), strict=True):
                assert ((found - truth).abs() <= 2**-8 * truth).all(), "beyond the bound of one TF32 product"
            return
        twin = operator(*arguments, **options, backend="torch")
        truth = operator(*in_double, **options, backend="torch")
        for index, parts in enumerate(zip(tree_leaves(results), tree_leaves(twin), tree_leaves(truth), strict=True)):
            assert_as_accurate_as(*parts, name=f"result {index}")
    except AssertionError as error:
        raise DisagreementError(f"{case.name}: {error}") from error


def count(case: Case, arch: int) -> Count:
    """Execute a case, and verify its results."""
    arguments, options = case.make()
    with simulated(arch) as simulation:
        results = getattr(scfg_kernels, case.op)(*arguments, **options, backend="triton")
    verify(case, arguments, options, results)
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
fp16 predictions, queries, keys and values unless the name says fp32, fp32 maps, 77 text tokens, one image: two samples
in attention and completion. All results were compared with the torch twin and fp64.

- compulsory: bytes of all inputs and results, once each. The next four columns are multiples of it.
- moved: all 32-byte sectors between L2 and the multiprocessors. K, V once: the same, without what blocks of rows read
  of K and V again. operands once: without what any tile of a matrix product reads again of its operands, Q by tiles of
  keys, with their log-sum-exp, S, C and Y of the completion by products and blocks of rows.
  touched: every sector that was touched at all, once, scratch memory included.
- read again: operands of the kernel that are read more than 1.05 times, and how often.
- wavefronts: of shared memory, over the fewest for the same words; `wgmma` operands are not counted.
- MMA: work of the tensor-core instructions over that of the products in the formula; with sweep 2: over the same with
  the scores formed again in every sweep that does so, which leaves padding. Products of fp32 operands (fp32 attention;
  S or P times X, C or Y) are three TF32 products each and count three times in both.
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
    began, rows, wrong = time.perf_counter(), [], []
    for case in cases:
        for arch in arguments.arch:
            try:
                rows.append(row(case, arch, count(case, arch)))
            except DisagreementError as error:
                wrong.append(f"sm_{arch}: {error}")
                print(f"FAILED {wrong[-1]}", file=sys.stderr, flush=True)
            else:
                print(f"[{time.perf_counter() - began:4.0f} s] {' | '.join(rows[-1])}", flush=True)
    if wrong:
        print("nothing written: results disagree")
    elif len(cases) == len(CASES) and tuple(arguments.arch) == ARCHITECTURES:
        title = "# The kernels in the simulator\n\n`python -m benchmarks.simulated`"
        source = f"Triton {triton.__version__}, kernels of commit {_kernels_commit()}. No GPU, no times."
        arguments.out.write_text(f"{title}, {source}\n\n{table(rows)}\n{EXPLAINED}", encoding="utf-8")
        print(f"wrote {arguments.out.name}")
    else:
        print("nothing written: not the whole table")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
