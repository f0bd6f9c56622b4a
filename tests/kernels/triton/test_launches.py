"""Launches of whole guided steps, and what every operator's launch must be: repeatable, without floating-point atomics.

A guided step may add one launch per product of a captured block and one for the step to what plain guidance launches:
the attention kernels take the place of `scaled_dot_product_attention` one for one.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import scfg_kernels as ops
import torch
from diffusers import StableDiffusionPipeline
from scfg_kernels._launch import OPS, GuideConfig, PixelConfig, device_guard
from scfg_kernels._triton import KERNELS
from scfg_kernels._triton._order import counters
from scfg_kernels.testing import assert_as_accurate_as
from torch.utils._pytree import tree_leaves

import scfg_fast
from lab.measure import CountOps
from lab.ptxsim import FLOAT_ATOMIC, recorded, simulated
from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.guidance import CFGPlusPlus, WeightSchedule
from scfg_fast.guidance.steps import StepWeight
from tests.kernels.cases import random_maps, random_qkv
from tests.kernels.triton.simulation import ARCHITECTURES

BLOCKS = 6
"""Captured blocks of Stable Diffusion 1.5, and of the tiny pipeline: five at latent / 4, one at latent / 8."""
PRODUCTS = 2
"""Of a completion, each of them a launch."""
WEIGHT = {"aten::linalg_vector_norm": 2, "aten::_to_copy": 2, "aten::mul": 2, "aten::sub": 1}
"""Operators of torch for the effective weight of a guided step."""
SDPA = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module", autouse=True)
def kept_counters() -> None:
    """Made once per process."""
    with counters(torch.device("cpu"), 1):
        pass


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """At SD 1.5's own latents, so that 16x16 and 8x8 are captured, and in a dtype that the attention kernels take."""
    return tiny_sd_pipeline(sample_size=64, dtype=torch.bfloat16)


def denoise(pipe: StableDiffusionPipeline, steps: int, prompts: int = 1, backend: str | None = None) -> torch.Tensor:
    """`backend` is asked for in the call: `enable` itself refuses `"triton"` on a CPU."""
    width, side = pipe.unet.config.cross_attention_dim, pipe.unet.config.sample_size
    rng = torch.Generator().manual_seed(3)
    uncond, cond = torch.randn(2, prompts, 77, width, generator=rng).to(pipe.unet.dtype)
    latents = torch.randn(prompts, 4, side, side, generator=rng).to(pipe.unet.dtype)
    return pipe(
        prompt_embeds=cond, negative_prompt_embeds=uncond, latents=latents, num_inference_steps=steps,
        guidance_scale=7.5, output_type="latent", **({"scfg_kwargs": {"backend": backend}} if backend else {}),
    ).images  # fmt: skip


def counted(
    pipe: StableDiffusionPipeline, config: SCFGConfig | None, steps: int, prompts: int, schedule: StepWeight | None
) -> tuple[Counter[str], Counter[str]]:
    """Launches of Triton by kernel, and of torch by operator; plain guidance without a config."""
    if config is not None:
        scfg_fast.enable(pipe, config, schedule=schedule, strict=True)
    try:
        with recorded("sm_80") as launches, CountOps() as counter:
            denoise(pipe, steps, prompts, None if config is None else "triton")
    finally:
        scfg_fast.disable(pipe)
    return Counter(launch.kernel.removesuffix("_kernel") for launch in launches), +counter.counts.inside


def extra(
    pipe: StableDiffusionPipeline, config: SCFGConfig, steps: int, prompts: int = 1, schedule: StepWeight | None = None
) -> tuple[int, dict, dict]:
    """Launches of attention and of Triton beyond plain guidance; Triton's by kernel; torch's others beyond plain."""
    none, plain = counted(pipe, None, steps, prompts, None)
    assert not none
    triton, torch_ops = counted(pipe, config, steps, prompts, schedule)
    torch_ops.subtract(plain)
    torch_ops.pop("aten::_local_scalar_dense", None)  # CFG++ reads the scheduler's tables, which are on the CPU
    return triton.total() + torch_ops.pop(SDPA, 0), dict(triton), {name: n for name, n in torch_ops.items() if n}


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_step_adds_a_launch_of_maps_and_one_per_product_of_a_block_and_one(pipe, prompts) -> None:
    added, triton, others = extra(pipe, SCFGConfig(), 1, prompts)
    assert triton.pop("complete") == PRODUCTS * BLOCKS
    assert triton.pop("segment_and_guide") == 1
    assert triton == {"map": BLOCKS, "lse": 2 * BLOCKS}, "on a GPU attention, which is torch's, leaves its log-sum-exp"
    assert added == (3 + PRODUCTS) * BLOCKS + 1
    assert others == {}, "both halves of the batch are the guided prediction: of one image a view, else written twice"


def test_two_steps_launch_twice_as_much(pipe) -> None:
    added, _, others = extra(pipe, SCFGConfig(), 2)
    assert added == 2 * ((3 + PRODUCTS) * BLOCKS + 1)
    assert others == {}


def test_steps_that_reuse_regions_add_one(pipe) -> None:
    added, triton, others = extra(pipe, SCFGConfig(reuse_every=3), 3)
    assert (triton["segment_and_guide"], triton["guide"]) == (1, 2)
    assert added == (3 + PRODUCTS) * BLOCKS + 1 + 2
    assert others == {}


def test_a_large_layer_adds_one_map_and_torchs_attention() -> None:
    """33x33 tokens at latent / 2: no self-attention map, completion is attention with the cross map as values."""
    large = tiny_sd_pipeline(sample_size=66, dtype=torch.bfloat16)
    _, triton, _ = extra(large, SCFGConfig(levels=[2, 4, 8]), 1)
    assert triton.pop("complete") == PRODUCTS * BLOCKS
    assert triton == {"map": 1 + BLOCKS, "lse": 1 + 2 * BLOCKS, "segment_and_guide": 1}


def test_sixty_layers_are_found_and_guided_in_one_launch_without_a_copy() -> None:
    """As many as Stable Diffusion XL has at 32x32: torch launches nothing, it allocates the results and scratch."""
    rng = torch.Generator().manual_seed(4)
    maps = [random_maps(rng, 1, 1024, 77).mT.contiguous() for _ in range(60)]
    regions = maps, [x[:, 0].contiguous() for x in maps], [(32, 32)] * 60, (32, 32)
    uncond, cond = torch.randn(2, 1, 4, 128, 128, generator=rng).half()
    with recorded("sm_80") as launches, CountOps() as counter:
        ops.segment_and_guide(*regions, uncond, cond, torch.tensor(7.5), backend="triton")
    assert [launch.kernel for launch in launches] == ["segment_and_guide_kernel"]
    assert not +counter.counts.inside


def test_rates_per_pixel_add_one(pipe) -> None:
    added, triton, others = extra(pipe, SCFGConfig.pixels(), 2)
    assert (added, triton) == (2, {"guide_pixels": 2})
    assert others == {}


@pytest.mark.parametrize(
    ("schedule", "prompts"), [(WeightSchedule("linear"), 3), (CFGPlusPlus(0.6), 1)], ids=["linear", "cfgpp"]
)
def test_weights_of_steps_add_one_or_nothing(pipe, schedule, prompts) -> None:
    """Plain guidance of another weight is one launch a step; with regions or rates per pixel it is in theirs."""
    plain = SCFGConfig(rates="none")
    assert extra(pipe, plain, 2, prompts, schedule) == (2, {"guide_pixels": 2}, {})
    added, triton, others = extra(pipe, SCFGConfig.pixels(), 2, prompts, schedule)
    assert (added, triton, others) == (2, {"guide_pixels": 2}, {})
    assert extra(pipe, SCFGConfig(), 2, prompts, schedule)[::2] == (2 * ((3 + PRODUCTS) * BLOCKS + 1), {})


def test_one_rate_for_the_image_adds_nothing(pipe) -> None:
    assert extra(pipe, SCFGConfig(rates="none"), 1) == (0, {}, {})


def test_a_guided_step_executed_is_that_of_torch() -> None:
    """All kernels together, in the simulator, against a step in fp64. 16x16 latents: maps of 4x4 and 2x2."""
    pipe = tiny_sd_pipeline(sample_size=16, dtype=torch.float16)
    results = {}
    for name, dtype, backend in (
        ("torch", torch.float16, "torch"), ("triton", torch.float16, "triton"), ("truth", torch.float64, "torch"),
    ):  # fmt: skip
        handle = scfg_fast.enable(pipe.to(dtype=dtype), strict=True)
        try:
            with simulated(80) as simulation:
                latents = denoise(pipe, 1, backend=backend)
        finally:
            scfg_fast.disable(pipe)
        assert len(simulation.launches) == ((3 + PRODUCTS) * BLOCKS + 1 if name == "triton" else 0)
        results[name] = latents, handle.regions
    (naive, naive_regions), (actual, regions), (truth, true_regions) = results.values()
    assert torch.equal(regions.token_index, true_regions.token_index)
    assert torch.equal(regions.foreground, true_regions.foreground)
    assert_as_accurate_as(actual, naive, truth, name="latents")
    assert_as_accurate_as(regions.rate, naive_regions.rate, true_regions.rate, name="rate")
    assert regions.rate.std() > 0.1, "a step with one rate everywhere would prove nothing"


def operators() -> dict[str, Callable[[], Any]]:
    """A call of every operator; sizes with idle lanes everywhere, and with parts whose order could matter."""
    rng = torch.Generator().manual_seed(5)
    q, k, _ = random_qkv(rng, (1, 2, 17, 77, 40), torch.float16)
    q3, k3, _ = random_qkv(rng, (1, 2, 101, 101, 40), torch.float16)
    lse = torch.randn(1, 2, 17, generator=rng)
    own, cross = random_maps(rng, 2, 70, 70), random_maps(rng, 2, 70, 5)
    maps = [random_maps(rng, 2, n, 40).mT.contiguous() for n in (28, 28, 8)]
    starts = [torch.rand(2, n, generator=rng) for n in (28, 28, 8)]
    regions = maps, starts, [(4, 7), (4, 7), (2, 4)], (4, 7)
    u, c = torch.randn(2, 2, 4, 13, 25, generator=rng).half()
    ids = torch.randint(40, (2, 4, 7), generator=rng)
    options: dict[str, Any] = dict(backend="triton")

    def guide(block_h: int, **tile: Any) -> Any:
        config = GuideConfig(2, 1, 16, block_h, 8, **tile)
        rates = 0.8, 3.0, 15.0, 0.5, "official", "guided", 0.7, "foreground"
        return KERNELS["guide"](u, c, ids, ids < 15, torch.tensor(7.5), 40, 4, *rates, config)

    def guide_pixels(config: PixelConfig) -> Any:
        return KERNELS["guide_pixels"](u, c, torch.tensor(7.5), 0.5, 2.0, "guided", 0.7, config)

    return {
        "attention_map": lambda: ops.attention_map(q, k, lse, **options),
        "attention_map, of fp32": lambda: ops.attention_map(q.float(), k.float(), lse, **options),
        "attention_maps": lambda: ops.attention_maps(q, q, lse, q, k, lse, **options),
        "joint_attention_maps": lambda: ops.joint_attention_maps(q3, k, k3, grid=(9, 11), pool=2, **options),
        "complete": lambda: ops.complete(own, cross, unconditional=1, **options),
        "complete, layers of two sizes": lambda: ops.complete(
            [own, own[:, :20, :20]], [cross, cross[:, :20]], **options
        ),
        "segment": lambda: ops.segment(*regions, **options),
        "guide": lambda: ops.guide(u, c, ids, ids < 15, 7.5, num_tokens=40, **options),
        "guide, in tiles": lambda: guide(4, held=False, block_c=2, rows=1, lines=2),
        "guide, in parts": lambda: guide(1, held=True, block_c=4, rows=1, lines=4),
        "segment_and_guide": lambda: ops.segment_and_guide(*regions, u, c, 7.5, rescale=0.7, **options),
        "guide_pixels": lambda: ops.guide_pixels(u, c, 7.5, rate_min=0.5, rate_max=2.0, **options),
        "guide_pixels, in tiles": lambda: guide_pixels(PixelConfig(2, 1, False, 4, 64)),
        "guide_pixels, in parts": lambda: guide_pixels(PixelConfig(2, 1, True, 4, 64)),
    }


MODULES = sorted({op.removesuffix("s").removeprefix("joint_") if "maps" in op else op for op in OPS})


def bits(result: Any) -> list[bytes]:
    return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in tree_leaves(result)]


def test_every_operator_is_run_twice_below() -> None:
    assert {name.split(",")[0] for name in operators()} == set(OPS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", operators())
def test_two_runs_are_equal_to_the_bit(op, arch) -> None:
    """The second with the warps in another order; and no floating-point atomic, whose order a device does not keep."""
    call, found = operators()[op], []
    for order in ("lockstep", "backward"):
        # One warp after another, warps that store the same word look like a race.
        with simulated(arch, order=order, check_races=order == "lockstep") as simulation:
            found.append(bits(call()))
        assert simulation.launches
        for launch in simulation.launches:
            assert launch.counters.float_atomics == 0
            assert not FLOAT_ATOMIC.search(launch.ptx)
    assert found[0] == found[1]


@pytest.mark.parametrize("op", operators())
def test_what_is_launched_is_launched_under_the_guard_of_its_tensors_device(op, monkeypatch) -> None:
    """Triton launches on the current device, whatever its arguments are on."""
    call = operators()[op]
    guarded = []
    with recorded("sm_80") as launches:

        @contextmanager
        def guard(device: torch.device) -> Iterator[None]:
            before = len(launches)
            yield
            guarded.append((device, len(launches) - before))

        for module in (importlib.import_module(f"scfg_kernels._triton.{name}") for name in MODULES):
            if hasattr(module, "device_guard"):
                monkeypatch.setattr(module, "device_guard", guard)
        call()
    assert sum(count for _, count in guarded) == len(launches) > 0
    assert {device for device, _ in guarded} == {torch.device("cpu")}


def test_the_guard_makes_a_cuda_device_current_and_leaves_others(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or nullcontext())
    with device_guard(torch.device("cpu")), device_guard(torch.device("cuda", 1)):
        pass
    assert made == [torch.device("cuda", 1)]


def far_apart(x: torch.Tensor, room: torch.Tensor, at: int) -> torch.Tensor:
    """x in `room`, its samples 2^30 elements apart."""
    return room.as_strided(x.shape, (1 << 30, *x.stride()[1:]), at).copy_(x)


@pytest.mark.parametrize("op", ["attention_map", "attention_maps", "complete", "guide", "guide_pixels"])
def test_samples_may_be_2_31_elements_apart(op) -> None:
    """The third sample begins at element 2^31 of its tensors, which a product of 32-bit numbers makes negative. Of the
    memory only what the samples have is ever touched."""
    rng = torch.Generator().manual_seed(6)
    room, at = torch.empty((1 << 31) + (1 << 16), dtype=torch.float16), iter(range(0, 1 << 16, 1 << 13))
    q, k, v = (far_apart(x, room, next(at)) for x in random_qkv(rng, (3, 2, 17, 17, 40), torch.float16))
    own, cross = (far_apart(random_maps(rng, 3, 17, n).half(), room, next(at)) for n in (17, 5))
    u, c = (far_apart(x, room, next(at)) for x in torch.randn(2, 3, 4, 13, 25, generator=rng).half())
    ids, lse = torch.randint(5, (3, 4, 7), generator=rng), torch.randn(3, 2, 17, generator=rng)
    arguments, options = {
        "attention_map": ((q, k, lse), {}),
        "attention_maps": ((q, v, lse, q, k, lse), {}),
        "complete": ((own, cross), {"unconditional": 1}),
        "guide": ((u, c, ids, ids < 2, 7.5), {"num_tokens": 5}),
        "guide_pixels": ((u, c, 7.5), {}),
    }[op]
    compact = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments]
    found = []
    for given in (arguments, compact):
        # Races are not looked for, which takes memory in proportion to the tensors; they are in every other test.
        with simulated(80, check_races=False) as simulation:
            found.append(bits(getattr(ops, op)(*given, **options, backend="triton")))
        assert simulation.launches
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("line", "is_float"),
    [
        ("atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2;", True),
        ("@%p1 red.global.add.noftz.f16x2 [%rd1], %r1;", True),
        ("atom.global.gpu.relaxed.add.v4.f32 {%r3, %r4, %r5, %r6}, [%rd0], {%r1, %r1, %r1, %r1};", True),
        ("atom.shared::cta.max.u32 %r1, [%r2], %r3;", False),
        ("redux.sync.add.s32 %r1, %r2, -1;", False),
        ("ld.global.f32 %f1, [%rd1];", False),
    ],
)
def test_float_atomics_are_recognised(line: str, is_float: bool) -> None:
    assert bool(FLOAT_ATOMIC.search(line)) == is_float
