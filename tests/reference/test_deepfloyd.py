"""Properties of the DeepFloyd IF reference: what diffusers computes, and what the Stable Diffusion path computes."""

from __future__ import annotations

import torch

from lab.reference import deepfloyd, official
from lab.tiny.deepfloyd import STAGE_ONE, STAGE_TWO, if_arguments, tiny_if_pipeline


def test_the_explicit_processor_gives_the_output_of_the_stock_one() -> None:
    """Also in layers that attend to the text alone, which leave no maps."""
    for name, only_text, kept in ((STAGE_ONE[0], False, {2: 3, 4: 5, 8: 4}), (STAGE_TWO[0], True, {8: 1})):
        pipe = tiny_if_pipeline(name, only_cross_attention=only_text)
        arguments = if_arguments(name, num_inference_steps=1)
        sizes = pipe.unet.config.in_channels, pipe.unet.config.sample_size
        sample = torch.randn(2, sizes[0], sizes[1], sizes[1], generator=torch.Generator().manual_seed(0)).double()
        extra = {"class_labels": torch.tensor([250, 250])} if name in STAGE_TWO else {}
        states = arguments["prompt_embeds"][:2]
        store = official.LiteralStore((sizes[1], sizes[1]))
        with torch.no_grad():
            expected = pipe.unet(sample, 500, encoder_hidden_states=states, **extra).sample
            pipe.unet.set_attn_processor(deepfloyd.LiteralJointProcessor(store))
            actual = pipe.unet(sample, 500, encoder_hidden_states=states, **extra).sample
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert {int(key[1]): len(maps) for key, maps in store.maps.items() if key.endswith("self")} == kept
        for factor in kept:
            for own, cross in store.layers(factor):
                torch.testing.assert_close(own.sum(-1) + cross.sum(-1), torch.ones_like(own[..., 0]))
                assert float(own.sum(-1).max()) < 1.0


def test_a_uniform_norm_is_rate_one_in_both_stages(rng) -> None:
    d = torch.randn(2, 3, 16, 16, generator=rng)
    d = d / d.norm(dim=1, keepdim=True)
    ids = torch.randint(5, (2, 4, 4), generator=rng)
    masks = torch.nn.functional.one_hot(ids, 5).permute(0, 3, 1, 2).float()
    for foreground in (None, (ids == 0)[:, None].float()):
        rate = deepfloyd.region_rates(torch.zeros_like(d), d, masks, foreground)
        torch.testing.assert_close(rate, torch.ones_like(rate))


def test_with_the_foreground_the_rates_are_those_of_stable_diffusion(rng) -> None:
    uncond, cond = torch.randn(2, 2, 3, 16, 16, generator=rng)
    masks = torch.nn.functional.one_hot(torch.randint(5, (2, 4, 4), generator=rng), 5).permute(0, 3, 1, 2).float()
    foreground = (torch.rand(2, 1, 4, 4, generator=rng) < 0.5).float()
    assert torch.equal(
        deepfloyd.region_rates(uncond, cond, masks, foreground), official.region_rates(uncond, cond, masks, foreground)
    )


def test_a_run_is_reproducible_and_leaves_the_pipeline_stock() -> None:
    name = STAGE_TWO[0]
    pipe = tiny_if_pipeline(name)
    stock = dict(pipe.unet.attn_processors)
    plain = pipe(**if_arguments(name)).images
    first, history = deepfloyd.replaced_run(pipe, if_arguments(name), stage=2)
    again, _ = deepfloyd.replaced_run(pipe, if_arguments(name), stage=2)
    assert torch.equal(first.images, again.images) and len(history) == 4
    assert float((first.images - plain).abs().max()) > 0.1
    assert all(0.2 < float(stages["foreground"].mean()) < 0.8 for stages in history)
    assert all(pipe.unet.attn_processors[key] is value for key, value in stock.items())
    assert torch.equal(pipe(**if_arguments(name)).images, plain)
