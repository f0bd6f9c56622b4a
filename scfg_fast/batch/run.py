"""The worker: micro-batches in, rows out. Neither Ray nor a queue is in it, so anything can call it.

worker = Worker(settings, Folder("images"))
for batch in mine:
    folder.commit(encode(worker.make(batch)), batch.name)
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow

from ..config import SCFGConfig
from ..methods import set_method
from .folder import IMAGES, Folder
from .plan import MicroBatch
from .settings import Loader, Settings, load_pipeline

DIED = "its worker died while making it"
MAX_ATTEMPTS = 3


class Worker:
    """Holds a pipeline and makes micro-batches with it.

    Args:
        settings: of the job.
        folder: for the markers of attempts, and the log.
        max_attempts: attempts at a micro-batch that may die before its rows run alone.
        load: returns the pipeline; default `load_pipeline(settings)`. Loading is no attempt at anything.

    Raises:
        UnsupportedPipelineError: the pipeline cannot run S-CFG.
    """

    def __init__(
        self, settings: Settings, folder: Folder, max_attempts: int = MAX_ATTEMPTS, load: Loader | None = None
    ) -> None:
        self.settings, self.folder, self.max_attempts = settings, folder, max_attempts
        self.pipe = load_pipeline(settings) if load is None else load()
        self.pipe.set_progress_bar_config(disable=True)
        self._parts = tuple(settings.guidance.split("+"))
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        self._defaults = {name: parameter.default for name, parameter in parameters.items()}
        self._handle, self._config = self._enabled()
        self._fits: dict[str, int] = {}  # call -> images at once, where memory did not hold a whole micro-batch
        self._log = f"logs/{socket.gethostname()}-{os.getpid()}.txt"

    def _enabled(self) -> tuple[Any, SCFGConfig]:
        if self._parts == ("cfg",):
            return None, SCFGConfig()
        from ..patch import enable
        from ..pipelines.families import default_config

        given = self.settings.config
        config = default_config(self.pipe) if given is None else SCFGConfig.from_dict(given)
        return enable(self.pipe, config, strict=True), config

    def make(self, batch: MicroBatch) -> list[dict[str, Any]]:
        """The rows of one micro-batch, in its order; images as raw RGB pixels, see `encode`.

        What fails in a row becomes an error row. A marker is written before the attempt. An interrupt takes it back.
        """
        before = self.folder.attempts(batch.name)
        marker = self.folder.begin(batch.name)
        started = time.perf_counter()
        try:
            everyone = range(len(batch))
            if before >= self.max_attempts:
                rows = [row for index in everyone for row in self._guarded(batch, index)]
            else:
                rows = list(self._together(batch, everyone))
        except BaseException:
            self.folder.delete(marker)
            raise
        for row in rows:
            row["attempt"] = before + 1
        errors = sum(row["status"] == "error" for row in rows)
        took = time.perf_counter() - started
        self._note(f"{batch.name}: {len(batch)} rows, {errors} errors, attempt {before + 1}, {took:.2f} s")
        return rows

    def _guarded(self, batch: MicroBatch, index: int) -> Iterator[dict[str, Any]]:
        """One row alone, with a marker of its own; an error row if an earlier one was left behind."""
        key = f"{batch.name}-{index}"
        if self.folder.attempts(key):
            yield _row(batch, index, error=DIED)
            return
        marker = self.folder.begin(key)
        try:
            yield from self._together(batch, [index])
        finally:
            self.folder.delete(marker)

    def _together(self, batch: MicroBatch, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows in one call, in halves where memory is short, each alone after an exception."""
        fits = self._fits.get(batch.call, len(indices))
        if len(indices) > fits:
            for start in range(0, len(indices), fits):
                yield from self._together(batch, indices[start : start + fits])
            return
        try:
            rows = self._call(batch, indices)
        except Exception as error:
            self._note(f"{batch.name}: rows {', '.join(batch.ids[i] for i in indices)}\n{traceback.format_exc()}")
            if len(indices) == 1:
                yield _row(batch, indices[0], error=f"{type(error).__name__}: {error}")
                return
            short = _is_out_of_memory(error)
        else:
            yield from rows
            return
        if short:
            _free_memory()
            self._fits[batch.call] = (len(indices) + 1) // 2
            yield from self._together(batch, indices)
        else:
            for index in indices:
                yield from self._together(batch, [index])

    def _call(self, batch: MicroBatch, indices: Sequence[int]) -> list[dict[str, Any]]:
        """One call of the pipeline."""
        import torch

        call = json.loads(batch.call)
        if "negative_prompt" in call:
            call["negative_prompt"] = [call["negative_prompt"]] * len(indices)
        if self._handle is not None and self._parts != ("scfg",):
            set_method(self.pipe, self._handle, self._parts, self._defaults | call, self._config)
        # Noise from the CPU is the same on every device.
        generators = [torch.Generator("cpu").manual_seed(batch.seeds[index]) for index in indices]
        started = time.perf_counter()
        prompts = [batch.prompts[index] for index in indices]
        result = self.pipe(prompt=prompts, generator=generators, output_type="np", **call)
        seconds = (time.perf_counter() - started) / len(indices)
        means, effective = self._weights(call, len(indices))
        refused = getattr(result, "nsfw_content_detected", None) or [False] * len(indices)
        rows = []
        for at, index in enumerate(indices):
            pixels = np.asarray(result.images[at])
            error = ""
            if not np.isfinite(pixels).all():
                error = "the image has values that are not numbers; try another dtype or a smaller guidance_scale"
            elif refused[at]:
                error = "the model's safety checker refused it"
            row = _row(batch, index, error, len(indices), seconds)
            if not error:
                row["pixels"] = (pixels * 255).round().astype(np.uint8)
                row["mean_weight"], row["effective_weight"] = means, effective[at]
            rows.append(row)
        return rows

    def _weights(self, call: dict[str, Any], count: int) -> tuple[float | None, list[float | None]]:
        """Mean weight of the last call, and the effective weight of each of its images."""
        stats = None if self._handle is None else self._handle.stats
        if stats is None or not stats.weights:  # plain guidance acts as its scale
            scale = (self._defaults | call).get("guidance_scale")
            return scale, [scale] * count
        steps = [weights.tolist() for weights in stats.effective_weights]
        return stats.mean_weight, [sum(of_image) / len(steps) for of_image in zip(*steps, strict=True)]

    def _note(self, text: str) -> None:
        self.folder.append(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def _row(
    batch: MicroBatch, index: int, error: str = "", together: int = 1, seconds: float | None = None
) -> dict[str, Any]:
    return {
        "batch": batch.name,
        "id": batch.ids[index],
        "prompt": batch.prompts[index],
        "seed": batch.seeds[index],
        "call": batch.call,
        "status": "error" if error else "image",
        "error": error,
        "together": together,
        "seconds": seconds,
    }


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encode(rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
    """Rows of `Worker.make` as a table of the schema `IMAGES`: pixels become PNG files without a timestamp."""
    return pyarrow.Table.from_pylist([_encoded(row) for row in rows], schema=IMAGES)


def _encoded(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    pixels = row.get("pixels")
    data, digest = b"", ""
    if pixels is not None:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        data, digest = file.getvalue(), hashlib.sha256(pixels.tobytes()).hexdigest()
    values = {name: value for name, value in row.items() if name != "pixels"}
    return values | {"sha256": digest, "image": {"bytes": data, "path": None}}
