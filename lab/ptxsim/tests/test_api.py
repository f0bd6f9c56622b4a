"""The `simulated` context: what it installs, restores and records."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

from lab.ptxsim import DEVICES, SimError, simulated
from lab.ptxsim.tests.samples import add_kernel, matmul, matmul_kernel, softmax_kernel, vector_add


def test_the_previous_driver_comes_back() -> None:
    before = driver._active
    with simulated(80):
        outer = driver.active
        assert outer.get_current_target().arch == 80 and outer.get_current_target().backend == "cuda"
        assert outer.get_active_torch_device() == torch.device("cpu")
        with simulated(90):
            assert driver.active.get_current_target().arch == 90
        assert driver.active is outer
    assert driver._active is before


def test_the_previous_driver_comes_back_after_an_exception() -> None:
    before = driver._active
    with pytest.raises(SimError, match="store out of bounds"), simulated(80) as run:
        add_kernel[(1,)](torch.zeros(1024), torch.zeros(1024), torch.zeros(10), 1024, BLOCK=1024)
    assert driver._active is before
    assert len(run.launches) == 1
    with pytest.raises(ZeroDivisionError), simulated(80):
        _ = 1 / 0
    assert driver._active is before


@pytest.mark.parametrize("arch", sorted(DEVICES))
def test_each_architecture_is_a_device_of_its_own(arch: int) -> None:
    sample = vector_add()
    with simulated(arch) as run:
        assert sample.correct(sample.run())
        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
    assert properties["multiprocessor_count"] == DEVICES[arch].multiprocessors
    assert properties["max_shared_mem"] == DEVICES[arch].shared_memory
    assert f".target sm_{arch}" in run.launches[0].ptx


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="arch=75"), simulated(75):
        pass
    with pytest.raises(ValueError, match="order='random'"), simulated(80, order="random"):
        vector_add().run()
    with simulated(80), pytest.raises(SimError, match="knows no time"):
        driver.active.get_benchmarker()


def test_interpreter_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SimError, match="TRITON_INTERPRET"), simulated(80):
        pass


def test_launch_records() -> None:
    x, y, out = (torch.ones(2048) for _ in range(3))
    with simulated(80) as run:
        add_kernel[lambda meta: (triton.cdiv(2048, meta["BLOCK"]),)](x, y, out, 2048, BLOCK=1024, num_warps=8)
        add_kernel[(0,)](x, y, out, 0, BLOCK=1024)
    launch = run.launches[0]
    assert (launch.kernel, launch.arch, launch.grid, launch.num_warps) == ("add_kernel", 80, (2, 1, 1), 8)
    assert launch.shared_bytes == 0 and launch.seconds > 0
    counters = launch.counters
    assert counters.ctas == 2 and counters.mma_flops == counters.atomics == counters.barriers == 0
    assert {name: t.unique_bytes for name, t in counters.traffic.items()} == {"x": 8192, "y": 8192, "out": 8192}
    assert counters.total.load_bytes == 16384 and counters.total.store_sectors == 256
    assert counters.total.moved_bytes == counters.total.unique_bytes == 3 * 8192
    assert run.launches[1].grid == (0, 1, 1) and run.launches[1].counters.ctas == 0


def test_cooperative_launches_are_recorded_as_such_and_refused_if_they_do_not_fit() -> None:
    x, y, out = (torch.ones(2048) for _ in range(3))
    most = DEVICES[80].multiprocessors
    with simulated(80) as run:
        for programs, cooperative in ((2, False), (2, True), (most, True), (0, True)):
            add_kernel[(programs,)](x, y, out, 2048, BLOCK=1024, launch_cooperative_grid=cooperative)
        with pytest.raises(SimError, match=f"cooperative launch of {most + 1} CTAs"):
            add_kernel[(most + 1,)](x, y, out, 2048, BLOCK=1024, launch_cooperative_grid=True)
    assert [launch.cooperative for launch in run.launches] == [False, True, True, True]
    assert [launch.counters.ctas for launch in run.launches] == [2, 2, most, 0] and (out == 2).all()


def test_matmul_counters_are_the_arithmetic_ones() -> None:
    sample = matmul()
    with simulated(80) as run:
        sample.run()
    counters = run.launches[0].counters
    assert counters.mma_flops == 2 * 128 * 128 * 128  # 70 x 88 x 120, padded
    assert counters.traffic["c"].store_bytes == 2 * 70 * 88
    assert counters.traffic["a"].load_bytes == 2 * 2 * 70 * 120  # read by both column blocks
    assert counters.shared_wavefronts >= counters.shared_wavefronts_ideal > 0


def test_arguments_that_share_a_storage_are_one_buffer() -> None:
    joined = torch.randn(3, 1024)
    expected = joined[0] + joined[1]
    with simulated(80) as run:
        add_kernel[(1,)](joined[0], joined[1], joined[2], 1024, BLOCK=1024)
    assert torch.equal(joined[2], expected)
    assert list(run.launches[0].counters.traffic) == ["x/y/out"]


def test_misaligned_and_strided_views() -> None:
    base = torch.randn(4, 301)
    out = torch.zeros(4, 301)
    with simulated(80):
        softmax_kernel[(4,)](base[:, 1:], out[:, 1:], 300, 301, BLOCK=512)
    torch.testing.assert_close(out[:, 1:], base[:, 1:].softmax(1))
    assert not out[:, 0].any()


def test_unchecked_bounds_of_a_view_are_those_of_its_storage() -> None:
    whole = torch.zeros(1024)
    with simulated(80):
        add_kernel[(1,)](torch.ones(1024), torch.ones(1024), whole[:512], 1024, BLOCK=1024)
    assert whole.sum() == 2048  # why outputs need guard zones


@triton.jit
def scalars_kernel(out, values, flag, a, b, c, optional):
    if optional is None:
        tl.store(out, a + b)
    tl.store(out + 1, c)
    tl.store(out + 2, tl.load(values[0]) + values[1])
    tl.store(out + 3, flag.to(tl.float32))


def test_scalars_tuples_and_none() -> None:
    out = torch.zeros(4)
    with simulated(80):
        scalars_kernel[(1,)](out, (torch.full((1,), 7.0), 3), True, 2.5, 4, -(2**40), None)
    assert out.tolist() == [6.5, -(2.0**40), 10.0, 1.0]


def test_other_tensors_are_refused() -> None:
    with simulated(80), pytest.raises(SimError, match="must be a CPU tensor"):
        meta = torch.ones(1024, device="meta")
        add_kernel[(1,)](meta, meta, meta, 1024, BLOCK=1024)


def test_too_much_shared_memory_is_refused_by_triton_as_on_the_device() -> None:
    a, b, c = (torch.zeros(128, 128, dtype=torch.float16) for _ in range(3))
    sizes = {"BM": 128, "BN": 128, "BK": 64, "num_stages": 5, "num_warps": 8}
    for arch, expectation in ((80, nullcontext()), (86, pytest.raises(triton.runtime.errors.OutOfResources))):
        with simulated(arch), expectation:
            matmul_kernel[(1, 1)](a, b, c, 128, 128, 128, 128, 128, 128, **sizes)


@triton.jit
def unsupported_kernel(x):
    tl.device_print("x", tl.load(x))


def test_what_is_not_known_stops_the_launch() -> None:
    with simulated(80), pytest.raises(SimError, match=r"unsupported_kernel: PTX line|unsupported_kernel"):
        unsupported_kernel[(1,)](torch.zeros(1))
