"""Images per second of a batch job over a plain loop of the same pipeline at equal batch size.

    python -m benchmarks.batch [--images 64] [--batch-size 4] [--rounds 3] [--steps N] [--size N] [--workers 1 2]

Each round makes all images twice, in an order drawn anew: with the local runner of `scfg_fast.batch`, from the first
micro-batch's start to the last commit, and with a loop of `pipe(...)` over the same micro-batches that keeps its images
as PNG bytes in memory. Both share one loaded pipeline, warmed up before. Ratios are taken within a round; their median
and all rounds are reported. Other programs change the seconds of the clock by more than a job does. So the ratio of the
seconds that the process was on a processor, all threads together, stands beside it. With `--workers 1 2`, jobs on Ray
with one thread a worker follow. Their rate counts from the first marker of an attempt to the last checkpoint.

Writes `benchmarks/results/batch.csv` and `.json`. Images are compared: both ways give equal pixels, or it ends with an
error.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lab.measure import Spread
from scfg_fast.batch.folder import Folder
from scfg_fast.batch.local import run_local
from scfg_fast.batch.plan import MicroBatch, new_batches
from scfg_fast.batch.rows import read_rows
from scfg_fast.batch.run import Worker
from scfg_fast.batch.settings import Settings, load_pipeline
from scfg_fast.models import BUNDLED_CALL

from .report import RESULTS, Report

THINGS = ("apple", "car", "cat", "sun", "tree", "house", "boat", "bird")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "pink", "orange")


def rows_of(images: int) -> list[dict[str, str]]:
    pairs = [f"a {color} {thing}" for color in COLORS for thing in THINGS]
    return [{"prompt": pairs[index % len(pairs)]} for index in range(images)]


Seconds = tuple[float, float]
"""By the clock, and on a processor."""


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(started: Seconds) -> Seconds:
    clock, processor = now()
    return clock - started[0], processor - started[1]


def loop(pipe: Any, batches: Sequence[MicroBatch]) -> tuple[Seconds, dict[str, str]]:
    """Seconds of a plain loop, and id -> hash of the pixels."""
    hashes = {}
    files = []
    started = now()
    for batch in batches:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds]
        images = pipe(list(batch.prompts), generator=generators, output_type="np", **json.loads(batch.call)).images
        for id, image in zip(batch.ids, images, strict=True):
            pixels = (image * 255).round().astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="PNG")
            files.append(file.getvalue())
            hashes[id] = hashlib.sha256(pixels.tobytes()).hexdigest()
    return since(started), hashes


def job(worker: Worker, batches: Sequence[MicroBatch], out: Path) -> tuple[Seconds, dict[str, str]]:
    """The same with the local runner, in a new folder."""
    folder = worker.folder = Folder(out)
    folder.make()
    started = now()
    run_local(folder, batches, lambda: worker)
    took = since(started)
    tables = folder.tables(folder.committed_names(), ["id", "sha256"])
    return took, {row["id"]: row["sha256"] for table in tables for row in table.to_pylist()}


def on_ray(workers: int, images: int, options: Sequence[str], out: Path) -> float:
    """Images per second of a job on Ray, from the first attempt's start to the last commit."""
    prompts = out.with_suffix(".jsonl")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows_of(images)))
    argv = [sys.executable, "-m", "scfg_fast", "batch", str(prompts), "--out", str(out), *options]
    argv += ["--workers", str(workers), *(["--address", "local"] if workers == 1 else [])]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    begun = min(int(path.name.rpartition("-")[2]) for path in (out / "attempts").rglob("*-*-*"))
    ended = max(path.stat().st_mtime_ns for path in (out / "checkpoint").iterdir())
    return images / (ended - begun) * 1e9


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=BUNDLED_CALL["num_inference_steps"])
    parser.add_argument("--size", type=int, default=BUNDLED_CALL["height"])
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="jobs on Ray with so many workers")
    parser.add_argument("--out", type=Path, default=RESULTS / "batch", help="results, without their ending")
    args = parser.parse_args(argv)
    call = {"guidance_scale": 5.0, "num_inference_steps": args.steps, "height": args.size, "width": args.size}
    settings = Settings(call=call, batch_size=args.batch_size)
    batches = new_batches(read_rows(rows_of(args.images), defaults=call), [], args.batch_size)
    report = Report({name: str(value) if name == "out" else value for name, value in vars(args).items()})
    pipe = load_pipeline(settings)
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(settings, Folder(folder), load=lambda: pipe)
        loop(pipe, batches[:1])
        rounds = []
        order = ["job", "loop"]
        for number in range(args.rounds):
            random.Random(number).shuffle(order)
            times: dict[str, Seconds] = {}
            hashes: dict[str, dict[str, str]] = {}
            for what in order:
                if what == "job":
                    times[what], hashes[what] = job(worker, batches, Path(folder) / str(number))
                else:
                    times[what], hashes[what] = loop(pipe, batches)
            if hashes["job"] != hashes["loop"]:
                print("the job's pixels are not those of the loop", file=sys.stderr)
                return 1
            rounds.append(times)
            rates = {what: args.images / clock for what, (clock, _) in times.items()}
            by_clock, by_processor = (a / b for a, b in zip(times["loop"], times["job"], strict=True))
            print(
                f"round {number + 1}: job {rates['job']:.3f}, loop {rates['loop']:.3f} images/s, ratio {by_clock:.3f}, "
                f"on a processor {by_processor:.3f}",
                flush=True,
            )
        ratio, on_processor = (Spread.of([t["loop"][at] / t["job"][at] for t in rounds]) for at in (0, 1))
        for what in order:
            per_second = Spread.of([args.images / times[what][0] for times in rounds])
            _add(report, args, what, "images_per_second", "1/s", per_second)
        _add(report, args, "job", "ratio_to_loop", "1", ratio)
        _add(report, args, "job", "ratio_to_loop_on_processor", "1", on_processor)
        options = ["--batch-size", str(args.batch_size), "--steps", str(args.steps), "--size", str(args.size)]
        ray = {n: on_ray(n, args.images, options, Path(folder) / f"ray{n}") for n in args.workers}
    print(f"job over loop, images per second: {ratio.value:.3f}, on a processor {on_processor.value:.3f} (medians)")
    for workers, rate in ray.items():
        _add(report, args, f"ray, {workers} workers", "images_per_second", "1/s", rate)
        print(f"{workers} workers on Ray: {rate:.3f} images/s")
    report.samples = {"rounds": {what: [times[what][0] for times in rounds] for what in order}}
    report.write(args.out, finished=True)
    return 0


def _add(
    report: Report, args: argparse.Namespace, provider: str, metric: str, unit: str, number: Spread | float
) -> None:
    sizes = f"{args.size}x{args.size}, {args.steps} steps, {args.images} images"
    report.add("batch", "batch", sizes, args.batch_size, provider, metric, unit, number)


if __name__ == "__main__":
    sys.exit(main())
