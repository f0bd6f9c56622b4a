"""Warp exchange, branches, loops, barriers, scopes of inline assembly."""

from __future__ import annotations

import numpy as np
import pytest

from lab.ptxsim import SimError, machine
from lab.ptxsim.tests.assembly import evaluate, run_body

LANES = np.arange(32)
VALUES = (LANES * 7 + 3).astype(np.uint32)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("bfly.b32 d, a, 5, 31", LANES ^ 5),
        ("bfly.b32 d, a, 4, 0x1807", LANES ^ 4),
        ("up.b32 d, a, 3, 0", np.where(LANES >= 3, LANES - 3, LANES)),
        ("down.b32 d, a, 3, 31", np.where(LANES + 3 <= 31, LANES + 3, LANES)),
        ("down.b32 d, a, 1, 0x1807", np.where(LANES % 8 < 7, LANES + 1, LANES)),
        ("idx.b32 d, a, 9, 31", np.full(32, 9)),
    ],
)
def test_shuffles(text: str, source: np.ndarray) -> None:
    np.testing.assert_array_equal(evaluate(f"shfl.sync.{text}, -1", "u32", ("u32", VALUES)), VALUES[source])


def test_shuffle_tells_which_lanes_are_in_range() -> None:
    result = evaluate("shfl.sync.up.b32 %r9|d, a, 3, 0, -1", "pred", ("u32", VALUES))
    np.testing.assert_array_equal(result, LANES >= 3)


def test_votes() -> None:
    flags = LANES % 3 == 0
    ballot = sum(1 << int(lane) for lane in LANES[flags])
    assert (evaluate("vote.sync.ballot.b32 d, a, -1", "u32", ("pred", flags)) == ballot).all()
    assert evaluate("vote.sync.any.pred d, a, -1", "pred", ("pred", flags)).all()
    assert not evaluate("vote.sync.all.pred d, a, -1", "pred", ("pred", flags)).any()
    assert not evaluate("vote.sync.uni.pred d, !a, -1", "pred", ("pred", flags)).any()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("add.s32", VALUES.sum()),
        ("max.u32", VALUES.max()),
        ("min.s32", 3),
        ("and.b32", np.bitwise_and.reduce(VALUES)),
        ("or.b32", np.bitwise_or.reduce(VALUES)),
        ("xor.b32", np.bitwise_xor.reduce(VALUES)),
    ],
)
def test_warp_reductions(mode: str, expected: int) -> None:
    assert (evaluate(f"redux.sync.{mode} d, a, -1", "u32", ("u32", VALUES)) == expected).all()


def store(register: str) -> str:
    return f"cvt.u64.u32 %rd8, {register}; add.s64 %rd9, %rd0, %o; st.global.b64 [%rd9], %rd8;"


def test_loop_with_a_trip_count_per_thread() -> None:
    out = np.zeros(64, np.int64)
    body = f"""mov.b32 %r1, 0; mov.b32 %r2, 0;
        $again: add.s32 %r1, %r1, %t; add.s32 %r2, %r2, 1; setp.le.u32 %p1, %r2, %t; @%p1 bra $again; {store("%r1")}"""
    run_body(body, out, threads=64, grid=3, check_races=False)  # all CTAs store the same
    np.testing.assert_array_equal(out, np.arange(64) * (np.arange(64) + 1))


def test_divergent_branches_meet_again() -> None:
    out = np.zeros(32, np.int64)
    body = f"""setp.lt.u32 %p1, %t, 10; @!%p1 bra $else; mov.b32 %r1, 1; bra.uni $end; $else: mov.b32 %r1, 2;
        $end: shfl.sync.idx.b32 %r2, %r1, 0, 31, -1; add.s32 %r3, %r1, %r2; {store("%r3")}"""
    run_body(body, out)
    np.testing.assert_array_equal(out, np.where(LANES < 10, 2, 3))


def test_threads_may_leave_early() -> None:
    out = np.zeros(64, np.int64)
    run_body(f"mov.b32 %r1, 5; setp.gt.u32 %p1, %t, 40; @%p1 ret; {store('%r1')}", out, threads=64)
    np.testing.assert_array_equal(out, np.where(np.arange(64) > 40, 0, 5))


@pytest.mark.parametrize("text", ["ret;", "ret.uni;", "exit;"])
def test_nothing_is_executed_after_the_end(text: str) -> None:
    out = np.zeros(32, np.int64)
    run_body(f"mov.b32 %r1, 5; {text} {store('%r1')}", out)
    assert not out.any()


def test_a_warp_that_left_does_not_hold_up_a_barrier() -> None:
    out = np.zeros(64, np.int64)
    run_body(f"mov.b32 %r1, 5; setp.gt.u32 %p1, %t, 31; @%p1 ret; bar.sync 0; {store('%r1')}", out, threads=64)
    np.testing.assert_array_equal(out, np.where(np.arange(64) > 31, 0, 5))


def test_half_a_warp_at_a_barrier_or_shuffle() -> None:
    for text in ("bar.sync 0;", "shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;", "bar.warp.sync -1;"):
        body = f"setp.lt.u32 %p1, %t, 10; @!%p1 bra $end; {text} $end: mov.b32 %r2, 1;"
        with pytest.raises(SimError, match="only some threads of a warp"):
            run_body(body, np.zeros(1, np.int64))


def test_warps_at_different_barriers() -> None:
    body = "setp.lt.u32 %p1, %t, 32; @!%p1 bra $else; bar.sync 0; bra $end; $else: bar.sync 0; $end: mov.b32 %r2, 1;"
    with pytest.raises(SimError, match=r"different bar\.sync"):
        run_body(body, np.zeros(1, np.int64), threads=64)


def test_endless_loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_STEPS", 1000)
    with pytest.raises(SimError, match="seems to hang"):
        run_body("$again: mov.b32 %r1, 1; bra $again;", np.zeros(1, np.int64))


def test_traps_and_the_async_proxy() -> None:
    with pytest.raises(SimError, match="trapped"):
        run_body("trap;", np.zeros(1, np.int64))
    fences = "membar.gl; membar.cta; membar.sys; fence.acq_rel.gpu; fence.sc.cta; fence.acq_rel.sys;"
    run_body(f"{fences} fence.proxy.async.shared::cta; nanosleep.u32 5;", np.zeros(1, np.int64), shared=16)


@pytest.mark.parametrize(
    "text", ["bar.sync 0;", "bar.cta.sync 0;", "barrier.sync 0;", "barrier.cta.sync.aligned 0, 64;"]
)
def test_barriers_of_the_cta(text: str) -> None:
    counters = run_body(text, np.zeros(1, np.int64), threads=64, grid=3)
    assert counters.barriers == 3


def test_registers_of_inner_scopes_are_their_own() -> None:
    out = np.zeros(32, np.int64)
    body = f"""mov.b32 %r1, 5; {{ .reg .b32 %r1, x; .reg .b32 y<3>; mov.b32 %r1, 7; mov.b32 x, 1; add.s32 y2, x, %r1; }}
        {{ .reg .b32 x; mov.b32 x, 2; add.s32 %r1, %r1, x; }} {store("%r1")}"""
    run_body(body, out)
    assert (out == 7).all()


def test_launch_coordinates() -> None:
    from lab.ptxsim import Counters, GlobalMemory, decode, launch
    from lab.ptxsim.tests.assembly import kernel_text

    out = np.zeros(2 * 3 * 5, np.int64)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x;
        mov.u32 %r5, %nctaid.y;
        mad.lo.s32 %r6, %r3, %r5, %r2; mad.lo.s32 %r7, %r6, %r4, %r1; mul.wide.u32 %rd3, %r7, 8;
        add.s64 %rd4, %rd0, %rd3;
        mov.u32 %r8, %ntid.x; add.s32 %r9, %r8, %r7; cvt.u64.u32 %rd5, %r9; st.global.b64 [%rd4], %rd5;"""
    memory = GlobalMemory()
    base = memory.add(out.view(np.uint8), "out").base
    launch(decode(kernel_text(body, 1, 32)), memory, [base], (2, 3, 5), 0, Counters())
    np.testing.assert_array_equal(out, 32 + np.arange(30))


def test_unwritten_registers_are_nan() -> None:
    assert np.isnan(evaluate("add.f32 d, a, %r77", "f32", ("f32", [1.0]))).all()
