"""`segment` and `smooth` against the literal reference: equality masks, two-channel foreground, padded convolution."""

import pytest
import torch
from scfg_kernels import complete, segment, smooth
from scfg_kernels.testing import Recorder, assert_as_accurate_as

from lab.reference import deepfloyd, official
from tests.kernels.cases import (
    TOKENS,
    assert_agrees_with_reference,
    by_name,
    completed_by_operators,
    random_layers,
    random_maps,
    random_step,
    segment_by_operators,
)

GRIDS = {
    # name: (layers as (h, w), grid)
    "square": ([(16, 16)] * 5 + [(8, 8)], (16, 16)),
    "one-layer": ([(16, 16)], (16, 16)),
    "odd-non-square": ([(17, 25)] * 5 + [(9, 13)], (17, 25)),
    "wide": ([(4, 28), (2, 14)], (4, 28)),
    "one-row": ([(1, 63), (1, 32)], (1, 63)),
    "one-column": ([(40, 1), (20, 1)], (40, 1)),
    "two-by-two": ([(2, 2), (1, 1)], (2, 2)),
    "three-levels": ([(16, 12), (8, 6), (4, 3)], (16, 12)),
    "coarser-grid-than-a-layer": ([(16, 16), (8, 8)], (8, 8)),
}


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.3])
@pytest.mark.parametrize("grid", **by_name(GRIDS))
def test_agrees_with_the_literal_reference(rng, grid, sigma):
    sizes, size = grid
    tokens, start, cond, uncond = random_layers(rng, sizes)
    ids, foreground = segment(tokens, start, sizes, size, blur_sigma=sigma)
    assert ids.shape == foreground.shape == (2, *size)
    assert ids.dtype == torch.int64 and foreground.dtype == torch.bool
    assert ids.is_contiguous() and foreground.is_contiguous()
    assert_agrees_with_reference(ids, foreground, cond, uncond, sizes, size, sigma)


@pytest.mark.parametrize("tokens", [2, 63, 77, 78])
def test_any_number_of_tokens(rng, tokens):
    sizes, size = GRIDS["odd-non-square"]
    maps, start, cond, uncond = random_layers(rng, sizes, tokens=tokens)
    ids, foreground = segment(maps, start, sizes, size)
    assert int(ids.max()) == tokens - 1
    assert_agrees_with_reference(ids, foreground, cond, uncond, sizes, size)


@pytest.mark.parametrize("dtype", **by_name({"fp16": torch.float16, "bf16": torch.bfloat16}))
def test_half_precision_maps_are_scored_in_fp32(rng, dtype):
    sizes, size = GRIDS["square"]
    tokens, start, _, _ = random_layers(rng, sizes, dtype=dtype)
    ids, foreground = segment(tokens, start, sizes, size)
    again = segment([x.float() for x in tokens], [x.float() for x in start], sizes, size)
    assert torch.equal(ids, again[0]) and torch.equal(foreground, again[1])


def test_fp64_maps_are_exact_away_from_ties(rng):
    sizes, size = GRIDS["odd-non-square"]
    tokens, start, cond, _ = random_layers(rng, sizes, dtype=torch.float64)
    ids, _ = segment(tokens, start, sizes, size)
    assert torch.equal(ids, official.token_ids(official.token_masks(official.smoothed_normalised(cond, sizes, size))))


def test_the_order_of_the_layers_does_not_matter_away_from_ties(rng):
    sizes, size = GRIDS["square"]
    tokens, start, cond, uncond = random_layers(rng, sizes)
    backwards = segment(tokens[::-1], start[::-1], sizes[::-1], size)
    assert_agrees_with_reference(*backwards, cond, uncond, sizes, size)


def test_every_layer_has_the_same_weight(rng):
    """A layer counts once per entry, whatever its size; the same layer twice is the same as once."""
    sizes, size = [(16, 16)], (16, 16)
    tokens, start, _, _ = random_layers(rng, sizes)
    once = segment(tokens, start, sizes, size)
    twice = segment(tokens * 2, start * 2, sizes * 2, size)
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])


def test_a_token_is_divided_by_its_own_mean(rng):
    """Scaling one token's maps, in every layer by another factor, changes nothing but rounding."""
    sizes, size = GRIDS["square"]
    tokens, start, cond, uncond = random_layers(rng, sizes)
    for layer, factor in zip(tokens, (0.25, 2.0, 8.0, 0.5, 4.0, 16.0), strict=True):
        layer[:, 5] *= factor  # powers of two, so that only the 1e-8 and the order of additions differ
    ids, foreground = segment(tokens, start, sizes, size)
    assert_agrees_with_reference(ids, foreground, cond, uncond, sizes, size)


class TestTies:
    def test_the_lowest_token_wins(self, rng):
        sizes, size = [(8, 8)], (8, 8)
        tokens, start, _, _ = random_layers(rng, sizes)
        winners, _ = segment(tokens, start, sizes, size)
        twin = tokens[0].clone()
        twin[:, 40] = twin[:, 30]
        twin[:, 50] = twin[:, 30]
        ids, _ = segment([twin], start, sizes, size)
        assert (winners == 30).any(), "the case must have a region to tie"
        assert not ((ids == 40) | (ids == 50)).any()

    def test_the_reference_is_hot_in_every_tied_mask(self, rng):
        _, _, cond, _ = random_layers(rng, [(8, 8)])
        cond[0][..., 40] = cond[0][..., 30]
        masks = official.token_masks(official.smoothed_normalised(cond, [(8, 8)], (8, 8)))
        assert torch.equal(masks[:, 30], masks[:, 40]) and masks[:, 30].any()

    def test_uniform_attention_is_token_zero_and_no_foreground(self):
        sizes, size = GRIDS["square"]
        tokens = [torch.full((1, TOKENS, h * w), 1 / TOKENS) for h, w in sizes]
        start = [torch.full((1, h * w), 1 / TOKENS) for h, w in sizes]
        ids, foreground = segment(tokens, start, sizes, size)
        assert torch.equal(ids, torch.zeros(1, *size, dtype=torch.int64))
        assert not foreground.any()


class TestTokenMask:
    def test_only_allowed_tokens_own_cells(self, rng):
        sizes, size = GRIDS["square"]
        tokens, start, cond, uncond = random_layers(rng, sizes)
        mask = torch.rand(2, TOKENS, generator=rng) < 0.3
        ids, foreground = segment(tokens, start, sizes, size, token_mask=mask)
        assert mask.gather(1, ids.flatten(1)).all()
        assert_agrees_with_reference(ids, foreground, cond, uncond, sizes, size, token_mask=mask)

    def test_all_allowed_changes_nothing_and_the_foreground_never_depends_on_it(self, rng):
        sizes, size = GRIDS["square"]
        tokens, start, _, _ = random_layers(rng, sizes)
        plain = segment(tokens, start, sizes, size)
        full = segment(tokens, start, sizes, size, token_mask=torch.ones(2, TOKENS, dtype=torch.bool))
        assert torch.equal(plain[0], full[0]) and torch.equal(plain[1], full[1])
        one = torch.zeros(2, TOKENS, dtype=torch.bool)
        one[:, 7] = True
        ids, foreground = segment(tokens, start, sizes, size, token_mask=one)
        assert (ids == 7).all() and torch.equal(foreground, plain[1])

    def test_each_sample_has_its_own(self, rng):
        sizes, size = [(8, 8)], (8, 8)
        tokens, start, _, _ = random_layers(rng, sizes)
        mask = torch.zeros(2, TOKENS, dtype=torch.bool)
        mask[0, 3] = mask[1, 9] = True
        ids, _ = segment(tokens, start, sizes, size, token_mask=mask)
        assert (ids[0] == 3).all() and (ids[1] == 9).all()


class TestForeground:
    def test_is_where_the_start_token_attends_less_than_its_mean(self):
        start = torch.full((1, 64), 0.6)
        start[0, :32] = 0.2
        tokens = torch.full((1, 2, 64), 0.5)
        _, foreground = segment([tokens], [start], [(8, 8)], (8, 8), blur_sigma=0.0)
        assert foreground[0, :4].all() and not foreground[0, 4:].any()

    def test_a_tie_is_background(self):
        start = torch.tensor([[0.25, 0.5, 0.75, 0.5]])  # the mean is 0.5, exactly
        _, foreground = segment([torch.full((1, 2, 4), 0.5)], [start], [(2, 2)], (2, 2), blur_sigma=0.0)
        assert foreground.flatten().tolist() == [True, False, False, False]

    def test_comes_from_the_unconditional_half_alone(self, rng):
        sizes, size = GRIDS["square"]
        tokens, start, _, _ = random_layers(rng, sizes)
        others, other_start, _, _ = random_layers(rng, sizes)
        ids, foreground = segment(tokens, start, sizes, size)
        assert torch.equal(segment(others, start, sizes, size)[1], foreground)
        assert torch.equal(segment(tokens, other_start, sizes, size)[0], ids)


class TestTwoChannels:
    """Maps whose rows do not sum to 1: the start token, and all others, are given."""

    @staticmethod
    def layers(rng, sizes, dtype=torch.float32):
        """As `random_layers`, with a share of every row, another in every cell, lost to keys that are no tokens."""
        tokens, _, cond, uncond = random_layers(rng, sizes, dtype=dtype)
        uncond = [x * (0.2 + 0.6 * torch.rand(*x.shape[:2], 1, generator=rng, dtype=dtype)) for x in uncond]
        start = [torch.stack([x[..., 0], x[..., 1:].sum(-1)], 1) for x in uncond]
        return tokens, start, cond, uncond

    @pytest.mark.parametrize("sigma", [0.0, 0.5])
    @pytest.mark.parametrize("grid", **by_name({name: GRIDS[name] for name in ("square", "odd-non-square", "one-row")}))
    def test_agrees_with_the_literal_reference(self, rng, grid, sigma):
        sizes, size = grid
        tokens, start, cond, uncond = self.layers(rng, sizes)
        ids, foreground = segment(tokens, start, sizes, size, blur_sigma=sigma)
        assert_agrees_with_reference(ids, foreground, cond, uncond, sizes, size, sigma)
        single = segment(tokens, [x[:, 0].contiguous() for x in start], sizes, size, blur_sigma=sigma)
        assert not torch.equal(single[1], foreground), "the second channel must matter"

    @pytest.mark.parametrize("latent_hw", [(64, 64), (40, 72)])
    def test_with_completed_maps_of_one_softmax_over_text_and_picture(self, rng, latent_hw):
        """DeepFloyd IF: the columns of a joint map are split, and its unconditional half is completed as two."""
        sizes = [tuple(length // factor for length in latent_hw) for factor in (4, 4, 8)]
        joint = [random_maps(rng, 4, h * w, 21 + h * w, gain=2.0) for h, w in sizes]
        split = [(x[:, :, :21], x[:, :, 21:]) for x in joint]
        tokens = [complete(own[2:], cross[2:])[0] for cross, own in split]
        two = [torch.stack([cross[:2, :, 0], cross[:2, :, 1:].sum(-1)], 2) for cross, _ in split]
        start = [complete(own[:2], columns)[0] for columns, (_, own) in zip(two, split, strict=True)]
        ids, foreground = segment(tokens, start, sizes, sizes[0])
        layers = [deepfloyd.split_joint_map(x.double())[::-1] for x in joint]
        masks, expected = deepfloyd.segmentation(layers, sizes, sizes[0])
        assert torch.equal(ids, official.token_ids(masks))
        assert torch.equal(foreground, expected[:, 0] > 0) and 0.2 < float(foreground.float().mean()) < 0.8

    def test_of_rows_that_sum_to_one_the_second_channel_says_nothing_new(self, rng):
        sizes, size = GRIDS["square"]
        tokens, start, _, _ = random_layers(rng, sizes, dtype=torch.float64)
        paired = [torch.stack([x, 1.0 - x], 1) for x in start]
        assert torch.equal(segment(tokens, paired, sizes, size)[1], segment(tokens, start, sizes, size)[1])

    def test_equal_channels_are_background(self, rng):
        start = torch.rand(1, 1, 64, generator=rng).expand(1, 2, 64).contiguous()
        assert not segment([torch.full((1, 2, 64), 0.5)], [start], [(8, 8)], (8, 8))[1].any()

    def test_one_layer_with_and_one_without_is_refused(self, rng):
        sizes, size = [(4, 4), (4, 4)], (4, 4)
        tokens, start, _, _ = self.layers(rng, sizes)
        with pytest.raises(ValueError, match=r"start\[1\] must be \(2, 2, 16\), got \(2, 16\)"):
            segment(tokens, [start[0], start[1][:, 0]], sizes, size)

    def test_opcheck(self, rng):
        sizes, size = GRIDS["odd-non-square"]
        tokens, start, _, _ = self.layers(rng, sizes)
        flat = [length for pair in sizes for length in pair]
        torch.library.opcheck(torch.ops.scfg_kernels.segment.default, (tokens, start, flat, *size, 0.5, None, "torch"))


@pytest.mark.parametrize("latent_hw", [(64, 64), (65, 97), (4, 100)], ids=["64x64", "65x97", "one-row-of-cells"])
@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_with_completed_maps(rng, fidelity, latent_hw):
    step = random_step(rng, latent_hw)
    ids, foreground = segment_by_operators(step, fidelity)
    completion = {"official": official.official_completion, "paper": official.paper_completion}[fidelity]
    truth = step.to(torch.float64)
    completed = [completion(s, c) for s, c in zip(truth.self_maps, truth.cross_maps, strict=True)]
    uncond, cond = [x.chunk(2)[0] for x in completed], [x.chunk(2)[1] for x in completed]
    assert_agrees_with_reference(ids, foreground, cond, uncond, step.sizes, step.size)


def test_batch_three_equals_three_singles_and_permutes(rng):
    step = random_step(rng, batch=3)
    tokens, start = completed_by_operators(step)

    def run(samples):
        return segment([x[samples] for x in tokens], [x[samples] for x in start], step.sizes, step.size)

    ids, foreground = run([0, 1, 2])
    alone = [run([sample]) for sample in range(3)]
    assert torch.equal(ids, torch.cat([x[0] for x in alone]))
    assert torch.equal(foreground, torch.cat([x[1] for x in alone]))
    permuted = run([2, 0, 1])
    assert torch.equal(permuted[0], ids[[2, 0, 1]]) and torch.equal(permuted[1], foreground[[2, 0, 1]])


def test_strided_maps_give_the_contiguous_result(rng):
    sizes, size = GRIDS["odd-non-square"]
    tokens, start, _, _ = random_layers(rng, sizes)
    token_last = [x.mT.contiguous().mT for x in tokens]
    wide = [x.new_full((2, 2 * x.shape[1]), torch.nan)[:, ::2].copy_(x) for x in start]
    ours, expected = segment(token_last, wide, sizes, size), segment(tokens, start, sizes, size)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_repeats_are_bit_equal_and_inputs_are_left_alone(rng):
    sizes, size = GRIDS["square"]
    tokens, start, _, _ = random_layers(rng, sizes)
    before = [x.clone() for x in (*tokens, *start)]
    first, second = segment(tokens, start, sizes, size), segment(tokens, start, sizes, size)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(x, y) for x, y in zip((*tokens, *start), before, strict=True))


def test_memory_is_linear_in_the_maps(rng):
    sizes, size = GRIDS["square"]
    tokens, start, _, _ = random_layers(rng, sizes)
    with Recorder() as recorder:
        segment(tokens, start, sizes, size)
    recorder.assert_none_larger_than(sum(x.numel() for x in tokens))


@pytest.mark.parametrize("masked", [False, True], ids=["all-tokens", "token-mask"])
@pytest.mark.parametrize("grid", ["odd-non-square", "one-row"])
def test_opcheck(rng, grid, masked):
    sizes, size = GRIDS[grid]
    tokens, start, _, _ = random_layers(rng, sizes, tokens=5)
    mask = torch.tensor([[True, False, True, True, False]] * 2) if masked else None
    flat = [length for pair in sizes for length in pair]
    torch.library.opcheck(torch.ops.scfg_kernels.segment.default, (tokens, start, flat, *size, 0.5, mask, "torch"))


def test_compiles_as_one_graph(rng):
    sizes, size = GRIDS["odd-non-square"]
    tokens, start, _, _ = random_layers(rng, sizes, tokens=5)
    compiled = torch.compile(segment, fullgraph=True, backend="aot_eager")
    results, expected = compiled(tokens, start, sizes, size), segment(tokens, start, sizes, size)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results, expected, strict=True))


class TestSmooth:
    @pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
    @pytest.mark.parametrize("hw", [(16, 16), (17, 25), (2, 3), (1, 9), (9, 1), (1, 1)])
    def test_as_accurate_as_the_padded_convolution(self, rng, hw, sigma):
        x = torch.rand(2, 3, *hw, generator=rng)
        truth = official.smooth(x.double(), sigma)
        assert_as_accurate_as(smooth(x, sigma), official.smooth(x, sigma), truth)
        torch.testing.assert_close(smooth(x.double(), sigma), truth, rtol=1e-14, atol=0)

    def test_zero_is_the_identity(self, rng):
        x = torch.rand(1, 2, 5, 7, generator=rng)
        assert torch.equal(smooth(x, 0.0), x)

    def test_bounds_hold(self, rng):
        x = torch.rand(1, 8, 33, 33, generator=rng)
        result = smooth(x, 0.5)
        # A convex mean, each of whose weights is rounded once.
        assert float(result.min()) >= float(x.min()) - 1e-7 and float(result.max()) <= float(x.max()) + 1e-7

    def test_constants_stay_within_one_rounding(self):
        x = torch.full((1, 1, 9, 9), 0.8)
        torch.testing.assert_close(smooth(x, 0.5), x, rtol=2e-7, atol=0)

    def test_any_leading_dimensions(self, rng):
        x = torch.rand(2, 3, 5, 6, 7, generator=rng)
        torch.testing.assert_close(smooth(x, 0.5), official.smooth(x.flatten(0, 2)[:, None], 0.5).view_as(x))

    def test_compiles_as_one_graph(self, rng):
        x = torch.rand(2, 3, 6, 7, generator=rng)
        compiled = torch.compile(smooth, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, 0.5), smooth(x, 0.5))
