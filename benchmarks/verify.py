"""Check every provider of every case against the reference, without timing.

    python -m benchmarks.verify [--quick] [--filter WORDS] [--providers literal ours compiled]

Also fills torch.compile's cache on disk, so that a run after it compiles faster.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from lab.measure import fresh_compiler

from . import registry


def verify(
    cases: Sequence[registry.Case],
    providers: Sequence[str] = registry.PROVIDERS,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Run the agreement check of each of `providers` of each case; returns one line per failure."""
    failures = []
    for case in cases:
        fresh_compiler()
        began = time.perf_counter()
        prepared = registry.prepare(case)
        marks = []
        for provider in providers:
            if reason := case.unavailable(provider):
                marks.append(f"{provider} not run ({reason})")
                continue
            try:
                prepared.check(provider)
                marks.append(f"{provider} ok")
            except registry.DisagreementError as error:
                failures.append(str(error))
                marks.append(f"{provider} DISAGREES")
        say(f"{case.name:48} {', '.join(marks)}   [{time.perf_counter() - began:.1f} s]")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only cases whose name contains every one of these words")
    parser.add_argument("--quick", action="store_true", help="the tiny sizes only")
    parser.add_argument("--providers", nargs="+", choices=registry.PROVIDERS, default=registry.PROVIDERS)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cases = registry.select(arguments.filter, arguments.quick)
    if not cases:
        parser.error(f"no case matches {arguments.filter!r}")
    with torch.no_grad():
        failures = verify(cases, arguments.providers, lambda line: print(line, flush=True))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"{len(cases)} cases, {len(failures)} disagreements")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
