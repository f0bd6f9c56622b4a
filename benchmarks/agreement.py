"""The kernels against their twins on attention of the bundled model, executed by the PTX simulator.

    python -m benchmarks.agreement [--prompts 3] [--steps 12] [--at 0 5 11] [--arch 80 90]

Queries, keys and values of all seven attention layers and the two predictions are taken from runs of the bundled model
under plain guidance, at an early, a middle and a late step, and rounded to fp16, bf16 and fp32. From there on the chain
`attention_with_lse`, `attention_maps`, `complete`, `segment_and_guide` runs in that dtype: by the kernels, in
`lab.ptxsim.simulated`, and by the torch twins. The layers are small: 4 heads of 24 over 16x16 tokens, or of 40 over
8x8, and 24 text tokens.

Writes `benchmarks/results/agreement.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from scfg_kernels import attention_maps, attention_with_lse, complete, guide, segment_and_guide
from torch.overrides import TorchFunctionMode

from lab.ptxsim import simulated
from lab.reference.official import foreground_scores, smoothed_normalised
from scfg_fast import SCFGConfig
from scfg_fast.capture import grid_size
from scfg_fast.denoisers.unet import find_blocks

from .guidance import SCALE, open_pipeline, pair
from .report import RESULTS, environment

CONFIG = SCFGConfig()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHITECTURES = (80, 90)
BANDS = {torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float32: 1e-5}
"""Margins beyond which every cell must have the fp32 twin's region. The largest at which the torch twin differed, over
12 prompts and 9216 cells: 6e-7, 1.2e-4 and none."""

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """q [2B, H, N, d], k and v [2B, H, T, d] of both attentions of one block; (h, w) of its tokens."""

    own: Operands
    cross: Operands
    size: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One denoising step: its layers, and the predictions [B, C, H, W]."""

    layers: list[Layer]
    uncond: torch.Tensor
    cond: torch.Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Of cells, (h, w)."""
        return grid_size(self.cond.shape[2], self.cond.shape[3], CONFIG.cell)

    def to(self, dtype: torch.dtype) -> Step:
        layers = [Layer(_cast(x.own, dtype), _cast(x.cross, dtype), x.size) for x in self.layers]
        return Step(layers, self.uncond.to(dtype), self.cond.to(dtype))


def _cast(operands: Operands, dtype: torch.dtype) -> Operands:
    q, k, v = operands
    return q.to(dtype), k.to(dtype), v.to(dtype)


class Attention(TorchFunctionMode):
    """Keeps q, k and v of every `scaled_dot_product_attention` that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Operands] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.operands.append((args[0].clone(), args[1].clone(), args[2].clone()))
        return func(*args, **(kwargs or {}))


def steps(prompts: int, number: int, at: Sequence[int]) -> list[Step]:
    """The steps `at` (0 is the first of `number`) of the bundled model drawing `prompts` pictures at once."""
    pipe = open_pipeline()
    blocks = [block for block, _ in find_blocks(pipe.unet)]
    found: list[Step] = []
    seen = Attention()

    def before(module: torch.nn.Module, args: tuple) -> None:
        seen.operands.clear()
        seen.__enter__()

    def after(module: torch.nn.Module, args: tuple, output: tuple[torch.Tensor]) -> None:
        seen.__exit__(None, None, None)
        uncond, cond = output[0].chunk(2)
        pairs = zip(seen.operands[::2], seen.operands[1::2], blocks, strict=True)  # attn1, attn2 of each block
        height, width = cond.shape[-2:]
        found.append(Step([Layer(a, c, grid_size(height, width, b.level)) for a, c, b in pairs], uncond, cond))

    hooks = [pipe.unet.register_forward_pre_hook(before), pipe.unet.register_forward_hook(after)]
    pipe(
        [pair(i).caption for i in range(prompts)], num_inference_steps=number, guidance_scale=SCALE,
        generator=[torch.Generator().manual_seed(i) for i in range(prompts)], output_type="latent",
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    return [found[i] for i in at]


def completed(step: Step, unconditional: int, backend: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `complete` makes of every layer's maps."""
    result = []
    for layer in step.layers:
        compared = [(q, k, attention_with_lse(q, k, v)[1]) for q, k, v in (layer.own, layer.cross)]
        own, cross = attention_maps(*compared[0], *compared[1], backend=backend)
        result.append(complete(own, cross, unconditional=unconditional, backend=backend))
    return result


OPTIONS: dict[str, Any] = dict(
    cell=CONFIG.cell, rate_min=CONFIG.rate_min, rate_max=CONFIG.rate_max, max_scale=CONFIG.max_scale,
    blur_sigma=CONFIG.blur_sigma,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Completed maps [B, T, N] per layer; guided [B, C, H, W] in the chain's dtype; ids and foreground [B, h, w]."""

    maps: Sequence[torch.Tensor]
    guided: torch.Tensor
    ids: torch.Tensor
    foreground: torch.Tensor


def chain(step: Step, backend: str) -> Outcome:
    """From queries, keys and values to the guided prediction."""
    tokens, start = zip(*completed(step, step.cond.shape[0], backend), strict=True)
    sizes = [layer.size for layer in step.layers]
    guided, _, ids, foreground = segment_and_guide(
        tokens, start, sizes, step.grid, step.uncond, step.cond, SCALE, backend=backend, **OPTIONS
    )
    return Outcome(tokens, guided, ids, foreground)


@dataclass(frozen=True)
class Margins:
    """How far the better of the two best candidates is ahead, relative to it, in fp64: both [B, h, w]."""

    ids: torch.Tensor
    foreground: torch.Tensor


def margins(step: Step) -> Margins:
    """By the literal reference, from fp64 maps of a step in fp64."""
    maps = [tokens.mT for tokens, _ in completed(step, 0, "torch")]
    sizes, samples = [layer.size for layer in step.layers], step.cond.shape[0]
    best, second = smoothed_normalised([x[samples:] for x in maps], sizes, step.grid).topk(2, 1).values.unbind(1)
    start, others = foreground_scores([x[:samples] for x in maps], sizes, step.grid).unbind(1)
    return Margins((best - second) / best, (start - others).abs() / torch.maximum(start, others))


@dataclass
class Row:
    """One dtype of one implementation, over all steps; the attributes are the columns of the CSV.

    Attributes:
        dtype: of queries, keys, values and predictions.
        by: "torch", or "sm_80" and so on for the kernels.
        cells: how many were compared.
        same_ids, same_foreground: share of cells that are as the fp32 twin's on the unrounded operands.
        ids_band, foreground_band: the largest fp64 margin of a cell that differs; 0 if none does.
        in_ids_band, in_foreground_band: share of all cells whose margin is at most that.
        maps_rms, maps_max: distance of the completed maps to fp64 on the same rounded operands, over the layer's
            largest entry.
        noise_rms, noise_max: distance of the guided prediction to fp64 on the same rounded operands, over the largest
            guided value.
        given_regions_rms, given_regions_max: the same, where all have this one's regions, so that a cell on a tie does
            not count as an error of the noise.
        *_ratio: the last six over those of the torch twin in this dtype.
    """

    dtype: str
    by: str
    cells: int
    same_ids: float
    same_foreground: float
    ids_band: float
    in_ids_band: float
    foreground_band: float
    in_foreground_band: float
    maps_rms: float
    maps_max: float
    noise_rms: float
    noise_max: float
    given_regions_rms: float
    given_regions_max: float
    maps_rms_ratio: float = 1.0
    maps_max_ratio: float = 1.0
    noise_rms_ratio: float = 1.0
    noise_max_ratio: float = 1.0
    given_regions_rms_ratio: float = 1.0
    given_regions_max_ratio: float = 1.0


def _guided_in_fp64(double: Step, outcome: Outcome, tokens: int) -> torch.Tensor:
    """The fp64 twin's noise with the regions of `outcome`."""
    regions = outcome.ids, outcome.foreground
    return guide(double.uncond, double.cond, *regions, SCALE, num_tokens=tokens, backend="torch", **OPTIONS)[0]


def _band(differs: torch.Tensor, margin: torch.Tensor) -> tuple[float, float]:
    band = float(margin[differs].max()) if differs.any() else 0.0
    return band, float((margin <= band).double().mean()) if band else 0.0


def _error(actual: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Root mean square and maximum over all tensors, each relative to the largest entry of its truth."""
    parts = [((x.double() - y) / y.abs().max()).flatten() for x, y in zip(actual, truth, strict=True)]
    error = torch.cat(parts)
    return float(error.square().mean().sqrt()), float(error.abs().max())


def measure(
    dtype: str, by: str, mine: Sequence[Outcome], fp32: Sequence[Outcome], limits: Sequence[Margins],
    truth: Sequence[Outcome], given: Sequence[torch.Tensor],
) -> Row:  # fmt: skip
    """What `mine` is off, one entry per step: regions from `fp32`, maps and noise from `truth`, noise from `given`."""
    guided = [x.guided for x in mine]
    errors = [
        *_error([m for x in mine for m in x.maps], [m for x in truth for m in x.maps]),
        *_error(guided, [x.guided for x in truth]),
        *_error(guided, given),
    ]
    agreement: list[float] = []
    bands: list[float] = []
    for name in ("ids", "foreground"):
        differs = torch.stack([getattr(x, name) != getattr(y, name) for x, y in zip(mine, fp32, strict=True)])
        agreement.append(1.0 - float(differs.double().mean()))
        bands += _band(differs, torch.stack([getattr(limit, name) for limit in limits]))
    return Row(dtype, by, differs.numel(), *agreement, *bands, *errors)


def compare(taken: Sequence[Step], dtypes: Sequence[torch.dtype], architectures: Sequence[int]) -> Iterator[Row]:
    """The torch twin's row and one per architecture, for each dtype."""
    limits = [margins(step.to(torch.float64)) for step in taken]
    fp32 = [chain(step, "torch") for step in taken]
    for dtype in dtypes:
        rounded = [step.to(dtype) for step in taken]
        double = [step.to(torch.float64) for step in rounded]
        truth = [chain(step, "torch") for step in double]
        base: Row | None = None
        for arch in (None, *architectures):
            with nullcontext() if arch is None else simulated(arch):
                mine = [chain(step, "torch" if arch is None else "triton") for step in rounded]
            tokens = taken[0].layers[0].cross[1].shape[2]
            given = [_guided_in_fp64(step, x, tokens) for step, x in zip(double, mine, strict=True)]
            by = "torch" if arch is None else f"sm_{arch}"
            row = measure(str(dtype).removeprefix("torch."), by, mine, fp32, limits, truth, given)
            if base is None:
                base = row
            for name in ("maps_rms", "maps_max", "noise_rms", "noise_max", "given_regions_rms", "given_regions_max"):
                setattr(row, f"{name}_ratio", getattr(row, name) / getattr(base, name))
            yield row


HEADER = (
    "dtype", "by", "same region", "band", "cells in it", "same foreground", "band", "cells in it", "maps, rms",
    "to torch's", "max", "to torch's", "noise, rms", "to torch's", "max", "to torch's", "given regions, rms",
    "to torch's", "max", "to torch's",
)  # fmt: skip
EXPLAINED = """\
- same region, same foreground: share of cells that are as the fp32 torch twin's, whose operands are not rounded.
- band: the largest margin, in fp64, of a cell that differs: what the better of the two best tokens (of the start token
  and all others) is ahead, relative to it. Away from ties, beyond the band, every cell is the same by this definition;
  `cells in it` says how many of all cells are not beyond it. 0: no cell differs.
- maps: distance of the completed maps, fp32, to the fp64 twin's on the same rounded operands, over a layer's largest
  entry. They decide regions and nothing else.
- noise: the same of the guided prediction, which in half precision is mostly its own, last rounding. A cell on a tie
  that falls to another token moves the noise by more than rounding does.
- given regions: the same, the fp64 twin having this line's regions: what rounding alone does.
- to torch's: over the torch twin's own error in that dtype. The aim is at most 2.
"""


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER)]
    for x in rows:
        lines.append((
            x.dtype, x.by, f"{x.same_ids:.4%}", f"{x.ids_band:.1e}", f"{x.in_ids_band:.3%}", f"{x.same_foreground:.4%}",
            f"{x.foreground_band:.1e}", f"{x.in_foreground_band:.3%}",
            f"{x.maps_rms:.2e}", f"{x.maps_rms_ratio:.2f}", f"{x.maps_max:.2e}", f"{x.maps_max_ratio:.2f}",
            f"{x.noise_rms:.2e}", f"{x.noise_rms_ratio:.2f}", f"{x.noise_max:.2e}", f"{x.noise_max_ratio:.2f}",
            f"{x.given_regions_rms:.2e}", f"{x.given_regions_rms_ratio:.2f}",
            f"{x.given_regions_max:.2e}", f"{x.given_regions_max_ratio:.2f}",
        ))  # fmt: skip
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of every picture")
    parser.add_argument("--at", type=int, nargs="+", default=(0, 5, 11), help="which of them are compared")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=RESULTS / "agreement", help="without suffix")
    arguments = parser.parse_args(argv)
    began, rows = time.perf_counter(), []
    taken = steps(arguments.prompts, arguments.steps, arguments.at)
    for row in compare(taken, DTYPES, arguments.arch):
        rows.append(row)
        print(f"[{time.perf_counter() - began:4.0f} s] {table([row]).splitlines()[2]}", flush=True)
    where = environment()
    source = (
        f"# Kernels and twins on the bundled model's attention\n\n`python -m benchmarks.agreement`: "
        f"{arguments.prompts} prompts, steps {', '.join(str(i + 1) for i in arguments.at)} of {arguments.steps}, "
        f"{rows[0].cells} cells. "
        f"Triton {triton.__version__}, torch {where['torch']}, {where['cpu']}, no GPU; commit {where['commit']}"
        f"{', with changes' if where['dirty'] else ''}.\n\n"
    )
    arguments.out.with_suffix(".md").write_text(f"{source}{table(rows)}\n{EXPLAINED}", encoding="utf-8")
    records = json.dumps([asdict(row) for row in rows], indent=1)
    arguments.out.with_suffix(".json").write_text(records + "\n", encoding="utf-8")
    print(f"wrote {arguments.out.name}.md and .json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
