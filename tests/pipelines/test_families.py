"""Every supported pipeline against its own `__call__` with only the guidance line replaced by the published method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, DiffusionPipeline, T2IAdapter

import scfg_fast
from lab.reference.replaced import replaced_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.deepfloyd import STAGE_ONE, STAGE_TWO
from lab.tiny.unets import silent, tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.guidance import Step, WeightSchedule
from scfg_fast.pipelines.families import FAMILIES

PROMPTS = ["a red cat on the grass", "a blue boat", "a girl and a dog in a house"]
NEGATIVES = ["a car", "a black bird on a table", "the sky"]
STEPS = 4
TOLERANCE = 5e-6


def picture(seed: int, batch: int = 3, side: int = 128) -> torch.Tensor:
    """[B, 3, side, side] in [0, 1]: smooth colours, so that autoencoders and conditions see structure."""
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear")


def hole(batch: int = 3, side: int = 128) -> torch.Tensor:
    """[B, 1, side, side] inpainting mask: a rectangle to repaint."""
    mask = torch.zeros(batch, 1, side, side)
    mask[:, :, 24:96, 32:112] = 1.0
    return mask


def rebuilt(cls: type, base: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
    """Another pipeline class around the same components, silent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        components = {name: make(base) if callable(make) else make for name, make in components.items()}
    return silent(cls.from_pipe(base, **components), torch.float64)


def controlnet(base: DiffusionPipeline) -> ControlNetModel:
    """A control network from the UNet, with its zero convolutions made visible."""
    model = ControlNetModel.from_unet(
        base.unet, conditioning_channels=3, conditioning_embedding_out_channels=(4, 4, 4, 4)
    ).eval()
    with torch.no_grad():
        for block in (
            *model.controlnet_down_blocks,
            model.controlnet_mid_block,
            model.controlnet_cond_embedding.conv_out,
        ):
            block.weight.normal_(std=0.05)
    return model


def union(base: DiffusionPipeline) -> ControlNetUnionModel:
    """A union control network, which takes the kind of condition as a number."""
    model = ControlNetUnionModel(
        down_block_types=base.unet.config.down_block_types,
        block_out_channels=base.unet.config.block_out_channels,
        layers_per_block=1,
        norm_num_groups=4,
        transformer_layers_per_block=base.unet.config.transformer_layers_per_block,
        attention_head_dim=base.unet.config.attention_head_dim,
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
    ).eval()
    with torch.no_grad():
        for block in (*model.controlnet_down_blocks, model.controlnet_mid_block):
            block.weight.normal_(std=0.05)
    return model


def adapter(channels: list[int], kind: str, factor: int) -> T2IAdapter:
    return T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind).eval()


def embeddings() -> dict[str, Any]:
    """Prompts of Kolors as embeddings: its language model is not needed to test the guidance."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(2, 3, 40, 64, generator=generator).double()
    pooled = torch.randn(2, 3, 32, generator=generator).double()
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": states[0],
        "negative_prompt_embeds": states[1],
        "pooled_prompt_embeds": pooled[0],
        "negative_pooled_prompt_embeds": pooled[1],
    }


IMAGE = {"image": picture(1)}
TO_IMAGE = IMAGE | {"strength": 0.9}
INPAINT = TO_IMAGE | {"mask_image": hole()}
CONTROL = {"image": picture(2)}
UNION = {"control_image": [picture(2)], "control_mode": [1]}
SD_ADAPTER = lambda base: adapter([16, 16, 32, 32], "full_adapter", 8)  # noqa: E731
SDXL_ADAPTER = lambda base: adapter([16, 32, 32, 32], "full_adapter_xl", 16)  # noqa: E731

# name of the pipeline class -> (components beyond the text-to-image pipeline's, arguments beyond the prompt's)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "StableDiffusionPipeline": ({}, {}),
    "StableDiffusionImg2ImgPipeline": ({}, TO_IMAGE),
    "StableDiffusionInpaintPipeline": ({}, INPAINT),
    "StableDiffusionDepth2ImgPipeline": (
        {"depth_estimator": None, "feature_extractor": None},
        TO_IMAGE | {"depth_map": picture(3)[:, 0]},
    ),
    "StableDiffusionControlNetPipeline": ({"controlnet": controlnet}, CONTROL),
    "StableDiffusionControlNetImg2ImgPipeline": ({"controlnet": controlnet}, TO_IMAGE | {"control_image": picture(2)}),
    "StableDiffusionControlNetInpaintPipeline": ({"controlnet": controlnet}, INPAINT | {"control_image": picture(2)}),
    "StableDiffusionAdapterPipeline": ({"adapter": SD_ADAPTER}, CONTROL),
    "StableDiffusionPAGPipeline": ({}, {"pag_scale": 2.0}),
    "StableDiffusionPAGImg2ImgPipeline": ({}, TO_IMAGE | {"pag_scale": 2.0}),
    "StableDiffusionPAGInpaintPipeline": ({}, INPAINT | {"pag_scale": 2.0}),
    "StableDiffusionControlNetPAGPipeline": ({"controlnet": controlnet}, CONTROL | {"pag_scale": 2.0}),
    "StableDiffusionControlNetPAGInpaintPipeline": (
        {"controlnet": controlnet},
        INPAINT | {"control_image": picture(2), "pag_scale": 2.0},
    ),
    "StableDiffusionXLPipeline": ({}, {}),
    "StableDiffusionXLImg2ImgPipeline": ({}, TO_IMAGE),
    "StableDiffusionXLInpaintPipeline": ({}, INPAINT),
    "StableDiffusionXLControlNetPipeline": ({"controlnet": controlnet}, CONTROL),
    "StableDiffusionXLControlNetImg2ImgPipeline": (
        {"controlnet": controlnet},
        TO_IMAGE | {"control_image": picture(2)},
    ),
    "StableDiffusionXLControlNetInpaintPipeline": ({"controlnet": controlnet}, INPAINT | {"control_image": picture(2)}),
    "StableDiffusionXLControlNetUnionPipeline": ({"controlnet": union}, UNION),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": ({"controlnet": union}, TO_IMAGE | UNION),
    "StableDiffusionXLControlNetUnionInpaintPipeline": ({"controlnet": union}, INPAINT | UNION),
    "StableDiffusionXLAdapterPipeline": ({"adapter": SDXL_ADAPTER}, CONTROL),
    "StableDiffusionXLPAGPipeline": ({}, {"pag_scale": 2.0}),
    "StableDiffusionXLPAGImg2ImgPipeline": ({}, TO_IMAGE | {"pag_scale": 2.0}),
    "StableDiffusionXLPAGInpaintPipeline": ({}, INPAINT | {"pag_scale": 2.0}),
    "StableDiffusionXLControlNetPAGPipeline": ({"controlnet": controlnet}, CONTROL | {"pag_scale": 2.0}),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": (
        {"controlnet": controlnet},
        TO_IMAGE | {"control_image": picture(2), "pag_scale": 2.0},
    ),
    "KolorsPipeline": ({}, embeddings()),
    "KolorsPAGPipeline": ({}, {"pag_scale": 2.0} | embeddings()),
}


def is_xl(name: str) -> bool:
    return "XL" in name or "Kolors" in name


def build(name: str) -> DiffusionPipeline:
    components, _ = CASES[name]
    cls = getattr(diffusers, name)
    if "Kolors" in name:
        base = tiny_sdxl_pipeline()
        pipe = cls(vae=base.vae, text_encoder=None, tokenizer=None, unet=base.unet, scheduler=base.scheduler)
        return silent(pipe, torch.float64)
    in_channels = 5 if "Depth" in name else 4
    base = tiny_sdxl_pipeline() if is_xl(name) else tiny_sd_pipeline(uniform=bool(components), in_channels=in_channels)
    return rebuilt(cls, base, **components)


def arguments_of(name: str, indices: range | list[int] = range(3), **overrides: Any) -> dict[str, Any]:
    """Arguments of a call for some of the three samples."""
    indices = list(indices)
    _, extra = CASES[name]

    def rows(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[indices]
        return [rows(v) for v in value] if isinstance(value, list) else value

    common = dict(
        prompt=[PROMPTS[i] for i in indices],
        negative_prompt=[NEGATIVES[i] for i in indices],
        generator=[torch.Generator().manual_seed(20 + i) for i in indices],
        num_inference_steps=STEPS,
        guidance_scale=6.0,
        output_type="latent",
    )
    return common | {key: rows(value) for key, value in extra.items()} | overrides


def call(pipe: DiffusionPipeline, name: str, *args: Any, **overrides: Any) -> torch.Tensor:
    return pipe(**arguments_of(name, *args, **overrides)).images


def options_of(name: str) -> dict[str, Any]:
    """Which maps the literal method finds: SDXL has no level 8, and PAG takes the middle block, SD's only one there."""
    options: dict[str, Any] = {"factors": (4,) if is_xl(name) or "PAG" in name else (4, 8)}
    if "PAG" in name:
        options["groups"] = 3
    return options


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_with_its_guidance_line_replaced(name: str) -> None:
    pipe = build(name)
    plain = call(pipe, name)
    with otherwise_rounded(pipe):
        expected = replaced_run(pipe, arguments_of(name), **options_of(name)).images
    handle = scfg_fast.enable(pipe)
    actual = call(pipe, name)
    assert handle.stats.steps_applied >= 3 and not handle.stats.steps_skipped
    assert relative(actual, expected) < TOLERANCE
    assert relative(plain, expected) > 100 * TOLERANCE
    scfg_fast.disable(pipe)
    assert torch.equal(call(pipe, name), plain)


def test_no_negative_prompt_on_sdxl_reads_the_foreground_of_the_conditional_half() -> None:
    """The default call of SDXL: the unconditional half attends to all tokens alike. As text, and as embeddings."""
    name = "StableDiffusionXLPipeline"
    pipe = build(name)
    overrides = {"negative_prompt": None}
    expected = replaced_run(pipe, arguments_of(name, **overrides), factors=(4,), foreground_half=1).images
    handle = scfg_fast.enable(pipe)
    assert relative(call(pipe, name, **overrides), expected) < TOLERANCE
    assert 0.05 < handle.regions.foreground.float().mean() < 0.95
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
    assert not negative.any()
    as_embeds = {
        "prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled,
    }  # fmt: skip
    assert relative(call(pipe, name, **as_embeds), expected) < TOLERANCE


class NearlyInterval:
    """Guidance in the middle steps; outside a weight too close to 1 to matter, but not 1."""

    needs_levels = False

    def check(self, scheduler, eta=0.0) -> None: ...

    def weight(self, step: Step) -> float:
        return step.guidance_scale if 1 <= step.index < step.count - 1 else 1.0 + 1e-9


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_batch_is_enough_where_the_weight_is_one(name: str) -> None:
    """Whatever else the pipeline hands to its denoiser is halved with it: residuals, embeddings, extra channels."""
    pipe = build(name)
    handle = scfg_fast.enable(pipe, SCFGConfig(rates="none"), schedule=NearlyInterval())
    expected = call(pipe, name)
    whole, steps = handle.stats.samples, len(handle.stats.weights)
    weights = handle.stats.weights
    handle.schedule = WeightSchedule([0.0] + [1.0] * (steps - 2) + [0.0])
    actual = call(pipe, name)
    assert handle.stats.weights == pytest.approx(weights) and handle.stats.weights[0] == 1.0
    assert handle.stats.samples == (whole if "PAG" in name else whole - 2 * 3)
    assert relative(actual, expected) < 1e-5


def test_words_on_kolors_are_refused() -> None:
    pipe = build("KolorsPipeline")
    scfg_fast.enable(pipe, SCFGConfig(tokens="words"))
    with pytest.raises(ValueError, match="a tokenizer of CLIP's layout"):
        call(pipe, "KolorsPipeline")


def test_every_family_member_is_tested() -> None:
    """DeepFloyd IF in `test_deepfloyd`; those with a transformer in `test_transformers`."""
    members = {name for family in FAMILIES if family.denoisers == ("unet",) for name in family.pipelines}
    assert members == {*CASES, *STAGE_ONE, *STAGE_TWO}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_equals_its_images_alone_in_any_order(name: str) -> None:
    pipe = build(name)
    scfg_fast.enable(pipe)
    with otherwise_rounded(pipe):
        batch = call(pipe, name, num_inference_steps=3)
    assert relative(call(pipe, name, [2, 0, 1], num_inference_steps=3), batch[[2, 0, 1]]) < 10 * TOLERANCE
    alone = torch.cat([call(pipe, name, [index], num_inference_steps=3) for index in range(3)])
    assert relative(alone, batch) < 10 * TOLERANCE


SIZES = [(264, 392), (320, 448)]


@pytest.mark.parametrize("height, width", SIZES, ids=["264x392", "320x448"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_sizes_that_are_not_square(name: str, height: int, width: int) -> None:
    """Latents of 33 x 49, odd at every level, with ragged cells at the border; and of 40 x 56, odd at the last."""
    pipe = build(name)
    size = {"height": height, "width": width, "num_inference_steps": 2}
    expected = replaced_run(pipe, arguments_of(name, [1], **size), **options_of(name)).images
    handle = scfg_fast.enable(pipe)
    actual = call(pipe, name, [1], **size)
    assert handle.regions.token_index.shape == (1, -(-height // 32), -(-width // 32))
    assert relative(actual, expected) < TOLERANCE


def stock_state(pipe: DiffusionPipeline) -> tuple:
    return dict(pipe.unet.attn_processors), dict(pipe.unet._forward_hooks), dict(pipe.unet._forward_pre_hooks)


class Interrupted(Exception):
    """Raised by the tests in the middle of a run."""


def _after(before: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(then)
    def both(*args: Any, **kwargs: Any) -> Any:
        before()
        return then(*args, **kwargs)

    return both


@pytest.mark.parametrize("name", [name for name in CASES if "PAG" not in name])
def test_an_exception_leaves_a_stock_pipeline(name: str, monkeypatch) -> None:
    """In the second call of the denoiser, of the callback and of the scheduler's step, one after the other."""
    pipe = build(name)
    plain, before = call(pipe, name, [0], num_inference_steps=3), stock_state(pipe)
    scfg_fast.enable(pipe)
    for where in ("denoiser", "callback", "scheduler"):
        calls = []

        def interrupt(*args: Any, calls: list = calls, **kwargs: Any) -> None:
            calls.append(None)
            if len(calls) == 2:
                raise Interrupted

        overrides: dict[str, Any] = {"num_inference_steps": 3}
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            if where == "denoiser":
                patch.setattr(pipe.unet.mid_block, "forward", _after(interrupt, pipe.unet.mid_block.forward))
            elif where == "scheduler":
                patch.setattr(pipe.scheduler, "step", _after(interrupt, pipe.scheduler.step))
            elif "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
                overrides["callback_on_step_end"] = _after(interrupt, lambda pipe, step, timestep, tensors: tensors)
            else:
                overrides["callback"] = interrupt
            call(pipe, name, [0], **overrides)
        after = stock_state(pipe)
        assert after[1:] == before[1:] and all(after[0][key] is value for key, value in before[0].items()), where
    scfg_fast.disable(pipe)
    assert torch.equal(call(pipe, name, [0], num_inference_steps=3), plain)
