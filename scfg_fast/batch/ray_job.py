"""The Ray runner: the same workers as actors of Ray Data, which commits with the same files."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pyarrow

from .errors import MissingPackageError
from .folder import Folder, plan_table
from .plan import MicroBatch
from .run import Worker, encode
from .settings import Loader, Settings

MISSING = 'more than one worker and --address need Ray: pip install "scfg_fast[batch]"'
CPUS = 0.5
STORE_BYTES = 200 * 2**20


def require_ray() -> None:
    """Raises MissingPackageError if Ray Data is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingPackageError(MISSING)


class _Actor:
    """A `Worker` in the types of `Dataset.map_batches`: a row of the plan in, rows with raw pixels out."""

    def __init__(self, settings: Settings, out: str, filesystem: Any, max_attempts: int, load: Loader | None) -> None:
        self._worker = Worker(settings, Folder(out, filesystem), max_attempts, load)

    def __call__(self, plan: pyarrow.Table) -> pyarrow.Table:
        (row,) = plan.to_pylist()
        batch = MicroBatch(tuple(row["ids"]), tuple(row["prompts"]), tuple(row["seeds"]), row["call"])
        return _packed(self._worker.make(batch))


def _packed(rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
    """Rows with their pixels as bytes, so that they cross processes as Arrow."""
    table = encode([{name: value for name, value in row.items() if name != "pixels"} for row in rows])
    pixels = [row.get("pixels") for row in rows]
    shapes = [None if image is None else list(image.shape) for image in pixels]
    data = pyarrow.array([None if image is None else image.tobytes() for image in pixels], pyarrow.large_binary())
    table = table.append_column("pixels", data)
    return table.append_column("shape", pyarrow.array(shapes, pyarrow.list_(pyarrow.int32())))


def _unpacked(table: pyarrow.Table) -> pyarrow.Table:
    """The table of `encode` from that of `_packed`."""
    import numpy as np

    rows = table.to_pylist()
    for row in rows:
        data, shape = row.pop("pixels"), row.pop("shape")
        row["pixels"] = None if data is None else np.frombuffer(data, np.uint8).reshape(shape)
    return encode(rows)


def run_on_ray(
    folder: Folder,
    batches: Sequence[MicroBatch],
    settings: Settings,
    *,
    workers: int,
    num_gpus: float | None,
    address: str | None,
    max_attempts: int,
    load: Loader | None,
) -> None:
    """Make and commit micro-batches on Ray Data; see `generate` for the arguments. Returns when all are committed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require_ray()
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig, CheckpointManager

    class NothingToRestore(CheckpointManager):
        """The plan has only what is left, so Ray need not filter it, nor hold actors that do."""

        def load_checkpoint(self, *_: Any, **__: Any) -> tuple[None, int]:
            return None, 0

    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {"env_vars": threads, "worker_process_setup_hook": "scfg_fast.batch.ray_job.quiet_worker"}
    mine = not ray.is_initialized()
    if mine:
        handler = signal.getsignal(signal.SIGTERM)
        sizes: dict[str, Any] = {}
        if address is None:
            sizes = {"num_cpus": workers + 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment, **sizes)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process without a word
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        "batch",
        folder.path("checkpoint"),
        delete_checkpoint_on_success=False,
        override_filesystem=folder.filesystem,
        checkpoint_manager_cls=NothingToRestore,
    )
    context.target_max_block_size = None  # a micro-batch is one block, whatever its size
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if num_gpus is None:
        num_gpus = 1 if settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0
    try:
        with DataContext.current(context):
            plan = ray.data.from_arrow(plan_table(batches)).repartition(target_num_rows_per_block=1, strict=True)
            pixels = plan.map_batches(
                _Actor,
                fn_constructor_args=(settings, str(folder) if folder.is_local else folder.root,
                                     None if folder.is_local else folder.filesystem, max_attempts, load),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=CPUS,
                num_gpus=num_gpus,
                compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            )  # fmt: skip
            images = pixels.map_batches(_unpacked, batch_size=None, batch_format="pyarrow", num_cpus=CPUS)
            images.write_parquet(folder.path("images"), filesystem=folder.filesystem)
    finally:
        if mine:
            ray.shutdown()


def quiet_worker() -> None:
    """Silence what libraries print in a worker and nobody reads."""
    import warnings

    warnings.simplefilter("ignore")
