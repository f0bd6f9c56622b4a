"""The kernels on a CUDA machine: verified against their twins, then timed. `python -m benchmarks.gpu`; see README.md.

Needs torch and triton alone, no network, no installation: the kernels measured are those of this checkout.
"""

import sys
from pathlib import Path

KERNELS = str(Path(__file__).resolve().parents[2] / "kernels")
if KERNELS not in sys.path:
    sys.path.insert(0, KERNELS)
