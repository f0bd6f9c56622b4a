"""Bad arguments: one ValueError that names the operator and lists every reason. And sizes at the edge that are good."""

import pytest
import torch
from scfg_kernels import attention_map, attention_with_lse, complete, complete_from_qk, guide, segment
from scfg_kernels._checks import Reasons


def raises_all(function, *arguments, reasons, **options):
    """Assert that the call raises one ValueError that contains every one of `reasons`."""
    with pytest.raises(ValueError) as raised:
        function(*arguments, **options)
    message = str(raised.value)
    assert message.startswith(f"{function.__name__}: "), message
    missing = [reason for reason in reasons if reason not in message]
    assert not missing, f"not in {message!r}: {missing}"


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


class TestReasons:
    def test_nothing_found_raises_nothing(self):
        reasons = Reasons("op")
        assert reasons.unless(True, "unused")
        reasons.raise_if_any()
        assert reasons.found == []

    def test_everything_found_is_raised_once(self):
        reasons = Reasons("op")
        assert not reasons.unless(False, "first")
        assert reasons.unless(True, "unused")
        assert not reasons.unless(False, "second")
        with pytest.raises(ValueError, match=r"^op: first; second$"):
            reasons.raise_if_any()

    def test_a_reason_that_two_checks_find_is_listed_once(self):
        reasons = Reasons("op")
        assert not reasons.unless(False, "same") and not reasons.unless(False, "same")
        assert reasons.found == ["same"]

    def test_devices(self):
        reasons = Reasons("op")
        reasons.same_device(zeros(1), zeros(2))
        assert reasons.found == []
        reasons.same_device(zeros(1), zeros(1, device="meta"))
        assert reasons.found == ["all tensors must be on one device, got cpu and meta"]


ATTENTION = {
    # name: (q, k, v, reasons)
    "dimensions": (
        zeros(2, 9, 8), zeros(1, 2, 9, 9, 8), zeros(8),
        ["q must be [batch, heads, tokens, head_dim], got (2, 9, 8)", "k must be [", "v must be ["],
    ),
    "integers": (
        zeros(1, 2, 9, 8, dtype=torch.int64), zeros(1, 2, 9, 8, dtype=torch.int32), zeros(1, 2, 9, 8),
        ["q must be floating point, got torch.int64", "k must be floating point, got torch.int32", "share one dtype"],
    ),
    "dtypes": (
        zeros(1, 2, 9, 8, dtype=torch.float16), zeros(1, 2, 9, 8), zeros(1, 2, 9, 8), ["q, k, v must share one dtype"],
    ),
    "devices": (
        zeros(1, 2, 9, 8), zeros(1, 2, 9, 8, device="meta"), zeros(1, 2, 9, 8), ["one device, got cpu and meta"],
    ),
    "batch-heads-and-head-dim": (
        zeros(1, 2, 9, 8), zeros(2, 3, 9, 16), zeros(2, 3, 9, 16),
        ["q and k differ in batch or heads: (1, 2, 9, 8), (2, 3, 9, 16)", "q and k differ in head_dim: 8, 16"],
    ),
    "values": (
        zeros(1, 2, 9, 8), zeros(1, 2, 9, 8), zeros(1, 2, 7, 8), ["k and v differ in batch, heads or tokens"],
    ),
    "empty-keys": (
        zeros(1, 2, 0, 8), zeros(1, 2, 0, 8), zeros(1, 2, 0, 8), ["key tokens and head_dim must not be empty"],
    ),
    "types-and-shapes-together": (
        zeros(1, 2, 9, 8, dtype=torch.float16), zeros(1, 3, 9, 16), zeros(1, 3, 7, 16),
        ["share one dtype", "differ in batch or heads", "differ in head_dim: 8, 16", "k and v differ in"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("q", "k", "v", "reasons"), list(ATTENTION.values()), ids=list(ATTENTION))
def test_attention_with_output(q, k, v, reasons):
    raises_all(attention_with_lse, q, k, v, reasons=reasons)


@pytest.mark.parametrize("name", ["integers", "dtypes", "devices", "batch-heads-and-head-dim", "empty-keys"])
def test_attention_map(name):
    q, k, _, reasons = ATTENTION[name]
    raises_all(attention_map, q, k, reasons=reasons)


def test_self_attention_is_over_the_same_tokens():
    q, k = zeros(1, 2, 9, 8), zeros(1, 2, 7, 8)
    raises_all(complete_from_qk, q, k, zeros(1, 9, 5), reasons=["same tokens, got 9 and 7", "attention_map"])


def test_self_attention_lists_its_own_reason_with_the_others():
    q, k = zeros(1, 2, 9, 8), zeros(1, 2, 7, 16)
    raises_all(complete_from_qk, q, k, zeros(1, 9, 5), reasons=["same tokens, got 9 and 7", "differ in head_dim"])


class TestComplete:
    def test_shapes_and_options_together(self):
        raises_all(
            complete, zeros(2, 9, 8), zeros(2, 7, 5),
            unconditional=3, fidelity="exact", powers=0,
            reasons=[
                "self_map must be square, got (2, 9, 8)", "cross_map must be [2, 9, T], got (2, 7, 5)",
                "unconditional must lie in 0..2, got 3", "fidelity='exact' is unknown",
                "powers must be at least 1, got 0",
            ],
        )  # fmt: skip

    def test_dimensions_types_and_devices_together(self):
        reasons = ["three dimensions", "floating point, got torch.int64 and torch.float32", "got cpu and meta"]
        raises_all(complete, zeros(9, 9, dtype=torch.int64), zeros(9, 5, device="meta"), reasons=reasons)

    def test_layers_together(self):
        own, cross = [zeros(2, 9, 9), zeros(2, 4, 4).double()], [zeros(2, 9, 5), zeros(2, 4, 6)]
        raises_all(
            complete, own, cross,
            reasons=["self_maps must have one dtype, got", "cross_map[1] must have the samples and text tokens"],
        )  # fmt: skip
        raises_all(complete, own, cross[:1], reasons=["a self_map and a cross_map for every layer"])

    @pytest.mark.parametrize("unconditional", [-1, 3])
    def test_unconditional_out_of_range(self, unconditional):
        reasons = [f"0..2, got {unconditional}"]
        raises_all(complete, zeros(2, 9, 9), zeros(2, 9, 5), unconditional=unconditional, reasons=reasons)

    def test_no_text_tokens(self):
        raises_all(complete, zeros(2, 9, 9), zeros(2, 9, 0), unconditional=1, reasons=["at least one text token"])


class TestSegment:
    def good(self):
        return [zeros(2, 5, 16), zeros(2, 5, 4)], [zeros(2, 16), zeros(2, 4)], [(4, 4), (2, 2)], (4, 4)

    def test_layers_and_options_together(self):
        tokens, start, sizes, size = self.good()
        tokens[1], start[0] = zeros(2, 6, 4), zeros(1, 16)
        raises_all(
            segment, tokens, start, sizes, size,
            blur_sigma=-1.0, token_mask=zeros(2, 5),
            reasons=[
                "blur_sigma must not be negative, got -1.0", "tokens[1] must be (2, 5, 4), got (2, 6, 4)",
                "start[0] must be (2, 16), got (1, 16)", "token_mask must be [2, 5] bool, got torch.float32 (2, 5)",
            ],
        )  # fmt: skip

    def test_no_layers(self):
        raises_all(segment, [], [], [], (4, 4), reasons=["at least one layer, got (0, 0, 0)"])

    def test_number_of_entries_and_size_together(self):
        tokens, start, sizes, _ = self.good()
        reasons = ["one entry per layer", "got (2, 1, 2)", "size must be positive, got (0, 4)"]
        raises_all(segment, tokens, start[:1], sizes, (0, 4), reasons=reasons)

    def test_sizes_that_do_not_fit_the_maps(self):
        tokens, start, _, size = self.good()
        reasons = ["tokens[0] must be (2, 5, 20), got (2, 5, 16)", "start[1] must be (2, 6), got (2, 4)"]
        raises_all(segment, tokens, start, [(4, 5), (2, 3)], size, reasons=reasons)

    def test_devices(self):
        tokens, start, sizes, size = self.good()
        start[1] = zeros(2, 4, device="meta")
        raises_all(segment, tokens, start, sizes, size, reasons=["one device, got cpu and meta"])

    def test_shape_of_the_token_mask(self):
        mask = zeros(2, 4, dtype=torch.bool)
        raises_all(segment, *self.good(), token_mask=mask, reasons=["token_mask must be [2, 5] bool"])

    def test_integer_maps(self):
        tokens, start, sizes, size = self.good()
        tokens[0] = tokens[0].long()
        raises_all(segment, tokens, start, sizes, size, reasons=["floating point"])

    def test_no_text_tokens(self):
        reasons = ["at least one text token"]
        raises_all(segment, [zeros(2, 0, 16)], [zeros(2, 16)], [(4, 4)], (4, 4), reasons=reasons)


class TestGuide:
    def good(self):
        return {
            "uncond": zeros(2, 4, 9, 5),
            "cond": zeros(2, 4, 9, 5),
            "token_index": zeros(2, 3, 2, dtype=torch.int64),
            "foreground": zeros(2, 3, 2, dtype=torch.bool),
            "guidance_scale": 7.5,
            "num_tokens": 5,
        }

    @pytest.mark.parametrize(
        ("change", "reasons"),
        [
            pytest.param(
                {
                    "fidelity": "exact", "rewrite": "both", "num_tokens": 0, "blur_sigma": -0.5, "rate_min": 2.0,
                    "rate_max": 1.0, "foreground": zeros(2, 3, 2), "token_index": zeros(2, 3, 3, dtype=torch.int32),
                },
                [
                    "fidelity='exact' is unknown", "rewrite='both' is unknown", "num_tokens must be at least 1, got 0",
                    "blur_sigma must not be negative", "rate_min must not exceed rate_max, got 2.0 and 1.0",
                    "token_index must be int64, got torch.int32", "foreground must be bool, got torch.float32",
                    "must be (2, 3, 2), got (2, 3, 3) and (2, 3, 2)",
                ],
                id="options-and-masks-together",
            ),
            pytest.param({"uncond": zeros(2, 4, 9, 6)}, ["(2, 4, 9, 6)", "must match"], id="shapes"),
            pytest.param({"uncond": zeros(2, 4, 9, 5).half()}, ["torch.float16", "must match"], id="dtypes"),
            pytest.param({"uncond": zeros(4, 9, 5), "cond": zeros(4, 9, 5)}, ["[B, C, H, W]"], id="dimensions"),
            pytest.param(
                {"uncond": zeros(2, 4, 9, 5).long(), "cond": zeros(2, 4, 9, 5).long()}, ["floating point"],
                id="integers",
            ),
            pytest.param({"foreground": zeros(2, 3, 2, device="meta").bool()}, ["got cpu and meta"], id="devices"),
            pytest.param({"cell": 0}, ["cell must be at least 1, got 0"], id="cell"),
            pytest.param({"cell": 1}, ["token_index and foreground must be (2, 9, 5), got (2, 3, 2)"], id="grid"),
            pytest.param({"guidance_scale": torch.ones(3)}, ["a number, [] or [2]"], id="scales"),
            pytest.param(
                {"guidance_scale": torch.ones(2, device="meta")}, ["got cpu and meta"], id="scales-on-another-device",
            ),
            pytest.param(
                {"guidance_scale": 1.0, "rewrite": "unconditional"}, ["above 1, got 1.0"],
                id="rewrite-without-guidance",
            ),
            pytest.param(
                {"guidance_scale": -2.0}, ["guidance_scale must not be negative, got -2.0"], id="negative-scale",
            ),
            pytest.param({"rescale": -0.1}, ["rescale must lie in 0..1, got -0.1"], id="negative-rescale"),
            pytest.param({"rescale": float("nan")}, ["rescale must lie in 0..1, got nan"], id="rescale-nan"),
            pytest.param(
                {"rescale": 1.5, "rewrite": "unconditional"},
                ["rescale must lie in 0..1, got 1.5", "rescale needs rewrite='guided'"], id="rescale-rewritten",
            ),
        ],
    )  # fmt: skip
    def test_reasons(self, change, reasons):
        raises_all(guide, **{**self.good(), **change}, reasons=reasons)

    def test_the_unchanged_case_is_good(self):
        result, rate = guide(**self.good())
        assert result.shape == (2, 4, 9, 5) and rate.shape == (2, 1, 9, 5)


class TestEmpty:
    """No samples is no error: a batch may be split so that one part has none."""

    def test_attention(self):
        q, k, v = zeros(0, 2, 9, 8), zeros(0, 2, 7, 8), zeros(0, 2, 7, 8)
        assert attention_map(q, k).shape == (0, 9, 7)
        out, _ = attention_with_lse(q, k, v)
        assert out.shape == (0, 2, 9, 8)

    def test_complete(self):
        tokens, start = complete(zeros(0, 9, 9), zeros(0, 9, 5))
        assert tokens.shape == (0, 5, 9) and start.shape == (0, 9)

    def test_segment(self):
        ids, foreground = segment([zeros(0, 5, 16)], [zeros(0, 16)], [(4, 4)], (4, 4))
        assert ids.shape == foreground.shape == (0, 4, 4)

    def test_guide(self):
        masks = zeros(0, 3, 2, dtype=torch.int64), zeros(0, 3, 2, dtype=torch.bool)
        result, rate = guide(zeros(0, 4, 9, 5), zeros(0, 4, 9, 5), *masks, 7.5, num_tokens=5)
        assert result.shape == (0, 4, 9, 5) and rate.shape == (0, 1, 9, 5)
