"""The completion kernel, executed."""

from __future__ import annotations

import pytest
import torch
from scfg_kernels import complete
from scfg_kernels._triton._device import DeviceLimits
from scfg_kernels._triton.complete import CompleteConfig, complete_config, factors, launch

from lab.ptxsim import recorded
from tests.kernels.cases import by_name, random_maps
from tests.kernels.triton.simulation import ARCHITECTURES, assert_nothing_beside_is_touched, run

CASES = {
    # name: (batch, unconditional, N of every layer, T, fidelity, powers, dtype)
    "official": (2, 1, (70,), 20, "official", 4, torch.float32),
    "paper": (3, 1, (33,), 7, "paper", 4, torch.float32),
    "two-powers": (2, 2, (20,), 5, "official", 2, torch.float32),
    "one-power": (2, 1, (66,), 5, "official", 1, torch.float32),
    "one-power-of-the-paper": (1, 0, (20,), 5, "paper", 1, torch.float32),
    "half": (2, 1, (33,), 63, "official", 4, torch.float16),
    "brain": (3, 1, (81,), 77, "official", 4, torch.bfloat16),
    "more-tokens-than-a-program-takes": (2, 1, (66,), 300, "official", 4, torch.float32),
    "one-row": (2, 1, (1,), 3, "official", 4, torch.float32),
    "expanded": (3, 1, (33,), 7, "paper", 4, torch.float32),
    "sizes-in-turns": (2, 1, (64, 16, 64, 24), 20, "official", 4, torch.float32),
    "sizes-of-the-paper": (3, 1, (36, 9, 36), 20, "paper", 3, torch.float32),
    "sdxl-one-sample": (1, 0, (1024,), 5, "official", 4, torch.float32),
}


def layers(rng, batch, sizes, tokens, dtype):
    own = [random_maps(rng, batch, n, n).to(dtype) for n in sizes]
    # Windows of larger tensors: a read beside a map meets NaN.
    cross = [
        torch.full((batch, n, tokens + 2), torch.nan, dtype=dtype)[..., 1:-1].copy_(random_maps(rng, batch, n, tokens))
        for n in sizes
    ]
    return own, cross


def as_in_one_product(actual, truth, products):
    """Every operand keeps 11 bits, cut off on NVIDIA, and all terms are positive: nothing is off by more than 2^-9 a
    product, and a rounding to the dtype of the result."""
    assert actual.shape == truth.shape
    bound = products * 2**-9 + torch.finfo(actual.dtype).eps
    off = (actual.double() - truth).abs()
    assert (off <= bound * truth + 1e-30).all(), f"relative error {(off / truth).max():.2e} beyond {bound:.2e}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", **by_name(CASES))
def test_completed_maps(rng, request, arch, case):
    batch, unconditional, sizes, tokens, fidelity, powers, dtype = case
    own, cross = layers(rng, batch, sizes, tokens, dtype)
    if "expanded" in request.node.callspec.id:  # one sample for all
        own, cross = ([x[:1].expand_as(x) for x in maps] for maps in (own, cross))
    options = {"unconditional": unconditional, "fidelity": fidelity, "powers": powers}
    (found, start), launches = run(arch, lambda: complete(own, cross, **options, backend="triton"))
    expected, expected_start = complete([x.double() for x in own], [x.double() for x in cross], **options)
    products = factors(fidelity, powers)[0]
    assert [launch.kernel for launch in launches] == ["complete_kernel"] * products
    assert len(found) == len(start) == len(set(sizes))
    for actual, truth in zip(found + start, expected + expected_start, strict=True):
        assert actual.dtype == dtype and actual.is_contiguous()
        as_in_one_product(actual, truth, products)
    assert all(launch.counters.float_atomics == 0 for launch in launches)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_maps_by_tokens_and_by_rows_give_the_same_bits(rng, arch):
    own, cross = layers(rng, 2, (70, 24), 20, torch.float32)
    by_token = [x.mT.contiguous().mT for x in cross]
    padded = [torch.full((2, x.shape[1], 32), torch.nan)[..., :20].copy_(x) for x in cross]
    results = []
    for given in (cross, by_token, padded):
        (found, start), _ = run(arch, lambda given=given: complete(own, given, unconditional=1, backend="triton"))
        results.append(found + start)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_rows_over_several_programs_give_the_same_bits(rng, fidelity):
    own, cross = layers(rng, 2, (70,), 7, torch.float32)
    results = []
    for rows in (16, 32, 64):
        config = CompleteConfig(rows, 32, 16, 4, 3)
        actual, launches = run(80, lambda config=config: launch(own, cross, 1, fidelity, 3, config))
        assert launches[0].grid == (-(-70 // rows), 2, 1)
        results.append(actual)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_nothing_beside_a_map_is_touched(rng):
    """Idle tokens of a sample would write to the next one's."""
    own, cross = random_maps(rng, 3, 37, 37), random_maps(rng, 3, 37, 21)
    call = lambda: complete(own, cross, unconditional=1, fidelity="paper", powers=1, backend="triton")  # noqa: E731
    assert_nothing_beside_is_touched(80, call, "out of bounds|different values|race", masks=1)


@pytest.mark.parametrize("layer_count", [1, 10, 60])
def test_layers_share_a_launch_per_product(layer_count) -> None:
    own, cross = torch.empty(2, 1024, 1024), torch.empty(2, 1024, 77)
    with recorded("sm_90") as launches:
        tokens, start = complete([own] * layer_count, [cross] * layer_count, unconditional=1, backend="triton")
    assert [launch.kernel for launch in launches] == ["complete_kernel"] * 2
    assert launches[0].grid[0] == layer_count * (1024 // (64 if layer_count > 1 else 32))
    assert tokens[0].shape == (layer_count, 1, 77, 1024) and start[0].shape == (layer_count, 1, 1024)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bytes_of_a_real_layer(rng, arch):
    """SD 1.5's 16x16 layers: S once per product, no bank conflicts with maps by token."""
    own, cross = random_maps(rng, 2, 256, 256), random_maps(rng, 2, 256, 77).mT.contiguous().mT
    actual, launches = run(arch, lambda: complete(own, cross, unconditional=1, backend="triton"))
    truth = complete(own.double(), cross.double(), unconditional=1)
    for x, y in zip(actual, truth, strict=True):
        as_in_one_product(x, y, 2)
    assert sum(launch.counters.traffic["self_maps[0]"].moved_bytes for launch in launches) == 2 * own.nbytes
    assert sum(x.counters.shared_wavefronts for x in launches) <= 1.1 * sum(
        x.counters.shared_wavefronts_ideal for x in launches
    )


def test_tiles() -> None:
    a100 = DeviceLimits("sm_80", 108, 166912)
    assert complete_config(2 * 1344, 77, a100) == CompleteConfig(32, 32, 128, 4, 3), "one image of SD 1.5"
    assert complete_config(2 * 10240, 77, a100).block_m == 64, "ten layers of SDXL"
    assert [complete_config(1, tokens, a100).block_t for tokens in (1, 20, 64, 300)] == [16, 32, 64, 128]
    assert complete_config(1, 77, DeviceLimits("gfx942", 304, 65536)).num_stages == 2
