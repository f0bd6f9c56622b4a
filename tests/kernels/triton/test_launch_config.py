"""Launch configurations are pure functions of sizes and device limits; what a kernel cannot take is a listed reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scfg_kernels import BackendError, _launch, attention_map, choose_backend
from scfg_kernels._launch import (
    DeviceLimits,
    attention_config,
    attention_limits,
    complete_config,
    complete_limits,
    guide_limits,
    pixel_config,
    pixel_limits,
    segment_config,
    segment_limits,
    two_widths,
)

CUDA = torch.device("cuda")
DEVICES = {
    "sm_80": DeviceLimits("sm_80", 108, 166912),
    "sm_86": DeviceLimits("sm_86", 84, 101376),
    "sm_89": DeviceLimits("sm_89", 128, 101376),
    "sm_90": DeviceLimits("sm_90", 132, 232448),
    "sm_100": DeviceLimits("sm_100", 148, 232448),
    "sm_120": DeviceLimits("sm_120", 170, 101376),
    "gfx942": DeviceLimits("gfx942", 304, 65536),
}


@pytest.mark.parametrize("limits", DEVICES.values(), ids=list(DEVICES))
@pytest.mark.parametrize("heads", [1, 2, 5, 8, 10, 20])
@pytest.mark.parametrize("keys", [1, 64, 77, 96, 128, 129, 256, 1024])
def test_attention(limits, heads, keys):
    config = attention_config(heads, keys, limits)
    assert config.heads == config.num_warps, "one head per warp"
    assert config.sweeps == (1 if keys <= 128 else 2)
    assert config.sweeps == 2 or keys <= sum(config.block_n)
    assert config.block_m >= 16 and config.block_d >= 16, "the smallest tile of a tensor core"
    if limits.arch == "gfx942":
        assert config.heads <= 4


@pytest.mark.parametrize(("heads", "at_once"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (10, 4), (20, 4), (24, 8)])
def test_few_warps_are_idle(heads, at_once):
    assert attention_config(heads, 77, DEVICES["sm_80"]).heads == at_once


@pytest.mark.parametrize(
    ("size", "widths"),
    [(1, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (77, (64, 16)), (96, (64, 32)), (128, (128, 0)),
     (120, (128, 0)), (160, (128, 32))],
)  # fmt: skip
def test_two_widths_cover_with_little_waste(size, widths):
    assert two_widths(size) == widths


@pytest.mark.parametrize("n", [1, 64, 256, 512, 513, 4096])
def test_complete_is_one_launch_while_one_program_reads_the_map_fast_enough(n):
    assert complete_config(n, 77).one_launch == (n <= 512)
    assert complete_config(n, 3).block_t == 4


@pytest.mark.parametrize("cells", [1, 64, 100, 256, 1024])
def test_segment_holds_all_cells(cells):
    config = segment_config(cells)
    assert cells <= config.block_s <= max(64, 2 * cells)
    assert config.block_t * config.block_s <= 32 * 32 * config.num_warps, "at most 32 scores per thread"


@pytest.mark.parametrize("pixels", [1, 63, 256, 300, 4096, 4097, 16384])
def test_pixels_are_eight_a_thread(pixels):
    config = pixel_config(pixels)
    assert config.block_p == 8 * 32 * config.num_warps
    assert config.num_warps <= 16, "more than 512 threads leave each too few registers"
    assert config.block_p <= max(256, 2 * pixels - 1), "no block without a pixel"
    assert config.block_p >= min(pixels, 4096)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        segment_config(64).block_t = 1


def test_every_limit_of_attention_is_listed():
    q, k = torch.zeros(1, 2, 4, 600)[..., ::2], torch.zeros(1, 2, 2000, 600)[..., ::2]
    reasons = " ".join(attention_limits(q, k, None))
    for part in ("fp16 and bf16 only", "2000 keys", "head sizes beyond 160", "stride 1"):
        assert part in reasons
    assert attention_limits(q[..., :64].half().contiguous(), k[..., :64].half().contiguous()[:, :, :77], None) == []


def test_the_public_function_reports_the_limits():
    with pytest.raises(
        BackendError, match=r"CUDA device; the attention kernels compute products of fp16 and bf16 only"
    ):
        attention_map(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), backend="triton")


def test_auto_takes_torch_where_a_limit_is_exceeded(monkeypatch):
    monkeypatch.setattr(_launch, "_TRITON_INSTALLED", True)
    monkeypatch.setitem(_launch.KERNELS, "complete", print)
    assert choose_backend("complete", "auto", CUDA) == "triton"
    assert choose_backend("complete", "auto", CUDA, ["too large"]) == "torch"
    with pytest.raises(BackendError, match="too large"):
        choose_backend("complete", "triton", CUDA, ["too large"])


def test_limits_of_the_other_operators():
    s, c = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(2, 3, 4).mT
    assert len(complete_limits(s, c)) == 2 and complete_limits(s.float(), c.contiguous()) == []
    x = torch.zeros(1, 3, 4)
    assert segment_limits([x], [x[:, 0]], None, 4) == []
    assert len(segment_limits([x.double().mT] * 17, [x[:, 0]] * 17, None, 5000)) == 4
    assert guide_limits(x, 4) == [] and len(guide_limits(x.double(), 5000)) == 2
    x = torch.zeros(1, 1, 128, 128)
    assert pixel_limits(x) == []
    assert pixel_limits(x.double().expand(2, 3, 128, 128)) == [
        "the kernel computes in fp32, fp64 needs the torch implementation"
    ]
    assert pixel_limits(torch.zeros(1, 1, 128, 129)) == ["16512 pixels exceed 16384"]
