"""The configuration at work in a pipeline call: windows, reuse, tokens, layers, overrides, callbacks."""

from __future__ import annotations

import pytest
import scfg_kernels
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

import scfg_fast
import scfg_fast.pipelines.call
from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast import Regions, SCFGConfig, SCFGError, SCFGWarning

PROMPT = "a red cat on the grass"
STEPS = 6


@pytest.fixture()
def pipe() -> StableDiffusionPipeline:
    return tiny_sd_pipeline(sample_size=16)


def run(pipe, prompt=PROMPT, **kwargs) -> torch.Tensor:
    options = dict(num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent") | kwargs
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images


def enable_and_record(pipe, config=None, **kwargs) -> tuple[scfg_fast.Handle, list[Regions]]:
    seen: list[Regions] = []
    handle = scfg_fast.enable(pipe, config, on_regions=lambda step, regions: seen.append(regions.clone()), **kwargs)
    return handle, seen


def test_regions_and_stats(pipe) -> None:
    handle, seen = enable_and_record(pipe)
    run(pipe, num_images_per_prompt=2)
    regions = handle.regions
    assert regions.step == STEPS - 1 == seen[-1].step
    assert regions.token_index.shape == (2, 4, 4) and regions.token_index.dtype == torch.int64
    assert regions.foreground.shape == (2, 4, 4) and regions.foreground.dtype == torch.bool
    assert regions.rate.shape == (2, 1, 16, 16)
    assert float(regions.rate.min()) > 0.8 - 1e-6 and float(regions.rate.max()) < 2.0 + 1e-6
    assert len(handle.stats.layers) == 6 and "mid_block.attentions.0.transformer_blocks.0" in handle.stats.layers
    # Kept to the end of a step: per image, (77 columns + 1) x (5 x 16 + 1 x 4) cells in fp64.
    assert handle.stats.bytes == 2 * 78 * (5 * 16 + 4) * 8
    assert set(handle.stats.backend.values()) == {"torch"}


def test_regions_are_a_copy(pipe) -> None:
    handle = scfg_fast.enable(pipe)
    assert handle.regions is None
    run(pipe)
    handle.regions.rate.zero_()
    assert float(handle.regions.rate.min()) > 0


@pytest.mark.parametrize("start, stop, steps", [(0.0, 0.5, [0, 1, 2]), (0.5, 1.0, [3, 4, 5]), (0.34, 0.67, [2, 3])])
def test_start_and_stop(pipe, start: float, stop: float, steps: list[int]) -> None:
    handle, seen = enable_and_record(pipe, SCFGConfig(start=start, stop=stop))
    run(pipe)
    assert [regions.step for regions in seen] == steps
    assert handle.stats.steps_applied == len(steps)
    assert sum(handle.stats.steps_skipped.values()) == STEPS - len(steps)


def test_fractions_mean_whole_steps(pipe) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point and means 29 steps."""
    handle = scfg_fast.enable(pipe, SCFGConfig(start=0.28, stop=0.29))
    run(pipe, num_inference_steps=100, height=64, width=64)
    assert handle.stats.steps_applied == 1


def test_an_empty_window_is_bit_identical_to_plain(pipe) -> None:
    plain = run(pipe)
    scfg_fast.enable(pipe, SCFGConfig(start=0.5, stop=0.5))
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_rate_one_is_plain_guidance(pipe, rescale: float) -> None:
    """Bounds that force rate 1: the image is plain guidance's (bit for bit where u alone is rewritten)."""
    plain = run(pipe, guidance_rescale=rescale)
    scfg_fast.enable(pipe, SCFGConfig(rate_min=1.0, rate_max=1.0))
    guided = run(pipe, guidance_rescale=rescale)
    if rescale:
        assert torch.equal(guided, plain)
    torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)


def test_reuse_every(pipe) -> None:
    _, every = enable_and_record(pipe)
    run(pipe)
    _, reused = enable_and_record(pipe, SCFGConfig(reuse_every=3))
    run(pipe)
    assert torch.equal(reused[0].token_index, every[0].token_index)
    for first in (0, 3):
        for later in (first + 1, first + 2):
            assert torch.equal(reused[later].token_index, reused[first].token_index)
            assert not torch.equal(reused[later].rate, reused[first].rate)
    assert not torch.equal(reused[3].token_index, reused[0].token_index)


def test_words_only(pipe) -> None:
    """'a red cat on the grass' is six tokens after the start token."""
    _, seen = enable_and_record(pipe, SCFGConfig(tokens="words"))
    run(pipe, [PROMPT, "a boat"])
    for regions in seen:
        assert set(regions.token_index[0].flatten().tolist()) <= set(range(1, 7))
        assert set(regions.token_index[1].flatten().tolist()) <= {1, 2}


def test_words_of_textual_inversion(pipe) -> None:
    """One placeholder stands for several tokens; the words after it keep their own columns."""
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<thing>": vectors})
    masks = []
    original = scfg_fast.pipelines.call.word_mask
    scfg_fast.pipelines.call.word_mask = lambda *args: masks.append(original(*args)) or masks[-1]
    try:
        scfg_fast.enable(pipe, SCFGConfig(tokens="words"))
        run(pipe, "a <thing> dog", num_inference_steps=1)
    finally:
        scfg_fast.pipelines.call.word_mask = original
    assert masks[0].nonzero()[:, 1].tolist() == [1, 2, 3, 4, 5, 6]


def test_autocast_does_not_reach_the_maps() -> None:
    """Under autocast the layers compute in bfloat16; what the maps become from there is fp32 arithmetic."""
    q, k = torch.randn(2, 2, 4, 64, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    text = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(1))

    def regions() -> list[torch.Tensor]:
        own, cross = scfg_kernels.attention_map(q, k), scfg_kernels.attention_map(q, text)
        tokens, start = scfg_kernels.complete(own, cross, unconditional=1)
        ids, foreground = scfg_kernels.segment([tokens], [start], [(8, 8)], (8, 8))
        guided, rate = scfg_kernels.guide(
            q[:1, :, :, 0].reshape(1, 4, 8, 8), k[:1, :, :, 0].reshape(1, 4, 8, 8), ids, foreground, 7.5,
            num_tokens=12, cell=1,
        )  # fmt: skip
        return [own, cross, tokens, start, ids, foreground, guided, rate]

    expected = regions()
    with torch.autocast("cpu", torch.bfloat16):
        actual = regions()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_words_need_text(pipe) -> None:
    scfg_fast.enable(pipe, SCFGConfig(tokens="words"))
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with pytest.raises(ValueError, match="tokens='words' needs the prompt's text"):
        pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=1, output_type="latent")


def test_an_empty_prompt_keeps_all_tokens(pipe) -> None:
    handle, _ = enable_and_record(pipe, SCFGConfig(tokens="words"))
    assert torch.isfinite(run(pipe, "")).all()
    assert handle.stats.steps_applied == STEPS


def test_levels_and_layers(pipe) -> None:
    handle = scfg_fast.enable(pipe, SCFGConfig(levels=[8]))
    run(pipe)
    assert handle.stats.layers == ("mid_block.attentions.0.transformer_blocks.0",)
    chosen = ("down_blocks.2.attentions.1.transformer_blocks.0", "up_blocks.1.attentions.0.transformer_blocks.0")
    handle.config = SCFGConfig(layers=chosen)
    run(pipe)
    assert handle.stats.layers == chosen


@pytest.mark.parametrize(
    "config, message",
    [
        (SCFGConfig(levels=[16]), r"no attention at \[16\]; it has \[2, 4, 8\]"),
        (SCFGConfig(layers=["mid_block.nothing"]), "not transformer blocks of this model"),
        (SCFGConfig(cell=16), "Pass SCFGConfig"),
        (
            SCFGConfig(backend="triton"),
            r"backend='triton' cannot run: .*need a CUDA device \(attention_map, attention_maps, ",
        ),
    ],
    ids=["level", "layer", "cell", "triton"],
)
def test_what_the_model_does_not_have(pipe, config: SCFGConfig, message: str) -> None:
    with pytest.raises(scfg_fast.UnsupportedPipelineError, match=message):
        scfg_fast.enable(pipe, config)
    assert type(pipe) is StableDiffusionPipeline


def test_per_call_overrides(pipe) -> None:
    plain = run(pipe)
    handle = scfg_fast.enable(pipe)
    guided = run(pipe)
    assert torch.equal(run(pipe, scfg_kwargs={"enabled": False}), plain)
    assert not torch.equal(run(pipe, scfg_kwargs={"rate_max": 1.0}), guided)
    assert float(handle.regions.rate.max()) <= 1.0
    assert torch.equal(run(pipe), guided)
    with pytest.raises(ValueError, match="unknown parameters"):
        run(pipe, scfg_kwargs={"rate_maximum": 2.0})
    assert torch.equal(run(pipe), guided)


def test_guidance_off_warns_once_and_is_stock(pipe) -> None:
    plain = run(pipe, guidance_scale=1.0)
    handle = scfg_fast.enable(pipe)
    with pytest.warns(SCFGWarning, match="guidance is off") as caught:
        assert torch.equal(run(pipe, guidance_scale=1.0), plain)
    assert len(caught) == 1
    assert handle.stats.steps_applied == 0 and sum(handle.stats.steps_skipped.values()) == STEPS
    scfg_fast.enable(pipe, strict=True)
    with pytest.raises(SCFGError, match="guidance is off"):
        run(pipe, guidance_scale=1.0)


def test_a_callback_that_turns_guidance_off(pipe) -> None:
    """The documented dynamic-CFG callback: half way through, the batch shrinks to the conditional half."""

    def off_after_three(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    options = dict(callback_on_step_end=off_after_three, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    handle = scfg_fast.enable(pipe)
    handle.strict = True  # no error and no warning: it is the user's own choice for a part of the run
    assert torch.isfinite(run(pipe, **options)).all()
    assert handle.stats.steps_applied == 3 and handle.stats.steps_skipped == {"guidance is off": 3}


def test_a_callback_that_changes_the_scale(pipe) -> None:
    """The scale is read at every step: the clamp max_scale / guidance_scale follows it."""

    def raise_scale(pipe, step, timestep, tensors):
        pipe._guidance_scale = 30.0
        return tensors

    _, seen = enable_and_record(pipe)
    run(pipe, callback_on_step_end=raise_scale)
    assert float(seen[0].rate.max()) > 0.8
    assert all(torch.allclose(regions.rate, torch.full_like(regions.rate, 0.5)) for regions in seen[1:])


class TwiceTheOutput(AttnProcessor2_0):
    """A processor of the user's own, with an argument of its own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, factor=1.0):
        return factor * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@pytest.mark.parametrize("make", [AttnProcessor, lambda: SlicedAttnProcessor(1)], ids=["eager", "sliced"])
def test_other_stock_processors_keep_their_output(pipe, make) -> None:
    """The output is the user's processor's own, and the maps are the same ones."""
    scfg_fast.enable(pipe)
    expected = run(pipe)
    pipe.unet.set_attn_processor(make())
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)


def test_a_users_own_processor_is_asked_with_its_own_arguments(pipe) -> None:
    pipe.unet.set_attn_processor(TwiceTheOutput())
    plain = run(pipe, cross_attention_kwargs={"factor": 0.5})
    assert not torch.equal(plain, run(pipe))
    scfg_fast.enable(pipe, SCFGConfig(rate_min=1.0, rate_max=1.0))
    guided = run(pipe, cross_attention_kwargs={"factor": 0.5})
    torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)


def test_fused_projections(pipe) -> None:
    scfg_fast.enable(pipe)
    expected = run(pipe)
    pipe.unet.fuse_qkv_projections()
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)
