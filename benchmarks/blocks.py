"""What capturing adds to one transformer block of a real-size UNet, and from there to a step.

    python -m benchmarks.blocks [--arch sdxl|sd15] [--level 4] [--latent SIDE] [--rounds 10] [--threads N]
                                [--step SECONDS]

A whole step of SDXL takes minutes on a CPU, and what other programs do meanwhile changes it by more than S-CFG does.
S-CFG changes only the captured blocks and what comes after the UNet, so this times just that, in pairs of seconds:

    block        a `BasicTransformerBlock` at latent / LEVEL with its weights drawn at random, [uncond; cond] of one
                 image: stock processors against capture processors, and stock against itself; where queries and keys
                 are held in place of the map (`scfg_fast.capture.holds_map`), against the map too
    step's end   `segment_and_guide` on the maps of all captured blocks, against the guidance line

Seconds are those that the process was on a processor. With `--step`, the seconds of a plain step on the same machine
(`python -m benchmarks.overhead`), the ratio 1 + (blocks * (captured - stock) + step's end) / step is added, for all
blocks and for one per transformer.

Writes `benchmarks/results/blocks-ARCH.csv` and `.json`; another level than 4 and another latent than the model's own
are in the name: `blocks-sd15-level1-latent96`.
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

from lab.architectures import SD15_UNET, SDXL_UNET
from lab.measure import MIB, Spread, allocated_peak, interleaved
from scfg_fast import SCFGConfig
from scfg_fast.capture import choose_layers
from scfg_fast.capture.processors import wrap_block
from scfg_fast.denoisers.unet import find_blocks

from . import overhead, registry
from .report import RESULTS, Report

UNETS = {"sdxl": SDXL_UNET, "sd15": SD15_UNET}
BY_MAP = "captured, by its map"
CHOICES = ("all", "one-per-transformer")


def counts(config: dict[str, Any], level: int = registry.CELL) -> dict[str, int]:
    """Blocks at latent / level that each choice of layers captures, on a model without memory."""
    with torch.device("meta"):
        infos = [info for info, _ in find_blocks(UNet2DConditionModel(**config))]
    return {name: len(choose_layers(infos, SCFGConfig(layers=name, levels=(level,)))) for name in CHOICES}


def block_of(config: dict[str, Any], level: int = registry.CELL) -> BasicTransformerBlock:
    """One block at latent / level of this UNet, random weights, fp32."""
    stage = level.bit_length() - 1
    width, heads = config["block_out_channels"][stage], config["attention_head_dim"]  # heads, for historical reasons
    heads = heads if isinstance(heads, int) else heads[stage]
    torch.manual_seed(0)
    block = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=config["cross_attention_dim"])
    return overhead.sharpen(block.eval())


def processor_seconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(
    config: dict[str, Any], rounds: int, level: int = registry.CELL
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """What is found, by name: "stock", "captured", "stock (again)", `BY_MAP` where that is another way, and "end" of
    each choice of layers.

    Returns:
        processor seconds per round, and of the ways through the block the most bytes allocated at once.
    """
    block, size = block_of(config, level), config["sample_size"]
    side, cells, width = -(-size // level), -(-size // registry.CELL), block.attn1.to_q.out_features
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    states = draw(2, side * side, width)
    text = draw(2, registry.TOKENS, config["cross_attention_dim"])
    stock = block.attn1.processor, block.attn2.processor
    capture = wrap_block(block, SCFGConfig())

    def run(processors: tuple[Any, Any]) -> None:
        block.attn1.processor, block.attn2.processor = processors
        block(states, encoder_hidden_states=text)

    tokens = draw(1, registry.TOKENS, side * side).softmax(1)
    start = tokens[:, 0].contiguous()
    uncond, cond = draw(1, 4, size, size), draw(1, 4, size, size)

    def end(layers: int) -> None:
        segment_and_guide(
            [tokens] * layers, [start] * layers, [(side, side)] * layers, (cells, cells), uncond, cond,
            registry.GUIDANCE_SCALE,
        )  # fmt: skip

    ways: dict[str, Callable[[], Any]] = {
        "stock": lambda: run(stock),
        "captured": lambda: run(capture),
        "stock (again)": lambda: run(stock),
    }
    ends = {f"end, {name}": lambda layers=layers: end(layers) for name, layers in counts(config, level).items()}
    calls = {**ways, **ends}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            call()
        allocated = {name: allocated_peak(call) for name, call in ways.items()}

        def noted(name: str) -> Callable[[], None]:
            return lambda: samples[name].append(processor_seconds(calls[name]))

        interleaved({name: noted(name) for name in calls}, rounds)
    return samples, allocated


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=list(UNETS), default="sdxl")
    parser.add_argument("--level", type=int, default=registry.CELL, choices=(1, 2, 4), help="downsampling factor")
    parser.add_argument("--latent", type=int, help="latent pixels a side; default: the model's own")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--step", type=float, help="processor seconds of a plain step on this machine")
    parser.add_argument("--out", type=Path, help="without suffix; default: in benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = UNETS[arguments.arch]
    case = arguments.arch
    if arguments.level != registry.CELL:
        case += f"-level{arguments.level}"
    if arguments.latent:
        config = {**config, "sample_size": arguments.latent}
        case += f"-latent{arguments.latent}"
    out = arguments.out or RESULTS / f"blocks-{case}"
    report = Report({**vars(arguments), "out": out.name})
    samples, allocated = measure(config, arguments.rounds, arguments.level)
    place = (f"blocks/{case}", "block", case, 1)
    report.samples[place[0]] = samples
    for name, values in samples.items():
        report.add(*place, name, "cpu_time", "s", Spread.of(values))
    for name, most in allocated.items():
        report.add(*place, name, "peak_allocated", "MiB", most / MIB)
    pairs = {
        name: [a - b for a, b in zip(samples[name], samples["stock"], strict=True)]
        for name in allocated
        if name != "stock"
    }
    for name, values in pairs.items():
        report.add(*place, name, "cpu_time_extra", "s", Spread.of(values))
    for choice, blocks in counts(config, arguments.level).items():
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
