"""The `recorded` context: Triton's own path up to the launch, for targets that are not here."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from lab.ptxsim import TARGETS, SimError, recorded, simulated
from lab.ptxsim.tests.samples import add_kernel, matmul_kernel, vector_add


@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_is_compiled_and_recorded_and_not_executed(target: str) -> None:
    before = driver._active
    x, out = torch.ones(2048), torch.full((2048,), 7.0)
    with recorded(target) as launches:
        assert driver.active.get_active_torch_device() == torch.device("cpu")
        for _ in range(2):  # compiled once, recorded twice
            add_kernel[(2,)](x, x, out, 2048, BLOCK=1024, num_warps=8)
    assert driver._active is before
    assert launches[0] == launches[1]
    launch = launches[0]
    assert (launch.kernel, launch.target, launch.grid, launch.num_warps) == ("add_kernel", target, (2, 1, 1), 8)
    assert out.eq(7).all()
    if target.startswith("gfx"):
        assert target in launch.files["amdgcn"].read_text(encoding="utf-8")
        assert launch.files["hsaco"].read_bytes().startswith(b"\x7fELF")
    else:
        assert f".target {target}" in launch.files["ptx"].read_text(encoding="utf-8")
        assert launch.files["cubin"].read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_cooperative_launches_are_recorded_as_such_and_refused_if_they_do_not_fit(target: str) -> None:
    x = torch.ones(1024)
    most = TARGETS[target][1].multiprocessors
    with recorded(target) as launches:
        for programs, cooperative in ((1, False), (most, True), (most + 1, False)):
            add_kernel[(programs,)](x, x, x, 1024, BLOCK=1024, launch_cooperative_grid=cooperative)
        with pytest.raises(SimError, match=f"cooperative launch of {most + 1} CTAs"):
            add_kernel[(most + 1,)](x, x, x, 1024, BLOCK=1024, launch_cooperative_grid=True)
    assert [launch.cooperative for launch in launches] == [False, True, False]


def test_recording_and_simulating_do_not_share_kernels() -> None:
    sample = vector_add()
    with recorded("sm_80") as launches:
        sample.run()
    with simulated(80) as simulation:
        assert sample.correct(sample.run())
    with recorded("sm_80") as again:
        sample.run()
    assert len(launches) == len(simulation.launches) == len(again) == 1


def test_too_much_shared_memory_is_an_error_as_on_the_device() -> None:
    a = torch.empty(256, 256, dtype=torch.float16)

    def multiply() -> None:
        sizes = dict(BM=128, BN=128, BK=128, num_stages=3, num_warps=8)
        matmul_kernel[(1, 1)](a, a, torch.empty_like(a), 256, 256, 256, 256, 256, 256, **sizes)

    with recorded("sm_86"), pytest.raises(OutOfResources, match="shared memory"):
        multiply()
    with recorded("sm_90") as launches:
        multiply()
    assert launches[0].shared_bytes > TARGETS["sm_86"][1].shared_memory


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target='sm_75'"), recorded("sm_75"):
        pass
