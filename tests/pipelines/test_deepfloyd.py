"""DeepFloyd IF's pipelines against their own `__call__` with only the guidance line replaced by the published one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnAddedKVProcessor, SlicedAttnAddedKVProcessor
from torch._dynamo.testing import CompileCounter

import scfg_fast
from lab.reference.deepfloyd import replaced_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.deepfloyd import STAGE_ONE, STAGE_TWO, if_arguments, tiny_if_pipeline
from scfg_fast import Regions, SCFGConfig, SCFGWarning
from scfg_fast.cli.commands import _config_for, read_config
from scfg_fast.cli.session import Session
from scfg_fast.guidance import CharacteristicGuidance, LossGuidance, WeightSchedule

NAMES = STAGE_ONE + STAGE_TWO
TOLERANCE = 5e-6
# The first steps of a run divide by a signal near zero and clip, which magnifies rounding some hundred times, in stock
# too; these do not. `test_every_stage_of_every_step` has all of a run.
LATE = {"timesteps": [300, 225, 150, 75], "guidance_scale": 4.0}


def stage_of(name: str) -> int:
    return 2 if name in STAGE_TWO else 1


def call(pipe: DiffusionPipeline, *args: Any, **overrides: Any) -> torch.Tensor:
    return pipe(**if_arguments(type(pipe).__name__, *args, **(LATE | overrides))).images


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_with_its_guidance_line_replaced(name: str) -> None:
    pipe = tiny_if_pipeline(name)
    plain = call(pipe)
    with otherwise_rounded(pipe):
        expected, history = replaced_run(pipe, if_arguments(name, **LATE), stage=stage_of(name))
    handle = scfg_fast.enable(pipe, strict=True)
    actual = call(pipe)
    assert handle.stats.steps_applied == len(history) >= 3 and not handle.stats.steps_skipped
    assert relative(actual, expected.images) < TOLERANCE
    assert relative(plain, expected.images) > 1000 * TOLERANCE
    scfg_fast.disable(pipe)
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [(STAGE_ONE[0], None), (STAGE_TWO[0], None), (STAGE_ONE[0], DPMSolverMultistepScheduler)],
    ids=["stage-one", "stage-two", "dpmsolver++"],
)
def test_every_stage_of_every_step(name: str, scheduler: type | None) -> None:
    """Regions, foreground and rates of every step, with the scale and the steps of the stage."""
    pipe = tiny_if_pipeline(name)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with otherwise_rounded(pipe):
        expected, history = replaced_run(pipe, if_arguments(name), stage=stage_of(name))
    seen: list[Regions] = []
    scfg_fast.enable(pipe, strict=True, on_regions=lambda step, regions: seen.append(regions.clone()))
    actual = pipe(**if_arguments(name)).images
    assert actual.dtype == torch.float64
    for regions, stages in zip(seen, history, strict=True):
        assert torch.equal(regions.token_index, stages["ids"])
        assert torch.equal(regions.foreground, stages["foreground"][:, 0] > 0)
        torch.testing.assert_close(regions.rate, stages["rate"], rtol=1e-10, atol=1e-10)
    assert relative(actual, expected.images) < 1e-8


@pytest.mark.parametrize("processor", [AttnAddedKVProcessor(), SlicedAttnAddedKVProcessor(1)], ids=["eager", "sliced"])
def test_other_processors(processor) -> None:
    pipe = tiny_if_pipeline(STAGE_ONE[0])
    pipe.unet.set_attn_processor(processor)
    expected, _ = replaced_run(pipe, if_arguments(STAGE_ONE[0], **LATE), stage=1)
    scfg_fast.enable(pipe, strict=True)
    assert relative(call(pipe), expected.images) < TOLERANCE


def test_the_layers_are_the_last_three_of_each_resolution() -> None:
    stage_one, stage_two = (scfg_fast.supports(tiny_if_pipeline(name)) for name in (STAGE_ONE[0], STAGE_TWO[0]))
    last = ["mid_block.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]
    assert stage_one.layers == last + [f"up_blocks.1.attentions.{index}" for index in range(3)]
    assert stage_two.layers == last
    pipe = tiny_if_pipeline(STAGE_ONE[0])
    assert len(scfg_fast.supports(pipe, SCFGConfig(levels=[8])).layers) == 3
    named = ["down_blocks.2.attentions.0", "up_blocks.1.attentions.2"]
    assert scfg_fast.supports(pipe, SCFGConfig(layers=named)).layers == named


def test_layers_that_attend_to_the_text_alone_are_no_candidates() -> None:
    name = STAGE_TWO[0]
    pipe = tiny_if_pipeline(name, only_cross_attention=True)
    assert scfg_fast.supports(pipe).layers == ["mid_block.attentions.0"]
    expected, _ = replaced_run(pipe, if_arguments(name, **LATE), stage=2)
    scfg_fast.enable(pipe, strict=True)
    assert relative(call(pipe), expected.images) < TOLERANCE


def test_a_picture_that_is_not_square() -> None:
    name = STAGE_ONE[0]
    pipe = tiny_if_pipeline(name)
    size = LATE | {"height": 32, "width": 56}
    expected, _ = replaced_run(pipe, if_arguments(name, **size), stage=1)
    handle = scfg_fast.enable(pipe, strict=True)
    assert relative(call(pipe, **size), expected.images) < TOLERANCE
    assert handle.regions.token_index.shape == (3, 8, 14)


class TestConfiguration:
    def test_without_one_it_is_the_published_one(self) -> None:
        for name in (STAGE_ONE[0], STAGE_TWO[0]):
            assert scfg_fast.enable(tiny_if_pipeline(name)).config == SCFGConfig.deepfloyd()

    def test_one_that_is_given_holds(self) -> None:
        """`SCFGConfig()` has the clamps of Stable Diffusion; the reference may be either in both stages."""
        pipe = tiny_if_pipeline(STAGE_ONE[0])
        handle = scfg_fast.enable(pipe)
        call(pipe)
        assert float(handle.regions.rate.min()) < 0.8
        handle.config = SCFGConfig()
        call(pipe)
        assert float(handle.regions.rate.min()) >= 0.8 - 1e-6

    @pytest.mark.parametrize(
        ("name", "config", "as_stage"),
        [
            (STAGE_ONE[0], SCFGConfig.deepfloyd(reference="foreground"), 2),
            (STAGE_TWO[0], SCFGConfig.deepfloyd(reference="image"), 1),
            (STAGE_ONE[0], SCFGConfig.deepfloyd(foreground="conditional", reference="foreground"), 2),
        ],
        ids=["foreground", "image", "conditional"],
    )
    def test_the_benchmark_is_a_choice(self, name: str, config: SCFGConfig, as_stage: int) -> None:
        pipe = tiny_if_pipeline(name)
        options = {"foreground_half": 1} if config.foreground == "conditional" else {}
        expected, _ = replaced_run(pipe, if_arguments(name, **LATE), stage=as_stage, **options)
        scfg_fast.enable(pipe, config, strict=True)
        assert relative(call(pipe), expected.images) < TOLERANCE

    def test_the_paper_has_one_benchmark(self) -> None:
        pipe = tiny_if_pipeline(STAGE_ONE[0])
        handle = scfg_fast.enable(pipe, SCFGConfig.paper())
        found = call(pipe)
        handle.config = SCFGConfig.paper(reference="foreground")
        assert torch.equal(call(pipe), found)
        handle.config = SCFGConfig.paper(reference="image")
        assert not torch.equal(call(pipe), found)

    def test_regions_may_be_kept(self) -> None:
        pipe = tiny_if_pipeline(STAGE_ONE[0])
        handle = scfg_fast.enable(pipe, SCFGConfig.deepfloyd(reuse_every=2), strict=True)
        seen: list[Regions] = []
        handle.on_regions = lambda step, regions: seen.append(regions.clone())
        call(pipe)
        assert torch.equal(seen[0].token_index, seen[1].token_index)
        assert not torch.equal(seen[1].token_index, seen[2].token_index)
        assert not torch.equal(seen[0].rate, seen[1].rate)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_images_alone_in_any_order(name: str) -> None:
    pipe = tiny_if_pipeline(name)
    scfg_fast.enable(pipe)
    steps = {"timesteps": [300, 150, 75]}
    with otherwise_rounded(pipe):
        batch = call(pipe, **steps)
    assert relative(call(pipe, [2, 0, 1], **steps), batch[[2, 0, 1]]) < 10 * TOLERANCE
    assert relative(torch.cat([call(pipe, [index], **steps) for index in range(3)]), batch) < 10 * TOLERANCE


class NearlyInterval:
    """Guidance in the middle steps; outside a weight too close to 1 to matter, but not 1."""

    needs_levels = False

    def check(self, scheduler, eta=0.0) -> None: ...

    def weight(self, step) -> float:
        return step.guidance_scale if 1 <= step.index < step.count - 1 else 1.0 + 1e-9


@pytest.mark.parametrize("name", ["IFPipeline", "IFInpaintingPipeline", "IFSuperResolutionPipeline"])
def test_half_of_the_batch_is_enough_where_the_weight_is_one(name: str) -> None:
    pipe = tiny_if_pipeline(name)
    handle = scfg_fast.enable(pipe, SCFGConfig(rates="none"), schedule=NearlyInterval())
    expected = call(pipe)
    whole, weights = handle.stats.samples, handle.stats.weights
    handle.schedule = WeightSchedule([0.0] + [1.0] * (len(weights) - 2) + [0.0])
    assert relative(call(pipe), expected) < 1e-5
    assert handle.stats.weights == pytest.approx(weights) and len(weights) == (3 if "Inpainting" in name else 4)
    assert handle.stats.samples == whole - 2 * 3


def test_rates_of_one_are_plain_guidance_and_the_variance_is_the_stock_one(monkeypatch) -> None:
    """(f, f) for the noise is exact in the pipeline's own line; the variance is what the denoiser returned."""
    pipe = tiny_if_pipeline(STAGE_ONE[0])
    plain = call(pipe)
    scfg_fast.enable(pipe, SCFGConfig(rate_min=1.0, rate_max=1.0, max_scale=None), strict=True)
    assert torch.equal(call(pipe), plain)
    returned, stepped = [], []
    own_hook = pipe.unet.register_forward_hook(lambda module, args, output: returned.append(output[0].clone()))
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda out, *a, **k: stepped.append(out.clone()) or step(out, *a, **k))
    call(pipe)
    own_hook.remove()
    assert len(stepped) == 4
    for whole, used in zip(returned, stepped, strict=True):
        assert torch.equal(used[:, 3:], whole[3:, 3:]) and not torch.equal(used[:, :3], whole[3:, :3])


class Interrupted(Exception):
    """Raised by the tests in the middle of a run."""


@pytest.mark.parametrize("where", ["denoiser", "callback", "scheduler"])
def test_an_exception_leaves_a_stock_pipeline(where: str, monkeypatch) -> None:
    pipe = tiny_if_pipeline(STAGE_TWO[0])
    plain, processors = call(pipe, [0]), dict(pipe.unet.attn_processors)
    scfg_fast.enable(pipe)
    calls = []

    def interrupt(*args: Any, **kwargs: Any) -> None:
        calls.append(where)
        if len(calls) == 2:
            raise Interrupted

    overrides: dict[str, Any] = {"callback": interrupt} if where == "callback" else {}
    if where == "scheduler":
        step = pipe.scheduler.step
        monkeypatch.setattr(pipe.scheduler, "step", lambda *a, **k: interrupt() or step(*a, **k))
    hook = pipe.unet.mid_block.register_forward_pre_hook(interrupt) if where == "denoiser" else None
    with pytest.raises(Interrupted):
        call(pipe, [0], **overrides)
    if hook is not None:
        hook.remove()
    monkeypatch.undo()
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks
    assert all(pipe.unet.attn_processors[key] is value for key, value in processors.items())
    scfg_fast.disable(pipe)
    assert torch.equal(call(pipe, [0]), plain)


def test_guidance_that_is_off_warns_and_stays_stock() -> None:
    pipe = tiny_if_pipeline(STAGE_ONE[0])
    options = {"guidance_scale": 1.0}
    plain = call(pipe, **options)
    handle = scfg_fast.enable(pipe)
    with pytest.warns(SCFGWarning, match="guidance is off"):
        assert torch.equal(call(pipe, **options), plain)
    assert handle.stats.steps_applied == 0


def test_what_does_not_go_with_a_learned_variance_or_t5_is_refused() -> None:
    pipe = tiny_if_pipeline(STAGE_ONE[0])
    handle = scfg_fast.enable(pipe)
    loss = LossGuidance(lambda x: x.square().mean((1, 2, 3)))
    for settings in ({"characteristic": CharacteristicGuidance()}, {"loss": loss}):
        with pytest.raises(ValueError, match="predicts a variance beside the noise"):
            call(pipe, scfg_kwargs=settings)
    handle.config = SCFGConfig.deepfloyd(tokens="words")
    with pytest.raises(ValueError, match="a tokenizer of CLIP's layout"):
        call(pipe)


def test_a_compiled_denoiser_is_one_graph() -> None:
    torch._dynamo.reset()
    pipe = tiny_if_pipeline(STAGE_TWO[0])
    handle = scfg_fast.enable(pipe, strict=True)
    expected = call(pipe)
    counter = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counter)
    assert relative(call(pipe), expected) < TOLERANCE
    assert counter.frame_count == 1 and handle.stats.steps_applied == 4
    torch._dynamo.reset()


@pytest.mark.any_rounding("errors of one step, far above those of a cell that falls elsewhere")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_as_accurate_as_the_published_code(dtype: torch.dtype) -> None:
    """One step: at most twice as far from the fp64 truth as the literal code is in that dtype."""

    def arguments(dtype: torch.dtype) -> dict[str, Any]:
        return if_arguments(STAGE_TWO[0], timesteps=[75], dtype=dtype)

    pipe = tiny_if_pipeline(STAGE_TWO[0], dtype=dtype)
    truth = replaced_run(tiny_if_pipeline(STAGE_TWO[0]), arguments(torch.float64), stage=2)[0].images
    literal = replaced_run(pipe, arguments(dtype), stage=2)[0].images
    handle = scfg_fast.enable(pipe, strict=True)
    actual = pipe(**arguments(dtype)).images
    assert actual.dtype == dtype and handle.regions.rate.dtype == torch.float32
    rms = lambda x: float((x.double() - truth.double()).square().mean().sqrt())  # noqa: E731
    assert rms(actual) <= 2.0 * rms(literal)


@pytest.mark.parametrize("asked, expected", [
    ({}, SCFGConfig.deepfloyd()),
    ({"fidelity": "official"}, SCFGConfig.deepfloyd()),
    ({"fidelity": "paper"}, SCFGConfig.paper()),
    ({"config": "mine.json"}, SCFGConfig(rate_max=2.0)),
], ids=str)  # fmt: skip
def test_the_command_line_takes_the_published_values_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], expected: SCFGConfig
) -> None:
    (tmp_path / "mine.json").write_text(SCFGConfig(rate_max=2.0).to_json(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(**{"config": None, "fidelity": None, "set": []} | asked)
    session = Session(tiny_if_pipeline(), "IF", "fp32")
    assert _config_for(session, args, read_config(args)) == expected
