"""S-CFG in transformer pipelines, against their own `__call__` with its guidance line alone replaced."""

from __future__ import annotations

import dataclasses
import itertools
import weakref

import diffusers
import peft
import pytest
import torch

import scfg_fast
from lab.reference.transformers import reference_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.transformers import BATCH, TINY, Tiny, made, sd3
from lab.tiny.unets import tiny_vae
from scfg_fast import SCFGConfig, SCFGError, SCFGWarning
from scfg_fast.capture import BlockInfo, choose_layers
from scfg_fast.guidance import CFGPlusPlus, CharacteristicGuidance

pytestmark = pytest.mark.filterwarnings("ignore:scfg_fast. this pipeline sets every guided token back")

TOLERANCE = 5e-6
EVERYONE = list(range(BATCH))


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return TINY[request.param]


def run(pipe, call: dict) -> torch.Tensor:
    result = pipe(**call)[0]
    return result if isinstance(result, torch.Tensor) else torch.stack(list(result))


def processors(model: torch.nn.Module) -> dict[str, object]:
    """`attn_processors`, which not every transformer has."""
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def test_it_is_the_method_and_stock_again_afterwards(tiny: Tiny) -> None:
    pipe, call = tiny.pipeline(), tiny.call
    stock = run(pipe, call(EVERYONE))
    handle = scfg_fast.enable(pipe)
    guided = run(pipe, call(EVERYONE))
    layers = [tuple(f"{name}.{part}" for part in tiny.layers) for name in dict.fromkeys(handle.stats.layers)]
    assert len(layers) >= 3 and handle.stats.steps_applied == 3 and not handle.stats.steps_skipped
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe, call(EVERYONE)), stock)
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, call(EVERYONE), layers, tiny.layout, tiny.text_tokens)[0]
    expected = expected if isinstance(expected, torch.Tensor) else torch.stack(list(expected))
    assert relative(stock, expected) > 1e-3, "the effect must be visible"
    assert relative(guided, expected) <= TOLERANCE


@pytest.mark.any_rounding("every rate is one, whatever the regions")
def test_rates_of_one_are_stock_to_the_bit(tiny: Tiny) -> None:
    pipe = tiny.pipeline(torch.float32)
    stock = run(pipe, tiny.call(EVERYONE, torch.float32))
    handle = scfg_fast.enable(pipe, SCFGConfig(rate_min=1.0, rate_max=1.0, max_scale=None))
    ones = run(pipe, tiny.call(EVERYONE, torch.float32))
    assert handle.stats.steps_applied == 3 and torch.equal(ones, stock)


def test_a_batch_is_its_samples_and_their_order_does_not_matter(tiny: Tiny) -> None:
    pipe, call = tiny.pipeline(), tiny.call
    scfg_fast.enable(pipe)
    with otherwise_rounded(pipe):
        together = run(pipe, call(EVERYONE))
    turned = run(pipe, call([2, 0, 1]))
    assert relative(turned[[1, 2, 0]], together) <= TOLERANCE
    if tiny is TINY["qwen"]:
        return  # its positions follow the longest prompt of the batch, with or without S-CFG
    alone = torch.cat([run(pipe, call([pick])) for pick in EVERYONE])
    assert relative(alone, together) <= TOLERANCE


def test_an_exception_leaves_a_stock_pipeline(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the denoiser, in the scheduler's step and in the callback, one after the other."""
    pipe = tiny.pipeline()
    stock = run(pipe, tiny.call([0]))
    scfg_fast.enable(pipe)

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    before = processors(pipe.transformer)
    for where in ("denoiser", "scheduler", "callback"):
        call = tiny.call([0])
        with monkeypatch.context() as patched:
            if where == "denoiser":
                last = [module for module in pipe.transformer.modules() if isinstance(module, torch.nn.Linear)][-1]
                patched.setattr(last, "forward", fail)
            elif where == "scheduler":
                patched.setattr(pipe.scheduler, "step", fail)
            else:
                name = "callback" if "PixArt" in type(pipe).__name__ else "callback_on_step_end"
                call[name] = fail
            with pytest.raises(RuntimeError, match="on purpose"):
                pipe(**call)
        assert all(processors(pipe.transformer)[name] is processor for name, processor in before.items())
        assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe, tiny.call([0])), stock)


@pytest.mark.parametrize("name", ["sd3", "hunyuan", "flux", "cogview4"])
def test_a_schedule_is_the_pipelines_own_line_with_another_scale(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.pipeline()
    two_pass = tiny.layout.two_pass
    weights = [2.0, 5.0, 3.0]

    class Stepwise:
        needs_levels = False

        def weight(self, step):
            return weights[step.index]

        def check(self, scheduler, eta=0.0):
            pass

    scfg_fast.enable(pipe, SCFGConfig(rates="none"), schedule=Stepwise())
    actual = run(pipe, tiny.call(EVERYONE))
    scfg_fast.disable(pipe)
    step = {"index": 0, "calls": 0}
    scale = tiny.call(EVERYONE).get("guidance_scale") or tiny.call(EVERYONE)["true_cfg_scale"]

    def rewrite(module, args, kwargs, output):
        """u' such that the pipeline's own line gives u + w (t - u)."""
        step["calls"] += 1
        if two_pass and step["calls"] % 2:
            step["cond"] = output[0]
            return None
        weight = weights[step["index"]]
        step["index"] += 1
        uncond, cond = (output[0], step["cond"]) if two_pass else output[0].chunk(2)
        guided = uncond + weight * (cond - uncond)
        moved = (scale * cond - guided) / (scale - 1.0)
        return (moved if two_pass else torch.cat([moved, cond]),)

    hook = pipe.transformer.register_forward_hook(rewrite, with_kwargs=True)
    expected = run(pipe, tiny.call(EVERYONE))
    hook.remove()
    assert relative(actual, expected) <= 2e-5


def test_skip_layer_guidance_reads_the_conditional_prediction_again() -> None:
    tiny = TINY["sd3"]
    pipe = tiny.pipeline()
    skip = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    handle = scfg_fast.enable(pipe)
    actual = run(pipe, tiny.call(EVERYONE, **skip))
    assert handle.stats.steps_applied == 3
    layers = [(f"{name}.attn",) for name in handle.stats.layers]
    scfg_fast.disable(pipe)
    stock = run(pipe, tiny.call(EVERYONE, **skip))
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, tiny.call(EVERYONE, **skip), layers, tiny.layout, tiny.text_tokens)[0]
    assert relative(stock, expected) > 1e-3
    assert relative(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("name, prompts", [
    ("lumina2", dict(lengths=(9, 6, 11))),
    ("z-image", dict(captions=[torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (9, 40, 33)])),
])  # fmt: skip
def test_prompts_of_different_lengths_in_one_stream(name: str, prompts: dict) -> None:
    """Every sample's text ends elsewhere; each image is what it is alone, as far as the model itself has that so."""
    pipe, call = TINY[name].pipeline(), TINY[name].call

    def apart() -> float:
        alone = torch.cat([run(pipe, call([pick], **prompts)) for pick in EVERYONE])
        return relative(run(pipe, call(EVERYONE, **prompts)), alone)

    stock = apart()
    scfg_fast.enable(pipe)
    assert apart() <= stock + TOLERANCE


def test_where_z_image_cuts_guidance_off_the_step_is_its_own() -> None:
    tiny = TINY["z-image"]
    pipe = tiny.pipeline()
    handle = scfg_fast.enable(pipe)
    run(pipe, tiny.call(EVERYONE, cfg_truncation=0.5))
    assert handle.stats.steps_applied == 2 and handle.stats.steps_skipped == {"guidance is off": 1}


@pytest.mark.parametrize("name", ["hunyuan", "ltx"])
def test_guidance_rescale_follows(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.pipeline()
    handle = scfg_fast.enable(pipe)
    actual = run(pipe, tiny.call(EVERYONE, guidance_rescale=0.7))
    layers = [tuple(f"{layer}.{part}" for part in tiny.layers) for layer in handle.stats.layers]
    scfg_fast.disable(pipe)
    call = tiny.call(EVERYONE, guidance_rescale=0.7)
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, call, layers, tiny.layout, tiny.text_tokens)[0]
    assert relative(actual, expected) <= TOLERANCE


def test_cells_at_the_edges_may_be_ragged() -> None:
    """9 x 13 tokens: the last row and column of cells have half the tokens."""
    tiny = TINY["sd3"]
    pipe = tiny.pipeline()
    layout = dataclasses.replace(tiny.layout, grid=(1, 9, 13))
    handle = scfg_fast.enable(pipe)
    actual = run(pipe, tiny.call(EVERYONE, height=144, width=208))
    assert handle.regions.token_index.shape == (3, 5, 7)
    layers = [(f"{name}.attn",) for name in handle.stats.layers]
    scfg_fast.disable(pipe)
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, tiny.call(EVERYONE, height=144, width=208), layers, layout, tiny.text_tokens)[0]
    assert relative(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_one_graph_with_and_one_without(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.pipeline()
    scfg_fast.enable(pipe)
    expected = run(pipe, tiny.call([0, 1]))
    torch._dynamo.reset()
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    assert relative(run(pipe, tiny.call([0, 1])), expected) <= TOLERANCE
    run(pipe, tiny.call([0, 1]))
    assert graphs == (2 if tiny.layout.two_pass else 1), "a pass that captures and one that does not"


def test_flux_without_a_negative_prompt_says_what_to_pass() -> None:
    tiny = TINY["flux"]
    pipe = tiny.pipeline()
    call = tiny.call([0])
    call = {name: value for name, value in call.items() if not name.startswith("negative")}
    stock = run(pipe, dict(call, generator=torch.Generator().manual_seed(1)))
    scfg_fast.enable(pipe)
    with pytest.warns(SCFGWarning, match="true_cfg_scale > 1 and a negative_prompt"):
        assert torch.equal(run(pipe, dict(call, generator=torch.Generator().manual_seed(1))), stock)
    scfg_fast.enable(pipe, strict=True)
    with pytest.raises(SCFGError, match="true_cfg_scale"):
        pipe(**call)


def test_qwen_image_is_told_that_it_undoes_lengths() -> None:
    tiny = TINY["qwen"]
    pipe = tiny.pipeline()
    handle = scfg_fast.enable(pipe)
    with pytest.warns(SCFGWarning, match="back to the length of the conditional prediction") as caught:
        run(pipe, tiny.call([0]))
    assert len(caught) == 1 and handle.stats.steps_applied == 3


def test_what_needs_a_unet_is_refused_by_name() -> None:
    tiny = TINY["sd3"]
    pipe = tiny.pipeline()
    scfg_fast.enable(pipe, characteristic=CharacteristicGuidance())
    with pytest.raises(
        ValueError, match="Characteristic Guidance: for pipelines with a UNet, this is Stable Diffusion 3"
    ):
        pipe(**tiny.call([0]))
    scfg_fast.enable(pipe, SCFGConfig(tokens="words"))
    with pytest.raises(ValueError, match="Use tokens='all'"):
        pipe(**tiny.call([0], prompt="a cat", prompt_embeds=None, pooled_prompt_embeds=None))


def test_an_inversion_needs_a_unet() -> None:
    with pytest.raises(ValueError, match="invert: PixArtSigmaPipeline has no UNet"):
        scfg_fast.invert(TINY["pixart"].pipeline(), "a cat", latents=torch.zeros(1, 4, 16, 24))


def test_layers_are_taken_from_the_middle_of_the_stack() -> None:
    blocks = [BlockInfo(f"transformer_blocks.{i}", 2, i / 23) for i in range(24)]
    chosen = [int(block.name.split(".")[1]) for block in choose_layers(blocks, SCFGConfig())]
    assert chosen == [6, 10, 13, 17]
    named = SCFGConfig(layers=("transformer_blocks.9",))
    assert [block.name for block in choose_layers(blocks, named)] == ["transformer_blocks.9"]
    short = [BlockInfo(f"transformer_blocks.{i}", 2, i / 2) for i in range(3)]
    assert len(choose_layers(short, SCFGConfig())) == 3


@pytest.mark.any_rounding("one run, looked at alone")
def test_a_reader_of_positions_is_what_the_layer_does_in_half_precision() -> None:
    """bf16 weights and latents: the maps still are fp32, and the run stays finite."""
    tiny = TINY["flux"]
    pipe = tiny.pipeline(torch.bfloat16)
    handle = scfg_fast.enable(pipe)
    result = run(pipe, tiny.call([0], torch.bfloat16))
    assert result.dtype == torch.bfloat16 and result.isfinite().all()
    assert handle.regions.rate.dtype == torch.float32 and handle.stats.steps_applied == 3


PICTURE = torch.rand(BATCH, 3, 128, 192, generator=torch.Generator().manual_seed(9))
HOLE = torch.zeros(BATCH, 1, 128, 192)
HOLE[:, :, 24:96, 32:160] = 1.0
VARIANTS = [
    ("sd3", "StableDiffusion3Img2ImgPipeline", dict(image=PICTURE)),
    ("sd3 of 16 channels", "StableDiffusion3InpaintPipeline", dict(image=PICTURE, mask_image=HOLE)),
    ("flux", "FluxImg2ImgPipeline", dict(image=PICTURE)),
    ("flux", "FluxInpaintPipeline", dict(image=PICTURE, mask_image=HOLE)),
    ("chroma", "ChromaImg2ImgPipeline", dict(image=PICTURE)),
    ("z-image", "ZImageImg2ImgPipeline", dict(image=PICTURE)),
]


@pytest.mark.parametrize("name, cls, more", VARIANTS, ids=[cls for _, cls, _ in VARIANTS])
def test_pipelines_that_begin_with_a_picture(name: str, cls: str, more: dict) -> None:
    tiny = TINY.get(name) or sd3(channels=16)
    base = tiny.pipeline()
    vae = tiny_vae(16, channels=16 if "16" in name else 4).double()
    vae.register_to_config(shift_factor=0.0)
    components = {key: value for key, value in base.components.items() if key != "vae"}
    pipe = getattr(diffusers, cls)(**components, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    layout = dataclasses.replace(tiny.layout, grid=(1, 8, 12))
    if cls == "ChromaImg2ImgPipeline":  # its mask is a number that is added: padding is attended, and comes last
        layout = dataclasses.replace(layout, start=[tiny.text_tokens - 1] * BATCH)

    def call() -> dict:
        options = dict(height=128, width=192, num_inference_steps=4, strength=0.75, **more)
        return tiny.call(EVERYONE, **options)

    stock = run(pipe, call())
    handle = scfg_fast.enable(pipe)
    guided = run(pipe, call())
    assert handle.stats.steps_applied == 3 and not handle.stats.steps_skipped
    layers = [tuple(f"{layer}.{part}" for part in tiny.layers) for layer in handle.stats.layers]
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe, call()), stock)
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, call(), layers, layout, tiny.text_tokens)[0]
    assert relative(stock, expected) > 1e-4
    assert relative(guided, expected) <= TOLERANCE


def test_pixart_alpha_is_told_the_size_of_the_picture() -> None:
    tiny = TINY["pixart"]
    base = tiny.pipeline()
    pipe = diffusers.PixArtAlphaPipeline(**base.components)
    pipe.set_progress_bar_config(disable=True)
    handle = scfg_fast.enable(pipe)
    guided = run(pipe, tiny.call(EVERYONE))
    layers = [tuple(f"{layer}.{part}" for part in tiny.layers) for layer in handle.stats.layers]
    scfg_fast.disable(pipe)
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, tiny.call(EVERYONE), layers, tiny.layout, tiny.text_tokens)[0]
    assert handle.stats.steps_applied == 3 and relative(guided, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_the_per_pixel_rule(name: str) -> None:
    """Rates by energy, between two passes and in packed patches and videos too."""
    tiny = TINY[name]
    pipe = tiny.pipeline()
    config = SCFGConfig.pixels()
    handle = scfg_fast.enable(pipe, config)
    actual = run(pipe, tiny.call(EVERYONE))
    assert handle.stats.layers == () and handle.stats.steps_applied == 3
    scfg_fast.disable(pipe)
    layout, state = tiny.layout, {}

    def rewrite(module, args, kwargs, output):
        if layout.two_pass and "cond" not in state:
            state["cond"] = output[0]
            return None
        uncond, cond = (output[0], state.pop("cond")) if layout.two_pass else output[0].chunk(2)
        scale = tiny.call(EVERYONE).get("guidance_scale") or tiny.call(EVERYONE)["true_cfg_scale"]
        u, t = layout.images(uncond), layout.images(cond)
        energy = (t - u).square().mean(1, keepdim=True)
        low, high = energy.amin((2, 3), keepdim=True), energy.amax((2, 3), keepdim=True)
        rate = config.rate_max - (energy - low) / (high - low) * (config.rate_max - config.rate_min)
        moved = layout.back(u - scale / (scale - 1.0) * (rate - 1.0) * (t - u), uncond)
        return (moved if layout.two_pass else torch.cat([moved, cond]),)

    hook = pipe.transformer.register_forward_hook(rewrite, with_kwargs=True)
    expected = run(pipe, tiny.call(EVERYONE))
    hook.remove()
    assert relative(actual, expected) <= 2e-5


def test_cfg_plus_plus_in_a_flow_is_a_weight_per_step() -> None:
    tiny = TINY["sd3"]
    pipe = tiny.pipeline()
    handle = scfg_fast.enable(pipe, SCFGConfig(rates="none"), schedule=CFGPlusPlus(0.4))
    result = run(pipe, tiny.call(EVERYONE))
    sigmas = pipe.scheduler.sigmas.tolist()
    weights = [0.4 * now * (1.0 - then) / (now - then) for now, then in itertools.pairwise(sigmas)]
    assert handle.stats.weights == pytest.approx(weights, rel=1e-6) and result.isfinite().all()


def test_sana_with_norms_of_queries_and_keys() -> None:
    """As SANA 1.5 has them: over all heads at once."""
    tiny = TINY["sana"]
    pipe = tiny.pipeline()
    options = dict(pipe.transformer.config, qk_norm="rms_norm_across_heads")
    known = {name: value for name, value in options.items() if not name.startswith("_")}
    pipe.transformer = made("SanaTransformer2DModel", **known).double()
    handle = scfg_fast.enable(pipe)
    guided = run(pipe, tiny.call(EVERYONE))
    layers = [(f"{name}.attn2",) for name in handle.stats.layers]
    scfg_fast.disable(pipe)
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, tiny.call(EVERYONE), layers, tiny.layout, tiny.text_tokens)[0]
    assert relative(guided, expected) <= TOLERANCE


def test_a_step_may_be_done_again_from_the_very_same_latents() -> None:
    tiny = TINY["flux"]
    pipe = tiny.pipeline()
    kept: dict[str, torch.Tensor] = {}

    def again(pipe, step: int, timestep, values: dict) -> dict:
        if step == 0:
            kept["latents"] = values["latents"]
        return {"latents": kept["latents"]} if step == 1 else {}

    handle = scfg_fast.enable(pipe)
    seen: list[int] = []
    handle.on_regions = lambda step, _: seen.append(step)
    run(pipe, tiny.call(EVERYONE, num_inference_steps=4, callback_on_step_end=again))
    assert handle.stats.steps_applied == 4 and seen == [0, 1, 2, 3] and handle.stats.samples == 4 * 2 * BATCH


def test_maps_are_gone_when_the_scheduler_steps(tiny: Tiny) -> None:
    pipe = tiny.pipeline()
    handle = scfg_fast.enable(pipe)
    maps: list[weakref.ref] = []
    taken = handle._captures[0]
    step = type(pipe.scheduler).step
    alive: list[int] = []

    def watch(module, args, output) -> None:
        for block in taken.blocks:
            if block.captures[-1].tokens is not None:
                maps.append(weakref.ref(block.captures[-1].tokens))

    def counted(self, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in maps))
        return step(self, *args, **kwargs)

    run(pipe, tiny.call([0]))
    blocks = [pipe.transformer.get_submodule(name) for name in dict.fromkeys(handle.stats.layers)]
    hooks = [block.register_forward_hook(watch) for block in blocks]  # inside the evaluation: at its end they are taken
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "step", counted)
        run(pipe, tiny.call([0]))
    for hook in hooks:
        hook.remove()
    assert maps and alive == [0, 0, 0]


def test_where_lumina_2_cuts_guidance_off_the_step_has_weight_one() -> None:
    tiny = TINY["lumina2"]
    pipe = tiny.pipeline()
    handle = scfg_fast.enable(pipe)
    run(pipe, tiny.call(EVERYONE, cfg_trunc_ratio=0.34))
    assert handle.stats.steps_applied == 1 and sum(handle.stats.steps_skipped.values()) == 2
    assert handle.stats.weights == [4.0, 1.0, 1.0] and handle.stats.mean_weight == 2.0


def test_passes_that_cannot_be_told_apart_are_complained_of() -> None:
    """A hook of the user's own that copies the latents: the second pass is not the first one's."""
    tiny = TINY["cogview4"]
    pipe = tiny.pipeline()
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"].clone()}),
        with_kwargs=True,
    )
    stock = run(pipe, tiny.call([0]))
    scfg_fast.enable(pipe)
    with pytest.warns(SCFGWarning, match="twice on the very same latents"):
        assert torch.equal(run(pipe, tiny.call([0])), stock)
    hook.remove()


@pytest.mark.parametrize("name", ["flux", "wan2.2"])
def test_an_exception_between_the_passes(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.pipeline()
    stock = run(pipe, tiny.call([0]))
    models = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
    before = [processors(model) for model in models]
    calls = []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) == 4:  # the unconditional pass of the second step, in Wan 2.2 of its second denoiser
            raise RuntimeError("on purpose")

    hooks = [model.register_forward_pre_hook(fail) for model in models]
    scfg_fast.enable(pipe)
    with pytest.raises(RuntimeError, match="on purpose"):
        pipe(**tiny.call([0]))
    for hook in hooks:
        hook.remove()
    scfg_fast.disable(pipe)
    for model, there in zip(models, before, strict=True):
        assert all(processors(model)[key] is processor for key, processor in there.items())
        assert not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(run(pipe, tiny.call([0])), stock)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_lora_through_peft(name: str) -> None:
    """Queries and keys come from the layer's own modules, adapters included."""
    tiny = TINY[name]
    pipe = tiny.pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)
    handle = scfg_fast.enable(pipe)
    guided = run(pipe, tiny.call(EVERYONE))
    layers = [tuple(f"{layer}.{part}" for part in tiny.layers) for layer in handle.stats.layers]
    scfg_fast.disable(pipe)
    with otherwise_rounded(pipe):
        expected = reference_run(pipe, tiny.call(EVERYONE), layers, tiny.layout, tiny.text_tokens)[0]
    assert relative(guided, expected) <= TOLERANCE


def test_fused_projections() -> None:
    tiny = TINY["flux"]
    pipe = tiny.pipeline()
    scfg_fast.enable(pipe)
    expected = run(pipe, tiny.call(EVERYONE))
    pipe.transformer.fuse_qkv_projections()
    assert relative(run(pipe, tiny.call(EVERYONE)), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["pixart", "qwen", "z-image"])
def test_several_images_per_prompt(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.pipeline()
    handle = scfg_fast.enable(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in (40, 50, 41, 51)]
    run(pipe, tiny.call([0, 1], num_images_per_prompt=2, generator=generators))
    assert handle.stats.steps_applied == 3 and handle.regions.token_index.shape[0] == 4
