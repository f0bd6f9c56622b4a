"""The test kernel that a device is trusted by, executed."""

import pytest
import torch
from scfg_kernels._triton import canary
from scfg_kernels._trust import canary_reasons

from lab.ptxsim import simulated
from tests.kernels.triton.simulation import ARCHITECTURES

CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_canary_agrees_with_torch(arch):
    with simulated(arch) as simulation:
        assert canary_reasons(CPU) == []
    assert [launch.kernel for launch in simulation.launches] == ["canary_kernel"]


def test_a_wrong_exponential_is_seen():
    """As on a device whose compiler is at fault."""
    with simulated(80, rewrite=lambda ptx: ptx.replace("ex2.approx", "neg", 1).replace("neg.ftz.f32", "neg.f32", 1)):
        assert canary.disagreement(CPU) or canary_reasons(CPU)


def test_without_a_driver_there_is_a_reason():
    assert "fails on this device" in canary_reasons(CPU)[0]
