"""The completion kernel, executed."""

from __future__ import annotations

import functools

import pytest
import torch
from scfg_kernels import complete
from scfg_kernels._launch import CompleteConfig
from scfg_kernels._triton import KERNELS
from scfg_kernels.testing import assert_as_accurate_as

from lab.ptxsim import recorded
from tests.kernels.cases import by_name, random_maps
from tests.kernels.triton.simulation import ARCHITECTURES, assert_nothing_beside_is_touched, run

CASES = {
    # name: (batch, unconditional, N, T, fidelity, powers, dtype); up to 64 rows are one program
    "official": (2, 1, 70, 20, "official", 4, torch.float32),
    "sd15-8x8": (2, 1, 64, 77, "official", 4, torch.float32),
    "paper": (3, 1, 33, 7, "paper", 4, torch.float32),
    "two-powers": (2, 2, 20, 5, "official", 2, torch.float32),
    "one-power": (1, 0, 20, 5, "paper", 1, torch.float32),
    "half": (2, 1, 33, 63, "official", 4, torch.float16),
    "half-of-several-programs": (3, 1, 81, 77, "official", 4, torch.bfloat16),
    "paper-of-several-programs": (2, 1, 65, 78, "paper", 3, torch.float32),
    "one-power-of-several-programs": (2, 1, 66, 5, "official", 1, torch.float32),
    "many-tokens-of-few-rows": (2, 1, 20, 300, "official", 4, torch.float32),
    "more-tokens-than-a-program-takes": (2, 1, 66, 300, "official", 4, torch.float32),
    "one-row": (2, 1, 1, 3, "official", 4, torch.float32),
    "expanded": (3, 1, 33, 7, "paper", 4, torch.float32),
    "expanded-of-several-programs": (3, 1, 66, 5, "official", 4, torch.float32),
    "sdxl-one-sample": (1, 0, 1024, 5, "official", 4, torch.float32),
}


def both_ways(rng, arch, case, config=None, expanded=False):
    batch, unconditional, n, tokens, fidelity, powers, dtype = case
    # Windows of larger tensors: a read beside a map meets NaN.
    s = torch.full((batch, n + 1, n + 3), torch.nan, dtype=dtype)[:, :n, 2:-1].copy_(random_maps(rng, batch, n, n))
    c = torch.full((batch, n, tokens + 2), torch.nan, dtype=dtype)[..., 1:-1].copy_(random_maps(rng, batch, n, tokens))
    if expanded:  # one sample for all
        s, c = s[:1].expand_as(s), c[:1].expand_as(c)
    options = {"unconditional": unconditional, "fidelity": fidelity, "powers": powers}
    if config is None:
        actual, launches = run(arch, lambda: complete(s, c, **options, backend="triton"))
    else:
        actual, launches = run(arch, lambda: KERNELS["complete"](s, c, unconditional, fidelity, powers, config))
    return actual, complete(s, c, **options), complete(s.double(), c.double(), **options), launches


def assert_completed(actual, naive, truth):
    for name, x, y, z in zip(("tokens", "start"), actual, naive, truth, strict=True):
        assert x.dtype == y.dtype
        assert_as_accurate_as(x, y, z, name=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", **by_name(CASES))
def test_completed_maps(rng, request, arch, case):
    actual, naive, truth, launches = both_ways(rng, arch, case, expanded="expanded" in request.node.callspec.id)
    assert len(launches) == 1
    assert_completed(actual, naive, truth)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", [32, 64])
def test_more_rows_in_each_of_several_programs(rng, arch, rows):
    """What more samples than one get."""
    config = CompleteConfig(4, 1, block_m=rows, block_k=32, block_t=(64, 16), precision="tf32x3")
    actual, naive, truth, (launch,) = both_ways(rng, arch, (3, 1, 81, 77, "official", 4, torch.float32), config)
    assert launch.counters.ctas == 2 * 3 * -(-81 // rows)
    assert_completed(actual, naive, truth)


@pytest.mark.parametrize("rows", [37, 70])
def test_nothing_beside_a_map_is_touched(rng, rows):
    """By one program, and by several. Idle tokens of a sample would write to the next one's."""
    s, c = random_maps(rng, 3, rows, rows), random_maps(rng, 3, rows, 21)
    call = functools.partial(complete, s, c, unconditional=1, backend="triton")
    assert_nothing_beside_is_touched(80, call, "out of bounds|different values|race")


def test_a_layer_of_sdxl_is_one_launch() -> None:
    with recorded("sm_90") as launches:
        complete(torch.empty(2, 1024, 1024), torch.empty(2, 1024, 77), unconditional=1, backend="triton")
    assert [launch.kernel for launch in launches] == ["complete_kernel"]


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_rows_over_several_programs_give_the_same_bits(rng, fidelity):
    case = (2, 1, 70, 7, fidelity, 3, torch.float32)
    state, results = rng.get_state(), []
    for rows in (16, 32, 64):
        rng.set_state(state)
        config = CompleteConfig(4, 1, block_m=rows, block_k=32, block_t=(16, 0), precision="tf32x3")
        actual, _, _, launches = both_ways(rng, 80, case, config)
        assert len(launches) == 1
        results.append(actual)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bytes_of_a_real_layer(rng, arch):
    """SD 1.5's 16x16 layers: S once per product, C and Y once per block of rows."""
    own, cross = random_maps(rng, 2, 256, 256), random_maps(rng, 2, 256, 77)
    actual, launches = run(arch, lambda: complete(own, cross, unconditional=1, backend="triton"))
    naive, truth = (complete(x, y, unconditional=1) for x, y in ((own, cross), (own.double(), cross.double())))
    assert_completed(actual, naive, truth)
    counters = launches[0].counters
    assert counters.traffic["self_map"].moved_bytes == 2 * own.nbytes
    assert counters.shared_wavefronts <= 1.1 * counters.shared_wavefronts_ideal
    assert counters.float_atomics == 0
