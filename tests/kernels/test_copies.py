"""What the three operators that guide have in common: copies of the result, the scale as a number, plain guidance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scfg_kernels import guide, guide_pixels, segment_and_guide
from scfg_kernels.testing import as_layout

from lab.ptxsim import recorded, simulated
from tests.kernels.cases import random_maps

TOKENS = 5
OPS = ("guide", "segment_and_guide", "guide_pixels")


def call_of(op: str, rng: torch.Generator, shape=(2, 4, 13, 18), dtype=torch.float32, layout="contiguous") -> Callable:
    """The operator with everything but the scale and the options."""
    uncond, cond = (as_layout(torch.randn(shape, generator=rng).to(dtype), layout) for _ in range(2))
    if op == "guide_pixels":
        return lambda scale, **options: guide_pixels(uncond, cond, scale, **options)
    batch, grid = shape[0], (-(-shape[2] // 4), -(-shape[3] // 4))
    if op == "guide":
        ids = torch.randint(TOKENS, (batch, *grid), generator=rng)
        return lambda scale, **options: guide(uncond, cond, ids, ids < 2, scale, num_tokens=TOKENS, **options)
    cells = grid[0] * grid[1]
    maps = random_maps(rng, batch, cells, TOKENS).mT.contiguous()
    found = [maps], [maps[:, 0].contiguous()], [grid], grid
    return lambda scale, **options: segment_and_guide(*found, uncond, cond, scale, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels_last"])
def test_copies_are_the_result_one_after_the_other(rng, op, layout):
    call = call_of(op, rng, dtype=torch.float16, layout=layout)
    (once, rate, *_), (twice, same_rate, *_) = call(7.5), call(7.5, copies=2)
    assert torch.equal(twice, once.repeat(2, 1, 1, 1)) and torch.equal(rate, same_rate)
    last = {"memory_format": torch.channels_last}
    assert twice.is_contiguous(**(last if layout == "channels_last" else {}))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_write_the_copies_in_the_same_launch(rng, op, arch):
    call = call_of(op, rng, dtype=torch.float16, layout="channels_last")
    with simulated(arch) as run:
        results = [call(torch.tensor([7.5, 3.0]), copies=copies, backend="triton") for copies in (1, 2)]
    assert len(run.launches) == 2
    (once, rate, *_), (twice, same_rate, *_) = results
    assert torch.equal(twice, once.repeat(2, 1, 1, 1)) and torch.equal(rate, same_rate)
    assert twice.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_number_is_what_a_tensor_of_it_is(rng, op, backend):
    call = call_of(op, rng)
    with simulated(80):
        results = [call(scale, backend=backend) for scale in (7.5, torch.tensor(7.5), torch.tensor([7.5, 7.5]))]
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other, results[0], strict=True))


@pytest.mark.parametrize("copies", [0, 3])
@pytest.mark.parametrize("op", OPS)
def test_another_number_of_copies_is_refused(rng, op, copies):
    with pytest.raises(ValueError, match=f"{op}: copies must be 1 or 2, got {copies}"):
        call_of(op, rng)(7.5, copies=copies)


@pytest.mark.parametrize("op", OPS)
def test_a_number_that_changes_compiles(rng, op):
    torch._dynamo.reset()
    call = call_of(op, rng)
    compiled = torch.compile(lambda scale: call(scale, rate_min=0.1 * scale), fullgraph=True, backend="eager")
    for scale in (2.0, 3.5, 4.0):
        assert torch.equal(compiled(scale)[0], call(scale, rate_min=0.1 * scale)[0])


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("layout", ["sliced", "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_copies_compile_as_one_graph(rng, op, layout, copies):
    """The fake implementation knows shape and strides."""
    torch._dynamo.reset()
    call = call_of(op, rng, layout=layout)
    compiled = torch.compile(lambda: call(7.5, copies=copies), fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(), call(7.5, copies=copies), strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weight", [-0.5, 0.0, 1.0, 7.5])
def test_bounds_that_are_one_are_plain_guidance(rng, backend, weight):
    """In fp32 with one rounding to the dtype; tiles of 2048 pixels, none of which needs another."""
    uncond, cond = torch.randn(2, 3, 4, 33, 68, generator=rng).half()
    with simulated(80) as run:
        result, rate = guide_pixels(uncond, cond, 1.0, rate_min=weight, rate_max=weight, copies=2, backend=backend)
    u, c = uncond.float(), cond.float()
    assert torch.equal(result, (u + weight * (c - u)).half().repeat(2, 1, 1, 1))
    assert torch.equal(rate, torch.full_like(rate, weight))
    if backend == "triton":
        (launch,) = run.launches
        assert launch.grid == (3 * 3, 1, 1) and not launch.cooperative and launch.counters.atomics == 0


def test_images_of_several_sizes_share_a_compiled_kernel(rng):
    """Four sizes of SDXL's latents, which as many programs share; rows that are a multiple of 16 and others."""
    sizes = [(128, 128), (112, 120), (104, 128), (128, 120)]
    with recorded("sm_80") as launches:
        for size in sizes:
            call_of("guide_pixels", rng, (1, 4, *size), torch.float16)(7.5, backend="triton")
    assert len(launches) == len(sizes)
    assert len({str(launch.files["ptx"]) for launch in launches}) == 2
