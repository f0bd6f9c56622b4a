"""What each guidance method does to the bundled model's pictures, at what cost.

    python -m benchmarks.guidance study|methods|presence|place|characteristic [--pictures N] [--steps N...] [--judge D]

`study`: every method at two guidance scales, and next to each plain guidance at the scale that the method acts as
(`Stats.effective_weight`), from the same noise. What is reported is the difference of each picture to its plain twin,
its mean and a 95 % bootstrap interval over the prompts: `objects`, `exact`, `position` and `background` as the judge
sees them, `restlessness`, `saturation` and `clipped`. Restlessness is the mean absolute difference of neighbouring
pixels, over channels and both directions, where the judge sees background. Prompts are those of `methods`.

`methods`: two nouns per prompt, one picture each from the same noise, every method at the same guidance_scale, a common
and a high one, or the lam whose mean weight that is; `mean_weight` says what was applied (an interval applies less,
clamped schedules more). `presence` and `place`: loss guidance with the bundled classifier, to draw a noun that the
prompt leaves open, and to put one in a corner. `characteristic`: residuals of the fixed point over its iterations,
with the ridge projection and without.

Pictures are scored by a classifier: the bundled one, or with `--judge D` (a folder) one that
`python -m training.judge --data FOLDER --seed S` trained apart from it. Loss guidance steers by the
bundled one, so that only another says whether it drew the noun or an adversarial pattern; both are reported.

Writes `benchmarks/results/guidance-TASK.csv` and `.json`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import scfg_fast
from lab.measure import Spread
from lab.referee import assess, load_judge, summarise
from lab.scenes import RELATIONS, Scene, SceneObject, with_article
from scfg_fast import SCFGConfig
from scfg_fast.guidance import (
    Augment,
    CFGPlusPlus,
    CharacteristicGuidance,
    CharacteristicSolver,
    LossGuidance,
    WeightSchedule,
)
from scfg_fast.guidance.cfgpp import lam_for_mean_weight
from scfg_fast.models.classifier import NOUNS, SceneClassifier, bundled_classifier

from .report import RESULTS, ROOT, Report

BACKGROUNDS = ("blue", "green", "yellow", "pink", "white", "orange", "purple", "gray")
PLAIN = SCFGConfig(rates="none")
SCALE, HIGH_SCALE = 5.0, 12.0
WANTED = ("star", "heart", "penguin", "carrot", "house", "bus", "sunflower", "balloon")
"""Nouns that loss guidance is asked to draw."""

BATCH = 8


@dataclass(frozen=True)
class Scored:
    """One method's pictures [N, 3, H, W] in [0, 1] and what they cost."""

    pictures: torch.Tensor
    seconds: float
    samples: int
    mean_weight: float
    effective_weight: float


def pair(number: int) -> Scene:
    """Prompt `number` of 1600, "a star above a cat on a blue background", and what it asks for; nothing is drawn."""
    count = len(NOUNS)
    first, second = NOUNS[number % count], NOUNS[(number + 7 + 3 * (number // count)) % count]
    relation, background = RELATIONS[number % len(RELATIONS)], BACKGROUNDS[number % len(BACKGROUNDS)]
    where = {"left": "to the left of", "right": "to the right of"}.get(relation, relation)
    text = f"{with_article(first)} {where} {with_article(second)} on {with_article(background)} background"
    objects = tuple(SceneObject(noun, None, None, (0, 0, 0, 0)) for noun in (first, second))
    return Scene(np.empty((0, 0, 3), np.uint8), text, np.empty((0, 0, 0), bool), objects, relation, background, True)


def caption(noun: str, number: int) -> str:
    """A prompt as the model knows them, on a background by turns."""
    background = with_article(f"{BACKGROUNDS[number % len(BACKGROUNDS)]} background")
    return f"{with_article(noun)} on {background}"


def open_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(scfg_fast.bundled_model_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: Any,
    handle: Any,
    prompts: Sequence[str],
    steps: int,
    scale: float,
    first_seed: int = 0,
    guidance_rescale: float = 0.0,
) -> Scored:
    """Pictures of prompts, each with the noise of its own seed."""
    parts, samples, weights, doses = [], 0, [], []
    started = time.perf_counter()
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        images = pipe(
            part, num_inference_steps=steps, guidance_scale=scale, guidance_rescale=guidance_rescale,
            generator=generators, output_type="pt",
        ).images  # fmt: skip
        parts.append(images)
        samples += handle.stats.samples
        weights.append(handle.stats.mean_weight)
        doses += [handle.stats.effective_weight] * len(part)
    seconds = time.perf_counter() - started
    return Scored(torch.cat(parts), seconds, samples, sum(weights) / len(weights), sum(doses) / len(doses))


def colourfulness(pictures: torch.Tensor) -> float:
    """Mean over pixels of (max - min) / max of the channels: the saturation of HSV."""
    high, low = pictures.amax(1), pictures.amin(1)
    return float(((high - low) / high.clamp(min=1e-6)).mean())


def clipped(pictures: torch.Tensor) -> float:
    """Share of channel values that are black or full."""
    return float(((pictures <= 0.002) | (pictures >= 0.998)).float().mean())


def sheet(rows: Sequence[torch.Tensor], path: Path) -> None:
    """Rows of pictures [N, 3, H, W] as one PNG, at half size."""
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    image = Image.fromarray((grid.clamp(0, 1) * 255.0).round().byte().permute(1, 2, 0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(path)


def methods(report: Report, judge: SceneClassifier, pictures: int, step_counts: Sequence[int], image: Path) -> None:
    """Every method that needs no loss."""
    pipe = open_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN)
    scenes = [pair(number) for number in range(pictures)]
    prompts = [scene.caption for scene in scenes]
    for steps, scale in itertools.product(step_counts, (SCALE, HIGH_SCALE)):
        variants: dict[str, dict[str, Any]] = {
            "cfg": {},
            "scfg": dict(config=SCFGConfig()),
            "pixels": dict(config=SCFGConfig.pixels()),
            "linear": dict(schedule=WeightSchedule("linear")),
            "clamp-linear": dict(schedule=WeightSchedule("clamp-linear", floor=2.0)),
            "interval": dict(schedule=WeightSchedule(interval=(0.2, 0.8))),
            "cfgpp": dict(schedule=CFGPlusPlus(lam_for_mean_weight(scale, pipe.scheduler, steps))),
            "scfg+linear": dict(config=SCFGConfig(), schedule=WeightSchedule("linear")),
            "rescale": dict(rescale=0.7),
            "characteristic": dict(characteristic=CharacteristicGuidance()),
        }
        rows = []
        for name, options in variants.items():
            rescale = options.pop("rescale", 0.0)
            scfg_fast.enable(pipe, **({"config": PLAIN} | options))
            done = sample(pipe, handle, prompts, steps, scale, guidance_rescale=rescale)
            seen = (done.pictures.permute(0, 2, 3, 1) * 255.0).round().byte().numpy()
            scores = summarise(assess(judge.network, seen, scenes))
            sizes = f"g{scale:g}/steps{steps}"
            case = dict(case=f"methods/{name}/{sizes}", op="methods", sizes=sizes, batch=BATCH)
            for metric, unit, value in (
                *((metric, "share", scores[metric]["mean"]) for metric in ("objects", "exact", "background")),
                ("objects_error", "share", scores["objects"]["standard_error"]),
                ("exact_error", "share", scores["exact"]["standard_error"]),
                ("saturation", "share", colourfulness(done.pictures)),
                ("clipped", "share", clipped(done.pictures)),
                ("mean_weight", "1", done.mean_weight),
                ("samples_per_picture", "1", done.samples / len(prompts)),
                ("seconds_per_picture", "s", done.seconds / len(prompts)),
            ):
                report.add(**case, provider=name, metric=metric, unit=unit, number=float(value))
            print(f"{sizes} {name}: " + ", ".join(f"{row.metric} {row.value:.3f}" for row in report.rows[-10:]),
                  flush=True)  # fmt: skip
            rows.append(done.pictures[:8])
        sheet(rows, image.with_name(f"{image.stem}-g{scale:g}-steps{steps}{image.suffix}"))


STUDIED: dict[str, dict[str, Any]] = {
    "scfg": dict(config=SCFGConfig()),
    "scfg matched": dict(config=SCFGConfig(dose="matched")),
    "scfg words": dict(config=SCFGConfig(tokens="words")),
    "scfg stop=0.5": dict(config=SCFGConfig(stop=0.5)),
    "scfg stop=0.3": dict(config=SCFGConfig(stop=0.3)),
    "paper": dict(config=SCFGConfig.paper()),
    "pixels": dict(config=SCFGConfig.pixels()),
    "linear": dict(schedule=WeightSchedule("linear")),
    "interval": dict(schedule=WeightSchedule(interval=(0.2, 0.8))),
    "cfgpp": dict(schedule="cfgpp"),
    "rescale": dict(rescale=0.7),
    "apg": dict(config=PLAIN.replace(combine="apg", eta=0.0, adaptive_projected_guidance_momentum=-0.5)),
    "cfg-zero": dict(config=PLAIN.replace(combine="cfg-zero")),
    "scfg stop=0.5+apg": dict(
        config=SCFGConfig(stop=0.5, combine="apg", eta=0.0, adaptive_projected_guidance_momentum=-0.5)
    ),
    "scfg stop=0.5+rescale": dict(config=SCFGConfig(stop=0.5), rescale=0.7),
}
"""Method -> options of `enable`, and guidance_rescale."""

STUDY_SCALES = (5.0, 7.5)


def picture_scores(judge: SceneClassifier, pictures: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """What is measured of each picture [N, 3, H, W] in [0, 1]: name -> [N], nan where the question has no answer."""
    seen = (pictures.permute(0, 2, 3, 1) * 255.0).round().byte().numpy()
    verdicts = assess(judge.network, seen, list(scenes))
    scores = {
        name: torch.tensor([float("nan") if (value := getattr(v, name)) is None else value for v in verdicts])
        for name in ("objects", "exact", "position", "background")
    }
    high, low = pictures.amax(1), pictures.amin(1)
    scores["saturation"] = ((high - low) / high.clamp(min=1e-6)).mean((1, 2))
    scores["clipped"] = ((pictures <= 0.002) | (pictures >= 0.998)).float().mean((1, 2, 3))
    calm = (judge.logits(pictures).argmax(1) == 0).float()[:, None]  # [N, 1, h, w], background of the judge's cells
    calm = torch.nn.functional.interpolate(calm, pictures.shape[-2:])[:, 0]
    moves = torch.zeros_like(calm)
    moves[:, :, 1:] += (pictures[..., 1:] - pictures[..., :-1]).abs().mean(1) / 2.0
    moves[:, 1:] += (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean(1) / 2.0
    scores["restlessness"] = (moves * calm).sum((1, 2)) / calm.sum((1, 2)).clamp(min=1.0)
    return scores


def bootstrap(values: torch.Tensor, draws: int = 2000) -> Spread:
    """Mean of [N] values and its 95 % interval over resampled prompts; nan are left out."""
    known = values[~values.isnan()].double()
    if len(known) == 0:
        return Spread(float("nan"), float("nan"), float("nan"), 0)
    picks = torch.randint(len(known), (draws, len(known)), generator=torch.Generator().manual_seed(0))
    means = known[picks].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Spread(float(known.mean()), low, high, len(known))


def study(report: Report, judge: SceneClassifier, pictures: int, step_counts: Sequence[int], image: Path) -> None:
    """Every method against plain guidance at its own dose, picture by picture."""
    pipe = open_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN)
    scenes = [pair(number) for number in range(pictures)]
    prompts = [scene.caption for scene in scenes]
    for steps, scale in itertools.product(step_counts, STUDY_SCALES):
        rows = []
        for name, chosen in STUDIED.items():
            options = {"config": PLAIN} | chosen
            rescale = options.pop("rescale", 0.0)
            if options.get("schedule") == "cfgpp":
                options["schedule"] = CFGPlusPlus(lam_for_mean_weight(scale, pipe.scheduler, steps))
            scfg_fast.enable(pipe, **options)
            done = sample(pipe, handle, prompts, steps, scale, guidance_rescale=rescale)
            scfg_fast.enable(pipe, PLAIN)
            plain = sample(pipe, handle, prompts, steps, max(done.effective_weight, 1.01))
            scores, twins = (picture_scores(judge, each.pictures, scenes) for each in (done, plain))
            sizes = f"g{scale:g}/steps{steps}"
            case = dict(case=f"study/{name}/{sizes}", op="study", sizes=sizes, batch=BATCH, provider=name)
            report.add(**case, metric="effective_weight", unit="1", number=done.effective_weight)
            for metric, values in scores.items():
                report.add(**case, metric=metric, unit="1", number=bootstrap(values))
                report.add(**case, metric=f"{metric}_difference", unit="1", number=bootstrap(values - twins[metric]))
            said = [f"{row.metric} {row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f})" for row in report.rows[-14:]
                    if row.metric.endswith("difference")]  # fmt: skip
            print(f"{sizes} {name}, acts as {done.effective_weight:.2f}: {', '.join(said)}", flush=True)
            rows += [done.pictures[:8], plain.pictures[:8]]
        sheet(rows, image.with_name(f"{image.stem}-g{scale:g}-steps{steps}{image.suffix}"))


def loss_variants(loss_fn: Any) -> dict[str, LossGuidance | None]:
    """None, the plain gradient, and one thing added at a time."""
    normal: dict[str, Any] = dict(rule="freedom", scale=0.15)
    return {
        "none": None,
        "gradient": LossGuidance(loss_fn, rule="gradient", scale=2.0),
        "polyak": LossGuidance(loss_fn, rule="polyak", scale=0.01),
        "freedom": LossGuidance(loss_fn, **normal),
        "freedom+augment": LossGuidance(loss_fn, **normal, augment=Augment(copies=2, color=0.0)),
        "freedom+travel": LossGuidance(loss_fn, **normal, repeats=2),
    }


def loss(
    task: str, report: Report, judge: SceneClassifier, pictures: int, step_counts: Sequence[int], image: Path
) -> None:
    """Make the object be X (`presence`), or put it here (`place`)."""
    pipe, guide = open_pipeline(), bundled_classifier()
    handle = scfg_fast.enable(pipe, PLAIN)
    each = max(1, pictures // len(WANTED))
    corner = torch.zeros(16, 16, dtype=torch.bool)
    corner[1:9, 1:9] = True
    for steps in step_counts:
        rows = []
        for name in loss_variants(guide.presence_loss(WANTED[0])):
            done, found, seen, placed, final = [], [], [], [], []
            for index, noun in enumerate(WANTED):
                text = "toy" if task == "presence" else noun
                prompts = [caption(text, index + i) for i in range(each)]
                loss_fn = guide.presence_loss(noun) if task == "presence" else guide.place_loss(noun, corner)
                handle.loss = loss_variants(loss_fn)[name]
                done.append(sample(pipe, handle, prompts, steps, 3.0, first_seed=100 * index))
                found.append(judge.found(done[-1].pictures, noun).float())
                seen.append(guide.found(done[-1].pictures, noun).float())
                cells = judge.logits(done[-1].pictures).argmax(1) == 1 + NOUNS.index(noun)
                placed.append((cells & corner).sum((1, 2)) / cells.sum((1, 2)).clamp(min=1))
                with torch.no_grad():
                    final.append(loss_fn(done[-1].pictures))
            count = each * len(WANTED)
            seconds, samples = sum(part.seconds for part in done), sum(part.samples for part in done)
            case = dict(case=f"{task}/{name}/steps{steps}", op=task, sizes=f"steps{steps}", batch=min(BATCH, each))
            for metric, unit, value in (
                ("found", "share", torch.cat(found).mean()),
                ("found_by_guide", "share", torch.cat(seen).mean()),
                ("in_place", "share", torch.cat(placed).mean()),
                ("final_loss", "nat", torch.cat(final).mean()),
                ("samples_per_picture", "1", samples / count),
                ("seconds_per_picture", "s", seconds / count),
            ):
                report.add(**case, provider=name, metric=metric, unit=unit, number=float(value))
            print(f"{task} {steps} {name}: " + ", ".join(f"{row.metric} {row.value:.3f}" for row in report.rows[-6:]),
                  flush=True)  # fmt: skip
            rows.append(torch.cat([part.pictures[:1] for part in done]))
        sheet(rows, image.with_name(f"{image.stem}-steps{steps}{image.suffix}"))


PROJECTIONS = {
    "ridge": CharacteristicGuidance(max_iterations=20),
    "identity": CharacteristicGuidance(max_iterations=20, solver=CharacteristicSolver("identity")),
}


def characteristic(
    report: Report,
    judge: SceneClassifier,
    pictures: int,
    step_counts: Sequence[int],
    image: Path,
) -> None:
    """Residuals over the iterations at a low and a high weight."""
    pipe = open_pipeline()
    handle = scfg_fast.enable(pipe, PLAIN)
    prompts = [caption(noun, i) for i, noun in enumerate(WANTED)][:pictures]
    for (name, chosen), scale, steps in itertools.product(PROJECTIONS.items(), (SCALE, 15.0), step_counts):
        handle.characteristic = chosen
        done = sample(pipe, handle, prompts, steps, scale)
        curves = handle.stats.characteristic
        case = dict(case=f"characteristic/{name}/g{scale:g}/steps{steps}", op="characteristic", sizes=f"steps{steps}")
        used = torch.stack([curve.iterations for curve in curves]).float()
        agreed = torch.stack([curve.converged for curve in curves]).float()
        for metric, unit, value in (
            ("iterations", "1", used.mean()),
            ("converged", "share", agreed.mean()),
            ("samples_per_picture", "1", done.samples / len(prompts)),
            ("saturation", "share", colourfulness(done.pictures)),
        ):
            report.add(**case, batch=len(prompts), provider=name, metric=metric, unit=unit, number=float(value))
        report.details[case["case"]] = [
            {"step": curve.step, "residuals": curve.residuals.tolist(), "converged": curve.converged.tolist()}
            for curve in curves
        ]
        print(f"{case['case']}: {used.mean():.1f} iterations, {agreed.mean():.2f} converged", flush=True)


TASKS = {
    "study": study,
    "methods": methods,
    "presence": partial(loss, "presence"),
    "place": partial(loss, "place"),
    "characteristic": characteristic,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--pictures", type=int, default=40, help="per method")
    parser.add_argument("--steps", type=int, nargs="+", default=[25], help="denoising steps, one or several counts")
    parser.add_argument("--judge", type=Path, help="folder with another judge; default: the bundled classifier")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="without ending; default: benchmarks/results/guidance-TASK")
    parser.add_argument("--image", type=Path, help="contact sheets; default: docs/img/guidance-TASK.png")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    judge = bundled_classifier() if arguments.judge is None else SceneClassifier(load_judge(arguments.judge))
    # Names of files, not whole paths: results are published, and say nothing about a machine's folders.
    told = {name: getattr(value, "name", str(value)) for name, value in vars(arguments).items()}
    report = Report(told)
    image = arguments.image or ROOT / "docs" / "img" / f"guidance-{arguments.task}.png"
    TASKS[arguments.task](report, judge, arguments.pictures, arguments.steps, image)
    for path in report.write(arguments.out or RESULTS / f"guidance-{arguments.task}", finished=True):
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
