"""Tickets, announcements and meetings: one launch, parts of which wait for others."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from scfg_kernels._triton import _order
from scfg_kernels._triton._order import announce, counters, leave, leave_meeting, meet, take_ticket, wait

from lab.ptxsim import DEVICES, SimError, simulated
from lab.ptxsim.tests.mutations import with_weaker_order, without_synchronisation
from tests.kernels.triton.simulation import ARCHITECTURES


@triton.jit
def double_sum_kernel(x, squares, result, counters, parts, N: tl.constexpr, LENGTH: tl.constexpr, LATE: tl.constexpr):
    """Programs 0 .. parts - 1 square a part each; as many others sum all squares, each for one element of `result`."""
    ticket = take_ticket(counters)
    first = ticket < parts
    if LATE:
        first = ticket >= parts  # the wrong way round: those who wait come first
    part = ticket % parts
    at = tl.arange(0, N)
    if first:
        value = tl.load(x + part * N + at)
        tl.store(squares + part * N + at, value * value)
        announce(counters + 2)
    else:
        wait(counters + 2, parts)
        total = tl.zeros([N], tl.float32)
        for other in tl.range(0, parts):
            total += tl.load(squares + other * N + at)
        tl.store(result + part, tl.sum(total) + part)
    leave(counters, counters + 1, 2 * parts, LENGTH)


@triton.jit
def last_sums_kernel(x, squares, result, counters, parts, N: tl.constexpr):
    at = tl.arange(0, N)
    part = tl.program_id(0)
    value = tl.load(x + part * N + at)
    tl.store(squares + part * N + at, value * value)
    if announce(counters) == parts - 1:
        total = tl.zeros([N], tl.float32)
        for other in tl.range(0, parts):
            total += tl.load(squares + other * N + at)
        tl.store(result, tl.sum(total))
        tl.store(counters, 0)


@triton.jit
def meeting_kernel(x, squares, running, result, counters, parts, N: tl.constexpr):
    """`parts` programs per sample meet twice: each adds all squares of its sample to its own x, then stores what its
    neighbour has got."""
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, at = sample * parts * N, tl.arange(0, N)
    value = tl.load(x + first + part * N + at)
    tl.store(squares + first + part * N + at, value * value)
    meet(counters + sample, parts)
    total = value
    for other in tl.range(0, parts):
        total += tl.load(squares + first + other * N + at)
    tl.store(running + first + part * N + at, total)
    meet(counters + sample, 2 * parts)
    tl.store(result + first + part * N + at, tl.load(running + first + (part + 1) % parts * N + at))
    leave_meeting(counters + sample, 3 * parts)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("nan"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("parts", [1, 5, 40])
def test_who_waits_reads_what_all_others_stored(arch, parts) -> None:
    x = torch.randn(parts, 128, generator=torch.Generator().manual_seed(parts))
    result = torch.empty(parts)
    for _ in range(2):  # the second launch finds the counters as the first did
        with simulated(arch), counters(x.device, 3) as zeros:
            double_sum_kernel[(2 * parts,)](x, poisoned(x), result, zeros, parts, N=128, LENGTH=4, LATE=False)
        assert not zeros.any()
        torch.testing.assert_close(result, x.square().sum() + torch.arange(parts))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_last_one_out_reads_what_all_others_stored(arch) -> None:
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(0))
    result = torch.empty(1)
    with simulated(arch), counters(x.device, 1) as zeros:
        last_sums_kernel[(33,)](x, poisoned(x), result, zeros, 33, N=128)
    assert not zeros.any()
    torch.testing.assert_close(result[0], x.square().sum())


def hold_meeting(x: torch.Tensor, zeros: torch.Tensor, cooperative: bool = True) -> torch.Tensor:
    """x [samples, parts, N] -> x squared and summed over the parts, plus x, of the next part."""
    result = poisoned(x)
    samples, parts, columns = x.shape
    meeting_kernel[(samples * parts,)](
        x, poisoned(x), poisoned(x), result, zeros, parts, N=columns, launch_cooperative_grid=cooperative
    )
    return result


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("samples", "parts"), [(1, 1), (3, 5), (2, 40)])
def test_programs_that_meet_read_what_all_others_of_their_sample_stored(arch, samples, parts) -> None:
    x = torch.randn(samples, parts, 128, generator=torch.Generator().manual_seed(parts))
    expected = (x.square().sum(1, keepdim=True) + x).roll(-1, 1)
    for _ in range(2):  # the second launch finds the counters as the first did
        with simulated(arch) as run, counters(x.device, samples) as zeros:
            result = hold_meeting(x, zeros)
        assert not zeros.any() and run.launches[0].cooperative
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_meeting_gives_the_same_bits_whoever_comes_first(order: str) -> None:
    x, results = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0)), []
    for each in ("lockstep", order):
        with simulated(80, order=each), counters(x.device, 2) as zeros:
            results.append(hold_meeting(x, zeros))
        assert not zeros.any()
    assert torch.equal(*results)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("samples", "parts"), [(1, 2), (3, 5), (2, 40)])
def test_a_meeting_without_a_cooperative_launch_is_an_error_and_its_counters_are_forgotten(
    arch, samples, parts
) -> None:
    """Also where all programs happen to run side by side."""
    x = torch.ones(samples, parts, 128)
    hang = pytest.raises(SimError, match="hangs; unless the launch is cooperative")
    with hang, simulated(arch), counters(x.device, samples) as zeros:
        hold_meeting(x, zeros, cooperative=False)
    assert zeros.any() and (x.device, 0) not in _order._KEPT


def test_a_meeting_of_more_programs_than_may_be_resident_is_refused() -> None:
    x = torch.ones(1, DEVICES[80].multiprocessors + 1, 128)
    with pytest.raises(SimError, match="a cooperative launch of 109 CTAs"), simulated(80):
        hold_meeting(x, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_part_of_announce_and_wait_can_be_left_out(arch) -> None:
    """The simulator finds a race without the barrier before the release, without the release, without the acquire."""
    x, result = torch.ones(3, 128), torch.empty(3)

    def launch(ptx: str | None = None) -> str:
        zeros = torch.zeros(4, dtype=torch.int32)
        with simulated(arch, rewrite=lambda compiled: ptx or compiled) as run:
            double_sum_kernel[(6,)](x, poisoned(x), result, zeros, 3, N=128, LENGTH=4, LATE=False)
        assert not zeros.any()
        return run.launches[0].ptx

    ptx = launch()
    orders = [mutant for mutant in with_weaker_order(ptx) if not mutant.what.endswith("acq_rel as release")]
    release = ptx.index("acq_rel")
    barrier = ptx[:release].count("bar.sync")
    broken = [mutant for mutant in without_synchronisation(ptx) if mutant.number == barrier]
    assert len(broken) == 1 and len({mutant.number for mutant in orders}) >= 3
    unreached = ["ld.global.gpu.acquire as relaxed #3"]  # inside the loop: here all have announced before it
    missed = []
    for mutant in [*broken, *orders]:
        try:
            launch(mutant.ptx)
            missed.append(str(mutant))
        except SimError as error:
            assert "global memory race" in str(error)
    assert missed in ([], unreached)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_part_of_a_meeting_can_be_left_out(arch) -> None:
    """Of both meetings the barrier before the release, the release and the acquires; of the announcement that ends them
    both orders. Which acquire comes last, the one in front of the loop or the one in it, depends on the order of
    programs."""
    x = torch.ones(2, 3, 128)

    def launch(ptx: str | None = None, order: str = "lockstep") -> str:
        zeros = torch.zeros(2, dtype=torch.int32)
        with simulated(arch, order=order, rewrite=lambda compiled: ptx or compiled) as run:
            hold_meeting(x, zeros)
        assert not zeros.any()
        return run.launches[0].ptx

    def caught(ptx: str, order: str) -> bool:
        try:
            launch(ptx, order)
        except SimError as error:
            assert "global memory race" in str(error)
            return True
        return False

    ptx = launch()
    releases = [match.start() for match in re.finditer("acq_rel", ptx)]
    needed = [ptx[:release].count("bar.sync") for release in releases[:2]]
    barriers = [mutant for mutant in without_synchronisation(ptx) if mutant.number in needed]
    orders = list(with_weaker_order(ptx))
    assert len(releases) == 3 and len(barriers) == 2 and len({mutant.number for mutant in orders}) == 7
    missed = [m for m in [*barriers, *orders] if not any(caught(m.ptx, order) for order in ("lockstep", "forward"))]
    # `wait` acquires all that the announcement before it could have
    assert [str(mutant) for mutant in missed] == [f"atom.global.gpu.acq_rel as release #{number}" for number in (1, 4)]


def test_a_launch_that_waits_for_later_tickets_is_an_error_and_its_counters_are_forgotten() -> None:
    x, result = torch.ones(40, 128), torch.empty(40)
    with pytest.raises(SimError, match="polls for what none"), simulated(80), counters(x.device, 3) as zeros:
        double_sum_kernel[(80,)](x, x.clone(), result, zeros, 40, N=128, LENGTH=4, LATE=True)
    assert zeros.any() and x.device not in _order._KEPT


def test_counters_are_kept_and_grow() -> None:
    device = torch.device("cpu")
    with counters(device, 3) as first:
        pass
    with counters(device, 3) as again:
        pass
    with counters(device, 5000) as more:
        pass
    assert again is first and more.numel() >= 5000 and more.dtype == torch.int32 and not more.any()
