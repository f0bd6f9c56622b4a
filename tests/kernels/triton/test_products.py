"""No product is formed twice: the work of the tensor-core instructions is that of the tiles, padding included, exactly.

Triton gives every warp of a program a copy of a tile that is too small to be divided among them, and nobody would see.
The configurations are those that are chosen, at sizes that take seconds to execute.
"""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import attention_maps
from scfg_kernels._launch import DeviceLimits
from scfg_kernels._triton.attention_map import head_widths, map_config

from lab.ptxsim import simulated
from lab.ptxsim.driver import DEVICES
from tests.kernels.cases import by_name, random_qkv
from tests.kernels.triton.simulation import ARCHITECTURES

HALF, SINGLE = torch.float16, torch.float32
COMPLETION_PRODUCTS = 2
TF32X3 = 3
"""Products of fp32 are three of TF32."""


def limits_of(arch: int) -> DeviceLimits:
    device = DEVICES[arch]
    return DeviceLimits(f"sm_{arch}", device.multiprocessors, device.shared_memory)


def padded(size: int, block: int) -> int:
    return -(-size // block) * block


def times(dtype: torch.dtype) -> int:
    return TF32X3 if dtype == SINGLE else 1


def matrix_work(arch: int, call) -> int:
    """Multiply-adds of the tensor-core instructions of one launch."""
    with simulated(arch, check_races=False) as run:
        call()
    (launch,) = run.launches
    return launch.counters.mma_flops // 2


MAPS = {
    # name: (dtype, head size); at 96 columns an operand is two tiles, in fp32 three chunks
    "fp16": (HALF, 64),
    "fp16-40": (HALF, 40),
    "fp16-96": (HALF, 96),
    "fp32": (SINGLE, 96),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "head_dim"), **by_name(MAPS))
def test_maps(rng, arch, dtype, head_dim):
    """Both maps of a block, whose scores are formed once."""
    heads, rows, keys = 3, 33, (33, 100)
    q, k1, _ = random_qkv(rng, (1, heads, rows, keys[0], head_dim), dtype)
    _, k2, _ = random_qkv(rng, (1, heads, rows, keys[1], head_dim), dtype)
    lse = torch.zeros(1, heads, rows)
    config = map_config(1, [(rows, n) for n in keys], head_dim, dtype, limits_of(arch))
    width = padded(head_dim, config.chunk) if config.chunk else sum(head_widths(head_dim))
    columns = sum(padded(n, config.block_n) for n in keys)
    work = heads * padded(rows, config.block_m) * columns * width * times(dtype)
    assert matrix_work(arch, lambda: attention_maps(q, k1, lse, q, k2, lse, backend="triton")) == work
