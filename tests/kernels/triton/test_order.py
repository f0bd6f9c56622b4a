"""Tickets and announcements: one launch, parts of which wait for others."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ptxsim import SimError, simulated
from ptxsim.tests.mutations import with_weaker_order, without_synchronisation
from scfg_kernels._triton import _order
from scfg_kernels._triton._order import announce, counters, leave, take_ticket, wait

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
