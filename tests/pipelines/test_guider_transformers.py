"""`SCFGGuidance` in modular pipelines with transformers: all their blocks between the text encoder and the decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import ModularPipeline
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein_base import (
    Flux2KleinBaseCoreDenoiseStep,
    Flux2KleinBaseImageConditionedCoreDenoiseStep,
)
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXCoreDenoiseStep
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from PIL import Image
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import scfg_fast
from lab.reference.transformers import reference_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.transformers import (
    TINY,
    Tiny,
    made,
)
from scfg_fast import SCFGConfig
from scfg_fast.guider import SCFGGuidance

pytestmark = pytest.mark.filterwarnings("ignore:scfg_fast. this pipeline sets every guided token back")

TOLERANCE = 1e-5
PICKS = [0, 1]
ONES: dict[str, Any] = dict(rate_min=1.0, rate_max=1.0, max_scale=None)


@dataclass(frozen=True)
class Modular:
    """A modular pipeline to test.

    Attributes:
        tiny: the standard one with the same components.
        blocks: its blocks between the text encoder and the decoder.
        guiders: its guiders, and which argument of the standard pipeline is the scale of each.
        layout: its latents as the standard pipeline gives them.
        latents: shape of the noise where the blocks cannot tell it without an autoencoder.
    """

    tiny: Tiny
    blocks: type
    guiders: dict[str, str]
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents
    latents: tuple[int, ...] = ()

    def call(self, **others: Any) -> dict[str, Any]:
        call = self.tiny.call(PICKS, **others)
        if self.latents:
            noise = torch.randn(len(PICKS), *self.latents, generator=torch.Generator().manual_seed(5))
            call["latents"] = noise.double()
        return call

    def pipeline(self, standard: Any, make: Callable[..., Any], blocks: type | None = None) -> Any:
        """The modular pipeline with the components of the standard one, and a guider made for each scale."""
        pipe = (blocks or self.blocks)().init_pipeline()
        components = {name: getattr(standard, name, None) for name in pipe._component_specs}
        guiders = {name: make(self.call()[scale]) for name, scale in self.guiders.items()}
        pipe.update_components(**{name: part for name, part in components.items() if part is not None}, **guiders)
        if "boundary_ratio" in standard.config:
            pipe.update_components(boundary_ratio=standard.config.boundary_ratio)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, **others: Any) -> torch.Tensor:
        """Its latents in the layout of the standard pipeline."""
        known = {parameter.name for parameter in pipe.blocks.inputs}
        call = {name: value for name, value in (self.call() | others).items() if name in known}
        return self.layout(pipe(**call, output="latents"))


MODULAR: dict[str, Modular] = {
    "sd3": Modular(TINY["sd3"], StableDiffusion3T2ICoreDenoiseStep, dict(guider="guidance_scale")),
    "flux2": Modular(TINY["flux2"], Flux2KleinBaseCoreDenoiseStep, dict(guider="guidance_scale")),
    "qwen": Modular(
        TINY["qwen"], QwenImageCoreDenoiseStep, dict(guider="true_cfg_scale"),
        lambda latents: F.pixel_unshuffle(latents[:, :, 0], 2).flatten(2).transpose(1, 2),
    ),
    "ltx": Modular(
        TINY["ltx"], LTXCoreDenoiseStep, dict(guider="guidance_scale"),
        lambda latents: latents.flatten(2).transpose(1, 2),
    ),
    "wan": Modular(TINY["wan"], WanCoreDenoiseStep, dict(guider="guidance_scale"), latents=(4, 2, 16, 24)),
    "wan2.2": Modular(
        TINY["wan2.2"], Wan22CoreDenoiseStep, dict(guider="guidance_scale", guider_2="guidance_scale_2"),
        latents=(4, 2, 16, 24),
    ),
}  # fmt: skip


@pytest.fixture(params=MODULAR)
def modular(request: pytest.FixtureRequest) -> Modular:
    return MODULAR[request.param]


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("modular", [name], indirect=True)


def denoisers(pipe: Any) -> list[Any]:
    there = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in there if model is not None]


def state(pipe: Any) -> list[Any]:
    """What a run must leave as it was: the objects themselves."""
    kept = []
    for model in denoisers(pipe):
        kept += [(name, id(processor)) for name, processor in model.attn_processors.items()]
        kept += [tuple(model._forward_hooks), tuple(model._forward_pre_hooks)]
        kept += [id(model.__dict__.get(name)) for name in ("forward", "_compiled_call_impl")]
        kept += [(name, "processor" in module.__dict__) for name, module in model.named_modules()]
    return kept


def standard_run(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    return pipe(**call)[0]


def guided(modular: Modular, standard: Any, **options: Any) -> tuple[torch.Tensor, list[SCFGGuidance]]:
    """Latents and guiders of a run, which must leave the denoisers as they were."""
    pipe = modular.pipeline(standard, lambda scale: SCFGGuidance(scale, scfg=options))
    before = state(pipe)
    latents = modular.run(pipe)
    assert state(pipe) == before
    return latents, [getattr(pipe, name) for name in modular.guiders]


@pytest.mark.parametrize(("name", "options"), [
    ("sd3", {}), ("qwen", {}), ("wan", {}), ("wan2.2", {}), ("ltx", {"cell": 1}),
    ("sd3", {"reuse_every": 2, "foreground": "conditional"}), ("qwen", {"rates": "pixels"}),
    ("wan", {"rates": "pixels"}),
], ids=str)  # fmt: skip
def test_it_is_what_the_standard_pipeline_makes(name: str, options: dict[str, Any]) -> None:
    """Qwen-Image sets the guided tokens back to the norm of the conditional ones behind either guidance."""
    modular = MODULAR[name]
    if options.get("rates") == "pixels":
        options = SCFGConfig.pixels().to_dict()
    standard = modular.tiny.pipeline()
    plain = standard_run(standard, modular.call())
    handle = scfg_fast.enable(standard, SCFGConfig(**options))
    with otherwise_rounded(standard):
        expected = standard_run(standard, modular.call())
    scfg_fast.disable(standard)
    actual, guiders = guided(modular, standard, **options)
    assert relative(plain, expected) > 1e-3, "the effect must be visible"
    assert relative(actual, expected) < TOLERANCE
    assert sum(guider.stats.steps_applied for guider in guiders) == handle.stats.steps_applied == 3
    names = [name for guider in guiders for name in guider.stats.layers]
    assert list(dict.fromkeys(names)) == list(handle.stats.layers)
    last, regions = guiders[-1], handle.regions
    assert (last.regions is None) == (regions is None)
    if regions is not None:
        assert last.regions.step == regions.step
        assert torch.equal(last.regions.token_index, regions.token_index)
        assert torch.equal(last.regions.foreground, regions.foreground)
        assert relative(last.regions.rate, regions.rate) < TOLERANCE


def flux2_packed(standard: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents of the standard pipeline, ready for its decoder, as they leave the last step."""
    scaled = F.pixel_unshuffle(latents, 2) - standard.vae.bn.running_mean.view(1, -1, 1, 1)
    return scaled / torch.sqrt(standard.vae.bn.running_var.view(1, -1, 1, 1) + standard.vae.config.batch_norm_eps)


@pytest.mark.parametrize("reference_image", [False, True])
def test_flux2_is_the_method_written_out(reference_image: bool) -> None:
    """Sizes come from the positions of the tokens; those of a reference image, which follow, are no part of them."""
    modular = MODULAR["flux2"]
    standard = modular.tiny.pipeline()
    blocks, inputs, call = None, {}, modular.call()
    if reference_image:
        pixels = torch.randint(0, 256, (64, 256, 3), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
        picture = Image.fromarray(pixels.numpy())
        prepared = standard.image_processor.preprocess(picture, height=64, width=256).double()
        encoded = standard._encode_vae_image(prepared, None)
        blocks, inputs = Flux2KleinBaseImageConditionedCoreDenoiseStep, dict(image_latents=[encoded])
        call["image"] = picture
    pipe = modular.pipeline(standard, SCFGGuidance, blocks)
    before = state(pipe)
    actual = modular.run(pipe, **inputs)
    assert state(pipe) == before and pipe.guider.regions.rate.shape == (2, 1, 16, 24)
    layers = [(f"{name}.attn",) for name in pipe.guider.stats.layers]
    assert len(layers) >= 3 and pipe.guider.stats.steps_applied == 3
    with otherwise_rounded(standard.transformer):
        expected = reference_run(standard, call, layers, modular.tiny.layout, modular.tiny.text_tokens)[0]
    plain = modular.run(modular.pipeline(standard, ClassifierFreeGuidance, blocks), **inputs)
    assert relative(plain, flux2_packed(standard, expected)) > 1e-3, "the effect must be visible"
    assert relative(actual, flux2_packed(standard, expected)) < TOLERANCE


@pytest.mark.parametrize("interruption", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_denoiser_is_left_stock(modular: Modular, interruption: type[BaseException]) -> None:
    """In the last denoiser of the run, in the middle of its pass."""
    pipe = modular.pipeline(modular.tiny.pipeline(), SCFGGuidance)
    expected, before = modular.run(pipe), state(pipe)
    last = denoisers(pipe)[-1]
    stack = getattr(last, "transformer_blocks", None) or last.blocks

    def interrupt(*_: Any) -> None:
        raise interruption

    hook = stack[2].register_forward_pre_hook(interrupt)
    with pytest.raises(interruption):
        modular.run(pipe)
    hook.remove()
    assert state(pipe) == before
    assert torch.equal(modular.run(pipe), expected)


class Compared(SCFGGuidance):
    """Says of every step whether it was plain guidance to the bit."""

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> Any:
        self.plain = [*getattr(self, "plain", []), None]
        output = super().forward(pred_cond, pred_uncond)
        self.plain[-1] = torch.equal(output.pred, ClassifierFreeGuidance.forward(self, pred_cond, pred_uncond).pred)
        return output


def test_a_compiled_denoiser_has_one_graph_for_each_pass() -> None:
    modular = MODULAR["sd3"]
    standard = modular.tiny.pipeline()
    expected = modular.run(modular.pipeline(standard, SCFGGuidance))
    torch.compiler.reset()
    counters.clear()
    standard.transformer.compile(backend="eager", fullgraph=True)
    pipe = modular.pipeline(standard, SCFGGuidance)
    before = state(pipe)
    for _ in range(2):
        assert relative(modular.run(pipe), expected) < TOLERANCE and pipe.guider.stats.steps_applied == 3
        assert state(pipe) == before
    assert counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def test_outside_of_its_part_of_the_run_it_is_plain_guidance(modular: Modular) -> None:
    standard = modular.tiny.pipeline()
    pipe = modular.pipeline(standard, lambda scale: Compared(scale, scfg=dict(start=0.3, stop=0.6)))
    modular.run(pipe)
    plain = [step for name in modular.guiders for step in getattr(pipe, name).plain]
    assert sorted(plain) == [False, True, True]
    options: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dict(enabled=False), {}),
        (dict(start=0.3, stop=0.6), dict(scfg=dict(rates="none"))),
        ({}, dict(scfg=dict(stop=0.0))),
    ]
    for both, ours in options:
        plain_pipe = modular.pipeline(standard, functools.partial(ClassifierFreeGuidance, **both))
        pipe = modular.pipeline(standard, functools.partial(SCFGGuidance, **both, **ours))
        assert torch.equal(modular.run(pipe), modular.run(plain_pipe))


def test_rates_of_one_with_rescale_are_plain_guidance(modular: Modular) -> None:
    """Also the rescale: over the whole of a sample."""
    standard = modular.tiny.pipeline()
    plain = modular.run(modular.pipeline(standard, lambda scale: ClassifierFreeGuidance(scale, 0.7)))
    ones = modular.run(modular.pipeline(standard, lambda scale: SCFGGuidance(scale, 0.7, scfg=ONES)))
    assert relative(ones, plain) < TOLERANCE


class Readings(TorchFunctionMode):
    """Counts tensors that are turned into Python lists."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.tolist
        return function(*args, **(kwargs or {}))


def test_the_positions_of_tokens_are_read_once_in_a_run() -> None:
    modular = MODULAR["flux2"]
    standard = modular.tiny.pipeline()
    counts = []
    for make in (ClassifierFreeGuidance, SCFGGuidance):
        pipe = modular.pipeline(standard, make)
        with Readings() as readings:
            modular.run(pipe)
        counts.append(readings.count)
    assert counts[1] - counts[0] == 1


def test_a_guider_that_never_sees_the_first_step_starts_afresh() -> None:
    """Wan 2.2: the second guider of two, in a second and in a longer run."""
    modular = MODULAR["wan2.2"]
    pipe = modular.pipeline(modular.tiny.pipeline(), lambda scale: SCFGGuidance(scale, scfg=dict(reuse_every=5)))
    first, steps = modular.run(pipe), [pipe.guider.stats.steps_applied, pipe.guider_2.stats.steps_applied]
    assert min(steps) >= 1 and sum(steps) == 3
    assert torch.equal(modular.run(pipe), first)
    assert [pipe.guider.stats.steps_applied, pipe.guider_2.stats.steps_applied] == steps
    modular.run(pipe, num_inference_steps=7)
    assert pipe.guider.stats.steps_applied + pipe.guider_2.stats.steps_applied == 7


def test_packed_rows_beyond_the_picture_get_plain_guidance() -> None:
    """Reference images of Qwen-Image edits; the loop of a modular pipeline, written out for one step."""
    modular = MODULAR["qwen"]
    model, call = modular.tiny.pipeline().transformer, modular.call()
    guider = SCFGGuidance(4.0)
    guider.set_state(0, 1, torch.tensor(1000.0))
    embeds, masks = ((call[f"prompt_{name}"], call[f"negative_prompt_{name}"]) for name in ("embeds", "embeds_mask"))
    batches = guider.prepare_inputs(dict(encoder_hidden_states=embeds, encoder_hidden_states_mask=masks))
    tokens = torch.randn(2, 8 * 12 + 4 * 5, 16, generator=torch.Generator().manual_seed(3)).double()
    for batch in batches:
        guider.prepare_models(model)
        with torch.no_grad():
            batch.noise_pred = model(
                hidden_states=tokens, timestep=torch.ones(2), encoder_hidden_states=batch.encoder_hidden_states,
                encoder_hidden_states_mask=batch.encoder_hidden_states_mask, return_dict=False,
                img_shapes=[[(1, 8, 12), (1, 4, 5)]] * 2,
            )[0]  # fmt: skip
        guider.cleanup_models(model)
    pred = guider(batches).pred
    plain = ClassifierFreeGuidance.forward(guider, *(batch.noise_pred for batch in batches)).pred
    assert torch.equal(pred[:, 96:], plain[:, 96:]) and relative(pred[:, :96], plain[:, :96]) > 1e-3
    assert guider.regions.rate.shape == (2, 1, 16, 24)


def test_it_is_saved_with_a_pipeline_that_it_was_loaded_for(tmp_path) -> None:
    """Through a `ComponentSpec` with a path; what was set by `update_components` alone is dropped, by upstream."""
    modular = MODULAR["sd3"]
    guider = SCFGGuidance(
        5.5, guidance_rescale=0.2, stop=0.9, scfg={"rate_max": 2.0, "layers": ["transformer_blocks.1"]}
    )
    guider.save_pretrained(tmp_path / "repository" / "guider")
    spec = ComponentSpec(
        "guider", SCFGGuidance, pretrained_model_name_or_path=str(tmp_path / "repository"), subfolder="guider"
    )
    pipe = modular.pipeline(modular.tiny.pipeline(), SCFGGuidance)
    pipe.save_pretrained(str(tmp_path / "dropped"), overwrite_modular_index=True)
    without = ModularPipeline.from_pretrained(str(tmp_path / "dropped"))
    assert "guider" not in without.config and type(without.guider) is ClassifierFreeGuidance
    pipe.update_components(guider=spec.load())
    pipe.save_pretrained(str(tmp_path / "kept"), overwrite_modular_index=True)
    again = ModularPipeline.from_pretrained(str(tmp_path / "kept"))
    again.load_components(["guider"])
    assert type(again.guider) is SCFGGuidance and dict(again.guider.config) == dict(guider.config)
    assert again.guider.scfg_config == guider.scfg_config


def test_a_denoiser_that_takes_both_halves_as_one_list_is_refused() -> None:
    guider = SCFGGuidance()
    guider.set_state(0, 3, torch.tensor(1))
    with pytest.raises(ValueError, match=r"ZImageTransformer2DModel, whose attention is not known here"):
        guider.prepare_models(TINY["z-image"].pipeline().transformer)


def test_a_denoiser_whose_attention_is_not_known() -> None:
    model = made(
        "DiTTransformer2DModel", sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, norm_num_groups=4,
    )  # fmt: skip
    guider = SCFGGuidance()
    guider.set_state(0, 3, torch.tensor(1))
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel, whose attention is not known.*Guidance there"):
        guider.prepare_models(model)
    assert "forward" not in model.__dict__
    pixels = SCFGGuidance(scfg=SCFGConfig.pixels().to_dict())
    pixels.set_state(0, 3, torch.tensor(1))
    pixels.prepare_models(model)
    cond, uncond = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(pixels.forward(cond, uncond).pred).all() and pixels.stats.steps_applied == 1
