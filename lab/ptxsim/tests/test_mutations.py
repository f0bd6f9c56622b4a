"""The self-test of the checks: programs broken on purpose must be caught.

A mutant is caught if the simulator raises or the result is wrong. One that is not must be provably harmless: dropping
a barrier or a wait that nothing needs must give the same bits when the warps run one after another, in both orders,
and a dropped fence must be backed by another one. Nothing is skipped. How many there are depends on what the compiler
makes; of the version that README.md has the numbers of, they are asserted.
"""

from __future__ import annotations

import pytest
import torch
import triton

from lab.ptxsim import SimError, simulated
from lab.ptxsim.tests.mutations import (
    Mutant,
    with_weaker_order,
    without_all,
    without_masks,
    without_synchronisation,
)
from lab.ptxsim.tests.samples import SAMPLES, Guarded, Sample, last_one_out

DROPPED = {80: (13, 4), 90: (22, 4)}  # by Triton 3.8.0: caught, and shown to be redundant


def run_mutant(sample: Sample, arch: int, mutant: Mutant, **options) -> tuple[str, Guarded | None]:
    """Why the mutant was caught, or an empty string; and its output."""
    try:
        with simulated(arch, rewrite=lambda _: mutant.ptx, **options):
            output = sample.run()
    except SimError as error:
        return error.reason, None
    return ("" if sample.correct(output) else "wrong result"), output


def harmless(sample: Sample, arch: int, mutant: Mutant, reference: torch.Tensor) -> bool:
    """Whether a mutant that was not caught is right under other interleavings, or another fence does its work."""
    if "fence" in mutant.what:
        reason, _ = run_mutant(sample, arch, without_all(mutant.ptx, mutant.what))
        return bool(reason)
    for order in ("forward", "backward"):
        _, output = run_mutant(sample, arch, mutant, check_races=False, order=order)
        if output is None or not output.intact() or not torch.equal(output.view, reference):
            return False
    return True


def compiled(make, arch: int) -> tuple[Sample, torch.Tensor, str]:
    torch.manual_seed(0)
    sample = make()
    with simulated(arch) as run:
        output = sample.run()
    assert sample.correct(output)
    return sample, output.view, run.launches[-1].ptx


@pytest.mark.parametrize("arch", [80, 90])
def test_dropped_synchronisation_is_caught(arch: int) -> None:
    caught, redundant, missed = [], [], []
    for make in SAMPLES:
        sample, reference, ptx = compiled(make, arch)
        for mutant in without_synchronisation(ptx):
            reason, _ = run_mutant(sample, arch, mutant)
            name = f"{sample.name}: {mutant}"
            if reason:
                caught.append(name)
            else:
                (redundant if harmless(sample, arch, mutant, reference) else missed).append(name)
    assert not missed
    assert len(caught) >= 2 * len(redundant) and len(caught) >= 10
    if triton.__version__ == "3.8.0":
        assert (len(caught), len(redundant)) == DROPPED[arch], redundant


@pytest.mark.parametrize("arch", [80, 90])
def test_dropped_order_between_ctas_is_caught(arch: int) -> None:
    """The barrier before the release, and every weaker order. Of the two barriers after the acquire one is enough."""
    sample, reference, ptx = compiled(last_one_out, arch)
    barriers, orders = list(without_synchronisation(ptx)), list(with_weaker_order(ptx))
    assert len(barriers) == 3 and len(orders) == 3
    for mutant in orders:
        assert "global memory race: load from parts" in run_mutant(sample, arch, mutant)[0], mutant
    assert "global memory race: load from parts" in run_mutant(sample, arch, barriers[0])[0]
    assert "shared memory race" in run_mutant(sample, arch, barriers[1])[0]
    assert harmless(sample, arch, barriers[2], reference)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("make", SAMPLES)
def test_stripped_masks_are_caught(make, arch: int) -> None:
    sample, _, ptx = compiled(make, arch)
    mutants = list(without_masks(ptx))
    assert len(mutants) == 2
    for mutant in mutants:
        assert run_mutant(sample, arch, mutant)[0], mutant


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("make", SAMPLES[1:])
def test_too_little_shared_memory_is_caught(make, arch: int) -> None:
    torch.manual_seed(0)
    sample = make()
    with simulated(arch) as run:
        sample.run()
    for size in (0, run.launches[0].shared_bytes // 2, run.launches[0].shared_bytes - 4):
        with pytest.raises(SimError, match=r"shared .* out of bounds"), simulated(arch, shared_bytes=size):
            sample.run()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("make", SAMPLES)
def test_correct_programs_give_the_same_bits_in_any_warp_order(make, arch: int) -> None:
    sample, reference, _ = compiled(make, arch)
    for order in ("forward", "backward"):
        with simulated(arch, order=order):
            output = sample.run()
        assert output.intact() and torch.equal(output.view, reference)
