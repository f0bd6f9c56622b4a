"""`segment_and_guide` is `segment` followed by `guide`, to the bit; and its own checks, limits and registration."""

from __future__ import annotations

import math

import pytest
import torch
from scfg_kernels import BackendError, guide, segment, segment_and_guide
from scfg_kernels.testing import as_layout

from tests.kernels.cases import DTYPES, by_name, random_maps

TOKENS = 20
LATENTS = {
    # name: (height, width, cell)
    "64x64": (64, 64, 4),
    "13x25": (13, 25, 4),
    "one-row": (1, 63, 4),
    "cell-3": (20, 28, 3),
}
MAP_OPTIONS = ("blur_sigma", "token_mask")
RESULTS = ("result", "rate", "token_index", "foreground")


def random_inputs(rng, height, width, cell=4, batch=2, dtype=torch.float32, map_dtype=torch.float32, layers=(2, 1)):
    """Positional arguments but for the scale: `layers[0]` maps on the grid of cells, `layers[1]` of half its size."""
    size = (math.ceil(height / cell), math.ceil(width / cell))
    half = (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    sizes = [size] * layers[0] + [half] * layers[1]
    tokens = [random_maps(rng, batch, h * w, TOKENS, dtype=map_dtype).mT.contiguous() for h, w in sizes]
    start = [random_maps(rng, batch, h * w, 3, dtype=map_dtype)[..., 0].contiguous() for h, w in sizes]
    uncond = torch.randn(batch, 4, height, width, generator=rng)
    strength = torch.randn(batch, 1, height, width, generator=rng).exp()
    cond = uncond + strength * torch.randn(batch, 4, height, width, generator=rng)
    return tokens, start, sizes, size, uncond.to(dtype), cond.to(dtype)


def random_mask(rng, batch=2):
    return torch.rand(batch, TOKENS, generator=rng) < 0.4


def one_after_the_other(tokens, start, sizes, size, uncond, cond, scale, **options):
    """`segment`, then `guide`, in the order of the results of `segment_and_guide`."""
    map_options = {name: options[name] for name in MAP_OPTIONS if name in options}
    options = {name: value for name, value in options.items() if name != "token_mask"}
    regions = segment(tokens, start, sizes, size, **map_options, backend="torch")
    guided = guide(uncond, cond, *regions, scale, num_tokens=tokens[0].shape[1], **options, backend="torch")
    return (*guided, *regions)


def assert_same(inputs, scale=7.5, **options):
    """Both ways give the same bits, dtypes and strides."""
    found = segment_and_guide(*inputs, scale, **options, backend="torch")
    expected = one_after_the_other(*inputs, scale, **options)
    for name, x, y in zip(RESULTS, found, expected, strict=True):
        assert (x.dtype, x.stride()) == (y.dtype, y.stride()), name
        assert torch.equal(x, y), name
    assert found[3].any(), "the case must have a foreground"


@pytest.mark.parametrize("fidelity", ["official", "paper"])
@pytest.mark.parametrize("rewrite", ["guided", "unconditional"])
@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("latent", **by_name(LATENTS))
def test_equals_segment_followed_by_guide(rng, latent, batch, dtype, rewrite, fidelity):
    height, width, cell = latent
    inputs = random_inputs(rng, height, width, cell, batch, dtype)
    options = {"cell": cell, "fidelity": fidelity, "rewrite": rewrite}
    assert_same(inputs, **options)
    assert_same(inputs, torch.linspace(3.0, 8.0, batch), token_mask=random_mask(rng, batch), **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"blur_sigma": 0.0}, id="not-smoothed"),
        pytest.param({"blur_sigma": 1.3}, id="wide-blur"),
        pytest.param({"rate_min": None, "rate_max": None, "max_scale": None}, id="no-clamps"),
        pytest.param({"rate_min": 0.95, "rate_max": 1.05, "max_scale": 7.0}, id="narrow"),
        pytest.param({"benchmark": "image"}, id="whole-image"),
    ],
)
def test_options_reach_both(rng, options):
    inputs = random_inputs(rng, 13, 25)
    assert_same(inputs, **options)
    rate = segment_and_guide(*inputs, 7.5, **options)[1]
    assert not torch.equal(rate, segment_and_guide(*inputs, 7.5)[1]), "the option must matter"


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
def test_rescale_reaches_the_prediction_alone(rng, dtype):
    inputs = random_inputs(rng, 13, 25, dtype=dtype)
    assert_same(inputs, rescale=0.7)
    rescaled, plain = segment_and_guide(*inputs, 7.5, rescale=0.7), segment_and_guide(*inputs, 7.5)
    assert not torch.equal(rescaled[0], plain[0]), "the option must matter"
    assert all(torch.equal(x, y) for x, y in zip(rescaled[1:], plain[1:], strict=True))


@pytest.mark.parametrize("layout", ["sliced", "strided", "expanded", "channels_last"])
def test_any_layout_of_the_predictions(rng, layout):
    *maps, uncond, cond = random_inputs(rng, 13, 25)
    assert_same((*maps, as_layout(uncond, layout), as_layout(cond, layout)))


@pytest.mark.parametrize("map_dtype", **by_name({**DTYPES, "fp64": torch.float64}))
def test_any_dtype_of_the_maps_beside_any_of_the_predictions(rng, map_dtype):
    for dtype in (torch.float16, torch.float64):
        assert_same(random_inputs(rng, 13, 25, dtype=dtype, map_dtype=map_dtype))


def test_maps_whose_rows_do_not_sum_to_one(rng):
    tokens, start, *rest = random_inputs(rng, 13, 25)
    paired = [torch.stack([x, torch.rand(x.shape, generator=rng)], 1) for x in start]
    assert_same((tokens, paired, *rest), benchmark="image", rate_min=None, rate_max=None)
    regions = segment_and_guide(tokens, paired, *rest, 7.5)[2:]
    assert not torch.equal(regions[1], segment_and_guide(tokens, start, *rest, 7.5)[3])


def test_strided_maps(rng):
    tokens, start, *rest = random_inputs(rng, 13, 25)
    token_last = [x.mT.contiguous().mT for x in tokens]
    wide = [x.new_full((2, 2 * x.shape[1]), torch.nan)[:, ::2].copy_(x) for x in start]
    assert_same((token_last, wide, *rest))


def test_a_callers_autocast_changes_nothing(rng):
    inputs = random_inputs(rng, 13, 25)
    expected = segment_and_guide(*inputs, 7.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = segment_and_guide(*inputs, 7.5)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_batch_three_equals_three_singles_and_inputs_are_left_alone(rng):
    tokens, start, sizes, size, uncond, cond = random_inputs(rng, 13, 25, batch=3)
    before = [x.clone() for x in (*tokens, *start, uncond, cond)]
    scales, mask = torch.tensor([3.0, 7.5, 5.0]), random_mask(rng, 3)

    def run(part):
        maps = [x[part] for x in tokens], [x[part] for x in start], sizes, size
        return segment_and_guide(*maps, uncond[part], cond[part], scales[part], token_mask=mask[part])

    together, alone = run(slice(None)), [run(slice(i, i + 1)) for i in range(3)]
    for index in range(4):
        assert torch.equal(together[index], torch.cat([sample[index] for sample in alone]))
    assert all(torch.equal(x, y) for x, y in zip((*tokens, *start, uncond, cond), before, strict=True))


def test_no_samples():
    maps = [torch.zeros(0, 5, 6)], [torch.zeros(0, 6)], [(3, 2)], (3, 2)
    result, rate, ids, foreground = segment_and_guide(*maps, torch.zeros(0, 4, 9, 5), torch.zeros(0, 4, 9, 5), 7.5)
    assert result.shape == (0, 4, 9, 5) and rate.shape == (0, 1, 9, 5) and ids.shape == foreground.shape == (0, 3, 2)


class TestChecks:
    def refused(self, *arguments, **options):
        """The message of the one ValueError of a call."""
        with pytest.raises(ValueError) as raised:
            segment_and_guide(*arguments, **options)
        message = str(raised.value)
        assert message.startswith("segment_and_guide: ")
        return message

    def test_every_reason_is_in_one_error(self, rng):
        tokens, start, sizes, _, uncond, cond = random_inputs(rng, 13, 25)
        message = self.refused(
            [tokens[0], tokens[1], tokens[2][:, :, 1:]], [start[0], start[1].long(), start[2]], sizes, (4, 6),
            uncond[:1], cond[:1].half(), 1.0, rate_min=2.0, rate_max=1.0, blur_sigma=-1.0, fidelity="exact",
            rewrite="unconditional", token_mask=torch.ones(2, TOKENS),
        )  # fmt: skip
        for reason in (
            "blur_sigma must not be negative, got -1.0",
            "tokens[2] must be (2, 20, 8), got (2, 20, 7)",
            "maps must be floating point, got ['torch.float32', 'torch.int64']",
            "token_mask must be [2, 20] bool, got torch.float32 (2, 20)",
            "fidelity='exact' is unknown",
            "needs a guidance_scale above 1, got 1.0",
            "rate_min must not exceed rate_max, got 2.0 and 1.0",
            "uncond torch.float32 (1, 4, 13, 25) and cond torch.float16 (1, 4, 13, 25) must match",
            "size must be (4, 7), the grid of the predictions, got (4, 6)",
            "maps and predictions differ in batch: 2, 1",
        ):
            assert message.count(reason) == 1, reason

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            pytest.param({"size": (0, 7)}, "size must be positive, got (0, 7)", id="empty-grid"),
            pytest.param({"tokens": []}, "at least one layer, got (0, 3, 3)", id="no-layers"),
            pytest.param({"cond": torch.zeros(4, 13, 25)}, "predictions must be [B, C, H, W]", id="dimensions"),
            pytest.param({"cell": 0}, "cell must be at least 1, got 0", id="cell"),
            pytest.param({"cell": 5}, "size must be (3, 5), the grid of the predictions, got (4, 7)", id="other-cell"),
            pytest.param({"guidance_scale": torch.ones(3)}, "a number, [] or [2]", id="scales"),
            pytest.param({"guidance_scale": -1.0}, "guidance_scale must not be negative, got -1.0", id="negative"),
            pytest.param({"rewrite": "both"}, "rewrite='both' is unknown", id="rewrite"),
            pytest.param({"benchmark": "sky"}, "benchmark='sky' is unknown", id="benchmark"),
            pytest.param({"rescale": 2.0}, "rescale must lie in 0..1, got 2.0", id="rescale"),
            pytest.param(
                {"rescale": 0.7, "rewrite": "unconditional"}, "rescale needs rewrite='guided'", id="rescale-rewritten"
            ),
            pytest.param({"backend": "cuda"}, "backend='cuda' is unknown", id="backend"),
            pytest.param({"uncond": torch.zeros(2, 4, 13, 25, device="meta")}, "got cpu and meta", id="predictions"),
            pytest.param({"guidance_scale": torch.ones(2, device="meta")}, "got cpu and meta", id="scale"),
            pytest.param({"token_mask": torch.ones(2, 20, device="meta").bool()}, "got cpu and meta", id="mask"),
        ],
    )
    def test_reasons(self, rng, change, reason):
        names = ("tokens", "start", "sizes", "size", "uncond", "cond")
        arguments = dict(zip(names, random_inputs(rng, 13, 25), strict=True))
        assert reason in self.refused(**{**arguments, "guidance_scale": 7.5, **change})

    def test_the_limits_of_both_kernels_are_listed_once(self, rng):
        tokens, start, *rest = random_inputs(
            rng, 140, 136, cell=1, dtype=torch.float64, map_dtype=torch.float64, layers=(1, 0)
        )
        with pytest.raises(BackendError) as raised:
            segment_and_guide([x.mT.contiguous().mT for x in tokens], start, *rest, 7.5, cell=1, backend="triton")
        for reason in ("CUDA device", "fp64 needs", "140 x 136 cells, as powers of two, exceed 8192", "be contiguous"):
            assert str(raised.value).count(reason) == 1, reason


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("cell", [1, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["all-tokens", "token-mask"])
@pytest.mark.parametrize(
    ("rewrite", "rescale"),
    [("guided", 0.0), ("guided", 0.7), ("unconditional", 0.0)],
    ids=["guided", "rescaled", "uncond"],
)
def test_opcheck(rng, rewrite, rescale, masked, cell, sigma):
    tokens, start, sizes, _, uncond, cond = random_inputs(rng, 9, 7, cell)
    flat = [length for pair in sizes for length in pair]
    arguments = (tokens, start, flat, random_mask(rng) if masked else None, uncond.half(), cond.half())
    options = (torch.tensor([3.0, 7.5]), cell, 0.8, 3.0, math.inf, sigma, "official", rewrite, "torch", rescale)
    torch.library.opcheck(torch.ops.scfg_kernels.segment_and_guide.default, (*arguments, *options))


@pytest.mark.parametrize("scale", [7.5, torch.tensor([3.0, 7.5])], ids=["number", "per-sample"])
def test_compiles_as_one_graph(rng, scale):
    *maps, uncond, cond = random_inputs(rng, 13, 25)
    inputs = (*maps, as_layout(uncond, "channels_last"), as_layout(cond, "channels_last"))
    mask = random_mask(rng)
    compiled = torch.compile(segment_and_guide, fullgraph=True, backend="aot_eager")
    results = compiled(*inputs, scale, token_mask=mask)
    expected = segment_and_guide(*inputs, scale, token_mask=mask)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results, expected, strict=True))
