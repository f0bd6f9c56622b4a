"""What Triton compiles for its language features, on three architectures, against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lab.ptxsim import simulated
from lab.ptxsim.tests.samples import flash, matmul, softmax

ARCHS = [80, 90, 120]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [matmul, flash])
def test_matrix_kernels(make, dtype: torch.dtype, arch: int) -> None:
    torch.manual_seed(1)
    sample = make(dtype)
    with simulated(arch) as run:
        assert sample.correct(sample.run())
    assert ("wgmma" in run.launches[0].ptx) == (arch == 90)


def test_softmax_in_bfloat16() -> None:
    sample = softmax(torch.bfloat16)
    with simulated(80):
        assert sample.correct(sample.run())


@triton.jit
def reductions_kernel(x, sums, where, running, largest, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    value = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(sums + r, tl.sum(value, 1))
    tl.store(where + r, tl.argmax(value, 1))
    tl.store(running + r[:, None] * C + c[None, :], tl.cumsum(value, 0))
    tl.store(largest + c, tl.max(value, 0))


@pytest.mark.parametrize("arch", ARCHS)
def test_reductions_scans_and_argmax(arch: int) -> None:
    x = torch.randn(64, 32)
    x[5, 3] = x[5, 9] = 9.0  # a tie: the lowest index wins
    sums, where, running, largest = (
        torch.zeros(64),
        torch.zeros(64, dtype=torch.int32),
        torch.zeros(64, 32),
        torch.zeros(32),
    )
    with simulated(arch):
        reductions_kernel[(1,)](x, sums, where, running, largest, R=64, C=32)
    torch.testing.assert_close(sums, x.sum(1))
    torch.testing.assert_close(running, x.cumsum(0))
    assert torch.equal(where.long(), x.argmax(1)) and where[5] == 3
    assert torch.equal(largest, x.amax(0))


@triton.jit
def mathematics_kernel(x, k, out, n, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n
    a = tl.load(x + i, mask=inside, other=0.0)
    b = tl.load(k + i, mask=inside, other=0)
    tl.store(out + i, tl.sqrt(tl.abs(a)) + tl.rsqrt(a * a + 1), mask=inside)
    tl.store(out + SIZE + i, tl.sin(a) + tl.cos(a), mask=inside)
    tl.store(out + 2 * SIZE + i, tl.log(tl.abs(a) + 1) + tl.exp(-a * a) + tl.erf(a), mask=inside)
    tl.store(out + 3 * SIZE + i, tl.floor(a) + 2 * tl.ceil(a) + tl.clamp(a, -1, 1) + tl.sigmoid(a), mask=inside)
    tl.store(out + 4 * SIZE + i, (b // 7 + b % 5 * 10).to(tl.float32), mask=inside)
    tl.store(
        out + 5 * SIZE + i, (b.to(tl.int8).to(tl.int32) + (b.to(tl.int64) * b).to(tl.int32)).to(tl.float32), mask=inside
    )
    tl.store(out + 6 * SIZE + i, a.to(tl.float16).to(tl.float32) + a.to(tl.bfloat16).to(tl.float32), mask=inside)


@pytest.mark.parametrize("arch", ARCHS)
def test_mathematics(arch: int) -> None:
    n = 250
    x, k = torch.randn(n) * 3, torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    out = torch.zeros(7, n)
    with simulated(arch):
        mathematics_kernel[(1,)](x, k, out, n, SIZE=n, BLOCK=256)
    kd = k.long()
    quotient = torch.div(kd, 7, rounding_mode="trunc") + torch.fmod(kd, 5) * 10
    expected = [
        x.abs().sqrt() + (x * x + 1).rsqrt(),
        x.sin() + x.cos(),
        (x.abs() + 1).log() + (-x * x).exp() + x.erf(),
        x.floor() + 2 * x.ceil() + x.clamp(-1, 1) + x.sigmoid(),
        quotient.float(),
        (k.to(torch.int8).long() + kd * kd).float(),
        x.half().float() + x.bfloat16().float(),
    ]
    torch.testing.assert_close(out, torch.stack(expected), rtol=2e-6, atol=2e-6)


@triton.jit
def last_program_kernel(x, partial, counter, total, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    i = tl.program_id(0)
    tl.store(partial + i, tl.sum(tl.load(x + i * BLOCK + tl.arange(0, BLOCK)), 0))
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(total, tl.sum(tl.load(partial + tl.arange(0, PROGRAMS)), 0))
        tl.store(counter, 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_program_finishes_for_all(arch: int) -> None:
    x, partial, total = torch.randn(64 * 256), torch.zeros(64), torch.zeros(1)
    counter = torch.zeros(1, dtype=torch.int32)
    with simulated(arch) as run:
        last_program_kernel[(64,)](x, partial, counter, total, BLOCK=256, PROGRAMS=64)
    torch.testing.assert_close(total, x.sum()[None], rtol=1e-5, atol=1e-4)
    assert counter.item() == 0 and run.launches[0].counters.atomics == 64


@triton.jit
def atomics_kernel(x, sums, largest, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(sums + i % 7, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)
    tl.atomic_max(largest + i % 7, i, mask=i < n)


@pytest.mark.parametrize("arch", ARCHS)
def test_atomics_of_several_programs(arch: int) -> None:
    x, sums, largest = torch.randn(1000), torch.zeros(7), torch.zeros(7, dtype=torch.int32)
    with simulated(arch) as run:
        atomics_kernel[(4,)](x, sums, largest, 1000, BLOCK=256)
    torch.testing.assert_close(sums, torch.zeros(7).index_add_(0, torch.arange(1000) % 7, x), rtol=1e-4, atol=1e-4)
    assert largest.tolist() == [994, 995, 996, 997, 998, 999, 993]
    assert run.launches[0].counters.float_atomics == 1000


@triton.jit
def reorder_kernel(x, index, out, picked, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, tl.sort(value))
    tl.store(picked + i, tl.gather(value, tl.load(index + i), 0))


def test_sort_and_gather() -> None:
    x, index = torch.randn(128), torch.randint(0, 128, (128,), dtype=torch.int32)
    out, picked = torch.zeros(128), torch.zeros(128)
    with simulated(80):
        reorder_kernel[(1,)](x, index, out, picked, BLOCK=128)
    assert torch.equal(out, x.sort().values) and torch.equal(picked, x[index.long()])


@triton.jit
def histogram_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, 64), tl.histogram(tl.load(x + tl.arange(0, BLOCK)), 64))


def test_histogram() -> None:
    x, out = torch.randint(0, 64, (256,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with simulated(80):
        histogram_kernel[(1,)](x, out, BLOCK=256)
    assert torch.equal(out.long(), x.bincount(minlength=64))


@triton.jit
def data_dependent_kernel(count, out, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(tl.load(count + i)):
        if step % 2 == 0:
            total += tl.arange(0, BLOCK)
    tl.store(out + i * BLOCK + tl.arange(0, BLOCK), total)


def test_loops_of_different_length_per_program() -> None:
    count = torch.tensor([0, 3, 8, 1, 2], dtype=torch.int32)
    out = torch.full((5, 32), -1, dtype=torch.int32)
    with simulated(80):
        data_dependent_kernel[(5,)](count, out, BLOCK=32)
    assert torch.equal(out, ((count + 1) // 2)[:, None] * torch.arange(32, dtype=torch.int32))
