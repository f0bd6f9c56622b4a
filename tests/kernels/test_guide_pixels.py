"""`guide_pixels` against the published formula written out, and the properties of that formula."""

import math

import pytest
import torch
from scfg_kernels import BackendError, guide_pixels
from scfg_kernels.guide_pixels import guide_pixels_torch
from scfg_kernels.testing import Recorder, as_layout, assert_as_accurate_as
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.reference import official
from tests.kernels.cases import DTYPES, by_name

LATENTS = {"64x64": (64, 64), "65x97": (65, 97), "one-row": (1, 63), "one-column": (50, 1), "one-pixel": (1, 1)}
RANGES = {
    # name: (g, w_min, w_max) of the paper; "wide" has bounds that are not exact in binary
    "sd15": (7.5, 5.0, 12.0),
    "sd35": (7.5, 3.0, 7.5),
    "wide": (3.0, 0.3, 21.1),
}
LOW, HIGH = torch.tensor(5.0 / 7.5), torch.tensor(12.0 / 7.5)


def predictions(rng, height, width, batch=2, channels=4, dtype=torch.float32):
    """Two predictions whose difference varies in strength over the picture."""
    uncond = torch.randn(batch, channels, height, width, generator=rng)
    strength = torch.randn(batch, 1, height, width, generator=rng).exp()
    cond = uncond + strength * torch.randn(batch, channels, height, width, generator=rng)
    return uncond.to(dtype), cond.to(dtype)


def energies(uncond, cond):
    """[B, H W] in fp64."""
    return (cond.double() - uncond.double()).square().mean(1).flatten(1)


def literal(uncond, cond, w_min, w_max, dtype=None):
    """The paper's weights [B, 1, H, W], at least in fp32, and its guided prediction, on inputs converted to `dtype`."""
    uncond, cond = (x.to(dtype or x.dtype) for x in (uncond, cond))
    d = cond - uncond
    energy = d.to(torch.promote_types(d.dtype, torch.float32)).pow(2).mean(dim=1, keepdim=True)
    least = energy.flatten(1).min(dim=1).values.view(-1, 1, 1, 1)
    greatest = energy.flatten(1).max(dim=1).values.view(-1, 1, 1, 1)
    normalised = (energy - least) / (greatest - least + 1e-8)
    weight = w_max - normalised * (w_max - w_min)
    return (uncond + weight * d).to(cond.dtype), weight


@pytest.mark.parametrize("bounds", **by_name(RANGES))
@pytest.mark.parametrize("latent", **by_name(LATENTS))
def test_fp64_equals_the_published_formula(rng, latent, bounds):
    g, w_min, w_max = bounds
    uncond, cond = predictions(rng, *latent, dtype=torch.float64)
    result, rate = guide_pixels(uncond, cond, g, rate_min=w_min / g, rate_max=w_max / g)
    expected, weight = literal(uncond, cond, w_min, w_max)
    assert rate.shape == (2, 1, *latent) and rate.dtype == torch.float64 and rate.is_contiguous()
    torch.testing.assert_close(rate, weight / g, rtol=1e-13, atol=0)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("bounds", **by_name(RANGES))
def test_is_as_accurate_as_the_published_formula(rng, bounds, dtype, phi):
    g, w_min, w_max = bounds
    uncond, cond = predictions(rng, 65, 97, dtype=dtype)
    result, rate = guide_pixels(uncond, cond, g, rate_min=w_min / g, rate_max=w_max / g, rescale=phi)
    assert result.dtype == dtype and rate.dtype == torch.float32
    truth, true_weight = literal(uncond, cond, w_min, w_max, torch.float64)
    naive, naive_weight = literal(uncond, cond, w_min, w_max)
    if phi > 0.0:
        truth, naive = official.rescaled(truth, cond.double(), phi), official.rescaled(naive, cond, phi)
    assert_as_accurate_as(result, naive, truth, name="guided")
    assert_as_accurate_as(rate, naive_weight / g, true_weight / g, name="rate")


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
def test_any_number_of_channels(rng, channels):
    uncond, cond = predictions(rng, 20, 28, channels=channels)
    result, rate = guide_pixels(uncond, cond, 7.5)
    truth, true_weight = literal(uncond, cond, 5.0, 12.0, torch.float64)
    naive, naive_weight = literal(uncond, cond, 5.0, 12.0)
    assert_as_accurate_as(result, naive, truth, name="guided")
    assert_as_accurate_as(rate, naive_weight / 7.5, true_weight / 7.5, name="rate")


class TestRate:
    @pytest.mark.parametrize("bounds", **by_name(RANGES))
    def test_the_extreme_pixels_have_the_bounds_to_the_bit(self, rng, bounds):
        g, w_min, w_max = bounds
        uncond, cond = predictions(rng, 65, 97, batch=3)
        _, rate = guide_pixels(uncond, cond, g, rate_min=w_min / g, rate_max=w_max / g)
        low, high = torch.tensor(w_min / g), torch.tensor(w_max / g)
        for energy, rates in zip(energies(uncond, cond), rate.flatten(1), strict=True):
            assert rates[energy.argmin()] == high and rates[energy.argmax()] == low
            assert float(rates.min()) == low and float(rates.max()) == high

    def test_falls_with_the_energy(self, rng):
        uncond, cond = predictions(rng, 64, 64)
        _, rate = guide_pixels(uncond, cond, 7.5)
        energy, order = energies(uncond, cond).sort(1)
        steps = rate.flatten(1).gather(1, order).diff(dim=1)
        assert float(steps.max()) <= 1.2e-7, "one rounding unit, where energies are alike"
        apart = energy.diff(dim=1) > 1e-6 * (energy[:, -1:] - energy[:, :1])
        assert (steps[apart] < 0).all() and float(apart.double().mean()) > 0.4

    @pytest.mark.parametrize("signs", [False, True], ids=["one-direction", "any-sign"])
    def test_one_energy_everywhere_is_the_upper_bound(self, rng, signs):
        d = torch.tensor([0.3, -1.7, 0.2, 5.0]).view(1, 4, 1, 1).expand(2, 4, 33, 21).clone()
        if signs:
            d *= torch.randint(2, d.shape, generator=rng).mul(2).sub(1)
        result, rate = guide_pixels(torch.zeros_like(d), d, 7.5)
        assert torch.equal(rate, HIGH.expand_as(rate))
        assert torch.equal(result, 7.5 * HIGH * d)

    @pytest.mark.parametrize("rewrite", ["guided", "unconditional"])
    def test_no_guidance_returns_the_unconditional_prediction(self, rng, rewrite):
        uncond, _ = predictions(rng, 16, 16)
        result, rate = guide_pixels(uncond, uncond.clone(), 7.5, rewrite=rewrite)
        assert torch.equal(result, uncond) and torch.equal(rate, HIGH.expand_as(rate))

    @pytest.mark.parametrize("k", [2.0**-8, 2.0**-4, -1.0, 32.0])
    def test_does_not_depend_on_the_length_of_d_up_to_the_epsilon(self, rng, k):
        """Powers of two scale d without rounding, so what is left is the 1e-8 beside the range of the energy."""
        uncond, cond = predictions(rng, 32, 32, dtype=torch.float64)
        d, zero = cond - uncond, torch.zeros_like(cond)
        _, rate = guide_pixels(zero, d, 7.5)
        _, scaled = guide_pixels(zero, k * d, 7.5)
        energy = energies(zero, d)
        span = float((energy.amax(1) - energy.amin(1)).min())
        bound = float(HIGH - LOW) * 1e-8 / (span * min(1.0, k * k)) + 1e-15
        difference = float((scaled - rate).abs().max())
        assert difference <= bound and (abs(k) >= 1.0 or difference > 1e-15), "small d must meet the epsilon"

    def test_a_step_of_three_energies(self):
        """E = 1, 4, 9 without and with the middle of the range: 1.6, 1.6 - 3/8 14/15, 2/3."""
        cond = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
        _, rate = guide_pixels(torch.zeros_like(cond), cond, 7.5)
        torch.testing.assert_close(rate.flatten(), torch.tensor([1.6, 1.25, 2 / 3]), rtol=1e-7, atol=0)

    def test_equal_bounds_are_plain_guidance_bit_for_bit(self, rng):
        uncond, cond = predictions(rng, 33, 21)
        result, rate = guide_pixels(uncond, cond, 7.5, rate_min=1.0, rate_max=1.0)
        assert torch.equal(rate, torch.ones_like(rate))
        assert torch.equal(result, uncond + 7.5 * (cond - uncond))
        assert torch.equal(guide_pixels(uncond, cond, 7.5, rate_min=1, rate_max=1, rewrite="unconditional")[0], uncond)


class TestRewriteAndRescale:
    @pytest.mark.parametrize("g", [1.5, 7.5, 20.0])
    def test_unconditional_leads_plain_guidance_to_the_same_result(self, rng, g):
        uncond, cond = predictions(rng, 33, 21, dtype=torch.float64)
        rewritten, rate = guide_pixels(uncond, cond, g, rewrite="unconditional")
        guided, same_rate = guide_pixels(uncond, cond, g)
        assert torch.equal(rate, same_rate)
        torch.testing.assert_close(rewritten + g * (cond - rewritten), guided, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("phi", [0.3, 1.0])
    def test_rescaled_equals_the_reference_in_fp64(self, rng, phi):
        uncond, cond = predictions(rng, 33, 21, batch=3, dtype=torch.float64)
        plain, rate = guide_pixels(uncond, cond, 7.5)
        rescaled, same_rate = guide_pixels(uncond, cond, 7.5, rescale=phi)
        assert torch.equal(rate, same_rate)
        torch.testing.assert_close(rescaled, official.rescaled(plain, cond, phi), rtol=1e-12, atol=1e-12)

    def test_rescale_zero_is_the_plain_combination_bit_for_bit(self, rng):
        uncond, cond = predictions(rng, 33, 21)
        result, rate = guide_pixels(uncond, cond, 7.5, rescale=0.0)
        assert torch.equal(result, uncond + 7.5 * rate * (cond - uncond))

    @pytest.mark.parametrize("shape", [(2, 4, 9, 7), (2, 1, 1, 1)], ids=["constant", "one-element"])
    def test_what_has_no_spread_stays_as_it_is(self, shape):
        uncond, cond = torch.full(shape, 0.3), torch.full(shape, 1.7)
        result, _ = guide_pixels(uncond, cond, 7.5, rescale=1.0)
        assert torch.equal(result, uncond + 7.5 * HIGH * (cond - uncond))


class TestGuidanceScale:
    def test_one_scale_per_sample_equals_each_sample_alone(self, rng):
        uncond, cond = predictions(rng, 32, 32, batch=3)
        scales = torch.tensor([3.0, 7.5, 18.0])
        result, rate = guide_pixels(uncond, cond, scales)
        for i, g in enumerate(scales.tolist()):
            alone = guide_pixels(uncond[i : i + 1], cond[i : i + 1], g)
            assert torch.equal(result[i : i + 1], alone[0]) and torch.equal(rate[i : i + 1], alone[1])

    @pytest.mark.parametrize(
        "scale", [torch.tensor(7.5), torch.tensor([7.5]), torch.tensor([7.5, 7.5]), torch.tensor(7.5).expand(2)]
    )
    def test_tensors_of_one_value_equal_the_number(self, rng, scale):
        uncond, cond = predictions(rng, 16, 16)
        result, expected = guide_pixels(uncond, cond, scale), guide_pixels(uncond, cond, 7.5)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])

    @pytest.mark.parametrize("rescale", [0.0, 0.7])
    def test_no_value_of_a_tensor_is_needed_on_the_host(self, rescale):
        """Fake tensors have none: reading one would raise."""
        with FakeTensorMode():
            uncond, cond, scale = torch.empty(2, 4, 8, 8), torch.empty(2, 4, 8, 8), torch.tensor(7.5)
            result, rate = guide_pixels_torch(uncond, cond, scale, 0.5, 1.5, "guided", rescale, 1)
        assert result.shape == (2, 4, 8, 8) and rate.shape == (2, 1, 8, 8)


class TestLayouts:
    @pytest.mark.parametrize("rescale", [0.0, 0.7])
    @pytest.mark.parametrize("layout", ["sliced", "strided", "expanded", "channels_last"])
    def test_any_layout_gives_the_contiguous_result(self, rng, layout, rescale):
        uncond, cond = (as_layout(x, layout) for x in predictions(rng, 33, 21))
        result, rate = guide_pixels(uncond, cond, 7.5, rescale=rescale)
        expected = guide_pixels(uncond.contiguous(), cond.contiguous(), 7.5, rescale=rescale)
        torch.testing.assert_close(rate, expected[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", **by_name(DTYPES))
    def test_channels_last_is_kept(self, rng, dtype):
        uncond, cond = (as_layout(x, "channels_last") for x in predictions(rng, 16, 12, dtype=dtype))
        for rewrite in ("guided", "unconditional"):
            result, rate = guide_pixels(uncond, cond, 7.5, rewrite=rewrite)
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert rate.shape == (2, 1, 16, 12)

    def test_halves_of_one_prediction_need_no_copy(self, rng):
        uncond, cond = predictions(rng, 16, 12)
        both = torch.cat([uncond, cond])
        result, _ = guide_pixels(*both.chunk(2), 7.5)
        assert torch.equal(result, guide_pixels(uncond, cond, 7.5)[0])
        assert torch.equal(both, torch.cat([uncond, cond]))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_batch_three_equals_three_singles_and_permutes_bit_for_bit(rng, rescale):
    uncond, cond = predictions(rng, 65, 97, batch=3)

    def run(samples):
        return guide_pixels(uncond[samples], cond[samples], 7.5, rescale=rescale)

    together, alone = run([0, 1, 2]), [run([sample]) for sample in range(3)]
    for index in range(2):
        assert torch.equal(together[index], torch.cat([sample[index] for sample in alone]))
        assert torch.equal(run([1, 2, 0])[index], together[index][[1, 2, 0]])


def test_one_sample_that_overflows_leaves_the_others_alone(rng):
    uncond, cond = predictions(rng, 16, 16)
    expected = guide_pixels(uncond, cond, 7.5)
    cond[0, 0, 3, 3] = torch.inf
    result = guide_pixels(uncond, cond, 7.5)
    assert all(torch.equal(x[1], y[1]) for x, y in zip(result, expected, strict=True))


def test_large_differences_in_fp16_do_not_overflow(rng):
    """Squares of 300 exceed the range of fp16; energies are formed in fp32."""
    uncond, cond = predictions(rng, 16, 16, dtype=torch.float16)
    cond = uncond + 300 * (cond - uncond).clamp(-1, 1)
    _, rate = guide_pixels(uncond, cond, 7.5)
    _, weight = literal(uncond, cond, 5.0, 12.0, torch.float64)
    torch.testing.assert_close(rate.double(), weight / 7.5, rtol=1e-6, atol=0)


def test_repeats_are_bit_equal_and_inputs_are_left_alone(rng):
    uncond, cond = predictions(rng, 65, 97)
    before = uncond.clone(), cond.clone()
    first, second = (guide_pixels(uncond, cond, 7.5, rescale=0.7) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(uncond, before[0]) and torch.equal(cond, before[1])


def test_nothing_larger_than_a_prediction_is_made(rng):
    uncond, cond = predictions(rng, 64, 64)
    with Recorder() as recorder:
        guide_pixels(uncond, cond, 7.5, rescale=0.7)
    recorder.assert_none_larger_than(cond.numel())
    assert recorder.products == []


def test_no_samples():
    empty = torch.zeros(0, 4, 9, 5)
    for rescale in (0.0, 0.7):
        result, rate = guide_pixels(empty, empty, 7.5, rescale=rescale)
        assert result.shape == (0, 4, 9, 5) and rate.shape == (0, 1, 9, 5)


class TestChecks:
    @pytest.mark.parametrize(
        ("change", "reasons"),
        [
            pytest.param(
                {"rewrite": "both", "rate_min": 2.0, "rate_max": 1.0, "rescale": -1.0, "guidance_scale": -2.0},
                [
                    "rewrite='both' is unknown", "rate_min must not exceed rate_max, got 2.0 and 1.0",
                    "rescale must lie in 0..1, got -1.0", "guidance_scale must not be negative, got -2.0",
                ],
                id="options-together",
            ),
            pytest.param(
                {"rate_max": math.inf}, ["rate_min and rate_max must be finite, got 0.6666666666666666 and inf"],
                id="no-bound",
            ),
            pytest.param({"rate_min": math.nan}, ["must be finite, got nan"], id="nan-bound"),
            pytest.param(
                {"rescale": 0.7, "rewrite": "unconditional"}, ["rescale needs rewrite='guided'"], id="rescale",
            ),
            pytest.param({"uncond": torch.zeros(2, 4, 9, 6)}, ["(2, 4, 9, 6)", "must match"], id="shapes"),
            pytest.param({"uncond": torch.zeros(2, 4, 9, 5).half()}, ["torch.float16", "must match"], id="dtypes"),
            pytest.param(
                {"uncond": torch.zeros(4, 9, 5), "cond": torch.zeros(4, 9, 5)}, ["[B, C, H, W]"], id="dimensions",
            ),
            pytest.param(
                {"uncond": torch.zeros(2, 4, 9, 5).long(), "cond": torch.zeros(2, 4, 9, 5).long()}, ["floating point"],
                id="integers",
            ),
            pytest.param(
                {"uncond": torch.zeros(2, 4, 0, 5), "cond": torch.zeros(2, 4, 0, 5)},
                ["C, H and W must not be 0, got (2, 4, 0, 5)"], id="no-pixels",
            ),
            pytest.param({"guidance_scale": torch.ones(3)}, ["a number, [] or [2]"], id="scales"),
            pytest.param({"uncond": torch.zeros(2, 4, 9, 5, device="meta")}, ["got cpu and meta"], id="devices"),
            pytest.param({"guidance_scale": torch.ones(2, device="meta")}, ["got cpu and meta"], id="scale-device"),
            pytest.param(
                {"guidance_scale": 1.0, "rewrite": "unconditional"}, ["above 1, got 1.0"], id="no-guidance-to-rewrite",
            ),
            pytest.param({"backend": "cuda"}, ["backend='cuda' is unknown"], id="backend"),
        ],
    )  # fmt: skip
    def test_reasons(self, change, reasons):
        good = {"uncond": torch.zeros(2, 4, 9, 5), "cond": torch.zeros(2, 4, 9, 5), "guidance_scale": 7.5}
        with pytest.raises(ValueError) as raised:
            guide_pixels(**{**good, **change})
        message = str(raised.value)
        assert message.startswith("guide_pixels: ")
        assert [reason for reason in reasons if message.count(reason) != 1] == []

    def test_the_limits_of_the_kernel_are_listed(self):
        large = torch.zeros(1, 257, 2, 3, dtype=torch.float64)
        with pytest.raises(BackendError) as raised:
            guide_pixels(large, large, 7.5, backend="triton")
        for reason in ("CUDA device", "fp64 needs", "257 channels exceed 256"):
            assert str(raised.value).count(reason) == 1, reason


@pytest.mark.parametrize(
    ("rewrite", "rescale"),
    [("guided", 0.0), ("guided", 0.7), ("unconditional", 0.0)],
    ids=["guided", "rescaled", "uncond"],
)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels_last"])
@pytest.mark.parametrize("dtype", **by_name({"fp32": torch.float32, "fp16": torch.float16}))
def test_opcheck(rng, dtype, layout, rewrite, rescale):
    uncond, cond = (as_layout(x, layout) for x in predictions(rng, 9, 7, dtype=dtype))
    arguments = (uncond, cond, torch.tensor([3.0, 7.5]), 0.5, 1.5, rewrite, "torch", rescale)
    torch.library.opcheck(torch.ops.scfg_kernels.guide_pixels.default, arguments)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scale", [7.5, torch.tensor([3.0, 7.5])], ids=["number", "per-sample"])
def test_compiles_as_one_graph(rng, scale, rescale):
    uncond, cond = (as_layout(x, "channels_last") for x in predictions(rng, 16, 12))
    compiled = torch.compile(guide_pixels, fullgraph=True, backend="aot_eager")
    results = compiled(uncond, cond, scale, rescale=rescale)
    expected = guide_pixels(uncond, cond, scale, rescale=rescale)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results, expected, strict=True))
