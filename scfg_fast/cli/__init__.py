"""The command line: `scfg-fast generate | masks | compare | batch | doctor`, the same as `python -m scfg_fast ...`.

Results go to stdout, everything else to stderr. An error is one line on stderr; the exit status is 0, 2 for bad input,
1 for a failure while running, 130 for an interrupt. A file appears under its name whole or not at all. Heavy packages
are imported only when a command needs them.
"""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Sequence

from .errors import explain, flush_output, one_line
from .parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit status: 0, 2 for bad input, 1 for a failure while running, 130 for an interrupt. A malformed command
        line, `--help` and `--version` raise SystemExit, as argparse does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # token names may be in any script, terminals may not
    try:
        args = build_parser().parse_args(argv)
    except SystemExit:
        flush_output()  # the help, or the version
        raise
    try:
        with contextlib.ExitStack() as args.cleanup:
            return args.run(args)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        message, status = explain(error)
    print(f"scfg-fast {args.command}: error: {one_line(message)}", file=sys.stderr)
    return status
