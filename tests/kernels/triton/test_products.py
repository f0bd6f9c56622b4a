"""No product is formed twice: the work of the tensor-core instructions is that of the tiles, padding included, exactly.

Triton gives every warp of a program a copy of a tile that is too small to be divided among them, and nobody would see.
The configurations are those that are chosen, at sizes that take seconds to execute.
"""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import attention_maps, complete
from scfg_kernels._launch import DeviceLimits, complete_config
from scfg_kernels._triton import KERNELS
from scfg_kernels._triton.attention_map import head_widths, map_config

from lab.ptxsim import simulated
from lab.ptxsim.driver import DEVICES
from tests.kernels.cases import by_name, random_maps, random_qkv
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


COMPLETIONS = {
    # name: (N that is executed, conditional samples and N that the configuration is chosen for, tokens)
    "all-rows-in-a-program": (64, (1, 64), 77),
    "sd15": (66, (1, 256), 77),
    "sd15-7-images": (66, (7, 256), 77),
    "sd15-16-images": (66, (16, 256), 77),
    "a-few-tokens": (66, (1, 256), 9),
    "20-tokens": (66, (1, 256), 20),
    "two-blocks-of-columns": (66, (1, 256), 154),
    "two-blocks-of-columns-16-images": (66, (16, 256), 154),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("n", "chosen_for", "tokens"), **by_name(COMPLETIONS))
def test_completion(rng, arch, n, chosen_for, tokens):
    """The unconditional sample, one column, has no part in it."""
    own, cross = random_maps(rng, 2, n, n), random_maps(rng, 2, n, tokens)
    config = complete_config(*chosen_for, tokens, limits_of(arch))
    inner = config.block_m if n <= config.block_m else padded(n, config.block_k)
    work = COMPLETION_PRODUCTS * padded(n, config.block_m) * inner * padded(tokens, sum(config.block_t)) * TF32X3
    assert matrix_work(arch, lambda: KERNELS["complete"](own, cross, 1, "official", 4, config)) == work


def test_a_column_alone_takes_no_tensor_core(rng):
    own, cross = random_maps(rng, 1, 66, 66), random_maps(rng, 1, 66, 5)
    assert matrix_work(80, lambda: complete(own, cross, unconditional=1, backend="triton")) == 0


def test_copies_of_a_tile_are_counted(rng):
    """What this file looks for: 16 rows in four warps that divide the rows."""
    own, cross = random_maps(rng, 1, 66, 66), random_maps(rng, 1, 66, 9)
    config = complete_config(1, 256, 9, limits_of(80))
    found = []
    for warps in (config.num_warps, 4):
        forced = type(config)(**vars(config) | {"num_warps": warps})
        found.append(matrix_work(80, lambda forced=forced: KERNELS["complete"](own, cross, 0, "official", 4, forced)))
    assert found[1] == 4 * found[0] > 0
