"""Time every case: `python -m benchmarks.run [--filter WORDS] [--quick] [--out benchmarks/results/NAME]`.

A provider is timed only after its result agreed with the reference; one that disagrees ends the run with an error.
Rounds are interleaved and `ours` runs twice in each of them: the ratio of the two is the control, and its spread is
what the machine's noise alone does to a ratio. Files are rewritten after every case, so an interrupted run keeps them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lab.measure import MIB, Spread, allocated_peak, fresh_compiler, interleaved, ratios, seconds

from . import registry
from .report import RESULTS, Report

CONTROL = "ours (again)"


def run_case(
    case: registry.Case,
    report: Report,
    budget: float = 4.0,
    rounds: tuple[int, int] = (5, 30),
    sample: float = 2e-2,
    providers: Sequence[str] = registry.PROVIDERS,
) -> str:
    """Check, time and record one case; returns a line for the screen.

    Args:
        budget: seconds that the timing may take, as far as the smallest number of rounds allows.
        rounds: smallest and largest number of rounds.
        sample: seconds that one sample should last; short calls are repeated to fill it.
    """
    fresh_compiler()
    prepared = registry.prepare(case)
    place = (case.name, case.op, case.sizes, case.batch)
    calls: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}
    for provider in providers:
        if reason := case.unavailable(provider):
            report.add(*place, provider, "time", "ms", None, f"not run: {reason}")
            continue
        began = time.perf_counter()
        prepared.check(provider)
        first[provider] = time.perf_counter() - began
        calls[provider] = prepared.call(provider)
    calls[CONTROL] = calls["ours"]
    once = {name: seconds(call) for name, call in calls.items()}
    repeats = {name: max(1, min(1000, int(sample / t))) for name, t in once.items()}
    round_seconds = sum(once[name] * repeats[name] for name in calls)
    count = max(rounds[0], min(rounds[1], int(budget / round_seconds)))
    samples = interleaved(calls, count, repeats)
    report.samples[case.name] = samples

    work, moved = case.operator.flops(case), case.operator.bytes(case)
    for provider in first:
        times = samples[provider]
        spread = Spread.of(times)
        report.add(*place, provider, "time", "ms", Spread.of([1e3 * t for t in times]))
        report.add(*place, provider, "speedup", "x", ratios(samples[registry.BASELINE], times))
        report.add(*place, provider, "useful_compute", "GFLOP/s", work / spread.value / 1e9)
        report.add(*place, provider, "useful_traffic", "GB/s", moved / spread.value / 1e9)
        report.add(*place, provider, "peak_allocated", "MiB", allocated_peak(calls[provider]) / MIB)
    if "compiled" in first:
        report.add(*place, "compiled", "first_call", "s", first["compiled"])
    control = ratios(samples[CONTROL], samples["ours"])
    report.add(*place, "ours", "control_ratio", "x", control)
    speed = ratios(samples[registry.BASELINE], samples["ours"])
    fast = ratios(samples[registry.BASELINE], samples["compiled"]) if "compiled" in samples else None
    compiled = f"compiled {fast.value:6.2f}x" if fast else "compiled      -"
    return (
        f"{case.name:48} literal {1e3 * Spread.of(samples['literal']).value:9.3f} ms   "
        f"ours {speed.value:6.2f}x [{speed.low:.2f}, {speed.high:.2f}]   {compiled}   "
        f"control {control.value:.3f} [{control.low:.3f}, {control.high:.3f}]   {count} rounds"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Time every case.")
    parser.add_argument("--filter", default="", help="only cases whose name contains every one of these words")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds: a smoke test")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, the slow part")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing per case (default: 4)")
    parser.add_argument("--rounds", type=int, nargs=2, metavar=("MIN", "MAX"), default=(5, 30), help="default: 5 30")
    parser.add_argument("--out", type=Path, default=RESULTS / "ops", help="without suffix; default: results/ops")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cases = registry.select(arguments.filter, arguments.quick)
    if not cases:
        parser.error(f"no case matches {arguments.filter!r}")
    low, high = (3, 3) if arguments.quick else arguments.rounds
    sample = 2e-3 if arguments.quick else 2e-2
    providers = [name for name in registry.PROVIDERS if not (arguments.no_compile and name == "compiled")]
    report = Report({**vars(arguments), "out": arguments.out.name})
    began = time.perf_counter()
    with torch.no_grad():
        for index, case in enumerate(cases, 1):
            try:
                line = run_case(case, report, arguments.budget, (low, high), sample, providers)
            except registry.DisagreementError as error:
                print(f"REFUSED TO TIME: {error}", file=sys.stderr)
                return 1
            report.write(arguments.out, finished=index == len(cases))
            print(f"[{index}/{len(cases)}, {time.perf_counter() - began:4.0f} s] {line}", flush=True)
    print(f"wrote {arguments.out.name}.csv and .json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
