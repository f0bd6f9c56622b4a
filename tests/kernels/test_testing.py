"""The testers themselves: each must pass what is right and refuse every kind of wrong."""

import pytest
import torch
from scfg_kernels import attention_map
from scfg_kernels.testing import (
    LAYOUTS,
    Recorder,
    as_layout,
    assert_as_accurate_as,
    assert_masks_agree,
    guarded_copy,
    guarded_empty,
)

from tests.kernels.cases import DTYPES, by_name, random_qkv


class TestAsAccurateAs:
    @pytest.fixture
    def results(self, rng):
        truth = torch.rand(4, 250, generator=rng, dtype=torch.float64)
        error = 1e-4 * torch.randn(4, 250, generator=rng, dtype=torch.float64)
        return truth, (truth + error).float(), error

    def test_accepts_the_naive_result_and_the_exact_one(self, results):
        truth, naive, _ = results
        assert_as_accurate_as(naive, naive, truth)
        assert_as_accurate_as(truth.float(), naive, truth)

    def test_accepts_up_to_the_factor_and_no_further(self, results):
        truth, naive, error = results
        assert_as_accurate_as((truth - 1.9 * error).float(), naive, truth)
        with pytest.raises(AssertionError, match="output: maximum error"):
            assert_as_accurate_as((truth - 2.1 * error).float(), naive, truth, name="output")
        assert_as_accurate_as((truth - 2.1 * error).float(), naive, truth, factor=2.5)

    def test_refuses_one_wrong_element(self, results):
        truth, naive, _ = results
        wrong = naive.clone()
        wrong[2, 100] += 2e-3
        with pytest.raises(AssertionError, match="maximum error"):
            assert_as_accurate_as(wrong, naive, truth)

    def test_refuses_a_bias_below_the_largest_error(self, results):
        truth, naive, error = results
        bias = 0.9 * float(error.abs().max())
        with pytest.raises(AssertionError, match="root mean square error"):
            assert_as_accurate_as((truth + bias).float(), naive, truth)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_refuses_what_is_not_finite(self, results, value):
        truth, naive, _ = results
        wrong = naive.clone()
        wrong[0, 0] = value
        with pytest.raises(AssertionError, match="1 of 1000 values are not finite"):
            assert_as_accurate_as(wrong, naive, truth)

    def test_refuses_other_shapes_and_a_truth_that_is_none(self, results):
        truth, naive, _ = results
        with pytest.raises(AssertionError, match="shapes differ"):
            assert_as_accurate_as(naive[:1], naive, truth)
        with pytest.raises(AssertionError, match="must be fp64"):
            assert_as_accurate_as(naive, naive, truth.float())

    @pytest.mark.parametrize("dtype", **by_name(DTYPES))
    def test_an_exact_naive_result_leaves_one_rounding_unit(self, dtype):
        truth = torch.ones(8, dtype=torch.float64)
        naive = truth.to(dtype)
        unit = torch.finfo(dtype).eps
        assert_as_accurate_as(naive + unit, naive, truth)
        with pytest.raises(AssertionError):
            assert_as_accurate_as(naive + 2 * unit, naive, truth)


class TestMasksAgree:
    expected = torch.tensor([3, 3, 5, 5])
    margin = torch.tensor([0.5, 1e-6, 2e-6, 0.5])
    runner_up = torch.tensor([1, 5, 3, 1])

    def test_accepts_equality_whatever_the_margin(self):
        assert_masks_agree(self.expected, self.expected, torch.zeros(4))

    def test_refuses_a_difference_away_from_a_tie(self):
        with pytest.raises(AssertionError, match=r"ids: 1 of 4 differ away from a tie.*5\.000e-01"):
            actual = torch.tensor([9, 3, 5, 5])
            assert_masks_agree(actual, self.expected, self.margin, max_crossings=4, name="ids")

    def test_counts_crossings_inside_the_band(self):
        actual = torch.tensor([3, 5, 3, 5])
        assert_masks_agree(actual, self.expected, self.margin, max_crossings=2, runner_up=self.runner_up)
        with pytest.raises(AssertionError, match="2 crossings inside the band, 1 allowed"):
            assert_masks_agree(actual, self.expected, self.margin, max_crossings=1)
        with pytest.raises(AssertionError, match="2 crossings inside the band, 0 allowed"):
            assert_masks_agree(actual, self.expected, self.margin)

    def test_the_band_is_a_limit(self):
        actual = torch.tensor([3, 3, 3, 5])
        with pytest.raises(AssertionError, match="away from a tie"):
            assert_masks_agree(actual, self.expected, self.margin, band=1e-6, max_crossings=4)

    def test_refuses_a_crossing_to_a_third_value(self):
        actual = torch.tensor([3, 7, 5, 5])
        with pytest.raises(AssertionError, match="1 elements fell to neither"):
            assert_masks_agree(actual, self.expected, self.margin, max_crossings=4, runner_up=self.runner_up)

    def test_a_margin_that_is_nan_excuses_nothing(self):
        with pytest.raises(AssertionError, match="away from a tie"):
            assert_masks_agree(self.expected + 1, self.expected, torch.full((4,), torch.nan), max_crossings=4)

    def test_refuses_other_shapes(self):
        with pytest.raises(AssertionError, match="shapes differ"):
            assert_masks_agree(self.expected[:3], self.expected, self.margin)

    def test_booleans(self):
        expected = torch.tensor([True, False])
        assert_masks_agree(expected, expected, torch.zeros(2))
        with pytest.raises(AssertionError):
            assert_masks_agree(~expected, expected, torch.ones(2), max_crossings=4)


class TestRecorder:
    def test_sees_the_largest_tensor_and_its_dtype(self):
        x = torch.ones(3, 4)
        with Recorder() as recorder:
            (x.double().unsqueeze(0) * torch.ones(5, 1, 1)).sum()
        assert (recorder.largest.op, recorder.largest.shape) == ("mul", (5, 3, 4))
        assert recorder.largest.dtype == torch.float64 and recorder.largest.numel == 60
        recorder.assert_none_larger_than(60)
        with pytest.raises(AssertionError, match=r"mul made \(5, 3, 4\) torch.float64, more than 59 elements"):
            recorder.assert_none_larger_than(59)

    def test_sees_inside_the_custom_operators(self, rng):
        q, k, _ = random_qkv(rng, (1, 2, 9, 7, 8))
        with Recorder() as recorder:
            recorded = attention_map(q, k)
        assert torch.equal(recorded, attention_map(q, k))
        assert any("softmax" in seen.op for seen in recorder.made)
        assert ((9, 8), (8, 7)) in recorder.products  # head by head on a CPU

    def test_sees_inside_attention_that_torch_does_step_by_step(self, rng):
        q, k, v = random_qkv(rng, (1, 2, 9, 7, 8))
        with Recorder() as recorder:
            torch.nn.functional.scaled_dot_product_attention(q, k, v[..., :3])  # no fused kernel takes other values
        assert max(seen.numel for seen in recorder.made if "softmax" in seen.op) == 2 * 9 * 7

    @pytest.mark.parametrize(
        "product",
        [torch.matmul, torch.bmm, lambda a, b: torch.baddbmm(a, a, b), lambda a, b: a[0] @ b[0], torch.einsum],
        ids=["matmul", "bmm", "baddbmm", "mm", "einsum"],
    )
    def test_sees_products_however_they_are_written(self, product):
        a = torch.ones(2, 6, 6)
        with Recorder() as recorder:
            product("bij,bjk->bik", a, a) if product is torch.einsum else product(a, a)
        with pytest.raises(AssertionError, match="a product of"):
            recorder.assert_no_product(6, 6, 6)
        recorder.assert_no_product(6, 6, 5)

    def test_nothing_recorded_is_an_error(self):
        with Recorder() as recorder:
            pass
        with pytest.raises(AssertionError, match="nothing was recorded"):
            recorder.assert_none_larger_than(1)


@pytest.mark.parametrize(
    "dtype", **by_name({**DTYPES, "fp64": torch.float64, "int64": torch.int64, "bool": torch.bool})
)
class TestGuarded:
    def test_a_complete_write_passes(self, dtype):
        guarded = guarded_empty((3, 5), dtype)
        assert guarded.tensor.shape == (3, 5) and guarded.tensor.dtype == dtype and guarded.tensor.is_contiguous()
        guarded.tensor.fill_(1)
        guarded.assert_written()
        guarded.assert_guards_intact()

    def test_an_element_left_out_is_found(self, dtype):
        guarded = guarded_empty((3, 5), dtype)
        guarded.tensor[:, :4] = 1
        with pytest.raises(AssertionError, match="3 of 15 elements were never written"):
            guarded.assert_written()
        guarded.assert_guards_intact()

    @pytest.mark.parametrize(("offset", "message"), [(-1, "1 elements before and 0"), (15, "0 elements before and 1")])
    def test_a_write_beside_the_tensor_is_found(self, dtype, offset, message):
        guarded = guarded_empty((3, 5), dtype, guard=4)
        guarded.tensor.fill_(1)
        guarded.tensor.as_strided((1,), (1,), guarded.tensor.storage_offset() + offset).fill_(0)
        with pytest.raises(AssertionError, match=message):
            guarded.assert_guards_intact()
        guarded.assert_written()

    def test_a_copy_keeps_the_values(self, dtype):
        x = torch.arange(6).view(2, 3).to(dtype)
        guarded = guarded_copy(x.T)
        assert torch.equal(guarded.tensor, x.T)
        guarded.assert_guards_intact()


class TestPoison:
    @pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
    def test_is_nan_and_a_read_beside_an_input_spreads(self, dtype):
        assert guarded_empty((4,), dtype).tensor.isnan().all()
        guarded = guarded_copy(torch.ones(4, dtype=dtype), guard=1)
        beside = guarded.tensor.as_strided((5,), (1,), guarded.tensor.storage_offset())
        assert beside.sum().isnan() and not guarded.tensor.sum().isnan()

    @pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
    def test_a_computed_nan_is_not_taken_for_poison_but_refused(self, dtype):
        guarded = guarded_empty((4,), dtype)
        guarded.tensor.copy_(torch.tensor([1.0, torch.inf, 1.0, 1.0]).to(dtype))
        guarded.tensor[1] -= torch.inf
        with pytest.raises(AssertionError, match="1 of 4 elements are NaN"):
            guarded.assert_written()

    @pytest.mark.parametrize("dtype", **by_name({**DTYPES, "fp64": torch.float64}))
    def test_an_ordinary_nan_in_a_guard_zone_is_a_write(self, dtype):
        guarded = guarded_empty((4,), dtype, guard=2)
        guarded.tensor.as_strided((1,), (1,), guarded.tensor.storage_offset() + 4).fill_(torch.nan)
        with pytest.raises(AssertionError, match="0 elements before and 1 elements after"):
            guarded.assert_guards_intact()

    def test_there_must_be_a_guard(self):
        with pytest.raises(ValueError, match="guard must be at least 1"):
            guarded_empty((4,), guard=0)


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_values_and_shape_are_kept(self, rng, layout):
        x = torch.randn(2, 3, 5, 7, generator=rng)
        result = as_layout(x, layout)
        expected = x[:1].expand_as(x) if layout == "expanded" else x
        assert result.shape == x.shape and torch.equal(result, expected)

    def test_strides_are_what_the_names_say(self, rng):
        x = torch.randn(2, 3, 5, 7, generator=rng)
        strides = {layout: as_layout(x, layout).stride() for layout in LAYOUTS}
        assert strides == {
            "contiguous": (105, 35, 7, 1),
            "projection": (105, 7, 21, 1),
            "sliced": (5 * 7 * 9, 7 * 9, 9, 1),
            "strided": (210, 70, 14, 2),
            "expanded": (0, 35, 7, 1),
            "channels_last": (105, 1, 21, 3),
        }

    @pytest.mark.parametrize("layout", ["sliced", "strided"])
    def test_gaps_are_nan(self, rng, layout):
        result = as_layout(torch.randn(2, 3, 5, 7, generator=rng), layout)
        whole = torch.empty(0).set_(result.untyped_storage(), 0, (result.untyped_storage().nbytes() // 4,))
        assert whole.isnan().sum() == whole.numel() - result.numel() > 0

    def test_an_unknown_layout_names_the_choices(self, rng):
        with pytest.raises(ValueError, match="layout='tiled' is unknown; use one of 'contiguous'"):
            as_layout(torch.zeros(1, 1, 1, 1), "tiled")
