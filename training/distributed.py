"""One process per core with gloo. On a CPU, two single-threaded ranks beat one rank with two OpenMP threads as soon as
anything else runs beside them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A step makes and drops the same large blocks every time. By default glibc returns them to the kernel and faults them
# in again page by page; this keeps them in the process (measured: 0.17 s less system time in a step of 1.2 s).
_KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


def launch(worker: Callable[..., None], ranks: int, *args: Any) -> None:
    """Run ``worker(rank, ranks, *args)`` in ``ranks`` processes, each with one thread; return when all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in _KEEP_MEMORY.items():
        os.environ.setdefault(name, value)  # read by the C library when a rank starts
    mp.spawn(_enter, args=(worker, ranks, port, args), nprocs=ranks)


def _enter(rank: int, worker: Callable[..., None], ranks: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        worker(rank, ranks, *args)
    finally:
        dist.destroy_process_group()


def all_mean(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all ranks, in place; the identity outside a process group."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def average_gradients(parameters: Iterable[torch.nn.Parameter], extra: list[float]) -> list[float]:
    """Average all gradients over the ranks in one message.

    Args:
        parameters: same order on every rank; a parameter without a gradient counts as zero and gets one.
        extra: numbers that ride along (losses, a stop flag).

    Returns:
        The mean of ``extra`` over the ranks.
    """
    parameters = list(parameters)
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    flat = all_mean(torch.cat([*parts, torch.tensor(extra, dtype=torch.float32)]))
    *gradients, extra_mean = flat.split([p.numel() for p in parameters] + [len(extra)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return extra_mean.tolist()
