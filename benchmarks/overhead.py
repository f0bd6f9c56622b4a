"""One denoising step of a whole UNet: plain guidance, S-CFG with this package, and the literal published way.

    python -m benchmarks.overhead --arch sd15|sdxl|bundled|tiny [--size 512] [--rounds 5] [--threads N]

Every variant is one step of the same call of a Stable Diffusion or SDXL pipeline, given prompt embeddings and latents:

    plain      stock processors, nothing installed
    ours       `scfg_fast.enable(pipe)`
    literal    every attention layer materialises its probabilities (`LiteralCaptureProcessor`), and a hook on the UNet
               computes the guided noise the published way; like ours it enters through the UNet's output

SDXL has `ours-LAYERS`, for `SCFGConfig(layers="LAYERS")`, in the place of ours, and no literal: the published code does
not run there. Ours is compared with the literal port at 256 pixels.

Time: the variants are interleaved in one process, plain twice per round; ratios are taken within a round, of the time
on the clock and of the time that the process was on a processor, which waiting for one does not lengthen.
Memory: each variant runs in a fresh process, once. Two peaks are recorded: the resident size of the whole process
(model, libraries and allocator included), and the bytes that torch's CPU allocator held above the loaded model.
Operators: what the dispatcher sees in that step, without views and pure allocations.
`--one-process`, for models that take minutes a step, leaves out the resident size and the operators and measures the
rest in the calls that are timed.

Nothing is timed unless the guided latents of ours and of the literal port agree. Weights are random but for bundled,
with the query and key projections amplified so that attention has peaks, as a trained model's has.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging

import scfg_fast
from lab.architectures import SD15_UNET, SDXL_UNET
from lab.measure import MIB, CountOps, Spread, allocated_peak, interleaved, ratios, resident_peak
from lab.reference.official import LiteralCaptureProcessor, LiteralStore
from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast import SCFGConfig

from . import registry
from .report import RESULTS, Report

VARIANTS = ("plain", "ours", "literal")
CONTROL = "plain (again)"
ATTENTION_GAIN = 2.5
FACTORS = (4, 8)
# Latent pixels where ours and the literal port may differ: those whose cell is a near-tie between two tokens.
DISAGREEING_PIXELS_ALLOWED = 0.02


_Module = TypeVar("_Module", bound=torch.nn.Module)


class DisagreementError(RuntimeError):
    """Ours and the literal port do not compute the same latents; nothing may be timed."""


def sharpen(model: _Module) -> _Module:
    """Scale the query and key weights by `ATTENTION_GAIN`."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                module.to_q.weight *= ATTENTION_GAIN
                module.to_k.weight *= ATTENTION_GAIN
    return model


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def sd15_pipeline() -> StableDiffusionPipeline:
    """The UNet of Stable Diffusion 1.5 at its real size, fp32, random weights; no text encoder, no autoencoder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15_UNET).eval()
    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=sharpen(unet), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def random_unet(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet with random weights of torch's default spread, without the time that its default initialisers take.

    Matrices and kernels are normal with variance 1 / (3 fan_in), norms the identity, biases zero; then `sharpen`.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(dtype)
    unet = unet.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(3.0 * parameter[0].numel()) ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return sharpen(unet)


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """The UNet of SDXL at its real size, fp32 (9.6 GiB), random weights; no text encoders, no autoencoder."""
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=random_unet(SDXL_UNET), scheduler=scheduler(),
    )  # fmt: skip


def bundled_pipeline() -> StableDiffusionPipeline:
    """The model that ships with the package, fp32."""
    return StableDiffusionPipeline.from_pretrained(
        scfg_fast.bundled_model_path(), safety_checker=None, requires_safety_checker=False, torch_dtype=torch.float32
    )


@dataclass(frozen=True)
class Architecture:
    """A pipeline to measure.

    Attributes:
        make: makes it.
        variants: what is measured; the first is plain.
        compare_at: pixels a side at which ours is compared with the literal port; None for the size that is timed.
    """

    make: Callable[[], Any]
    variants: tuple[str, ...] = VARIANTS
    compare_at: int | None = None


ARCHITECTURES = {
    "sd15": Architecture(sd15_pipeline),
    "sdxl": Architecture(sdxl_pipeline, ("plain", "ours-all", "ours-one-per-transformer"), compare_at=256),
    "bundled": Architecture(bundled_pipeline),
    "tiny": Architecture(tiny_sd_pipeline),
}


class Subject:
    """A pipeline with fixed inputs that can run one step in each variant.

    Args:
        arch: one of `ARCHITECTURES`.
        size: pixels a side; default: the model's own.
        pipe: take this one instead of making one.
    """

    def __init__(self, arch: str, size: int | None = None, pipe: Any = None) -> None:
        self.pipe = ARCHITECTURES[arch].make() if pipe is None else pipe
        self.pipe.set_progress_bar_config(disable=True)
        unet = self.pipe.unet
        self.size = size or unet.config.sample_size * self.pipe.vae_scale_factor
        if self.size % self.pipe.vae_scale_factor:
            raise ValueError(f"--size must be a multiple of {self.pipe.vae_scale_factor}, got {self.size}")
        side = self.size // self.pipe.vae_scale_factor
        # The published code makes its smoothing kernel when it is set up, not in a step.
        registry.oracle.gaussian_kernel_3x3(0.5, unet.dtype)
        rng = torch.Generator().manual_seed(0)
        width = unet.config.cross_attention_dim
        self.embeds = torch.randn(2, 1, registry.TOKENS, width, generator=rng).to(unet.dtype)
        self.latents = torch.randn(1, unet.config.in_channels, side, side, generator=rng).to(unet.dtype)
        self.more: dict[str, torch.Tensor] = {}
        if isinstance(self.pipe, StableDiffusionXLPipeline):
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            names = ("negative_pooled_prompt_embeds", "pooled_prompt_embeds")
            self.more = dict(zip(names, torch.randn(2, 1, pooled, generator=rng).to(unet.dtype), strict=True))

    def _call(self) -> torch.Tensor:
        return self.pipe(
            prompt_embeds=self.embeds[1], negative_prompt_embeds=self.embeds[0], latents=self.latents,
            height=self.size, width=self.size, num_inference_steps=1, guidance_scale=registry.GUIDANCE_SCALE,
            output_type="latent", **self.more,
        ).images  # fmt: skip

    def plain(self) -> torch.Tensor:
        """Guided latents after one step of plain guidance."""
        return self._call()

    def ours(self, layers: str = "auto") -> torch.Tensor:
        """The same with S-CFG; enabling and disabling are part of the step."""
        handle = scfg_fast.enable(self.pipe, SCFGConfig(layers=layers), strict=True)
        try:
            return self._call()
        finally:
            scfg_fast.disable(self.pipe)
            if handle.stats.steps_applied != 1:
                raise RuntimeError(f"S-CFG was not applied: {handle.stats.steps_skipped}")

    def literal(self) -> torch.Tensor:
        """The same with the published way of capturing and guiding."""
        with self._literal_installed():
            return self._call()

    def variant(self, name: str) -> Callable[[], torch.Tensor]:
        if name.startswith("ours-"):
            return functools.partial(self.ours, name.removeprefix("ours-"))
        return {"plain": self.plain, CONTROL: self.plain, "ours": self.ours, "literal": self.literal}[name]

    @contextlib.contextmanager
    def _literal_installed(self) -> Iterator[None]:
        unet = self.pipe.unet
        store = LiteralStore(tuple(self.latents.shape[-2:]))

        def guide(module: torch.nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            factors = [factor for factor in FACTORS if f"r{factor}_self" in store.maps]
            layers = [(factor, *maps) for factor in factors for maps in store.layers(factor)]
            uncond, cond = output[0].chunk(2)
            guided = registry.literal_step_from_maps(
                {
                    "self_maps": [self_map for _, self_map, _ in layers],
                    "cross_maps": [cross_map for _, _, cross_map in layers],
                    "sizes": [store.grid(factor) for factor, _, _ in layers],
                    "grid": store.grid(registry.CELL),
                    "uncond": uncond,
                    "cond": cond,
                }
            )[0]
            store.reset()
            return (torch.cat([guided, guided]), *output[1:])

        originals = dict(unet.attn_processors)
        unet.set_attn_processor(LiteralCaptureProcessor(store))
        hook = unet.register_forward_hook(guide)
        try:
            yield
        finally:
            hook.remove()
            unet.set_attn_processor(originals)


def check_agreement(results: dict[str, torch.Tensor]) -> float:
    """Fraction of latent pixels where ours and the literal port differ.

    Raises:
        DisagreementError: too many, or S-CFG changed nothing against plain guidance.
    """
    scale = results["literal"].square().mean().sqrt()
    differ = ((results["ours"] - results["literal"]).abs() > 1e-3 * scale).any(1).float().mean().item()
    effect = ((results["ours"] - results["plain"]).abs() > 1e-3 * scale).any(1).float().mean().item()
    if not differ <= DISAGREEING_PIXELS_ALLOWED:
        raise DisagreementError(f"ours and the literal port differ in {differ:.1%} of the latent pixels")
    if effect == 0.0:
        raise DisagreementError("S-CFG and plain guidance gave the same latents: nothing was guided")
    return differ


@dataclass(frozen=True)
class Footprint:
    """What one step of one variant took in a fresh process.

    Attributes:
        model: bytes of the UNet's weights.
        resident: largest resident size of the process.
        loaded: its largest resident size before the step.
        allocated: bytes that torch's allocator held at once above the loaded model.
        dispatched: operators seen by the dispatcher, a custom op counted as one.
        inside: the same with the torch implementation of custom ops in their place.
    """

    model: int
    resident: int
    loaded: int
    allocated: int
    dispatched: int
    inside: int


def footprint(arch: str, size: int | None, variant: str, threads: int | None) -> Footprint:
    """Run one step of one variant in this process, which should be a fresh one, and measure it."""
    _quiet()
    if threads:
        torch.set_num_threads(threads)
    subject = Subject(arch, size)
    step = subject.variant(variant)
    loaded = resident_peak()
    counter = CountOps()

    def counted() -> torch.Tensor:
        with counter:
            return step()

    allocated = allocated_peak(counted)
    model = sum(p.numel() * p.element_size() for p in subject.pipe.unet.parameters())
    counts = counter.counts
    return Footprint(model, resident_peak(), loaded, allocated, counts.dispatched.total(), counts.inside.total())


def in_fresh_process(*arguments: Any) -> Footprint:
    """`footprint` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(footprint, *arguments).result()


def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def add_footprints(report: Report, place: tuple[str, str, str, int], prints: dict[str, Footprint]) -> None:
    """Rows of memory and operators; ratios and differences are against plain."""
    plain = prints["plain"]
    for name, this in prints.items():
        report.add(*place, name, "peak_resident", "MiB", this.resident / MIB)
        report.add(*place, name, "peak_resident_ratio", "x", this.resident / plain.resident)
        report.add(*place, name, "peak_allocated", "MiB", this.allocated / MIB)
        report.add(*place, name, "peak_allocated_ratio", "x", this.allocated / plain.allocated)
        with_model = (this.model + this.allocated) / (plain.model + plain.allocated)
        report.add(*place, name, "peak_model_and_allocated_ratio", "x", with_model)
        report.add(*place, name, "ops_dispatched", "ops", float(this.dispatched))
        report.add(*place, name, "ops_dispatched_extra", "ops", float(this.dispatched - plain.dispatched))
        report.add(*place, name, "ops_inside", "ops", float(this.inside))
        report.add(*place, name, "ops_inside_extra", "ops", float(this.inside - plain.inside))


def add_times(
    report: Report, place: tuple[str, str, str, int], samples: dict[str, list[float]], prefix: str = ""
) -> None:
    """Rows of times and of ratios within rounds; `prefix` of the metrics says which clock."""
    for name in samples:
        if name != CONTROL:
            report.add(*place, name, f"{prefix}time", "s", Spread.of(samples[name]))
            report.add(*place, name, f"{prefix}time_ratio", "x", ratios(samples[name], samples["plain"]))
    report.add(*place, "plain", f"{prefix}control_ratio", "x", ratios(samples[CONTROL], samples["plain"]))


class Metered:
    """A call that notes, each time, how long it took and what it allocated.

    Args:
        call: what to measure.
        memory: measure memory too, by the profiler; its own work is not in the times.

    Attributes:
        clock: seconds.
        processor: seconds that this process, all threads together, was on a processor.
        allocated: bytes that torch's allocator held at once above what it held before; empty without `memory`.
    """

    def __init__(self, call: Callable[[], Any], memory: bool = False) -> None:
        self.clock: list[float] = []
        self.processor: list[float] = []
        self.allocated: list[float] = []
        self._call = call
        self._memory = memory

    def __call__(self) -> None:
        if self._memory:
            self.allocated.append(allocated_peak(self._timed))
        else:
            self._timed()

    def _timed(self) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        result = self._call()
        self.clock.append(time.perf_counter() - clock)
        self.processor.append(time.process_time() - processor)
        if self._memory:
            print(f"    {self.clock[-1]:.2f} s, {self.processor[-1]:.2f} s on a processor", flush=True)
        return result


def add_allocated(report: Report, place: tuple[str, str, str, int], calls: dict[str, Metered], model: int) -> None:
    """Rows of allocated memory from calls that measured it; `model` is the size of the weights in bytes."""
    plain = Spread.of(calls["plain"].allocated).value
    for name, call in calls.items():
        if name != CONTROL:
            this = Spread.of(call.allocated).value
            report.add(*place, name, "peak_allocated", "MiB", this / MIB)
            report.add(*place, name, "peak_allocated_ratio", "x", this / plain)
            report.add(*place, name, "peak_model_and_allocated_ratio", "x", (model + this) / (model + plain))


def table(report: Report) -> str:
    """The rows as a table for the screen: one line per metric, one column per variant."""
    found = {(row.metric, row.provider): row for row in report.rows}
    variants = list(dict.fromkeys(row.provider for row in report.rows))
    lines = [f"{'':32}" + "".join(f"{name:>26}" for name in variants)]
    for metric in dict.fromkeys(row.metric for row in report.rows):
        cells = []
        for name in variants:
            row = found.get((metric, name))
            if row is None or row.value is None:
                cells.append("")
            elif row.samples > 1:
                cells.append(f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]")
            else:
                cells.append(f"{row.value:.{ {'ops': 0, 'MiB': 1}.get(row.unit, 4) }f}")
        unit = next(row.unit for row in report.rows if row.metric == metric)
        lines.append(f"{f'{metric} ({unit})':32}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="sd15")
    parser.add_argument("--size", type=int, help="pixels per side; default: the model's own (512 for sd15)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument(
        "--seconds", type=float, default=450.0, help="start no round that would end later (default: 450)"
    )
    parser.add_argument("--one-process", action="store_true", help="no fresh process per variant; see above")
    parser.add_argument("--out", type=Path, help="without suffix; default: benchmarks/results/overhead-ARCH")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    _quiet()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or RESULTS / f"overhead-{arguments.arch}"
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    architecture = ARCHITECTURES[arguments.arch]
    report = Report({**vars(arguments), "out": out.name})
    prints = {}
    for name in () if arguments.one_process else architecture.variants:
        prints[name] = in_fresh_process(arguments.arch, arguments.size, name, arguments.threads)
        this = prints[name]
        resident, allocated, model = (value / MIB for value in (this.resident, this.allocated, this.model))
        say(f"memory in MiB, {name}: resident {resident:.0f}; model {model:.0f} and {allocated:.0f} allocated above it")

    subject = Subject(arguments.arch, arguments.size)
    place = (f"overhead/{arguments.arch}-{subject.size}/b1", "overhead", f"{arguments.arch}-{subject.size}", 1)
    if prints:
        add_footprints(report, place, prints)
    say("model loaded; one step of each variant to warm up and to compare")
    compared = Subject(arguments.arch, architecture.compare_at, subject.pipe) if architecture.compare_at else subject
    try:
        differ = check_agreement({name: compared.variant(name)() for name in VARIANTS})
    except DisagreementError as error:
        print(f"REFUSED TO TIME: {error}", file=sys.stderr)
        return 1
    report.details["latent_pixels_that_differ_from_literal"] = differ
    say(f"ours and the literal port agree in {1 - differ:.2%} of the latent pixels")

    def progress(index: int, latest: dict[str, float]) -> bool:
        against = {name: latest[name] / latest["plain"] for name in (CONTROL, *architecture.variants[1:])}
        ratio_text = ", ".join(f"{name} {value:.3f}" for name, value in against.items())
        say(f"round {index + 1}/{arguments.rounds}: plain {latest['plain']:.3f} s; ratios: {ratio_text}")
        return time.perf_counter() - began + sum(latest.values()) < arguments.seconds

    calls = {name: Metered(subject.variant(name), arguments.one_process) for name in (*architecture.variants, CONTROL)}
    rounds = len(interleaved(calls, arguments.rounds, after_round=progress)["plain"])
    if rounds < arguments.rounds:
        say(f"stopped after {rounds} rounds: --seconds {arguments.seconds:g}")
    for prefix, samples in (
        ("", {name: call.clock for name, call in calls.items()}),
        ("cpu_", {name: call.processor for name, call in calls.items()}),
    ):
        report.samples[f"{place[0]} {prefix}time"] = samples
        add_times(report, place, samples, prefix)
    if arguments.one_process:
        model = sum(p.numel() * p.element_size() for p in subject.pipe.unet.parameters())
        add_allocated(report, place, calls, model)
    report.write(out, finished=True)
    print(table(report))
    print(f"wrote {out.name}.csv and .json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
