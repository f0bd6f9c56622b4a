"""`python -m scfg_fast`, the same as the `scfg-fast` command."""

import sys

from .cli import main

sys.exit(main())
