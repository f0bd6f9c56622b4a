"""Small Triton kernels with inputs, launches and expected results; outputs have guard zones around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

GUARD = 64  # untouched elements before and after every output
SENTINEL = 12345.0


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def softmax_kernel(x, out, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < columns
    value = tl.load(x + row * stride + i, mask=inside, other=-float("inf")).to(tl.float32)
    power = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * stride + i, (power / tl.sum(power, 0)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def column_sum_kernel(x, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m = tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + m * columns + n, mask=(m < rows) & (n < columns), other=0.0)
    total = tl.sum(value, 0)
    tl.store(out + tl.arange(0, COLUMNS), total, mask=tl.arange(0, COLUMNS) < columns)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        left = tl.load(a + m * stride_a + (start + k)[None, :], mask=(m < M) & ((start + k)[None, :] < K), other=0.0)
        right = tl.load(b + (start + k)[:, None] * stride_b + n, mask=(n < N) & ((start + k)[:, None] < K), other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + m * stride_c + n, total.to(c.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def flash_kernel(q, k, v, out, scale, N, M, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    head = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.arange(0, BN)
    d = tl.arange(0, D)[None, :]
    query = tl.load(q + (head * N + m) * D + d, mask=m < N, other=0.0)
    best = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, D], tl.float32)
    for start in range(0, M, BN):
        inside = (start + n)[:, None] < M
        key = tl.load(k + (head * M + start + n)[:, None] * D + d, mask=inside, other=0.0)
        score = tl.dot(query, tl.trans(key)) * scale
        score = tl.where((start + n)[None, :] < M, score, -float("inf"))
        new = tl.maximum(best, tl.max(score, 1))
        power = tl.exp2(score - new[:, None])
        shrink = tl.exp2(best - new)
        norm = norm * shrink + tl.sum(power, 1)
        best = new
        value = tl.load(v + (head * M + start + n)[:, None] * D + d, mask=inside, other=0.0)
        total = tl.dot(power.to(v.dtype.element_ty), value, total * shrink[:, None])
    tl.store(out + (head * N + m) * D + d, (total / norm[:, None]).to(out.dtype.element_ty), mask=m < N)


@triton.jit
def last_one_out_kernel(x, parts, out, counter, n, BLOCK: tl.constexpr):
    """out = the sum of x [programs, BLOCK], by the program that comes last."""
    i = tl.arange(0, BLOCK)
    tl.store(parts + tl.program_id(0) * BLOCK + i, 2 * tl.load(x + tl.program_id(0) * BLOCK + i))
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    if before == n - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(n):
            total += tl.load(parts + part * BLOCK + i)
        tl.store(out + i, total / 2)
        tl.store(counter, 0)


@dataclass
class Guarded:
    """An output tensor inside a larger allocation that must stay untouched around it."""

    whole: torch.Tensor
    view: torch.Tensor

    @classmethod
    def make(cls, *shape: int, dtype: torch.dtype = torch.float32) -> Guarded:
        whole = torch.full((math.prod(shape) + 2 * GUARD,), SENTINEL, dtype=dtype)
        view = whole[GUARD:-GUARD].view(shape)
        view.fill_(float("nan"))
        return cls(whole, view)

    def intact(self) -> bool:
        outside = torch.cat([self.whole[:GUARD], self.whole[-GUARD:]])
        return bool((outside == torch.tensor(SENTINEL, dtype=self.whole.dtype)).all())


@dataclass
class Sample:
    """One kernel with fixed inputs: `run()` launches it and gives the output."""

    name: str
    run: Callable[[], Guarded]
    expected: torch.Tensor
    tolerance: float

    def correct(self, output: Guarded) -> bool:
        """Whether the output is right and nothing around it was touched."""
        error = (output.view.double() - self.expected.double()).abs().max().item()
        return output.intact() and error <= self.tolerance


def vector_add() -> Sample:
    x, y = torch.randn(1150), torch.randn(1150)

    def run() -> Guarded:
        out = Guarded.make(1150)
        add_kernel[(2,)](x, y, out.view, 1150, BLOCK=1024)
        return out

    return Sample("vector_add", run, x + y, 0.0)


def softmax(dtype: torch.dtype = torch.float16) -> Sample:
    x = torch.randn(5, 300).to(dtype)

    def run() -> Guarded:
        out = Guarded.make(5, 300, dtype=dtype)
        softmax_kernel[(5,)](x, out.view, 300, 300, BLOCK=512)
        return out

    return Sample("softmax", run, x.float().softmax(1), 1e-4 if dtype == torch.float16 else 1e-3)


def column_sum() -> Sample:
    x = torch.randn(61, 30)

    def run() -> Guarded:
        out = Guarded.make(30)
        column_sum_kernel[(1,)](x, out.view, 61, 30, ROWS=64, COLUMNS=32)
        return out

    return Sample("column_sum", run, x.sum(0), 1e-5)


def matmul(dtype: torch.dtype = torch.float16) -> Sample:
    m, n, k = 70, 88, 120
    a, b = torch.randn(m, 128).to(dtype)[:, :k], torch.randn(k, 96).to(dtype)[:, :n]

    def run() -> Guarded:
        out = Guarded.make(m, n, dtype=dtype)
        strides = a.stride(0), b.stride(0), out.view.stride(0)
        matmul_kernel[(2, 2)](a, b, out.view, m, n, k, *strides, BM=64, BN=64, BK=32, num_warps=4, num_stages=3)
        return out

    expected = a.double() @ b.double()
    relative = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-3}[dtype]
    return Sample("matmul", run, expected, relative * expected.abs().max().item())


def flash(dtype: torch.dtype = torch.float16) -> Sample:
    heads, rows, keys, size = 2, 75, 100, 64
    q, k, v = (torch.randn(heads, length, size).to(dtype) for length in (rows, keys, keys))
    scale = size**-0.5

    def run() -> Guarded:
        out = Guarded.make(heads, rows, size, dtype=dtype)
        flash_kernel[(2, heads)](
            q, k, v, out.view, scale * math.log2(math.e), rows, keys, BM=64, BN=32, D=size, num_warps=4, num_stages=3
        )
        return out

    expected = (q.double() @ k.double().transpose(1, 2) * scale).softmax(2) @ v.double()
    return Sample("flash", run, expected, {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 3e-3}[dtype])


def last_one_out() -> Sample:
    """Programs that wait for each other, through global memory."""
    x = torch.randn(20, 128)

    def run() -> Guarded:
        out = Guarded.make(128)
        counter = torch.zeros(1, dtype=torch.int32)
        last_one_out_kernel[(20,)](x, torch.full_like(x, float("nan")), out.view, counter, 20, BLOCK=128)
        return out

    return Sample("last_one_out", run, x.sum(0), 1e-5)


SAMPLES = (vector_add, softmax, column_sum, matmul, flash)
