"""Triton device code and launchers, one module per operator. The only place in the project that may import triton.

`KERNELS` maps an operator's name to its launcher; an operator that is not listed runs its torch implementation. No
operator is listed yet.
"""

from collections.abc import Callable

KERNELS: dict[str, Callable] = {}
