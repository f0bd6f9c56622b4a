"""One run of a job: check, lock, plan, reconcile, make what is left, sum up."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..config import SCFGConfig
from ..methods import method
from ..models import BUNDLED_CALL
from .errors import InputError
from .folder import Folder
from .local import run_local
from .lock import locked
from .plan import MicroBatch, new_batches
from .report import Progress, Summary, summarise
from .rows import read_rows
from .run import MAX_ATTEMPTS, Worker
from .settings import Loader, Settings

if TYPE_CHECKING:
    from pyarrow import fs


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no row is blamed for it."""


def generate(
    prompts: str | os.PathLike | Iterable[Mapping[str, Any]],
    out: str | os.PathLike,
    *,
    model: str = "bundled",
    guidance: str = "scfg",
    config: SCFGConfig | None = None,
    batch_size: int = 4,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    workers: int = 1,
    num_gpus: float | None = None,
    address: str | None = None,
    max_attempts: int = MAX_ATTEMPTS,
    retry_errors: bool = False,
    load: Loader | None = None,
    filesystem: fs.FileSystem | None = None,
    **call: Any,
) -> Summary:
    """Make an image for every row of a prompt file, once, whatever dies; a second call goes on where the first ended.

    Args:
        prompts: a .jsonl, .csv or .parquet file, or rows as dictionaries; see `scfg_fast.batch.rows`.
        out: the job's folder; a path, or a URI such as `s3://bucket/path`.
        model: `bundled`, a diffusers folder or a hub id.
        guidance: methods joined by +, as for `scfg-fast generate --guidance`.
        config: S-CFG parameters; default the pipeline's published ones.
        batch_size: images per pipeline call.
        seed: rows without a seed get one from it and their id.
        device: `cpu`, `cuda`, `cuda:N` or `mps`; default the best there is.
        dtype: `fp32`, `fp16` or `bf16`; default fp16 on a GPU, else fp32.
        workers: 1 runs here, without Ray; more run on Ray Data.
        num_gpus: per worker, on Ray; default 1 where the cluster has GPUs.
        address: of a Ray cluster; `auto` for the one this machine belongs to.
        max_attempts: attempts at a micro-batch that may die before its rows run alone.
        retry_errors: make micro-batches with error rows again.
        load: returns the pipeline on its device, for LoRA, schedulers or classes of your own. A function that can be
            imported or pickled; its name is part of the job's settings.
        filesystem: what `out` is a path in, for credentials.
        call: keyword arguments of the pipeline call where a row names no other: negative_prompt, width, height,
            num_inference_steps, guidance_scale.

    Returns:
        What was made; `exit_status` is that of the command.

    Raises:
        InputError: rows are bad; lists every reason.
        FolderError: `out` belongs to a job with other settings, or another driver works in it.
        MissingPackageError: Ray is needed and not installed.
        OSError: the folder cannot be written; what was committed stays, and another call goes on.
    """
    method(guidance)
    if model == "bundled" and load is None:
        call = BUNDLED_CALL | call
    settings = Settings(
        model=model,
        load=None if load is None else f"{load.__module__}.{getattr(load, '__qualname__', type(load).__name__)}",
        device=device,
        dtype=dtype,
        guidance=guidance,
        config=None if config is None else config.to_dict(),
        call=call,
        batch_size=_at_least_one("batch_size", batch_size),
        seed=seed,
    )
    _at_least_one("workers", workers), _at_least_one("max_attempts", max_attempts)
    rows = read_rows(prompts, seed=seed, defaults=call, guidance=guidance, config=config)
    folder = Folder(out, filesystem)

    def run(batches: list[MicroBatch]) -> None:
        if workers == 1 and address is None:
            run_local(folder, batches, lambda: Worker(settings, folder, max_attempts, load))
            return
        from .ray_job import run_on_ray

        run_on_ray(
            folder, batches, settings, workers=workers, num_gpus=num_gpus, address=address, max_attempts=max_attempts,
            load=load,
        )  # fmt: skip

    if workers > 1 or address is not None:
        from .ray_job import require_ray

        require_ray()
    return _run(folder, settings, lambda planned: new_batches(rows, planned, batch_size), run, retry_errors)


def _at_least_one(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _say(text: str) -> None:
    print(f"scfg-fast: {text}", file=sys.stderr, flush=True)


def _run(
    folder: Folder,
    settings: Settings,
    plan: Callable[[list[MicroBatch]], list[MicroBatch]],
    run: Callable[[list[MicroBatch]], None],
    retry_errors: bool,
) -> Summary:
    started = time.perf_counter()
    folder.check_settings(settings)  # nothing is made in the folder of another job
    folder.make()
    with locked(folder, _say), _terminable():
        if not folder.check_settings(settings):
            folder.write_settings(settings)
        planned = folder.read_plan()
        added = plan(planned)
        batches = planned + added
        found = folder.reconcile(batches)
        if found.lost:
            _say(f"{found.lost} files were lost or torn and are made again")
        if found.twice:
            _say(f"{found.twice} files were there twice; the second ones are gone")
        if retry_errors:
            _retry_errors(folder, found.files)
        if added:
            folder.write_plan(batches)
        left = [batch for batch in batches if batch.name not in found.files]
        resumed = sum(map(len, batches)) - sum(map(len, left))
        made, took = 0, 0.0
        if left:
            before = folder.markers()
            first = time.perf_counter()
            try:
                with Progress(folder, batches, found.files) as progress:
                    run(left)
                made, took = progress.made, progress.last_commit - first
            except (KeyboardInterrupt, Terminated):
                files = folder.look(batches).files
                folder.forgive(before, (batch.name for batch in left if batch.name not in files))
                done = sum(len(batch) for batch in batches if batch.name in files)
                _say(f"stopped; {done} of {sum(map(len, batches))} rows are done, the same command makes the rest")
                raise
        summary = summarise(folder, batches, resumed)
        summary.seconds = time.perf_counter() - started
        summary.images_per_second = made / took if made else None
        folder.write("summary.json", summary.to_json())
        return summary


def _retry_errors(folder: Folder, files: dict[str, str]) -> None:
    """Forget micro-batches with error rows, and their attempts."""
    markers = folder.markers()
    for batch, name in list(files.items()):
        table = folder.rows(name, ["status"])
        if table is None or "error" not in table["status"].to_pylist():
            continue
        for key in [key for key in markers if key.partition("-")[0] == batch]:
            for marker in markers[key]:
                folder.delete(f"attempts/{marker}")
        folder.drop(name)
        del files[batch]


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the main thread during the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["InputError", "Terminated", "generate"]
