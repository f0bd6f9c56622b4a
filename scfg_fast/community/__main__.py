"""`python -m scfg_fast.community [PIPELINE]`: print the file for one pipeline class, or write those of this folder."""

import sys

from . import source_of, write_all


def main() -> int:
    if len(sys.argv) == 1:
        write_all()
        return 0
    try:
        print(source_of(sys.argv[1]), end="")
    except ValueError as error:
        print(f"python -m scfg_fast.community: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
