"""What capturing adds to one transformer block of a real-size UNet, and from there to a step.

    python -m benchmarks.blocks [--arch sdxl|sd15] [--rounds 10] [--threads N] [--step SECONDS]

A whole step of SDXL takes minutes on a CPU, and what other programs do meanwhile changes it by more than S-CFG does.
S-CFG changes only the captured blocks and what comes after the UNet, so this times just that, in pairs of seconds:

    block        a `BasicTransformerBlock` at latent / 4 with its weights drawn at random, [uncond; cond] of one image:
                 stock processors against capture processors, and stock against itself
    step's end   `segment_and_guide` on the maps of all captured blocks, against the guidance line

Seconds are those that the process was on a processor. With `--step`, the seconds of a plain step on the same machine
(`python -m benchmarks.overhead`), the ratio 1 + (blocks * (captured - stock) + step's end) / step is added, for all
blocks and for one per transformer.

Writes `benchmarks/results/blocks-ARCH.csv` and `.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from scfg_kernels import segment_and_guide

from scfg_fast import SCFGConfig
from scfg_fast.capture import choose_layers
from scfg_fast.processors import find_blocks, wrap_block

from . import overhead, registry
from .measure import Spread, interleaved
from .report import RESULTS, Report

UNETS = {"sdxl": overhead.SDXL_UNET, "sd15": overhead.SD15_UNET}
LEVEL = 4
CHOICES = ("all", "one-per-transformer")


def counts(config: dict[str, Any]) -> dict[str, int]:
    """Blocks at latent / 4 that each choice of layers captures, on a model without memory."""
    with torch.device("meta"):
        infos = [info for info, _ in find_blocks(UNet2DConditionModel(**config))]
    return {name: len(choose_layers(infos, SCFGConfig(layers=name, levels=(LEVEL,)))) for name in CHOICES}


def block_of(config: dict[str, Any]) -> BasicTransformerBlock:
    """One block at latent / 4 of this UNet, random weights, fp32."""
    width, heads = config["block_out_channels"][2], config["attention_head_dim"]  # heads, for historical reasons
    heads = heads if isinstance(heads, int) else heads[2]
    torch.manual_seed(0)
    block = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=config["cross_attention_dim"])
    return overhead.sharpen(block.eval())


def processor_seconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(config: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Processor seconds per round: "stock", "captured", "stock (again)", and "end" of each choice of layers."""
    block, side = block_of(config), config["sample_size"] // LEVEL
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    states = draw(2, side * side, config["block_out_channels"][2])
    text = draw(2, registry.TOKENS, config["cross_attention_dim"])
    stock = block.attn1.processor, block.attn2.processor
    capture = wrap_block(block, SCFGConfig())

    def run(processors: tuple[Any, Any]) -> None:
        block.attn1.processor, block.attn2.processor = processors
        block(states, encoder_hidden_states=text)

    tokens = draw(1, registry.TOKENS, side * side).softmax(1)
    start = tokens[:, 0].contiguous()
    uncond, cond = draw(1, 4, side * LEVEL, side * LEVEL), draw(1, 4, side * LEVEL, side * LEVEL)

    def end(layers: int) -> None:
        segment_and_guide(
            [tokens] * layers, [start] * layers, [(side, side)] * layers, (side, side), uncond, cond,
            registry.GUIDANCE_SCALE,
        )  # fmt: skip

    calls: dict[str, Callable[[], Any]] = {
        "stock": lambda: run(stock),
        "captured": lambda: run(capture),
        "stock (again)": lambda: run(stock),
        **{f"end, {name}": lambda layers=layers: end(layers) for name, layers in counts(config).items()},
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            call()

        def noted(name: str) -> Callable[[], None]:
            return lambda: samples[name].append(processor_seconds(calls[name]))

        interleaved({name: noted(name) for name in calls}, rounds)
    return samples


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=list(UNETS), default="sdxl")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--step", type=float, help="processor seconds of a plain step on this machine")
    parser.add_argument("--out", type=Path, help="without suffix; default: benchmarks/results/blocks-ARCH")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or RESULTS / f"blocks-{arguments.arch}"
    report = Report({**vars(arguments), "out": out.name})
    config = UNETS[arguments.arch]
    samples = measure(config, arguments.rounds)
    place = (f"blocks/{arguments.arch}", "block", arguments.arch, 1)
    report.samples[place[0]] = samples
    for name, values in samples.items():
        report.add(*place, name, "cpu_time", "s", Spread.of(values))
    pairs = {
        name: [a - b for a, b in zip(samples[name], samples["stock"], strict=True)]
        for name in ("captured", "stock (again)")
    }
    for name, values in pairs.items():
        report.add(*place, name, "cpu_time_extra", "s", Spread.of(values))
    for choice, blocks in counts(config).items():
        added = [blocks * extra + end for extra, end in zip(pairs["captured"], samples[f"end, {choice}"], strict=True)]
        report.add(*place, f"{choice}, {blocks} blocks", "step_extra", "s", Spread.of(added))
        if arguments.step:
            ratio = Spread.of([1.0 + extra / arguments.step for extra in added])
            report.add(*place, f"{choice}, {blocks} blocks", "step_ratio", "x", ratio)
    report.write(out, finished=True)
    for row in report.rows:
        print(f"{row.provider:32} {row.metric:16} {row.value:9.4f} [{row.low:.4f}, {row.high:.4f}] {row.unit}")
    print(f"wrote {out.name}.csv and .json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
