"""Whole runs of a tiny Stable Diffusion pipeline against the literal reference: images, regions, rates."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)

import scfg_fast
from lab.reference.official import literal_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast import Regions, SCFGConfig

PROMPTS = ["a red cat on the grass", "a blue boat", "a girl and a dog in a house"]
NEGATIVES = ["", "a car", "a black bird on a table"]
STEPS = 4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_sd_pipeline(sample_size=32)


@pytest.fixture(autouse=True)
def stock_again(pipe: StableDiffusionPipeline):
    scheduler = pipe.scheduler
    yield
    scfg_fast.disable(pipe)
    pipe.scheduler = scheduler


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def run(pipe, prompts=PROMPTS, negatives=NEGATIVES, seeds=None, **kwargs) -> torch.Tensor:
    options = dict(num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent") | kwargs
    seeds = generators(len(prompts)) if seeds is None else [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(prompts, negative_prompt=negatives, generator=seeds, **options).images


def assert_parity(pipe, tolerance: float = TOLERANCE, *, config: SCFGConfig | None = None, literal=None, **kwargs):
    """Ours equals the literal run, and both differ from plain guidance by far more than the tolerance."""
    with otherwise_rounded(pipe):
        expected, _ = literal_run(
            pipe, PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=kwargs.get("guidance_scale", 7.5), seeds=[0, 1, 2],
            height=kwargs.get("height"), width=kwargs.get("width"),
            guidance_rescale=kwargs.get("guidance_rescale", 0.0), **(literal or {}),
        )  # fmt: skip
    plain = run(pipe, **kwargs)
    handle = scfg_fast.enable(pipe, config)
    actual = run(pipe, **kwargs)
    assert handle.stats.steps_applied == pipe.num_timesteps and not handle.stats.steps_skipped
    assert relative(actual, expected) < tolerance
    assert relative(plain, expected) > 100 * tolerance


SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_batch_of_three_equals_the_published_method(pipe, name: str) -> None:
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    assert_parity(pipe)


def compatible_schedulers() -> list[str]:
    return sorted({cls.__name__ for cls in tiny_sd_pipeline(sample_size=8).scheduler.compatibles})


@pytest.mark.parametrize("name", compatible_schedulers())
def test_every_compatible_scheduler(pipe, name: str) -> None:
    """Every scheduler diffusers lists as compatible: guided at every denoiser call, finite, different from plain."""
    cls = next(cls for cls in pipe.scheduler.compatibles if cls.__name__ == name)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    calls = []
    counter = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    plain = run(pipe)
    plain_calls = len(calls)
    handle = scfg_fast.enable(pipe)
    guided = run(pipe)
    counter.remove()
    assert handle.stats.steps_applied == plain_calls == len(calls) - plain_calls
    assert torch.isfinite(guided).all()
    assert relative(guided, plain) > 1e-4


def test_every_stage_of_every_step(pipe) -> None:
    """Regions, foreground and rates of each step, not only the final image."""
    with otherwise_rounded(pipe):
        _, history = literal_run(pipe, PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=7.5, seeds=[0, 1, 2])
    seen: list[Regions] = []
    scfg_fast.enable(pipe, on_regions=lambda step, regions: seen.append(regions.clone()))
    run(pipe)
    assert [regions.step for regions in seen] == list(range(STEPS))
    for regions, stages in zip(seen, history, strict=True):
        assert torch.equal(regions.token_index, stages["ids"])
        assert torch.equal(regions.foreground, stages["foreground"].bool().view_as(regions.foreground))
        torch.testing.assert_close(regions.rate, stages["rate"].view_as(regions.rate), rtol=1e-4, atol=1e-5)
    assert len(set(seen[0].token_index.flatten().tolist())) > 3


@pytest.mark.parametrize("height, width", [(256, 256), (104, 200), (520, 136)], ids=["square", "104x200", "520x136"])
def test_any_size_that_is_a_multiple_of_eight(pipe, height: int, width: int) -> None:
    """13 x 25 and 65 x 17 latents: odd grids at every level, ragged cells at the border."""
    assert_parity(pipe, height=height, width=width)


def test_guidance_rescale(pipe) -> None:
    assert_parity(pipe, guidance_rescale=0.7)


@pytest.mark.parametrize("scale", [1.5, 3.0, 7.5, 16.0, 20.0])
def test_guidance_scales_across_the_clamps(pipe, scale: float) -> None:
    """Above 15 the last clamp lowers the rate below 1; above 18.75 it wins over rate_min everywhere."""
    assert_parity(pipe, guidance_scale=scale)


def test_v_prediction() -> None:
    """SD 2.x: the rate is the same for v, because it differs from the noise by one factor per step."""
    assert_parity(tiny_sd_pipeline(sample_size=32, prediction_type="v_prediction"))


def test_paper_fidelity(pipe) -> None:
    literal = dict(completion="paper", rate_min=None, rate_max=None, max_scale=None, sigma=0.0)
    assert_parity(pipe, config=SCFGConfig.paper(), literal=literal)


def test_channels_last() -> None:
    pipe = tiny_sd_pipeline(sample_size=32)
    with otherwise_rounded(pipe):
        expected, _ = literal_run(pipe, PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=7.5, seeds=[0, 1, 2])
    pipe.unet.to(memory_format=torch.channels_last)
    scfg_fast.enable(pipe)
    assert relative(run(pipe), expected) < TOLERANCE


@pytest.mark.any_rounding("errors of one step, far above those of a cell that falls elsewhere")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_as_accurate_as_the_published_code(dtype: torch.dtype) -> None:
    """One step: the guided noise is at most twice as far from the fp64 truth as the literal code run in that dtype."""
    pipe = tiny_sd_pipeline(sample_size=32, dtype=dtype)
    truth_pipe = tiny_sd_pipeline(sample_size=32)
    noise = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = dict(steps=1, guidance_scale=7.5)
    truth, _ = literal_run(truth_pipe, PROMPTS, NEGATIVES, latents=noise.double(), **options)
    literal, _ = literal_run(pipe, PROMPTS, NEGATIVES, latents=noise, **options)
    scfg_fast.enable(pipe)
    actual = run(pipe, latents=noise, num_inference_steps=1)
    assert actual.dtype == dtype
    rms = lambda x: float((x.double() - truth.double()).square().mean().sqrt())  # noqa: E731
    assert rms(actual) <= 2.0 * rms(literal)


def test_a_batch_equals_its_images_alone(pipe) -> None:
    """Per-sample independence; products of other batch sizes may round differently, nothing more."""
    scfg_fast.enable(pipe)
    with otherwise_rounded(pipe):
        batch = run(pipe)
    for index in range(3):
        alone = run(pipe, [PROMPTS[index]], [NEGATIVES[index]], seeds=[index])
        assert relative(batch[index : index + 1], alone) < TOLERANCE


def test_permuting_the_batch_permutes_the_images(pipe) -> None:
    scfg_fast.enable(pipe)
    order = [2, 0, 1]
    expected = run(pipe)[order]
    actual = run(pipe, [PROMPTS[i] for i in order], [NEGATIVES[i] for i in order], seeds=order)
    assert relative(actual, expected) < TOLERANCE


def test_the_same_seed_gives_the_same_bytes(pipe) -> None:
    scfg_fast.enable(pipe)
    assert torch.equal(run(pipe), run(pipe))


def test_images_per_prompt_equal_repeated_prompts(pipe) -> None:
    scfg_fast.enable(pipe)
    expected = run(pipe, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, [NEGATIVES[0]] * 2 + [NEGATIVES[1]] * 2)
    actual = run(pipe, PROMPTS[:2], NEGATIVES[:2], seeds=range(4), num_images_per_prompt=2)
    assert relative(actual, expected) < TOLERANCE


def test_prompt_embeds_equal_the_prompt(pipe) -> None:
    scfg_fast.enable(pipe)
    embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=NEGATIVES)
    actual = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generators(3), num_inference_steps=STEPS,
        guidance_scale=7.5, output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(actual, run(pipe))


def test_the_negative_prompt_moves_the_foreground(pipe) -> None:
    """The foreground comes from the unconditional half, which is the negative prompt's when there is one."""
    seen: list[Regions] = []
    scfg_fast.enable(pipe, on_regions=lambda step, regions: seen.append(regions.clone()))
    run(pipe, num_inference_steps=1)
    run(pipe, negatives=["a house", "a tree", "a sea"], num_inference_steps=1)
    assert torch.equal(seen[0].token_index, seen[1].token_index)
    assert not torch.equal(seen[0].foreground, seen[1].foreground)
