"""The literal reference is checked by numbers worked out by hand, and by turning it into the stock pipeline."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from lab.reference import official
from lab.tiny.unets import tiny_sd_pipeline

RATE_ONE = {"rate_min": 1.0, "rate_max": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd_pipeline(sample_size=16, dtype=torch.float32)


class TestByHand:
    def test_attention(self):
        q = torch.tensor([[[1.0], [0.0]], [[0.0], [0.0]]])  # two heads, two queries
        k = torch.tensor([[[2.0], [0.0]], [[5.0], [7.0]]])
        probabilities = official.attention_probabilities(q, k, 0.5)
        first = torch.tensor(1.0).exp() / (torch.tensor(1.0).exp() + 1)
        torch.testing.assert_close(probabilities[0, 0], torch.stack([first, 1 - first]))
        assert torch.equal(probabilities[1], torch.full((2, 2), 0.5))
        torch.testing.assert_close(official.head_mean(probabilities, 2)[0, 0, 0], (first + 0.5) / 2)

    def test_folding_heads_puts_heads_fastest(self):
        x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
        assert torch.equal(official.fold_heads(x)[4], x[1, 1])

    def test_completions_of_a_swap(self):
        swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        assert official.official_completion_matrix(swap)[0].tolist() == [[0.75, 0.25], [0.25, 0.75]]
        assert official.paper_completion_matrix(swap)[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        c = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        assert torch.equal(official.official_completion(swap, c), official.official_completion_matrix(swap))
        assert torch.equal(official.paper_completion(swap, c), official.paper_completion_matrix(swap))

    def test_completions_of_a_number(self):
        half = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
        assert float(official.official_completion_matrix(half)) == (0.5 + 3 * 0.25) / 4
        assert float(official.paper_completion_matrix(half)) == (0.5 + 0.25 + 0.125 + 0.0625) / 4

    def test_kernel(self):
        kernel = official.gaussian_kernel_3x3(0.5)
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-15)
        assert [float(kernel[1, 1]), float(kernel[0, 1]), float(kernel[0, 0])] == pytest.approx(
            [0.3319107, 0.1221031, 0.0449192], abs=5e-8
        )

    def test_smoothing_reflects_about_the_edge_sample(self):
        x = torch.tensor([[[[1.0, 2.0, 4.0]]]], dtype=torch.float64)
        edge, centre = 0.21194156, 0.57611688
        expected = [centre + 2 * edge * 2, 2 * centre + edge * 5, 4 * centre + 2 * edge * 2]
        assert official.smooth(x).flatten().tolist() == pytest.approx(expected, abs=1e-7)

    def test_smoothing_is_torchs_reflection_padding(self, rng):
        x = torch.rand(2, 3, 5, 7, generator=rng, dtype=torch.float64)
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        kernel = official.gaussian_kernel_3x3(0.5).expand(3, 1, 3, 3)
        assert torch.equal(official.smooth(x), torch.nn.functional.conv2d(padded, kernel, groups=3))

    def test_a_map_becomes_an_image_row_by_row(self):
        maps = torch.arange(6.0).view(1, 6, 1)
        assert official.as_image(maps, (2, 3))[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_scores_and_masks(self):
        maps = torch.tensor([[[0.8, 0.2], [0.4, 0.6]]], dtype=torch.float64)  # two cells, two tokens
        scores = official.smoothed_normalised([maps, maps], [(1, 2)] * 2, (1, 2), sigma=0)
        assert scores[0, :, 0].flatten().tolist() == pytest.approx([0.8 / 0.6, 0.4 / 0.6, 0.5, 1.5], rel=1e-7)
        masks = official.token_masks(scores)
        assert masks[0, :, 0].tolist() == [[1, 0], [0, 1]]
        assert official.token_ids(masks)[0, 0].tolist() == [0, 1]

    def test_a_tie_is_hot_twice_and_a_token_mask_excludes(self):
        scores = torch.tensor([1.0, 2.0, 2.0]).view(1, 3, 1, 1)
        assert official.token_masks(scores).flatten().tolist() == [0, 1, 1]
        assert int(official.token_ids(official.token_masks(scores))) == 1
        allowed = torch.tensor([[True, False, True]])
        assert official.token_masks(scores, allowed).flatten().tolist() == [0, 0, 1]

    def test_foreground(self):
        maps = torch.tensor([[[0.7, 0.1, 0.2], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]]], dtype=torch.float64)
        two = official.foreground_scores([maps], [(1, 3)], (1, 3), sigma=0)
        assert two[0, 0, 0].tolist() == pytest.approx([1.4, 0.6, 1.0])
        assert two[0, 1, 0].tolist() == pytest.approx([0.6, 1.4, 1.0])
        assert official.foreground_mask([maps], [(1, 3)], (1, 3), sigma=0)[0, 0, 0].tolist()[:2] == [0, 1]

    def test_a_foreground_tie_is_background(self):
        maps = torch.full((1, 4, 2), 0.5)
        assert not official.foreground_mask([maps], [(2, 2)], (2, 2), sigma=0).any()

    def test_bilinear_resize_has_half_pixel_centres(self):
        image = torch.tensor([[[[0.0, 4.0]]]])
        assert official.resized_and_smoothed(image, (1, 4), 0)[0, 0, 0].tolist() == [0, 1, 3, 4]

    def test_nearest_upsampling_of_a_ragged_edge(self):
        masks = torch.tensor([[[[1.0, 2.0]]]])
        assert official.nearest_upsampled(masks, (1, 6), 4)[0, 0, 0].tolist() == [1, 1, 1, 1, 2, 2]

    def rates(self, **options):
        uncond = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
        cond = torch.tensor([[3.0, 6.0, 9.0, 18.0], [4.0, 8.0, 12.0, 24.0]], dtype=torch.float64).view(1, 2, 1, 4)
        masks = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.float64).view(1, 3, 1, 4)
        foreground = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64).view(1, 1, 1, 4)
        # norms 5, 10, 15, 30: region means 7.5 and 22.5, foreground mean 10
        return official.rates(uncond, cond, masks, foreground, cell=1, **options).flatten().tolist()

    def test_rates(self):
        low, high = 10 / 22.5, 10 / 7.5
        free = {"rate_min": None, "rate_max": None, "max_scale": None, "sigma": 0}
        assert self.rates(guidance_scale=7.5, **free) == pytest.approx([high, high, low, low], rel=1e-7)
        assert self.rates(guidance_scale=7.5, sigma=0) == pytest.approx([high, high, 0.8, 0.8], rel=1e-7)
        assert self.rates(guidance_scale=12.5, sigma=0) == pytest.approx([1.2, 1.2, 0.8, 0.8], rel=1e-7)
        assert self.rates(guidance_scale=30.0, sigma=0) == pytest.approx([0.5] * 4, rel=1e-7)
        edge = 0.21194156 * (high - 0.8)
        assert self.rates(guidance_scale=7.5) == pytest.approx([high, high - edge, 0.8 + edge, 0.8], rel=1e-7)

    def test_guided(self):
        uncond, cond = torch.full((2, 1, 1, 1), 1.0), torch.full((2, 1, 1, 1), 3.0)
        rate = torch.full((2, 1, 1, 1), 0.5)
        assert official.guided(uncond, cond, rate, 4.0).flatten().tolist() == [5, 5]
        assert official.guided(uncond, cond, rate, torch.tensor([4.0, 8.0])).flatten().tolist() == [5, 9]

    def test_rescale_is_that_of_diffusers(self, rng):
        noise, cond = torch.randn(2, 2, 4, 8, 8, generator=rng)
        torch.testing.assert_close(official.rescaled(noise, cond, 0.7), rescale_noise_cfg(noise, cond, 0.7))


class TestStore:
    @pytest.mark.parametrize(
        ("latent_hw", "grids"),
        [((64, 64), {1: (64, 64), 4: (16, 16), 8: (8, 8)}), ((65, 97), {2: (33, 49), 4: (17, 25), 8: (9, 13)})],
    )
    def test_factor_of_a_number_of_tokens(self, latent_hw, grids):
        store = official.LiteralStore(latent_hw)
        for factor, grid in grids.items():
            assert store.grid(factor) == grid and store.factor(grid[0] * grid[1]) == factor

    def test_a_number_of_tokens_that_does_not_fit(self):
        with pytest.raises(ValueError, match="100 image tokens are not a power-of-two fraction"):
            official.LiteralStore((64, 64)).factor(100)

    def test_full_resolution_is_not_kept(self):
        store = official.LiteralStore((8, 8))
        store.add("self", torch.ones(1, 64, 64))
        store.add("self", torch.ones(1, 16, 16))
        assert list(store.maps) == ["r2_self"]
        store.reset()
        assert store.maps == {}

    def test_guidance_refuses_another_latent(self):
        with pytest.raises(ValueError, match="differ"):
            official.literal_guidance(official.LiteralStore((8, 8)), torch.ones(2, 4, 8, 4), 7.5, (8, 4))


class TestProcessor:
    @pytest.mark.parametrize("latent_hw", [(16, 16), (17, 25)])
    def test_output_is_that_of_the_explicit_processor_bit_for_bit(self, pipe, latent_hw):
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(2, 4, *latent_hw, generator=generator)
        text = torch.randn(2, 77, 32, generator=generator)
        originals = dict(pipe.unet.attn_processors)
        store = official.LiteralStore(latent_hw)
        try:
            outputs = []
            for processor in (AttnProcessor(), official.LiteralCaptureProcessor(store)):
                pipe.unet.set_attn_processor(processor)
                with torch.no_grad():
                    outputs.append(pipe.unet(sample, 500, text).sample)
        finally:
            pipe.unet.set_attn_processor(originals)
        assert torch.equal(*outputs)
        assert {key: len(maps) for key, maps in store.maps.items()} == {
            "r2_self": 1, "r2_cross": 1, "r4_self": 5, "r4_cross": 5, "r8_self": 1, "r8_cross": 1,
        }  # fmt: skip
        for key, maps in store.maps.items():
            tokens = store.grid(int(key[1]))[0] * store.grid(int(key[1]))[1]
            for layer in maps:
                assert layer.shape == (2, tokens, tokens if key.endswith("self") else 77)
                torch.testing.assert_close(layer.sum(-1), torch.ones(2, tokens), rtol=0, atol=2e-6)


class TestRun:
    PROMPTS = ("a red cat", "a tree")
    NEGATIVES = ("a blue dog", "")

    def stock(self, pipe, seeds, **options):
        return pipe(
            list(self.PROMPTS),
            negative_prompt=list(self.NEGATIVES),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **options,
        ).images

    @pytest.mark.parametrize("rescale", [0.0, 0.7])
    @pytest.mark.parametrize("size", [(128, 128), (136, 200)], ids=["square", "odd-latent"])
    def test_rates_of_one_make_it_the_stock_pipeline(self, pipe, size, rescale):
        options = {"guidance_scale": 5.0, "guidance_rescale": rescale, "height": size[0], "width": size[1]}
        latents, history = official.literal_run(
            pipe, self.PROMPTS, self.NEGATIVES, steps=3, seeds=[1, 2], **options, **RATE_ONE
        )
        expected = self.stock(pipe, [1, 2], num_inference_steps=3, **options)
        # Explicit softmax in every layer instead of the fused one, over three steps of an untrained model.
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert len(history) == 3 and torch.equal(history[-1]["latents"], latents)

    def test_a_scheduler_that_scales_its_input(self, pipe):
        plain = pipe.scheduler
        pipe.scheduler = EulerDiscreteScheduler.from_config(plain.config)
        try:
            latents, _ = official.literal_run(
                pipe, self.PROMPTS, self.NEGATIVES, steps=3, seeds=[1, 2], guidance_scale=5.0, **RATE_ONE
            )
            expected = self.stock(pipe, [1, 2], num_inference_steps=3, guidance_scale=5.0)
        finally:
            pipe.scheduler = plain
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    def test_guidance_by_region_changes_the_result_within_the_bounds(self, pipe):
        options = {"steps": 2, "seeds": [1, 2], "guidance_scale": 7.5}
        latents, history = official.literal_run(pipe, self.PROMPTS, self.NEGATIVES, **options)
        plain, _ = official.literal_run(pipe, self.PROMPTS, self.NEGATIVES, **options, **RATE_ONE)
        assert not torch.allclose(latents, plain, atol=1e-3)
        for stages in history:
            assert stages["size"] == (4, 4) and stages["sizes"] == [(4, 4)] * 5 + [(2, 2)]
            assert stages["masks"].shape == (2, 77, 4, 4) and stages["foreground"].shape == (2, 1, 4, 4)
            assert float(stages["rate"].min()) >= 0.8 - 1e-6 and float(stages["rate"].max()) <= 2 + 1e-6
            assert torch.equal(torch.cat([stages["uncond"], stages["cond"]]), stages["model_output"])

    def test_given_latents_are_used_and_one_source_of_noise_is_needed(self, pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        noise = torch.cat([torch.randn(1, 4, 16, 16, generator=generator) for generator in generators])
        from_seeds, _ = official.literal_run(pipe, self.PROMPTS, steps=1, seeds=[1, 2])
        from_noise, _ = official.literal_run(pipe, self.PROMPTS, steps=1, latents=noise)
        assert torch.equal(from_seeds, from_noise)
        for both in ({}, {"seeds": [1, 2], "latents": noise}):
            with pytest.raises(ValueError, match="either seeds or latents"):
                official.literal_run(pipe, self.PROMPTS, steps=1, **both)

    def test_processors_are_restored_also_after_an_error(self, pipe):
        before = {name: id(processor) for name, processor in pipe.unet.attn_processors.items()}
        official.literal_run(pipe, self.PROMPTS, steps=1, seeds=[1, 2])
        assert {name: id(processor) for name, processor in pipe.unet.attn_processors.items()} == before
        with pytest.raises(KeyError, match="r16_self"):
            official.literal_run(pipe, self.PROMPTS, steps=1, seeds=[1, 2], factors=(16,))
        assert {name: id(processor) for name, processor in pipe.unet.attn_processors.items()} == before
