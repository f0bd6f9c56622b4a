"""`guide` against the literal reference, given equal masks."""

import math

import pytest
import torch
import torch.nn.functional as F
from scfg_kernels import guide
from scfg_kernels.testing import Recorder, as_layout, assert_as_accurate_as

from lab.reference import deepfloyd, official
from tests.kernels.cases import DTYPES, TOKENS, by_name, one_hot, random_step, step_by_operators, step_by_reference

RATE_NOISE = 3e-6
"""Relative error of an fp32 rate: two means over up to 4096 pixels and a quotient, each summed in its own order."""

LATENTS = {
    # name: (height, width, cell)
    "64x64": (64, 64, 4),
    "65x97": (65, 97, 4),
    "one-row": (1, 63, 4),
    "one-column": (50, 1, 4),
    "one-pixel": (1, 1, 4),
    "cell-1": (16, 12, 1),
    "cell-2": (33, 21, 2),
    "cell-8": (64, 40, 8),
    "cell-larger-than-the-latent": (6, 5, 16),
}
OPTIONS = {
    "defaults": {},
    "no-clamps": {"rate_min": None, "rate_max": None, "max_scale": None},
    "only-the-effective-scale": {"rate_min": None, "rate_max": None},
    "narrow": {"rate_min": 0.95, "rate_max": 1.05},
    "not-smoothed": {"blur_sigma": 0.0},
    "wide-blur": {"blur_sigma": 1.5},
}


def predictions(rng, height, width, batch=2, channels=4, dtype=torch.float32):
    """Two predictions whose difference varies in strength over the picture."""
    uncond = torch.randn(batch, channels, height, width, generator=rng)
    strength = torch.randn(batch, 1, height, width, generator=rng).exp()
    cond = uncond + strength * torch.randn(batch, channels, height, width, generator=rng)
    return uncond.to(dtype), cond.to(dtype)


def regions(rng, height, width, cell, batch=2, tokens=TOKENS):
    """Random ids and foreground on the grid of cells; a foreground cell in every sample."""
    grid = (batch, math.ceil(height / cell), math.ceil(width / cell))
    foreground = torch.rand(grid, generator=rng) < 0.4
    foreground[:, 0, 0] = True
    return torch.randint(tokens, grid, generator=rng), foreground


def reference(uncond, cond, ids, foreground, g, tokens=TOKENS, dtype=None, **options):
    """Guided prediction and rate of the literal reference, on inputs converted to `dtype`."""
    dtype = dtype or cond.dtype
    sigma = options.pop("blur_sigma", 0.5)
    uncond, cond = uncond.to(dtype), cond.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    masks, foreground = one_hot(ids, tokens, wide), foreground[:, None].to(wide)
    rate = official.rates(uncond, cond, masks, foreground, g, sigma=sigma, **options)
    return official.guided(uncond, cond, rate, g), rate


@pytest.mark.parametrize("options", **by_name(OPTIONS))
@pytest.mark.parametrize("latent", **by_name(LATENTS))
def test_rate_agrees_with_the_literal_reference(rng, latent, options):
    height, width, cell = latent
    uncond, cond = predictions(rng, height, width)
    ids, foreground = regions(rng, height, width, cell)
    _, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, cell=cell, **options)
    assert rate.shape == (2, 1, height, width) and rate.dtype == torch.float32 and rate.is_contiguous()
    _, expected = reference(uncond, cond, ids, foreground, 7.5, dtype=torch.float64, cell=cell, **options)
    torch.testing.assert_close(rate.double(), expected, rtol=RATE_NOISE, atol=0)


@pytest.mark.parametrize("options", **by_name({name: OPTIONS[name] for name in ("defaults", "no-clamps")}))
@pytest.mark.parametrize("latent", **by_name({name: LATENTS[name] for name in ("64x64", "65x97", "cell-1")}))
def test_the_whole_image_as_benchmark(rng, latent, options):
    """Of DeepFloyd IF's first stage: the numerator is the mean norm over all pixels, whatever the foreground is."""
    height, width, cell = latent
    uncond, cond = predictions(rng, height, width)
    ids, foreground = regions(rng, height, width, cell)
    options = {"cell": cell, **options}
    _, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, benchmark="image", **options)
    double = uncond.double(), cond.double()
    expected = deepfloyd.region_rates(*double, one_hot(ids, TOKENS), None, cell)
    bounds = [options.get(name, default) for name, default in (("rate_min", 0.8), ("rate_max", 3.0))]
    expected = expected.clamp(*bounds) if any(bounds) else expected
    expected = expected.clamp(max=2.0) if options.get("max_scale", 15.0) else expected
    torch.testing.assert_close(rate.double(), official.smooth(expected), rtol=RATE_NOISE, atol=0)
    for fidelity in ("official", "paper"):
        empty = guide(
            uncond, cond, ids, torch.zeros_like(foreground), 7.5, num_tokens=TOKENS, benchmark="image",
            fidelity=fidelity, **options,
        )  # fmt: skip
        assert torch.equal(empty[1], rate)


@pytest.mark.parametrize("latent", **by_name(LATENTS))
def test_fp64_equals_the_reference(rng, latent):
    height, width, cell = latent
    uncond, cond = predictions(rng, height, width, dtype=torch.float64)
    ids, foreground = regions(rng, height, width, cell)
    results = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, cell=cell)
    for ours, expected in zip(results, reference(uncond, cond, ids, foreground, 7.5, cell=cell), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("g", [1.0, 3.0, 7.5, 16.0, 20.0])
def test_guided_is_as_accurate_as_the_literal_reference(rng, g, dtype):
    uncond, cond = predictions(rng, 65, 97, dtype=dtype)
    ids, foreground = regions(rng, 65, 97, 4)
    result, rate = guide(uncond, cond, ids, foreground, g, num_tokens=TOKENS)
    assert result.dtype == dtype and rate.dtype == torch.float32
    truth, true_rate = reference(uncond, cond, ids, foreground, g, dtype=torch.float64)
    naive, naive_rate = reference(uncond, cond, ids, foreground, g)
    assert_as_accurate_as(result, naive, truth, name="guided")
    assert_as_accurate_as(rate, naive_rate, true_rate, name="rate")


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
@pytest.mark.parametrize("tokens", [1, 2, 77, 78, 256])
def test_any_number_of_channels_and_tokens(rng, channels, tokens):
    uncond, cond = predictions(rng, 20, 28, channels=channels)
    ids, foreground = regions(rng, 20, 28, 4, tokens=tokens)
    result, rate = guide(uncond, cond, ids, foreground, 5.0, num_tokens=tokens)
    _, true_rate = reference(uncond, cond, ids, foreground, 5.0, tokens=tokens, dtype=torch.float64)
    torch.testing.assert_close(rate.double(), true_rate, rtol=RATE_NOISE, atol=0)
    # Given equal rates: with one token the whole picture shares one rate, whose rounding would decide the comparison.
    truth = official.guided(uncond.double(), cond.double(), rate.double(), 5.0)
    assert_as_accurate_as(result, official.guided(uncond, cond, rate, 5.0), truth)


@pytest.mark.parametrize("latent_hw", [(64, 64), (65, 97), (4, 100)], ids=["64x64", "65x97", "one-row-of-cells"])
@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_the_whole_step_agrees_with_the_literal_reference(rng, fidelity, latent_hw):
    step = random_step(rng, latent_hw)
    result, rate = step_by_operators(step, fidelity=fidelity)
    truth, stages = step_by_reference(step.to(torch.float64), completion=fidelity)
    naive, _ = step_by_reference(step, completion=fidelity)
    torch.testing.assert_close(rate.double(), stages["rate"], rtol=RATE_NOISE, atol=0)
    assert_as_accurate_as(result, naive, truth)


class TestGuidanceScale:
    def test_one_scale_per_sample_equals_each_sample_alone(self, rng):
        uncond, cond = predictions(rng, 32, 32, batch=3)
        ids, foreground = regions(rng, 32, 32, 4, batch=3)
        scales = torch.tensor([3.0, 7.5, 18.0])
        result, rate = guide(uncond, cond, ids, foreground, scales, num_tokens=TOKENS)
        for i, g in enumerate(scales.tolist()):
            one = slice(i, i + 1)
            alone = guide(uncond[one], cond[one], ids[one], foreground[one], g, num_tokens=TOKENS)
            assert torch.equal(result[one], alone[0]) and torch.equal(rate[one], alone[1])

    @pytest.mark.parametrize("scale", [torch.tensor(7.5), torch.tensor([7.5]), torch.tensor([7.5, 7.5])])
    def test_tensors_of_one_value_equal_the_number(self, rng, scale):
        uncond, cond = predictions(rng, 16, 16)
        ids, foreground = regions(rng, 16, 16, 4)
        result = guide(uncond, cond, ids, foreground, scale, num_tokens=TOKENS)
        expected = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])

    @pytest.mark.parametrize("g", [16.0, 18.0, 18.75, 20.0, 30.0])
    def test_the_effective_scale_never_exceeds_the_limit(self, rng, g):
        uncond, cond = predictions(rng, 64, 64)
        ids, foreground = regions(rng, 64, 64, 4)
        _, rate = guide(uncond, cond, ids, foreground, g, num_tokens=TOKENS)
        assert float((rate * g).max()) <= 15.0 * (1 + 3e-7)  # one rounding each: 15/g, smoothing, product
        assert float(rate.max()) < 1.0


class TestRewrite:
    @pytest.mark.parametrize("g", [1.5, 7.5, 20.0])
    def test_unconditional_leads_plain_guidance_to_the_same_result(self, rng, g):
        uncond, cond = predictions(rng, 33, 21, dtype=torch.float64)
        ids, foreground = regions(rng, 33, 21, 4)
        rewritten, rate = guide(uncond, cond, ids, foreground, g, num_tokens=TOKENS, rewrite="unconditional")
        guided, same_rate = guide(uncond, cond, ids, foreground, g, num_tokens=TOKENS)
        assert torch.equal(rate, same_rate)
        torch.testing.assert_close(rewritten + g * (cond - rewritten), guided, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", **by_name(DTYPES))
    def test_unconditional_is_rounded_once(self, rng, dtype):
        uncond, cond = predictions(rng, 32, 32, dtype=dtype)
        ids, foreground = regions(rng, 32, 32, 4)
        rewritten, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, rewrite="unconditional")
        _, true_rate = reference(uncond, cond, ids, foreground, 7.5, dtype=torch.float64)
        truth = uncond.double() - 7.5 / 6.5 * (true_rate - 1) * (cond.double() - uncond.double())
        naive = uncond - (7.5 / 6.5 * (rate.to(dtype) - 1)) * (cond - uncond)
        assert rewritten.dtype == dtype
        assert_as_accurate_as(rewritten, naive, truth)

    @pytest.mark.parametrize("dtype", **by_name(DTYPES))
    def test_rate_one_leaves_the_prediction_bit_for_bit(self, rng, dtype):
        uncond, cond = predictions(rng, 32, 32, dtype=dtype)
        ids, foreground = regions(rng, 32, 32, 4)
        options = {"num_tokens": TOKENS, "rate_min": 1.0, "rate_max": 1.0}
        rewritten, rate = guide(uncond, cond, ids, foreground, 7.5, rewrite="unconditional", **options)
        assert torch.equal(rate, torch.ones_like(rate)), "smoothing must keep the constant 1 exactly"
        assert torch.equal(rewritten, uncond)

    def test_rate_one_guided_is_plain_guidance_bit_for_bit(self, rng):
        uncond, cond = predictions(rng, 32, 32)
        ids, foreground = regions(rng, 32, 32, 4)
        result, _ = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, rate_min=1.0, rate_max=1.0)
        assert torch.equal(result, uncond + 7.5 * (cond - uncond))


class TestRescale:
    """f' = f (phi std(cond) / std(f) + 1 - phi); the literal reference is diffusers' `rescale_noise_cfg`."""

    def both(self, rng, phi, dtype=torch.float32, layout="contiguous", **options):
        """Predictions, and the results with and without rescaling."""
        uncond, cond = (as_layout(x, layout) for x in predictions(rng, 33, 21, batch=3, dtype=dtype))
        ids, foreground = regions(rng, 33, 21, 4, batch=3)
        arguments = (uncond, cond, ids, foreground, 7.5)
        return cond, *(guide(*arguments, num_tokens=TOKENS, rescale=x, **options) for x in (phi, 0.0))

    @pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
    def test_fp64_equals_the_reference(self, rng, phi):
        cond, (result, rate), (plain, plain_rate) = self.both(rng, phi, torch.float64)
        torch.testing.assert_close(result, official.rescaled(plain, cond, phi), rtol=1e-12, atol=1e-12)
        assert torch.equal(rate, plain_rate), "the rate is that before rescaling"

    @pytest.mark.parametrize("phi", [0.3, 1.0])
    @pytest.mark.parametrize("dtype", **by_name(DTYPES))
    def test_is_as_accurate_as_the_literal_reference(self, rng, dtype, phi):
        uncond, cond = predictions(rng, 65, 97, dtype=dtype)
        ids, foreground = regions(rng, 65, 97, 4)
        result, _ = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, rescale=phi)
        assert result.dtype == dtype
        truth, _ = reference(uncond, cond, ids, foreground, 7.5, dtype=torch.float64)
        naive, _ = reference(uncond, cond, ids, foreground, 7.5)
        truth, naive = official.rescaled(truth, cond.double(), phi), official.rescaled(naive, cond, phi)
        assert_as_accurate_as(result, naive, truth)

    def test_zero_is_the_plain_combination_bit_for_bit(self, rng):
        uncond, cond = predictions(rng, 33, 21)
        ids, foreground = regions(rng, 33, 21, 4)
        result, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, rescale=0.0)
        assert torch.equal(result, uncond + 7.5 * rate * (cond - uncond))

    def test_one_gives_every_sample_the_spread_of_cond(self, rng):
        cond, (result, _), (plain, _) = self.both(rng, 1.0)
        spread, expected, before = (x.std((1, 2, 3)) for x in (result, cond, plain))
        torch.testing.assert_close(spread, expected, rtol=1e-6, atol=0)
        assert (before > 2 * expected).all(), "the case must need rescaling"

    @pytest.mark.parametrize("layout", ["sliced", "strided", "expanded", "channels_last"])
    def test_any_layout_gives_the_contiguous_result(self, rng, layout):
        uncond, cond = (as_layout(x, layout) for x in predictions(rng, 33, 21))
        ids, foreground = regions(rng, 33, 21, 4)
        result, _ = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, rescale=0.7)
        plain = uncond.contiguous(), cond.contiguous()
        expected, _ = guide(*plain, ids, foreground, 7.5, num_tokens=TOKENS, rescale=0.7)
        assert result.stride() == torch.empty_like(cond).stride()
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)

    def test_every_sample_has_its_own_factor(self, rng):
        uncond, cond = predictions(rng, 33, 21, batch=3)
        ids, foreground = regions(rng, 33, 21, 4, batch=3)
        cond[1] *= 5.0

        def run(samples):
            arguments = (x[samples] for x in (uncond, cond, ids, foreground))
            return guide(*arguments, 7.5, num_tokens=TOKENS, rescale=0.7)[0]

        together = run([0, 1, 2])
        assert torch.equal(together, torch.cat([run([sample]) for sample in range(3)]))
        uncond[2] = torch.inf
        assert torch.equal(run([0, 1, 2])[:2], together[:2])

    @pytest.mark.parametrize("phi", [0.7, 1.0])
    @pytest.mark.parametrize("shape", [(2, 4, 9, 7), (2, 1, 1, 1)], ids=["constant", "one-element"])
    def test_what_has_no_spread_stays_as_it_is(self, shape, phi):
        uncond, cond = torch.full(shape, 0.3), torch.full(shape, 1.7)
        _, foreground = regions(torch.Generator().manual_seed(0), *shape[2:], 4)
        arguments = (uncond, cond, torch.zeros_like(foreground, dtype=torch.int64), foreground, 7.5)
        result, rate = guide(*arguments, num_tokens=2, rescale=phi, rate_min=1.0, rate_max=1.0)
        assert torch.equal(result, uncond + 7.5 * rate * (cond - uncond)) and result.isfinite().all()

    def test_a_constant_cond_leaves_what_the_mixture_keeps(self, rng):
        uncond, _ = predictions(rng, 16, 16)
        cond = torch.full_like(uncond, 1.7)
        ids, foreground = regions(rng, 16, 16, 4)
        plain, _ = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
        result, _ = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, rescale=0.75)
        assert torch.equal(result, 0.25 * plain)


class TestEmptyRegions:
    def test_an_empty_foreground_gives_the_lower_clamp(self, rng):
        uncond, cond = predictions(rng, 16, 16)
        ids, foreground = regions(rng, 16, 16, 4)
        _, rate = guide(uncond, cond, ids, torch.zeros_like(foreground), 7.5, num_tokens=TOKENS)
        torch.testing.assert_close(rate, torch.full_like(rate, 0.8), rtol=2e-7, atol=0)

    def test_an_empty_foreground_gives_rate_zero_without_clamps(self, rng):
        uncond, cond = predictions(rng, 16, 16)
        ids, foreground = regions(rng, 16, 16, 4)
        empty = torch.zeros_like(foreground)
        result, rate = guide(uncond, cond, ids, empty, 7.5, num_tokens=TOKENS, rate_min=None, rate_max=None)
        assert torch.equal(rate, torch.zeros_like(rate)) and torch.equal(result, uncond)

    def test_an_empty_foreground_is_plain_guidance_in_the_papers_form(self, rng):
        uncond, cond = predictions(rng, 16, 16)
        ids, foreground = regions(rng, 16, 16, 4)
        foreground[0] = False  # and the other sample keeps its own
        options = {"num_tokens": TOKENS, "rate_min": None, "rate_max": None, "max_scale": None, "blur_sigma": 0.0}
        _, rate = guide(uncond, cond, ids, foreground, 7.5, fidelity="paper", **options)
        _, expected = guide(uncond, cond, ids, foreground, 7.5, fidelity="official", **options)
        assert torch.equal(rate[0], torch.ones_like(rate[0]))
        assert torch.equal(rate[1], expected[1])

    def test_no_guidance_returns_the_unconditional_prediction(self, rng):
        uncond, _ = predictions(rng, 16, 16)
        ids, foreground = regions(rng, 16, 16, 4)
        for rewrite in ("guided", "unconditional"):
            result, _ = guide(uncond, uncond.clone(), ids, foreground, 7.5, num_tokens=TOKENS, rewrite=rewrite)
            assert torch.equal(result, uncond)


class TestLayouts:
    @pytest.mark.parametrize("layout", ["sliced", "strided", "expanded", "channels_last"])
    def test_any_layout_gives_the_contiguous_result(self, rng, layout):
        uncond, cond = (as_layout(x, layout) for x in predictions(rng, 33, 21))
        ids, foreground = regions(rng, 33, 21, 4)
        result, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
        expected = guide(uncond.contiguous(), cond.contiguous(), ids, foreground, 7.5, num_tokens=TOKENS)
        torch.testing.assert_close(rate, expected[1], rtol=RATE_NOISE, atol=0)
        torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", **by_name(DTYPES))
    def test_channels_last_is_kept(self, rng, dtype):
        uncond, cond = (as_layout(x, "channels_last") for x in predictions(rng, 16, 12, dtype=dtype))
        ids, foreground = regions(rng, 16, 12, 4)
        for rewrite in ("guided", "unconditional"):
            result, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS, rewrite=rewrite)
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert rate.shape == (2, 1, 16, 12)

    def test_halves_of_one_prediction_need_no_copy(self, rng):
        """The two halves of a [uncond; cond] batch are views of one tensor, which must not be changed."""
        uncond, cond = predictions(rng, 16, 12)
        both = torch.cat([uncond, cond])
        ids, foreground = regions(rng, 16, 12, 4)
        result, _ = guide(*both.chunk(2), ids, foreground, 7.5, num_tokens=TOKENS)
        assert torch.equal(result, guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)[0])
        assert torch.equal(both, torch.cat([uncond, cond]))

    def test_the_cells_of_a_ragged_edge_hold_fewer_pixels(self, rng):
        """9 x 5 pixels in cells of 4 are 3 x 2 cells, of which the last row has 1 pixel a column."""
        uncond = torch.zeros(1, 1, 9, 5)
        cond = torch.ones(1, 1, 9, 5)
        cond[..., 8, :] = 3.0
        ids = torch.zeros(1, 3, 2, dtype=torch.int64)
        ids[0, 2] = 1
        foreground = torch.tensor([[[True, True], [True, True], [False, False]]])
        options = {"rate_min": None, "rate_max": None, "max_scale": None, "blur_sigma": 0.0}
        _, rate = guide(uncond, cond, ids, foreground, 2.0, num_tokens=2, **options)
        expected = torch.ones(1, 1, 9, 5)
        expected[..., 8, :] = 1 / 3
        torch.testing.assert_close(rate, expected, rtol=1e-6, atol=0)


def test_batch_three_equals_three_singles_and_permutes_bit_for_bit(rng):
    uncond, cond = predictions(rng, 65, 97, batch=3)
    ids, foreground = regions(rng, 65, 97, 4, batch=3)

    def run(samples):
        return guide(uncond[samples], cond[samples], ids[samples], foreground[samples], 7.5, num_tokens=TOKENS)

    together, alone = run([0, 1, 2]), [run([sample]) for sample in range(3)]
    for index in range(2):
        assert torch.equal(together[index], torch.cat([sample[index] for sample in alone]))
        assert torch.equal(run([1, 2, 0])[index], together[index][[1, 2, 0]])


def test_one_sample_that_overflows_leaves_the_others_alone(rng):
    uncond, cond = predictions(rng, 16, 16)
    ids, foreground = regions(rng, 16, 16, 4)
    expected, _ = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
    cond[0, 0, 3, 3] = torch.inf
    result, _ = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
    assert torch.equal(result[1], expected[1])


def test_large_differences_in_fp16_do_not_overflow(rng):
    """Squares of 300 exceed the range of fp16; norms and sums are formed in fp32."""
    uncond, cond = predictions(rng, 16, 16, dtype=torch.float16)
    cond = uncond + 300 * (cond - uncond).clamp(-1, 1)
    ids, foreground = regions(rng, 16, 16, 4)
    _, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
    _, expected = reference(uncond, cond, ids, foreground, 7.5, dtype=torch.float64)
    torch.testing.assert_close(rate.double(), expected, rtol=RATE_NOISE, atol=0)


def test_repeats_are_bit_equal_and_inputs_are_left_alone(rng):
    uncond, cond = predictions(rng, 65, 97)
    ids, foreground = regions(rng, 65, 97, 4)
    before = uncond.clone(), cond.clone(), ids.clone(), foreground.clone()
    first = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
    second = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(x, y) for x, y in zip((uncond, cond, ids, foreground), before, strict=True))


def test_masks_are_never_upsampled_to_the_latent(rng):
    """[T, H, W] masks would be 77 images; sums run over cells first."""
    uncond, cond = predictions(rng, 64, 64, batch=1)
    ids, foreground = regions(rng, 64, 64, 4, batch=1)
    with Recorder() as recorder:
        guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
    recorder.assert_none_larger_than(max(cond.numel(), TOKENS * ids.numel()))


@pytest.mark.parametrize(
    ("rewrite", "rescale"),
    [("guided", 0.0), ("guided", 0.7), ("unconditional", 0.0)],
    ids=["guided", "rescaled", "uncond"],
)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels_last"])
@pytest.mark.parametrize("dtype", **by_name({"fp32": torch.float32, "fp16": torch.float16}))
def test_opcheck(rng, dtype, layout, rewrite, rescale):
    uncond, cond = (as_layout(x, layout) for x in predictions(rng, 9, 7, dtype=dtype))
    ids, foreground = regions(rng, 9, 7, 4, tokens=5)
    arguments = (uncond, cond, ids, foreground, torch.tensor([3.0, 7.5]), 5, 4, 0.8, 3.0, 15.0, 0.5)
    for benchmark in ("foreground", "image"):
        options = ("official", rewrite, "torch", rescale, benchmark)
        torch.library.opcheck(torch.ops.scfg_kernels.guide.default, (*arguments, *options))


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("cell", [1, 4])
def test_opcheck_where_results_could_alias(rng, cell, sigma):
    uncond, cond = predictions(rng, 8, 8)
    ids, foreground = regions(rng, 8, 8, cell, tokens=5)
    arguments = (uncond, cond, ids, foreground, torch.tensor(7.5), 5, cell, 0.0, math.inf, math.inf, sigma)
    torch.library.opcheck(torch.ops.scfg_kernels.guide.default, (*arguments, "paper", "guided", "torch"))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scale", [7.5, torch.tensor([3.0, 7.5])], ids=["number", "per-sample"])
def test_compiles_as_one_graph(rng, scale, rescale):
    uncond, cond = (as_layout(x, "channels_last") for x in predictions(rng, 16, 12))
    ids, foreground = regions(rng, 16, 12, 4)
    compiled = torch.compile(guide, fullgraph=True, backend="aot_eager")
    results = compiled(uncond, cond, ids, foreground, scale, num_tokens=TOKENS, rescale=rescale)
    expected = guide(uncond, cond, ids, foreground, scale, num_tokens=TOKENS, rescale=rescale)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results, expected, strict=True))


def test_the_reference_upsamples_as_interpolate_does_where_sizes_divide(rng):
    masks = torch.rand(2, 3, 4, 5, generator=rng)
    expected = F.interpolate(masks, scale_factor=4, mode="nearest")
    assert torch.equal(official.nearest_upsampled(masks, (16, 20), 4), expected)
