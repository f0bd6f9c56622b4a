"""The command: verify, time, capture, write. See ../README.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lab.measure import fresh_compiler

from . import cases as ways_of
from .budget import Budget
from .device import Cpu, Cuda, Device
from .grid import CASES, Case, select
from .record import ROOT, Record

OUT = ROOT / "benchmarks" / "results" / "gpu.csv"
MINUTES = 7.5
FOR_COMPILER = 0.4
"""Share of the time that is kept for torch.compile, which comes last."""
FIRST_COMPILE = 25.0
"""Seconds that the first compilation is taken to need, later ones the slowest so far; twice that must be left."""
ROUNDS = (5, 50)
OUT_OF_TIME = "not run: the time was up"
HANG = 120.0
"""Seconds beyond its share of the time after which a case is taken to hang; its first compilations are among them."""
HANGS = 3
"""Exit status of a run that was ended so."""


@contextlib.contextmanager
def watched(seconds: float, give_up: Callable[[], object]) -> Iterator[None]:
    """Ends the process if the block takes longer, after `give_up`: nothing else of it goes on when a kernel hangs."""

    def end() -> None:
        try:
            give_up()
        finally:
            os._exit(HANGS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _timed(calls: Mapping[str, Callable[[], Any]], device: Device, budget: Budget, rounds: tuple[int, int]) -> dict:
    """Milliseconds by provider: every round times each once, in an order that is shuffled anew."""
    shuffle = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds[1]):
        if done >= rounds[0] and not budget.allows():
            break
        order = list(calls)
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(device.milliseconds(calls[name]))
    return samples


def _add_times(record: Record, case: Case, samples: Mapping[str, Sequence[float]]) -> None:
    for name, times in samples.items():
        record.add(case, name, "time", "ms", times)


def _add_graph(name: str, calls: dict[str, Callable[[], Any]], device: Device) -> str:
    """Add the call of a provider as a graph; returns "ok", or why there is none. A replay must have the call's bits."""
    try:
        expected, (replay, filled) = calls[name](), device.captured(calls[name])
    except RuntimeError as error:
        return f"FAILED: no graph: {error}"
    replay()
    if not all(map(torch.equal, tree_leaves(filled), tree_leaves(expected))):
        return "FAILED: a replay has other bits"
    calls[f"{name} (graph)"] = replay
    return "ok"


def run_case(
    case: Case, device: Device, record: Record, budget: Budget, backend: str, rounds: tuple[int, int] = ROUNDS
) -> bool:
    """Verify and time everything but torch.compile; returns whether ours agreed."""
    x = ways_of.make_inputs(case, device.name)
    calls = ways_of.ways(case, x, backend)
    try:
        result = calls["ours"]()
        ways_of.check(case, x, result)
        record.add(case, "ours", "agreement")
    except ways_of.DisagreementError as error:
        record.add(case, "ours", "agreement", status=f"FAILED: {error}")
        return False
    except (ways_of.ops.BackendError, torch.OutOfMemoryError) as error:
        record.add(case, "ours", "agreement", status=f"not run: {error}")
        del calls["ours"]
    for name in ("ours", "eager") if case.op == "step" and "ours" in calls else ():
        status = _add_graph(name, calls, device)
        record.add(case, f"{name} (graph)", "agreement", status=status)
        if name == "ours" and status != "ok":
            return False
    if "published" not in calls:
        record.add(case, "published", "time", "ms", status="not run: there is no published code")
    for name in list(calls):  # once untimed; what does not fit in memory is left out
        try:
            peak = device.peak(calls[name])
        except torch.OutOfMemoryError:
            del calls[name]
            record.add(case, name, "time", "ms", status="not run: out of memory")
            continue
        known = [] if peak is None else [peak]
        record.add(case, name, "peak_allocated", "MiB", known, "ok" if known else "not measured on a CPU")
    _add_times(record, case, _timed(calls, device, budget, rounds))
    return True


def run_compiled(
    case: Case, device: Device, record: Record, budget: Budget, backend: str, rounds: tuple[int, int] = ROUNDS
) -> float:
    """Compile the twin and time it beside ours; returns the milliseconds of its first call."""
    fresh_compiler()
    x = ways_of.make_inputs(case, device.name)
    calls = {
        "compiled": ways_of.compiled_way(case, x),
        "ours (beside compiled)": ways_of.ways(case, x, backend)["ours"],
    }
    try:
        first = device.milliseconds(calls["compiled"])
        calls["ours (beside compiled)"]()
    except (ways_of.ops.BackendError, torch.OutOfMemoryError) as error:
        record.add(case, "compiled", "time", "ms", status=f"not run: {error}")
        return 0.0
    record.add(case, "compiled", "first_call", "ms", [first])
    _add_times(record, case, _timed(calls, device, budget, rounds))
    return first


def run(
    cases: Sequence[Case], device: Device, record: Record, budget: Budget, backend: str, with_compiler: bool = True,
    rounds: tuple[int, int] = ROUNDS, write: Callable[[], object] = lambda: None, say: Callable[[str], object] = print,
    patience: float = HANG,
) -> list[str]:  # fmt: skip
    """All cases; those that do not fit in the budget get a row that says so. Returns the cases that disagreed.

    Of the first pass, without the compiler, every case is announced before it begins, and its rows are written as soon
    as it is over or is taken to hang. After an error there that the device does not recover from, nothing more is run.
    """
    failed = []
    kept = FOR_COMPILER * budget.left() if with_compiler else 0.0
    for index, case in enumerate(cases):
        if not budget.allows(kept):
            record.add(case, "ours", "agreement", status=OUT_OF_TIME)
            continue
        say(f"[{index + 1}/{len(cases)}, {budget.left():.0f} s left] {case.name} begins")
        share = budget.share(len(cases) - index, kept)

        def give_up(case: Case = case, seconds: float = share.left() + patience) -> None:
            status = f"FAILED: not over after {seconds:.0f} s: taken to hang"
            record.add(case, "ours", "agreement", status=status)
            write()
            say(f"{case.name}: {status}")

        try:
            with watched(share.left() + patience, give_up):
                agreed = run_case(case, device, record, share, backend, rounds)
        except Exception as error:  # one case's error is a row, not the end of the run
            record.add(case, "ours", "agreement", status=f"FAILED: {type(error).__name__}: {error}")
            agreed = False
        if not agreed:
            failed.append(case.name)
        write()
        try:
            device.release()
        except RuntimeError as error:
            for other in cases[index + 1 :]:
                record.add(other, "ours", "agreement", status=f"not run: the device failed in {case.name}")
            write()
            say(f"{case.name}: the device does not recover: {error}")
            return failed if case.name in failed else [*failed, case.name]
        say(f"[{index + 1}/{len(cases)}, {budget.left():.0f} s left] {_line(record, case)}")
    slowest = FIRST_COMPILE
    for index, case in enumerate(cases if with_compiler else ()):
        reason = "not run: ours disagrees" if case.name in failed else case.not_compiled()
        reason = reason or ("" if budget.allows(2.0 * slowest) else OUT_OF_TIME)
        if reason:
            record.add(case, "compiled", "time", "ms", status=reason)
            continue
        try:
            took = run_compiled(case, device, record, budget.share(len(cases) - index), backend, rounds) / 1e3
            slowest = max(took, 0.0 if slowest == FIRST_COMPILE else slowest)
        except Exception as error:  # a compiler's, which is not our failure
            record.add(case, "compiled", "time", "ms", status=f"not run: {type(error).__name__}: {error}")
        device.release()
        write()
        say(f"[{index + 1}/{len(cases)}, {budget.left():.0f} s left] {_line(record, case)}")
    write()
    return failed


def _line(record: Record, case: Case) -> str:
    """The latest times of a case, and what is wrong."""
    rows = [row for row in record.rows if row.case == case.name]
    times = {row.provider: f"{row.value:.4g}" for row in rows if row.metric == "time" and row.value is not None}
    wrong = [row.status for row in rows if row.status.startswith("FAILED")]
    return f"{case.name:48} ms: {', '.join(f'{name} {time}' for name, time in times.items())} {' '.join(wrong)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Verify and time the kernels on CUDA."
    )
    parser.add_argument("--filter", default="", help="only cases whose name contains every one of these words")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for the whole run (default: {MINUTES})")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--dry-run", action="store_true", help="every case once on the CPU, torch backend, small sizes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.csv; a dry run writes only if asked")
    arguments = parser.parse_args(argv)
    budget = Budget(60.0 * arguments.minutes)
    if not arguments.minutes > 0.0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes:g}")
    cases = select(arguments.filter)
    if not cases:
        parser.error(f"no case matches {arguments.filter!r}; the {len(CASES)} cases are called like {CASES[0].name}")
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no CUDA device, nothing was measured. "
            "`--dry-run` runs every case once on the CPU.", file=sys.stderr,
        )  # fmt: skip
        return 2
    device: Device = Cpu() if arguments.dry_run else Cuda()
    record = Record(device.description)
    out = arguments.out or (None if arguments.dry_run else OUT)
    rounds, backend = ((1, 1), "torch") if arguments.dry_run else (ROUNDS, "triton")
    if arguments.dry_run:
        cases = list(dict.fromkeys(case.reduced() for case in cases))  # batches of 4 and 16 are alike
    with torch.no_grad():
        failed = run(
            cases, device, record, budget, backend, not arguments.no_compile, rounds,
            (lambda: record.write(out)) if out else (lambda: None), lambda text: print(text, flush=True),
        )  # fmt: skip
    left_out = len({row.case for row in record.rows if row.status == OUT_OF_TIME})
    print(f"{len(cases)} cases, {len(failed)} disagree, {left_out} not finished in time")
    if out:
        print(f"wrote {out.name}")
    return 1 if failed else 0
