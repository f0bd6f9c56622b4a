"""Global memory between warps and CTAs: who waits lets others go first, and what nothing orders is a race."""

from __future__ import annotations

import numpy as np
import pytest

from lab.ptxsim import SimError, machine
from lab.ptxsim.machine import MAX_POLLS
from lab.ptxsim.tests.assembly import run_body

FIRST = "setp.eq.u32 %p2, %ctaid.x, 0;"  # of two CTAs; their threads' places in p0 are %rd4, those of the other %rd5
PLACES = "mul.wide.u32 %rd3, %t, 4; add.s64 %rd4, %rd0, %rd3; xor.b64 %rd5, %rd3, 128; add.s64 %rd5, %rd0, %rd5;"
STORE, LOAD, EXCHANGED = "st.global.b32 [%rd4], %t;", "ld.global.b32 %r5, [%rd4];", "ld.global.b32 %r5, [%rd5];"
BARRIER = "bar.sync 0;"
ANNOUNCE = "@%p1 atom.global.gpu.release.add.u32 %r2, [%rd1], 1;"
LISTEN = "@%p1 ld.global.gpu.acquire.b32 %r3, [%rd1];"


def hand_over(before: str = BARRIER, announce: str = ANNOUNCE, listen: str = LISTEN, after: str = BARRIER) -> str:
    """CTA 1 stores, then announces at p1; CTA 0 polls p1, then loads. Thread 0 of each does the talking."""
    return f"""{PLACES} {FIRST} setp.eq.u32 %p1, %t, 0; mov.b32 %r3, 1; @!%p2 bra $OTHER;
        $AGAIN: {listen} setp.eq.u32 %p3, %r3, 0; @%p3 bra $AGAIN;
        {after} {LOAD} mul.wide.u32 %rd6, %t, 4; add.s64 %rd6, %rd6, %rd2; st.global.b32 [%rd6], %r5; ret;
        $OTHER: {STORE} {before} {announce}"""


def handed_over(body: str, **options) -> tuple[np.ndarray, int]:
    """What CTA 0 got from 64 places, and the instructions of all warps."""
    flag, result = np.zeros(1, np.int32), np.full(64, -1, np.int32)
    options = {"cooperative": True, **options}  # CTA 0 waits for a later one
    counters = run_body(body, np.zeros(64, np.int32), flag, result, threads=64, grid=2, **options)
    assert flag[0] == 1
    return result, counters.warp_instructions


@pytest.mark.parametrize("order", ["lockstep", "forward", "backward"])
def test_who_polls_lets_others_go_first(order: str) -> None:
    """The polling loop is at the lower place in the program, which runs first otherwise, for ever."""
    result, instructions = handed_over(hand_over(), order=order)
    np.testing.assert_array_equal(result, np.arange(64))
    assert instructions < 200


ORDERS = pytest.mark.parametrize("order", ["lockstep", "forward", "backward"])
MEET = """setp.ne.u32 %p1, %t, 0; mov.u32 %r1, %nctaid.x; @%p1 bra $END;
    atom.global.gpu.release.add.u32 %r2, [%rd0], 1; $AGAIN: {} setp.lt.u32 %p2, %r3, %r1; @%p2 bra $AGAIN; $END:"""


@pytest.mark.parametrize(
    ("ctas", "order"), [(2, "lockstep"), (2, "forward"), (2, "backward"), (70, "lockstep")], ids=str
)
@pytest.mark.parametrize(
    "listen", ["ld.global.gpu.acquire.b32 %r3, [%rd0];", "atom.global.acquire.gpu.or.b32 %r3, [%rd0], 0;"]
)
def test_only_in_a_cooperative_launch_ctas_may_wait_for_each_other(
    ctas: int, listen: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fit into one batch of the simulator's, where all have announced themselves before the first one listens."""
    monkeypatch.setattr(machine, "MAX_POLLS", 3)
    counter = np.zeros(1, np.int32)
    run_body(MEET.format(listen), counter, grid=ctas, order=order, cooperative=True)
    assert counter[0] == ctas
    for check_races in (True, False):
        with pytest.raises(SimError, match="hangs; unless the launch is cooperative"):
            run_body(MEET.format(listen), np.zeros(1, np.int32), grid=ctas, order=order, check_races=check_races)
    run_body(MEET.format(listen), np.zeros(1, np.int32), order=order)  # alone there is nobody to wait for


TICKET = "setp.ne.u32 %p9, %t, 0; @%p9 bra $END; atom.global.gpu.relaxed.add.u32 %r1, [%rd0], 1; and.b32 %r2, %r1, 1;"


@ORDERS
def test_a_poll_sees_what_all_earlier_ctas_have_done_and_no_later_one(order: str) -> None:
    """Each sets the bit of its ticket and waits for the bits below; those with odd tickets do so first."""
    wait = """atom.global.gpu.acq_rel.or.b32 %r5, [%rd1], %r3; $AGAIN: ld.global.gpu.acquire.b32 %r5, [%rd1];
        and.b32 %r6, %r5, %r4; setp.ne.u32 %p2, %r6, %r4; @%p2 bra $AGAIN; st.global.b32 [%rd3], %r5;"""
    body = f"""{TICKET} setp.eq.u32 %p1, %r2, 0; mov.b32 %r7, 1; shl.b32 %r3, %r7, %r1; sub.s32 %r4, %r3, 1;
        mul.wide.u32 %rd3, %r1, 4; add.s64 %rd3, %rd3, %rd2; @%p1 bra $EVEN; {wait} ret;
        $EVEN: {wait.replace("$AGAIN", "$MORE")} $END:"""
    seen = np.zeros(20, np.int32)
    run_body(body, np.zeros(1, np.int32), np.zeros(1, np.int32), seen, grid=20, order=order)
    np.testing.assert_array_equal(seen, 2 ** np.arange(1, 21) - 1)


@ORDERS
def test_a_lock_that_a_later_cta_holds_is_locked(order: str) -> None:
    """What would change something changes what is there, whoever has done that."""
    locked = """$AGAIN: atom.global.gpu.acquire.cas.b32 %r3, [%rd1], 0, 1; setp.ne.u32 %p2, %r3, 0; @%p2 bra $AGAIN;
        ld.global.b32 %r4, [%rd2]; add.s32 %r4, %r4, 1; st.global.b32 [%rd2], %r4;
        st.global.gpu.release.b32 [%rd1], 0;"""
    body = f"""{TICKET} setp.eq.u32 %p1, %r2, 0; @%p1 bra $EVEN; {locked} ret;
        $EVEN: {locked.replace("$AGAIN", "$MORE")} $END:"""
    lock, total = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run_body(body, np.zeros(1, np.int32), lock, total, grid=20, order=order)
    assert (lock[0], total[0]) == (0, 20)


@pytest.mark.parametrize(
    "poll",
    [
        "ld.global.gpu.acquire.b32 %r3, [%rd0];",
        "ld.relaxed.gpu.global.b32 %r3, [%rd0];",
        "ld.volatile.global.b32 %r3, [%rd0];",
        "atom.global.gpu.acquire.add.u32 %r3, [%rd0], 0;",
        "atom.global.gpu.acquire.cas.b32 %r3, [%rd0], 1, 2;",
    ],
)
def test_a_hang_is_reported_at_once(poll: str) -> None:
    turns = np.zeros(3, np.int32)
    body = f"""$AGAIN: {poll} mul.wide.u32 %rd3, %ctaid.x, 4; add.s64 %rd3, %rd3, %rd1; ld.global.b32 %r4, [%rd3];
        add.s32 %r4, %r4, 1; st.global.b32 [%rd3], %r4; setp.eq.u32 %p1, %r3, 0; @%p1 bra $AGAIN;"""
    with pytest.raises(SimError, match="the kernel hangs"):
        run_body(body, np.zeros(1, np.int32), turns, grid=3)
    assert (turns == MAX_POLLS + 1).all()


def test_acquiring_loads_outside_a_loop_change_nothing() -> None:
    """CTAs that have polled more often than others still run, and in the end with them."""
    out = np.zeros(64, np.int32)
    body = f"""{FIRST} @%p2 ld.global.gpu.acquire.b32 %r1, [%rd0]; mul.wide.u32 %rd3, %t, 4; cvt.u64.u32 %rd4, %ctaid.x;
        shl.b64 %rd4, %rd4, 7; add.s64 %rd3, %rd3, %rd4; add.s64 %rd3, %rd3, %rd1; add.s32 %r2, %t, %ctaid.x;
        {BARRIER} st.global.b32 [%rd3], %r2;"""
    acquiring, ordinary = (
        run_body(text, np.zeros(1, np.int32), out, grid=2) for text in (body, body.replace("gpu.acquire.", ""))
    )
    np.testing.assert_array_equal(out, np.concatenate([np.arange(32), np.arange(1, 33)]))
    assert acquiring.traffic == ordinary.traffic and acquiring.barriers == ordinary.barriers == 2


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [(STORE, EXCHANGED, "RAW"), (STORE, "st.global.b32 [%rd5], %t;", "WAW")],
)
def test_races_between_warps(first: str, second: str, reason: str) -> None:
    for sync in ("", "bar.warp.sync 0xffffffff;", "fence.acq_rel.gpu;"):
        with pytest.raises(SimError, match=f"global memory race: .* p0 .*{reason}"):
            run_body(f"{PLACES} {first} {sync} {second}", np.zeros(64, np.int32), threads=64)
    run_body(f"{PLACES} {first} {BARRIER} {second}", np.zeros(64, np.int32), threads=64)
    run_body(f"{PLACES} {first} {second}", np.zeros(64, np.int32), threads=64, check_races=False)


def test_no_race_within_a_warp_nor_beside_another() -> None:
    data = np.zeros(32, np.int32)
    run_body(f"{PLACES} {STORE} ld.global.b32 %r5, [%rd4]; xor.b64 %rd5, %rd3, 64; add.s64 %rd5, %rd0, %rd5; "
             "ld.global.b32 %r5, [%rd5]; st.global.b32 [%rd4], %r5;", data)  # fmt: skip
    np.testing.assert_array_equal(data, np.arange(32) ^ 16)
    wide, narrow = np.zeros(64, np.int64), "add.s64 %rd2, %rd0, %o; st.global.b8 [%rd2], %t; ld.global.b8 %r1, [%rd2];"
    run_body(f"add.s64 %rd2, %rd0, %o; st.global.b64 [%rd2], %o; {narrow}", wide, threads=64)
    np.testing.assert_array_equal(wide % 256, np.arange(64))


def test_a_narrow_load_of_what_another_warp_stored_in_a_wide_one_is_a_race() -> None:
    body = "add.s64 %rd2, %rd0, %o; st.global.b64 [%rd2], %o; ld.global.b8 %r1, [%rd0+{}];"
    with pytest.raises(SimError, match="RAW"):
        run_body(body.format(511), np.zeros(64, np.int64), threads=64)


def test_two_ctas_that_store_to_one_place_race() -> None:
    with pytest.raises(SimError, match="WAW"):
        run_body(f"{PLACES} {STORE}", np.zeros(32, np.int32), grid=2)
    with pytest.raises(SimError, match="RAW"):  # also in another batch of the simulator's
        run_body(f"{PLACES} {FIRST} @%p2 {STORE} @!%p2 {LOAD}", np.zeros(1024, np.int32), threads=1024, grid=3)


CHAINS = {
    "release": {},
    "acq_rel": {"announce": ANNOUNCE.replace("release", "acq_rel")},
    "of the system": {"announce": ANNOUNCE.replace("gpu", "sys"), "listen": LISTEN.replace("gpu", "sys")},
    "store": {"announce": "@%p1 st.global.gpu.release.b32 [%rd1], 1;"},
    "atomic acquire": {"listen": "@%p1 atom.global.gpu.acquire.add.u32 %r3, [%rd1], 0;"},
}
BROKEN = {
    "barrier before the release": {"before": ""},
    "release": {"announce": ANNOUNCE.replace("release", "relaxed")},
    "release, which is not the default": {"announce": ANNOUNCE.replace("gpu.release.", "")},
    "release beyond the CTA": {"announce": ANNOUNCE.replace("gpu", "cta")},
    "acquire": {"listen": "@%p1 atom.global.gpu.relaxed.add.u32 %r3, [%rd1], 0;"},
    "barrier after the acquire": {"after": ""},
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_release_and_an_acquire_order_ctas(chain: str) -> None:
    result, _ = handed_over(hand_over(**CHAINS[chain]))
    np.testing.assert_array_equal(result, np.arange(64))


@pytest.mark.parametrize("missing", BROKEN)
def test_without_a_part_of_the_chain_it_is_a_race(missing: str) -> None:
    with pytest.raises(SimError, match="global memory race: load from p0"):
        handed_over(hand_over(**BROKEN[missing]))
    result, _ = handed_over(hand_over(**BROKEN[missing]), check_races=False)
    np.testing.assert_array_equal(result, np.arange(64))  # right all the same: only the detector sees it


def test_a_store_over_what_another_cta_has_loaded_needs_order_too() -> None:
    body = f"""{PLACES} {FIRST} setp.eq.u32 %p1, %t, 0; @!%p2 bra $OTHER;
        {LOAD} {{}} ret; $OTHER: {LISTEN} setp.eq.u32 %p3, %r3, 0; @%p3 bra $OTHER; {STORE}"""
    arrays = np.zeros(32, np.int32), np.zeros(1, np.int32)
    run_body(body.format(ANNOUNCE), *arrays, grid=2)
    with pytest.raises(SimError, match="WAR"):
        arrays[1][0] = 0
        run_body(body.format(ANNOUNCE.replace("release", "relaxed")), *arrays, grid=2)


def test_what_a_cta_knows_it_passes_on() -> None:
    """CTA 2 stores, CTA 1 hears of it, CTA 0 hears of CTA 1."""
    body = f"""{PLACES} setp.eq.u32 %p1, %t, 0; mov.u32 %r1, %ctaid.x; setp.eq.u32 %p4, %r1, 2; @%p4 bra $LAST;
        cvt.u64.u32 %rd6, %r1; shl.b64 %rd6, %rd6, 2; add.s64 %rd6, %rd1, %rd6;
        $AGAIN: ld.global.gpu.acquire.b32 %r3, [%rd6+4]; setp.eq.u32 %p3, %r3, 0; @%p3 bra $AGAIN;
        setp.eq.u32 %p2, %r1, 0; @%p2 {LOAD} @%p2 bra $END;
        @%p1 atom.global.gpu.{{}}.add.u32 %r2, [%rd6], 1; ret;
        $LAST: {STORE} @%p1 atom.global.gpu.release.add.u32 %r2, [%rd1+8], 1; $END:"""
    run_body(body.format("release"), np.zeros(32, np.int32), np.zeros(3, np.int32), grid=3, cooperative=True)
    with pytest.raises(SimError, match="load from p0"):
        run_body(body.format("relaxed"), np.zeros(32, np.int32), np.zeros(3, np.int32), grid=3, cooperative=True)


def test_a_counter_is_set_back_only_after_all_others_have_left_it() -> None:
    body = """atom.global.gpu.{}.inc.u32 %r1, [%rd0], 9; setp.eq.u32 %p1, %r1, 2; @%p1 st.global.b32 [%rd0], 0;"""
    body = f"setp.eq.u32 %p2, %t, 0; @!%p2 bra $END; {body} $END:"
    counter = np.zeros(1, np.int32)
    run_body(body.format("acq_rel"), counter, grid=3)
    assert counter[0] == 0
    for weaker in ("acquire", "release", "relaxed"):
        with pytest.raises(SimError, match="atomic operations of others need not be over"):
            run_body(body.format(weaker), np.zeros(1, np.int32), grid=3)
