"""How far the regions depend on which attention layers are captured, and what fewer layers save.

    python -m benchmarks.layers bundled|sd15|sdxl [--pictures 16] [--steps 12] [--size N] [--seeds 0 1 2] [--threads N]

Every step keeps the completed maps of all layers at the published levels. From the same maps and the same two
predictions the step's result is computed for each choice of layers, and compared with that of all:

    same_token          share of cells that belong to the same token
    same_foreground     share of cells on the same side of the foreground
    rate_difference     mean over latent pixels of |rate - rate of all layers|
    effect_difference   RMS of the difference between the guided predictions, over the RMS of what S-CFG with all layers
                        does to plain guidance: 0 is the same, 1 is as far as not using S-CFG at all
    kept                MiB of maps that live until the end of the step, one image

`previous step` is no choice of layers: the regions of all layers one step earlier, which is what `reuse_every=2` uses.
`rate_difference` of `plain` is the mean of |rate of all layers - 1|: the size of what is compared.

`bundled`: the model that ships with the package, prompts of two nouns, its own trajectory under S-CFG, every subset of
its seven layers. `sd15`, `sdxl`: the real UNets with random weights and random inputs, one step per seed. Their layers
agree on nothing that training taught them, so this is what independent layers would give, not what SDXL gives.

Writes `benchmarks/results/layers-MODEL.csv` and `.json`; the spread is over steps and seeds, each the mean of a batch.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from scfg_kernels import guide, segment_and_guide

from lab.architectures import SD15_UNET, SDXL_UNET
from lab.measure import MIB, Spread
from scfg_fast import SCFGConfig
from scfg_fast.capture.layers import BlockInfo, middles
from scfg_fast.capture.maps import StepMaps, collect
from scfg_fast.denoisers.install import CaptureSet

from . import overhead, registry
from .guidance import SCALE, open_pipeline, pair
from .report import RESULTS, Report

CONFIG = SCFGConfig()
ALL, PLAIN, PREVIOUS = "all", "plain", "previous step"
METRICS = ("same_token", "same_foreground", "rate_difference", "effect_difference")


class Compared:
    """Results of one step after another for every choice of layers, against those of all layers.

    Args:
        blocks: all captured blocks, in the order of the model.
        choices: name -> indices of blocks.
        scale: guidance_scale.
    """

    def __init__(self, blocks: Sequence[BlockInfo], choices: Mapping[str, Sequence[int]], scale: float) -> None:
        self.blocks = blocks
        self.choices = choices
        self.scale = scale
        self.samples: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.kept: dict[str, float] = {}
        self._previous: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(self, maps: StepMaps, uncond: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Compare all choices on the maps and the predictions [B, C, H, W]; returns the result of all layers."""
        guided, rate, token, foreground = self._result(maps, range(len(self.blocks)), uncond, cond)
        plain = uncond + self.scale * (cond - uncond)
        effect = (guided - plain).square().mean().sqrt()
        self._note(PLAIN, {"rate_difference": (rate - 1.0).abs().mean()})

        def note(name: str, other: tuple[torch.Tensor, ...]) -> None:
            self._note(name, {
                "same_token": (other[2] == token).double().mean(),
                "same_foreground": (other[3] == foreground).double().mean(),
                "rate_difference": (other[1] - rate).abs().mean(),
                "effect_difference": (other[0] - guided).square().mean().sqrt() / effect,
            })  # fmt: skip

        for name, members in self.choices.items():
            note(name, self._result(maps, members, uncond, cond))
            kept = sum(x[index][:1].numel() * 4 for x in (maps.tokens, maps.start) for index in members)
            self.kept[name] = kept / MIB
        if self._previous is not None:
            before = guide(
                uncond, cond, *self._previous, self.scale, num_tokens=maps.tokens[0].shape[1], cell=CONFIG.cell,
                rate_min=CONFIG.rate_min, rate_max=CONFIG.rate_max, max_scale=CONFIG.max_scale,
                blur_sigma=CONFIG.blur_sigma,
            )  # fmt: skip
            note(PREVIOUS, (*before, *self._previous))
        self._previous = token, foreground
        return guided

    def start_over(self) -> None:
        """The next step is the first of a run."""
        self._previous = None

    def _note(self, name: str, values: Mapping[str, torch.Tensor]) -> None:
        for metric, value in values.items():
            self.samples[name, metric].append(float(value))

    def _result(
        self, maps: StepMaps, members: Sequence[int], uncond: torch.Tensor, cond: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """guided, rate, token_index, foreground."""
        pick = [[values[index] for index in members] for values in (maps.tokens, maps.start, maps.sizes)]
        return segment_and_guide(
            *pick, maps.size, uncond, cond, self.scale, cell=CONFIG.cell, rate_min=CONFIG.rate_min,
            rate_max=CONFIG.rate_max, max_scale=CONFIG.max_scale, blur_sigma=CONFIG.blur_sigma,
        )  # fmt: skip


class Capture:
    """The captured blocks of a UNet; inside the context every forward pass leaves its maps in them."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self._installation = CaptureSet().choose(unet, SCFGConfig(layers="all"))
        self._blocks = self._installation.blocks
        self.infos = [block.info for block in self._blocks]
        self._undo = ExitStack()

    def __enter__(self) -> Capture:
        self._undo.enter_context(self._installation)
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()

    def maps(self, height: int, width: int) -> StepMaps:
        """The maps of the pass that has just run, for a latent of this size."""
        return collect([(block.info, block.take()) for block in self._blocks], height, width, CONFIG.cell)


def subsets(blocks: Sequence[BlockInfo]) -> dict[str, Sequence[int]]:
    """Every proper subset of a few layers, named by its indices."""
    everything = range(len(blocks))
    chosen = itertools.chain.from_iterable(itertools.combinations(everything, k) for k in range(1, len(blocks)))
    return {"layers " + " ".join(map(str, members)): members for members in chosen}


def stages(blocks: Sequence[BlockInfo]) -> dict[str, Sequence[int]]:
    """Choices for a UNet whose transformers have many blocks: by stage, and a few blocks of every transformer."""
    names = [block.name for block in blocks]
    place = [int(name.rpartition(".")[2]) for name in names]
    depth = max(place) + 1
    where = {block.name: index for index, block in enumerate(blocks)}
    choices: dict[str, Sequence[int]] = {
        f"{stage} only": [i for i, name in enumerate(names) if name.startswith(stage)]
        for stage in ("down_blocks", "mid_block", "up_blocks")
    }
    for position in range(depth):
        choices[f"block {position} of each"] = [i for i, at in enumerate(place) if at == position]
    for step in (2, 5):
        choices[f"one in {step} of each"] = [i for i, at in enumerate(place) if at % step == step // 2]
    choices["one-per-transformer"] = [where[block.name] for block in middles(blocks)]
    return {name: members for name, members in choices.items() if members}


def bundled(pictures: int, steps: int) -> Compared:
    """The bundled model along its own runs under S-CFG with all layers."""
    pipe = open_pipeline()
    capture = Capture(pipe.unet)
    compared = Compared(capture.infos, subsets(capture.infos), SCALE)

    def guide_step(module: torch.nn.Module, args: tuple, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        prediction = output[0]
        guided = compared.step(capture.maps(*prediction.shape[-2:]), *prediction.chunk(2))
        return (torch.cat([guided, guided]),)

    hook = pipe.unet.register_forward_hook(guide_step)
    with capture:
        for first in range(0, pictures, 8):
            numbers = range(first, min(first + 8, pictures))
            compared.start_over()
            pipe(
                [pair(number).caption for number in numbers], num_inference_steps=steps, guidance_scale=SCALE,
                generator=[torch.Generator().manual_seed(number) for number in numbers], output_type="latent",
            )  # fmt: skip
    hook.remove()
    return compared


def random_steps(arch: str, seeds: Sequence[int], size: int | None) -> Compared:
    """A real-size UNet with random weights: one step per seed, other weights, texts and noise each time."""
    config = {"sd15": SD15_UNET, "sdxl": SDXL_UNET}[arch]
    compared: Compared | None = None
    side = size // 8 if size else config["sample_size"]
    for seed in seeds:
        unet = overhead.random_unet(config, seed)
        generator = torch.Generator().manual_seed(seed)
        capture = Capture(unet)
        if compared is None:
            choose = stages if arch == "sdxl" else subsets
            compared = Compared(capture.infos, choose(capture.infos), registry.GUIDANCE_SCALE)
        latents = torch.randn(1, 4, side, side, generator=generator)
        states = torch.randn(2, registry.TOKENS, config["cross_attention_dim"], generator=generator)
        more: dict[str, Any] = {}
        if arch == "sdxl":
            pooled = torch.randn(2, 1280, generator=generator)
            ids = torch.tensor([[8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side]]).repeat(2, 1)
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        with torch.no_grad(), capture:
            prediction = unet(torch.cat([latents] * 2), 501, states, return_dict=False, **more)[0]
            compared.start_over()
            compared.step(capture.maps(side, side), *prediction.chunk(2))
        del unet, capture
    assert compared is not None
    return compared


def rows(report: Report, arch: str, compared: Compared) -> None:
    """Everything that was compared, one row per choice and metric."""
    report.details["layers"] = [block.name for block in compared.blocks]
    total = len(compared.blocks)
    for (name, metric), values in compared.samples.items():
        members = compared.choices.get(name)
        label = f"{total} layers" if members is None else f"{len(members)} of {total} layers"
        unit = "x" if metric == "rate_difference" else "share"
        report.add(f"layers/{arch}", "layers", label, 1, name, metric, unit, Spread.of(values))
    for name, kept in compared.kept.items():
        label = f"{len(compared.choices[name])} of {total} layers"
        report.add(f"layers/{arch}", "layers", label, 1, name, "kept", "MiB", kept)
    for label, picked in by_count(compared):
        for metric in METRICS:
            values = [value for name in picked for value in compared.samples[name, metric]]
            report.add(f"layers/{arch}", "layers", label, 1, "any such choice", metric, "share", Spread.of(values))


def by_count(compared: Compared) -> Iterator[tuple[str, list[str]]]:
    """The choices of each number of layers."""
    total = len(compared.blocks)
    for count in sorted({len(members) for members in compared.choices.values()}):
        yield (
            f"{count} of {total} layers",
            [name for name, members in compared.choices.items() if len(members) == count],
        )


def table(report: Report) -> str:
    """One line per choice; of models whose subsets were all tried, one per number of layers."""
    few = any(row.provider.startswith("layers ") for row in report.rows)
    lines = [f"{'':24}{'':20}" + "".join(f"{metric:>34}" for metric in METRICS)]
    found = {(row.provider, row.sizes, row.metric): row for row in report.rows}
    for provider, sizes in dict.fromkeys((row.provider, row.sizes) for row in report.rows):
        if few and provider.startswith("layers "):
            continue
        cells = []
        for metric in METRICS:
            row = found.get((provider, sizes, metric))
            cells.append("" if row is None else f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]")
        lines.append(f"{provider:24}{sizes:20}" + "".join(f"{cell:>34}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["bundled", "sd15", "sdxl"])
    parser.add_argument("--pictures", type=int, default=16, help="of bundled")
    parser.add_argument("--steps", type=int, default=12, help="of bundled")
    parser.add_argument("--size", type=int, help="of sd15 and sdxl, pixels a side; default: the model's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of sd15 and sdxl")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="without suffix; default: benchmarks/results/layers-MODEL")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or RESULTS / f"layers-{arguments.model}"
    report = Report({**vars(arguments), "out": out.name})
    if arguments.model == "bundled":
        compared = bundled(arguments.pictures, arguments.steps)
    else:
        compared = random_steps(arguments.model, arguments.seeds, arguments.size)
    rows(report, arguments.model, compared)
    report.write(out, finished=True)
    print(table(report))
    print(f"wrote {out.name}.csv and .json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
