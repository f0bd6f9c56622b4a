"""Loads, stores, atomics, asynchronous copies: values, bounds, alignment, races."""

from __future__ import annotations

import numpy as np
import pytest

from lab.ptxsim import SimError
from lab.ptxsim.tests.assembly import run_body


def test_vector_load_and_store_with_a_mask() -> None:
    source, target = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    body = """setp.lt.u32 %p1, %t, 20; mul.wide.u32 %rd2, %t, 16; add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
        @%p1 ld.global.nc.L1::evict_last.v4.b32 {%r1, %r2, %r3, %r4}, [%rd3+0];
        @%p1 st.global.v4.b32 [%rd4], {%r4, %r3, %r2, %r1};"""
    counters = run_body(body, source, target)
    expected = source.reshape(32, 4)[:, ::-1].copy()
    expected[20:] = 0
    np.testing.assert_array_equal(target.reshape(32, 4), expected)
    assert counters.traffic["p0"].load_bytes == counters.traffic["p0"].unique_load_bytes == 320
    assert counters.traffic["p1"].store_sectors == 10


def test_cache_policies_change_nothing() -> None:
    data = np.arange(32, dtype=np.int64)
    body = """createpolicy.fractional.L2::evict_first.b64 %rd5, 1.0;
        createpolicy.fractional.L2::evict_last.b64 %rd6, 0.5;
        add.s64 %rd2, %rd0, %o; ld.global.L2::cache_hint.b64 %rd3, [%rd2], %rd5; add.s64 %rd3, %rd3, 1;
        st.global.L2::cache_hint.b64 [%rd2], %rd3, %rd6;"""
    run_body(body, data)
    np.testing.assert_array_equal(data, np.arange(1, 33))


@pytest.mark.parametrize(("length", "shared"), [(2, False), (4, False), (8, False), (2, True), (4, True)])
def test_vectors_of_every_length(length: int, shared: bool) -> None:
    """From one buffer to another, straight or through shared memory, which has no vectors of eight."""
    data, out = np.arange(length * 32, dtype=np.int32), np.zeros(length * 32, np.int32)
    registers = "{" + ", ".join(f"%r{i}" for i in range(1, 1 + length)) + "}"
    through = f"st.shared::cta.v{length}.b32 [%r20], {registers}; ld.shared::cta.v{length}.b32 {registers}, [%r20];"
    body = f"""mul.wide.u32 %rd2, %t, {4 * length}; add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
        mov.b32 %r21, smem; mul.lo.u32 %r20, %t, {4 * length}; add.s32 %r20, %r20, %r21;
        ld.global.v{length}.b32 {registers}, [%rd3]; {through if shared else ""}
        st.global.v{length}.b32 [%rd4], {registers};"""
    run_body(body, data, out, shared=1024)
    np.testing.assert_array_equal(out, data)


def test_narrow_loads_extend_with_sign_or_zeros() -> None:
    source, target = np.array([-1, 2, -3, 4] * 8, np.int8), np.zeros(32, np.int64)
    body = """cvt.u64.u32 %rd2, %t; add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %o; ld.global.s8 %rs1, [%rd3];
        cvt.s64.s16 %rd5, %rs1; ld.global.u8 %rs2, [%rd3]; cvt.u64.u16 %rd6, %rs2; sub.s64 %rd7, %rd6, %rd5;
        st.global.b64 [%rd4], %rd7;"""
    run_body(body, source, target)
    np.testing.assert_array_equal(target, np.where(source < 0, 256, 0))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("add.s64 %rd2, %rd0, %o; ld.global.b64 %rd3, [%rd2+8];", "load out of bounds: bytes 256 to 264 of p0"),
        ("add.s64 %rd2, %rd0, %o; st.global.b64 [%rd2+-8], %rd0;", "store out of bounds"),
        ("ld.global.b32 %r1, [%rd0+2];", "misaligned address of p0"),
        ("mov.b64 %rd2, 64; ld.global.b32 %r1, [%rd2];", "is in no tensor"),
        ("ld.global.b32 %r1, [%rd9];", "out of bounds"),
        ("st.global.b32 [%rd0], %t;", "different values to one address"),
        ("ld.shared.b32 %r1, [smem];", "shared read out of bounds: bytes 0 to 4 of 0"),
    ],
)
def test_bad_accesses(body: str, reason: str) -> None:
    with pytest.raises(SimError, match=reason):
        run_body(body, np.zeros(32, np.int64))


def test_two_buffers_in_one_instruction() -> None:
    a, b = np.arange(32, dtype=np.int64), np.arange(100, 132, dtype=np.int64)
    body = """and.b32 %r1, %t, 1; setp.ne.b32 %p1, %r1, 0; selp.b64 %rd3, %rd1, %rd0, %p1; add.s64 %rd3, %rd3, %o;
        ld.global.b64 %rd4, [%rd3]; add.s64 %rd4, %rd4, 1; st.global.b64 [%rd3], %rd4;"""
    run_body(body, a, b)
    odd = np.arange(32) % 2 == 1
    np.testing.assert_array_equal(a, np.arange(32) + ~odd)
    np.testing.assert_array_equal(b, np.arange(100, 132) + odd)


def shared_exchange(first: str, second: str, sync: str) -> str:
    """Two shared accesses by every thread, the second at the other warp's place."""
    return f"""mov.b32 %r1, smem; shl.b32 %r2, %t, 2; add.s32 %r3, %r1, %r2; xor.b32 %r4, %r2, 128;
        add.s32 %r5, %r1, %r4;
        {first} {sync} {second}"""


STORE, LOAD = "st.shared.b32 [%r3], %t;", "ld.shared.b32 %r6, [%r5];"


def test_shared_memory_after_a_barrier() -> None:
    out = np.zeros(64, np.int64)
    body = (
        shared_exchange(STORE, LOAD, "bar.sync 0;")
        + "cvt.u64.u32 %rd3, %r6; add.s64 %rd2, %rd0, %o; st.global.b64 [%rd2], %rd3;"
    )
    counters = run_body(body, out, threads=64, shared=256)
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)
    assert (counters.barriers, counters.shared_wavefronts, counters.shared_wavefronts_ideal) == (1, 4, 4)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (STORE, LOAD, "RAW"),
        (LOAD, STORE, "WAR"),
        (STORE, "st.shared.b32 [%r5], %t;", "WAW"),
        (STORE, "atom.shared.add.u32 %r7, [%r5], 1;", "WAW"),
        (LOAD, "atom.shared.add.u32 %r7, [%r3], 1;", "WAR"),
        ("atom.shared.add.u32 %r7, [%r3], 1;", LOAD, "RAW"),
    ],
)
def test_races_between_warps(first: str, second: str, reason: str) -> None:
    out = np.zeros(64, np.int64)
    with pytest.raises(SimError, match=reason):
        run_body(shared_exchange(first, second, ""), out, threads=64, shared=256)
    run_body(shared_exchange(first, second, "bar.sync 0;"), out, threads=64, shared=256)
    run_body(shared_exchange(first, second, ""), out, threads=64, shared=256, check_races=False)


def test_no_race_within_a_warp_nor_between_ctas() -> None:
    run_body(
        shared_exchange(STORE, LOAD.replace("%r5", "%r3"), ""), np.zeros(1, np.int64), threads=64, shared=256, grid=5
    )


def test_two_readers_then_a_writer_is_a_race() -> None:
    body = """mov.b32 %r1, smem; ld.shared.b32 %r2, [%r1]; setp.lt.u32 %p1, %t, 1; @%p1 st.shared.b32 [%r1], %t;"""
    with pytest.raises(SimError, match="WAR"):
        run_body(body, np.zeros(1, np.int64), threads=64, shared=16)


def test_half_words_do_not_race_with_their_neighbours() -> None:
    body = """mov.b32 %r1, smem; shr.u32 %r2, %t, 5; shl.b32 %r3, %r2, 1; add.s32 %r3, %r3, %r1; mov.b16 %rs1, 5;
        st.shared.b16 [%r3], %rs1; ld.shared.b16 %rs2, [%r3];"""
    run_body(body, np.zeros(1, np.int64), threads=64, shared=16)


def test_uninitialised_shared_memory_is_nan() -> None:
    out = np.zeros(32, np.float32)
    body = "ld.shared.b32 %r1, [smem]; mul.wide.u32 %rd2, %t, 4; add.s64 %rd2, %rd2, %rd0; st.global.b32 [%rd2], %r1;"
    counters = run_body(body, out, shared=16)
    assert np.isnan(out).all() and counters.uninitialised_shared_reads == 1


def test_shared_misalignment() -> None:
    with pytest.raises(SimError, match="misaligned"):
        run_body("mov.b32 %r1, smem; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1+8];", np.zeros(1, np.int64), shared=64)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(stride: int, wavefronts: int) -> None:
    body = f"mov.b32 %r1, smem; mul.lo.s32 %r2, %t, {4 * stride}; add.s32 %r3, %r1, %r2; ld.shared.b32 %r4, [%r3];"
    counters = run_body(body, np.zeros(1, np.int64), shared=4 * 33 * 32)
    assert (counters.shared_wavefronts, counters.shared_wavefronts_ideal) == (wavefronts, 1)


def test_wide_accesses_take_a_wavefront_per_phase() -> None:
    body = "mov.b32 %r1, smem; shl.b32 %r2, %t, 4; add.s32 %r3, %r1, %r2; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];"
    counters = run_body(body, np.zeros(1, np.int64), shared=512)
    assert (counters.shared_wavefronts, counters.shared_wavefronts_ideal) == (4, 4)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (64, 32), (0, 1)])
def test_sectors(stride: int, sectors: int) -> None:
    data = np.zeros(32 * 64, np.uint8)
    counters = run_body(f"mul.wide.u32 %rd2, %t, {stride}; add.s64 %rd3, %rd0, %rd2; ld.global.b32 %r1, [%rd3];", data)
    traffic = counters.total
    assert (traffic.load_bytes, traffic.load_sectors) == (128, sectors)
    assert traffic.unique_load_bytes == 32 * sectors == traffic.moved_bytes


def copy_body(wait: str, sync: str = "bar.sync 0;", size: str = "16") -> str:
    return f"""mov.b32 %r1, smem; shl.b32 %r2, %t, 4; add.s32 %r3, %r1, %r2; mul.wide.u32 %rd3, %t, 16;
        add.s64 %rd4, %rd0, %rd3;
        mov.b32 %r9, {size}; cp.async.cg.shared.global [%r3], [%rd4], 16, %r9; cp.async.commit_group;
        {wait} {sync} xor.b32 %r4, %r3, 512; ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r4];
        add.s64 %rd5, %rd1, %rd3; st.global.v4.b32 [%rd5], {{%r5, %r6, %r7, %r8}};"""


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_asynchronous_copy(wait: str) -> None:
    source, target = np.arange(256, dtype=np.int32), np.zeros(256, np.int32)
    counters = run_body(copy_body(wait), source, target, threads=64, shared=1024)
    np.testing.assert_array_equal(target, np.roll(source, 128))
    assert counters.traffic["p0"].load_bytes == 1024
    run_body(copy_body(wait, size="0"), source, target, threads=64, shared=1024)
    assert not target.any()


@pytest.mark.parametrize(
    ("wait", "sync", "reason"),
    [
        ("", "bar.sync 0;", "cp.async has not been waited for"),
        ("cp.async.wait_group 1;", "bar.sync 0;", "cp.async has not been waited for"),
        ("cp.async.wait_group 0;", "", "RAW"),
    ],
)
def test_asynchronous_copy_without_wait_or_barrier(wait: str, sync: str, reason: str) -> None:
    source = np.arange(256, dtype=np.int32)
    with pytest.raises(SimError, match=reason):
        run_body(copy_body(wait, sync), source, source.copy(), threads=64, shared=1024)


def test_wait_counts_groups_not_copies() -> None:
    body = """mov.b32 %r1, smem; shl.b32 %r2, %t, 4; add.s32 %r3, %r1, %r2; mul.wide.u32 %rd3, %t, 16;
        add.s64 %rd4, %rd0, %rd3;
        cp.async.ca.shared::cta.global [%r3], [%rd4], 16; cp.async.commit_group;
        cp.async.cg.shared.global [%r3+512], [%rd4], 16; cp.async.commit_group; cp.async.wait_group 1;
        ld.shared.b32 %r5, [%r3{}];"""
    source = np.arange(128, dtype=np.int32)
    run_body(body.format(""), source, shared=1024)
    with pytest.raises(SimError, match=r"cp\.async has not been waited for"):
        run_body(body.format("+512"), source, shared=1024)


@pytest.mark.parametrize(
    ("opcode", "start", "operand", "expected"),
    [
        ("add.u32", 5, "%t", 5 + 496),
        ("max.s32", 5, "%t", 31),
        ("min.s32", 5, "%t", 0),
        ("or.b32", 0, "%t", 31),
        ("exch.b32", 5, "%t", 31),
        ("cas.b32", 5, "5, 9", 9),
        ("and.b32", 63, "%r9", 0),
        ("xor.b32", 5, "%t", 5),
        ("inc.u32", 5, "20", (5 + 32) % 21),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared", "shared::cta"])
def test_atomics(space: str, opcode: str, start: int, operand: str, expected: int) -> None:
    memory, old = np.full(1, start, np.int32), np.zeros(32, np.int32)
    where = "[%rd0]" if space == "global" else "[smem]"
    setup = (
        ""
        if space == "global"
        else "setp.eq.u32 %p1, %t, 0; ld.global.b32 %r2, [%rd0]; @%p1 st.shared.b32 [smem], %r2; bar.sync 0;"
    )
    finish = "" if space == "global" else "bar.sync 0; ld.shared.b32 %r3, [smem]; st.global.b32 [%rd0], %r3;"
    scope = "gpu.acq_rel." if space == "global" else ""
    setup = f"mov.b32 %r7, 1; shl.b32 %r8, %r7, %t; not.b32 %r9, %r8; {setup}"
    body = f"""{setup} atom.{space}.{scope}{opcode} %r1, {where}, {operand}; {finish}
        mul.wide.u32 %rd2, %t, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r1;"""
    counters = run_body(body, memory, old, shared=16)
    assert memory[0] == expected and old[0] == start
    if opcode == "add.u32":
        np.testing.assert_array_equal(old, start + np.concatenate([[0], np.arange(31).cumsum()]))
    assert counters.atomics == (32 if space == "global" else 0) and counters.float_atomics == 0


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.u32", 501),
        ("max.s32", 31),
        ("min.s32", 0),
        ("or.b32", 31),
        ("xor.b32", 5),
        ("and.b32", 0),
        ("inc.u32", 31),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared", "shared::cta"])
def test_reductions(space: str, opcode: str, expected: int) -> None:
    """The same operations without the old value, on what is 5 before."""
    total, where = np.full(1, 5, np.int32), "[%rd0]" if space == "global" else "[smem]"
    fill = "setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [smem], 5; bar.sync 0;"
    body = f"red.{space}.{opcode} {where}, %t;"
    if space != "global":
        body = f"{fill} {body} bar.sync 0; ld.shared.b32 %r3, [smem]; st.global.b32 [%rd0], %r3;"
    counters = run_body(body, total, shared=16)
    assert total[0] == expected
    assert counters.atomics == (32 if space == "global" else 0)


@pytest.mark.parametrize("base", ["atom", "red"])
@pytest.mark.parametrize("length", [2, 4, 8])
def test_vectors_of_atomics(length: int, base: str) -> None:
    totals = np.zeros(length, np.float32)
    target = "{" + ", ".join(f"%r{10 + i}" for i in range(length)) + "}, " if base == "atom" else ""
    operands = "{" + ", ".join("%r1" for _ in range(length)) + "}"
    run_body(f"cvt.rn.f32.u32 %r1, %t; {base}.global.relaxed.gpu.add.v{length}.f32 {target}[%rd0], {operands};", totals)
    assert totals.tolist() == [496.0] * length


def test_float_and_packed_atomics() -> None:
    total, pair = np.zeros(4, np.float32), np.zeros(2, np.float16)
    body = """cvt.rn.f32.u32 %r1, %t; red.global.gpu.relaxed.add.f32 [%rd0], %r1; mov.b32 %r2, 0x3C004000;
        red.global.relaxed.gpu.add.noftz.f16x2 [%rd1], %r2; atom.global.add.noftz.f16x2 %r7, [%rd1], %r2;
        setp.eq.u32 %p1, %t, 3;
        @%p1 atom.global.gpu.relaxed.add.v4.f32 {%r3, %r4, %r5, %r6}, [%rd0], {%r1, %r1, %r1, %r1};"""
    counters = run_body(body, total, pair)
    assert total.tolist() == [499, 3, 3, 3] and pair.tolist() == [128, 64]
    assert counters.float_atomics == 100


def test_constant_tables_and_local_memory() -> None:
    from lab.ptxsim.tests.assembly import execute, kernel_text

    out = np.zeros(32, np.int64)
    body = """mov.b64 %rd3, table; ld.global.nc.b32 %r1, [%rd3+4]; mov.b64 %rd4, depot; st.local.b32 [%rd4+4], %t;
        ld.local.b32 %r2, [%rd4+4]; add.s32 %r3, %r1, %r2; cvt.u64.u32 %rd5, %r3; add.s64 %rd6, %rd0, %o;
        st.global.b64 [%rd6], %rd5;"""
    text = kernel_text(body, 1, 32, ".local .align 4 .b8 depot[8];")
    table = ".global .align 4 .b8 table[8] = {0, 0, 0, 0, 7, 1, 0, 0};\n"
    execute(text.replace(".visible", table + ".visible"), out)
    np.testing.assert_array_equal(out, np.arange(32) + 263)
