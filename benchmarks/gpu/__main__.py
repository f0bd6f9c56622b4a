"""`python -m benchmarks.gpu`."""

from .run import main

raise SystemExit(main())
