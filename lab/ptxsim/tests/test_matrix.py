"""Tensor-core opcodes and the fragments' way through shared memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lab.ptxsim import SimError
from lab.ptxsim.tests.assembly import execute, kernel_text, run_body

LANE = np.arange(32)
GROUP, T = LANE // 4, LANE % 4


def fragments(matrix: np.ndarray, rows, columns) -> np.ndarray:
    """Registers (32, n) of a matrix whose element for (lane, register, half) is at (rows, columns)."""
    picked = np.ascontiguousarray(matrix[rows, columns])
    return picked if picked.itemsize == 4 and picked.ndim == 2 else picked.view(np.uint32).reshape(32, -1)


def a_registers(a: np.ndarray) -> np.ndarray:
    """PTX ISA: rows group and group + 8 alternate, then the next eight (16-bit) or four (tf32) columns."""
    depth = a.shape[1]
    if a.dtype == np.uint32:
        r = np.arange(depth // 2)
        return fragments(a, GROUP[:, None] + 8 * (r & 1), T[:, None] + 4 * (r >> 1))
    r, half = np.arange(depth // 4)[:, None], np.arange(2)
    return fragments(a, GROUP[:, None, None] + 8 * (r & 1), T[:, None, None] * 2 + half + 8 * (r >> 1))


def b_registers(b: np.ndarray) -> np.ndarray:
    depth = b.shape[0]
    if b.dtype == np.uint32:
        r = np.arange(depth // 4)
        return fragments(b, T[:, None] + 4 * r, GROUP[:, None] + 0 * r)
    r, half = np.arange(depth // 8)[:, None], np.arange(2)
    return fragments(b, T[:, None, None] * 2 + half + 8 * r, GROUP[:, None, None] + 0 * r + 0 * half)


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def load(first: int, count: int, pointer: int) -> str:
    rows = f"mul.wide.u32 %rd8, %t, {4 * count}; add.s64 %rd9, %rd{pointer}, %rd8;"
    return rows + "".join(f"ld.global.b32 %r{first + i}, [%rd9+{4 * i}];" for i in range(count))


@pytest.mark.parametrize(
    ("kind", "depth"), [("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("tf32", 4), ("tf32", 8)]
)
def test_mma(kind: str, depth: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    a, b = torch.randn(16, depth, generator=generator), torch.randn(depth, 8, generator=generator)
    c = torch.randn(16, 8, generator=generator)
    if kind == "tf32":
        raw = [x.numpy().view(np.uint32) for x in (a, b)]
        a, b = (torch.from_numpy((x & np.uint32(0xFFFFE000)).view(np.float32)) for x in raw)
    else:
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
        a, b = a.to(dtype), b.to(dtype)
        raw = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    left, right = a_registers(raw[0]), b_registers(raw[1])
    register = np.arange(4)
    rows, columns = GROUP[:, None] + 8 * (register >> 1), T[:, None] * 2 + (register & 1)
    start, out = np.ascontiguousarray(c.numpy()[rows, columns]), np.zeros((32, 4), np.float32)
    na, nb = left.shape[1], right.shape[1]
    body = f"""{load(10, na, 1)} {load(20, nb, 2)} {load(30, 4, 3)}
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {names(40, 4)}, {names(10, na)}, {names(20, nb)},
        {names(30, 4)}; mul.wide.u32 %rd8, %t, 16; add.s64 %rd9, %rd0, %rd8; st.global.v4.b32 [%rd9], {names(40, 4)};"""
    counters = run_body(body, out, left.copy(), right.copy(), start)
    expected = (a.double() @ b.double() + c.double()).numpy()[rows, columns]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert counters.mma_flops == 2 * 16 * 8 * depth


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize("count", [1, 2])
def test_fewer_matrices_at_a_time(count: int, space: str) -> None:
    data, out = np.random.default_rng(0).integers(0, 2**16, (2, 8, 8), np.uint16), np.zeros((32, 2), np.uint32)
    fragments = np.stack([np.ascontiguousarray(m).view(np.uint32).reshape(32) for m in data], 1)
    body = f"""{load(1, 2, 1)} mov.b32 %r9, smem; shl.b32 %r10, %t, 4; add.s32 %r11, %r9, %r10; mov.b32 %r21, 0;
        setp.lt.u32 %p1, %t, 16; @!%p1 mov.b32 %r11, %r9;
        stmatrix.sync.aligned.m8n8.x{count}.{space}.b16 [%r11], {names(1, count)}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}.{space}.b16 {names(20, count)}, [%r11]; mul.wide.u32 %rd8, %t, 8;
        add.s64 %rd9, %rd0, %rd8; st.global.v2.b32 [%rd9], {names(20, 2)};"""
    run_body(body, out, fragments, shared=256)
    np.testing.assert_array_equal(out[:, :count], fragments[:, :count])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    data = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 4), np.uint32)
    body = f"""mul.wide.u32 %rd8, %t, 16; add.s64 %rd9, %rd1, %rd8; ld.global.v4.b32 {names(1, 4)}, [%rd9];
        mov.b32 %r9, smem; shl.b32 %r10, %t, 4; add.s32 %r11, %r9, %r10; st.shared.v4.b32 [%r11], {names(1, 4)};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 {names(20, 4)}, [%r11];
        add.s64 %rd9, %rd0, %rd8; st.global.v4.b32 [%rd9], {names(20, 4)};"""
    counters = run_body(body, out, data, shared=512)
    for number in range(4):
        matrix = data[number].T if transposed else data[number]
        expected = np.ascontiguousarray(matrix[GROUP[:, None], T[:, None] * 2 + np.arange(2)]).view(np.uint32)[:, 0]
        np.testing.assert_array_equal(out[:, number], expected)
    assert counters.shared_wavefronts == counters.shared_wavefronts_ideal == 8


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(transposed: str) -> None:
    data, out = np.random.default_rng(0).integers(0, 2**32, (32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    body = f"""mul.wide.u32 %rd8, %t, 16; add.s64 %rd9, %rd1, %rd8; ld.global.v4.b32 {names(1, 4)}, [%rd9];
        mov.b32 %r9, smem; shl.b32 %r10, %t, 4; add.s32 %r11, %r9, %r10;
        stmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 [%r11], {names(1, 4)}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {names(20, 4)}, [%r11];
        add.s64 %rd9, %rd0, %rd8; st.global.v4.b32 [%rd9], {names(20, 4)};"""
    run_body(body, out, data, shared=512)
    np.testing.assert_array_equal(out, data)


def test_ldmatrix_races_with_a_store_of_another_warp() -> None:
    body = f"""mov.b32 %r9, smem; and.b32 %r8, %t, 31; shl.b32 %r10, %r8, 4; add.s32 %r11, %r9, %r10;
        setp.lt.u32 %p1, %t, 32;
        @%p1 st.shared.b32 [%r11], %t; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {names(20, 1)}, [%r11];"""
    with pytest.raises(SimError, match="RAW"):
        run_body(body, np.zeros(1, np.int64), threads=64, shared=512)


def wgmma_kernel(
    kind: str = "f16",
    *,
    proxy: str = "fence.proxy.async.shared::cta;",
    fence: str = "wgmma.fence.sync.aligned;",
    wait: str = "wgmma.wait_group.sync.aligned 0;",
    sync: str = "bar.sync 0;",
    after: str = "",
) -> str:
    """D (64, 8) = A (64, K) B (8, K)^T, rows of 32 bytes in shared memory, no swizzle: 8 x 16-byte core matrices."""
    leading, stride = 128, 256
    high = f"{(leading >> 4) << 16 | (stride >> 4) << 32}"
    a_row = """shr.u32 %r1, %t, 1; and.b32 %r2, %t, 1; shr.u32 %r3, %r1, 3; and.b32 %r4, %r1, 7; shl.b32 %r5, %r3, 8;
        shl.b32 %r6, %r2, 7; shl.b32 %r7, %r4, 4; add.s32 %r8, %r5, %r6; add.s32 %r8, %r8, %r7; mov.b32 %r9, smem;
        add.s32 %r8, %r8, %r9;"""  # thread t copies half t % 2 of row t // 2
    body = f"""{a_row} mul.wide.u32 %rd8, %t, 16; add.s64 %rd9, %rd1, %rd8; ld.global.v4.b32 {names(20, 4)}, [%rd9];
        st.shared.v4.b32 [%r8], {names(20, 4)}; setp.lt.u32 %p1, %t, 16; add.s64 %rd9, %rd2, %rd8;
        @%p1 ld.global.v4.b32 {names(24, 4)}, [%rd9]; @%p1 st.shared.v4.b32 [%r8+2048], {names(24, 4)};
        {proxy} {sync} mov.b64 %rd3, {high}; add.s64 %rd4, %rd3, 128;
        mov.b32 %r30, 0; mov.b32 %r31, 0; mov.b32 %r32, 0; mov.b32 %r33, 0; {fence}
        wgmma.mma_async.sync.aligned.m64n8k{8 if kind == "tf32" else 16}.f32.{kind}.{kind} {names(30, 4)}, %rd3, %rd4,
        1, 1, 1{"" if kind == "tf32" else ", 0, 0"};
        wgmma.commit_group.sync.aligned; {after} {wait}
        add.s64 %rd9, %rd0, %rd8; st.global.v4.b32 [%rd9], {names(30, 4)};"""
    return kernel_text(body, 3, 128)


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_wgmma(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    depth = 8 if kind == "tf32" else 16
    a, b = (torch.randn(n, depth, generator=generator).bfloat16() for n in (64, 8))  # exact in tf32 too
    a, b = (x.to({"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]) for x in (a, b))
    raw = [x.view(torch.int32 if kind == "tf32" else torch.int16).numpy() for x in (a, b)]
    out = np.zeros((4, 32, 4), np.float32)
    counters = execute(wgmma_kernel(kind), out, *raw, shared=2304)
    expected = (a.double() @ b.double().T).numpy()
    register = np.arange(4)
    for warp in range(4):
        rows = 16 * warp + GROUP[:, None] + 8 * (register >> 1)
        np.testing.assert_allclose(out[warp], expected[rows, T[:, None] * 2 + (register & 1)], atol=1e-5)
    assert counters.mma_flops == 2 * 64 * 8 * depth


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"proxy": ""}, "without fence.proxy.async"),
        ({"fence": ""}, "before any wgmma.fence"),
        ({"sync": ""}, "wgmma reads data that another warp wrote"),
        ({"wait": ""}, "accumulator of a wgmma that has not been waited for"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "accumulator of a wgmma that has not been waited for"),
        ({"after": "bar.sync 0; st.shared.b32 [%r8], %t;"}, "wgmma that has not been waited for still reads"),
    ],
)
def test_wgmma_rules(change: dict[str, str], reason: str) -> None:
    out, a, b = np.zeros(512, np.float32), np.zeros(1024, np.float16), np.zeros(128, np.float16)
    with pytest.raises(SimError, match=reason):
        execute(wgmma_kernel(**change), out, a, b, shared=2304)
