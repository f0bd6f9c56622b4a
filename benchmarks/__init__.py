"""Benchmarks: each case is described once, checked against the literal reference, then timed. See README.md."""

import os

# The profiler, which measures memory here, announces every start and stop on the screen otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
