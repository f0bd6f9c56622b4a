"""No product is formed twice: the work of the tensor-core instructions is that of the tiles, padding included, exactly.

Triton gives every warp of a program a copy of a tile that is too small to be divided among them, and nobody would see.
The configurations are those that are chosen, at sizes that take seconds to execute.
"""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import attention_map, complete_from_qk, cross_attention_map, propagate
from scfg_kernels._launch import (
    DeviceLimits,
    attention_config,
    flash_config,
    head_widths,
    propagate_config,
)

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


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_attention_in_one_sweep(rng, arch, head_dim):
    heads, rows, keys = 3, 17, 77
    q, k, v = random_qkv(rng, (1, heads, rows, keys, head_dim), HALF)
    config = attention_config(heads, keys, head_dim, limits_of(arch))
    tile = padded(heads, config.heads) * padded(rows, config.block_m) * sum(config.block_n)
    work = tile * 2 * padded(head_dim, config.block_d)
    assert matrix_work(arch, lambda: cross_attention_map(q, k, v, backend="triton")) == work


TWO_PARTS = {
    # name: (dtype, head size); at 96 columns an operand is two tiles
    "fp16": (HALF, 64),
    "fp16-96": (HALF, 96),
    "fp32": (SINGLE, 40),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize(("dtype", "head_dim"), **by_name(TWO_PARTS))
def test_attention_in_two_parts(rng, arch, with_output, dtype, head_dim):
    heads, rows, keys = 2, 33, 100
    q, k, v = random_qkv(rng, (1, heads, rows, keys, head_dim), dtype)
    config = flash_config(1, heads, rows, keys, head_dim, dtype, limits_of(arch))
    width = sum(head_widths(head_dim))
    first = padded(keys, config.block_n) * (1 + with_output)  # scores, and the output
    work = heads * padded(rows, config.block_m) * width * (first + padded(keys, config.map_n)) * times(dtype)
    if with_output:
        assert matrix_work(arch, lambda: cross_attention_map(q, k, v, backend="triton")) == work
    else:
        assert matrix_work(arch, lambda: attention_map(q, k, backend="triton")) == work


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("columns", [5, 77])
def test_propagation(rng, arch, dtype, columns):
    heads, rows, keys, head_dim = 2, 33, 40, 40
    q, k, _ = random_qkv(rng, (1, heads, rows, keys, head_dim), dtype)
    x = random_maps(rng, 1, keys, columns)
    config = propagate_config(1, heads, rows, columns, head_dim, dtype, limits_of(arch))
    m, map_n = padded(rows, config.block_m), padded(keys, config.map_n)
    scores = heads * m * sum(head_widths(head_dim)) * (padded(keys, config.block_n) + map_n) * times(dtype)
    work = scores + m * map_n * sum(config.block_t) * TF32X3
    assert matrix_work(arch, lambda: propagate(q, k, x, backend="triton")) == work


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_completion_from_queries_and_keys(rng, arch, dtype):
    """The unconditional sample has one column, padded to 16; every product forms the scores."""
    heads, n, tokens, head_dim = 2, 33, 77, 40
    q, k, _ = random_qkv(rng, (2, heads, n, n, head_dim), dtype)
    c = random_maps(rng, 2, n, tokens)
    config = propagate_config(2, heads, n, tokens, head_dim, dtype, limits_of(arch))
    m, map_n = padded(n, config.block_m), padded(n, config.map_n)
    keys = padded(n, config.block_n) + COMPLETION_PRODUCTS * map_n
    scores = 2 * heads * m * keys * sum(head_widths(head_dim)) * times(dtype)
    work = scores + COMPLETION_PRODUCTS * m * map_n * (sum(config.block_t) + 16) * TF32X3
    assert matrix_work(arch, lambda: complete_from_qk(q, k, c, unconditional=1, backend="triton")) == work
