"""Launch configurations are pure functions of sizes and device limits; what a kernel cannot take is a listed reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scfg_kernels import BackendError, _launch, attention_map, choose_backend
from scfg_kernels._launch import (
    DeviceLimits,
    GuideConfig,
    PixelConfig,
    SegmentConfig,
    guide_config,
    guide_limits,
    next_power_of_2,
    pixel_config,
    pixel_limits,
    resident_programs,
    segment_config,
    segment_limits,
    two_widths,
)
from scfg_kernels._triton import KERNELS
from scfg_kernels._triton.attention_map import head_widths, lse_config, map_config
from scfg_kernels.attention_map import map_limits
from scfg_kernels.complete import complete_limits

from lab.ptxsim import recorded
from tests.kernels.cases import by_name

CUDA = torch.device("cuda")
DEVICES = {
    "sm_80": DeviceLimits("sm_80", 108, 166912),
    "sm_86": DeviceLimits("sm_86", 82, 101376),
    "sm_89": DeviceLimits("sm_89", 128, 101376),
    "sm_90": DeviceLimits("sm_90", 132, 232448),
    "sm_100": DeviceLimits("sm_100", 148, 232448),
    "sm_120": DeviceLimits("sm_120", 170, 101376),
    "gfx942": DeviceLimits("gfx942", 304, 65536),
    "gfx950": DeviceLimits("gfx950", 256, 163840),
}
"""Of the cards: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI300X, MI355X."""
every_device = pytest.mark.parametrize("limits", DEVICES.values(), ids=list(DEVICES))


def tiles_of(limits=DEVICES["sm_80"], samples=2, rows=1024, dim=64, dtype=torch.float16):
    return map_config(samples, [(rows, rows), (rows, 77)], dim, dtype, limits)


@every_device
@pytest.mark.parametrize("dim", [40, 64, 80, 160, 256, 512])
def test_tiles_of_maps_fit_every_device(limits, dim):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for config in (tiles_of(limits, dim=dim, dtype=dtype), lse_config(dim, dtype, limits)):
            staged = config.num_stages * (config.block_m + config.block_n) * sum(head_widths(dim)) * dtype.itemsize
            assert config.num_stages == 1 or staged <= min(limits.shared_memory, 96 * 1024)
            assert (config.chunk > 0) == (dtype == torch.float32), "fp32 operands are not held whole"
            assert config.precision == ("ieee" if limits.arch.startswith("gfx") else "tf32x3")


def test_tiles_are_large_where_there_are_programs_enough():
    small = [(config.block_m, config.block_n) for config in (tiles_of(rows=256, dim=160), tiles_of(rows=64))]
    assert small == [(32, 32)] * 2
    assert (tiles_of(samples=1).block_m, tiles_of(samples=1).block_n) == (128, 64), "144 of SDXL's conditional half"
    assert tiles_of(DEVICES["sm_120"], samples=1).block_m == 64, "on 170 multiprocessors"
    assert tiles_of(samples=32, rows=256, dim=160).block_m == 64, "registers"


@pytest.mark.parametrize(
    ("size", "widths"),
    [(1, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (77, (64, 16)), (96, (64, 32)), (128, (128, 0)),
     (120, (128, 0)), (160, (128, 32))],
)  # fmt: skip
def test_two_widths_cover_with_little_waste(size, widths):
    assert two_widths(size) == widths


@pytest.mark.parametrize(
    ("size", "widths"),
    [(8, (16, 0, 0)), (40, (64, 0, 0)), (48, (32, 16, 0)), (64, (64, 0, 0)), (72, (64, 16, 0)), (80, (64, 16, 0)),
     (96, (64, 32, 0)), (160, (128, 32, 0)), (300, (256, 64, 0)), (512, (512, 0, 0))],
)  # fmt: skip
def test_widths_of_a_head_do_not_cut_sectors(size, widths):
    assert head_widths(size) == widths


@pytest.mark.parametrize("size", range(1, 513))
def test_widths_cover_every_head(size):
    widths = head_widths(size)
    assert sum(widths) >= size and all(width == 0 or width == next_power_of_2(width) >= 16 for width in widths)
    assert sum(widths) <= max(64, 1.5 * size)


@pytest.mark.parametrize(
    ("h", "w", "tokens"), [(1, 1, 16), (8, 8, 16), (16, 16, 16), (13, 25, 16), (32, 32, 8), (64, 64, 2), (80, 48, 1)]
)
def test_segment_holds_all_cells(h, w, tokens):
    config = segment_config(h, w)
    assert config.reasons(h, w) == []
    assert h <= config.block_h < 2 * h and w <= config.block_w < 2 * w
    assert config.block_t == tokens
    assert config.block_t * config.block_h * config.block_w <= 32 * 32 * config.num_warps, "32 scores per thread"


@pytest.mark.parametrize(
    ("prediction", "cell", "itemsize", "held", "warps"),
    [
        ((4, 64, 64), 4, 2, True, 8),
        ((4, 64, 64), 4, 4, True, 16),
        ((4, 65, 97), 4, 2, False, 8),
        ((16, 64, 64), 4, 2, False, 8),
        ((4, 128, 128), 4, 2, False, 8),
        ((4, 256, 256), 4, 2, False, 8),
        ((4, 512, 256), 4, 2, False, 8),
        ((4, 64, 64), 1, 2, True, 8),
        ((4, 64, 96), 4, 2, False, 8),
        ((1, 64, 64), 4, 2, True, 8),
        ((1, 128, 128), 4, 2, False, 8),
        ((8, 64, 32), 4, 2, True, 8),
        ((4, 512, 512), 64, 2, False, 8),
        ((3, 1, 1), 4, 4, True, 16),
    ],
)
def test_guide_holds_predictions_of_64_values_a_thread(prediction, cell, itemsize, held, warps):
    config = guide_config(*prediction, cell, itemsize)
    assert (config.held, config.num_warps) == (held, warps)
    pixels = config.rows * config.lines * config.block_w * next_power_of_2(cell)
    if held:
        assert config.block_c >= prediction[0] and config.rows == config.block_h and config.lines >= cell
        assert max(4, config.block_c) * pixels <= 64 * 256
    else:
        assert config.block_c * pixels <= 32 * 32 * config.num_warps, "32 values of a prediction per thread"
        assert config.rows == 1 or config.lines >= cell, "several rows of cells only if they are whole"


@pytest.mark.parametrize(
    ("channels", "pixels", "itemsize", "held", "warps"),
    [
        (4, 4096, 2, True, 8),
        (4, 4096, 4, True, 16),
        (4, 16384, 2, False, 8),
        (16, 4096, 2, False, 8),
        (1, 1, 4, True, 16),
    ],
)
def test_pixels_are_held_up_to_64_values_a_thread(channels, pixels, itemsize, held, warps):
    config = pixel_config(channels, pixels, itemsize)
    assert (config.held, config.num_warps, config.block_c) == (held, warps, channels)
    values = config.block_c * config.block_p
    assert config.block_p >= pixels and max(4, channels) * config.block_p <= 64 * 256 if held else values == 8192


@every_device
@pytest.mark.parametrize(("channels", "side"), [(4, 64), (4, 128), (16, 128), (4, 256)])
@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_guidance_on_every_device(limits, channels, side, batch, itemsize):
    """Programs that share an image wait for one another, so all of them must be resident."""
    programs = resident_programs(batch, limits)
    assert batch * programs <= max(batch, limits.multiprocessors // 2)
    config = guide_config(channels, side, side, 4, itemsize, programs)
    cells = side // 4
    assert config.reasons(cells, cells, channels, 4, shared=True) == []
    parts = -(-cells // config.block_h)
    assert parts <= programs and (config.held or parts == 1)
    pixels = pixel_config(channels, side * side, itemsize, programs)
    assert pixels.reasons(channels) == []
    assert not pixels.held or -(-side * side // pixels.block_p) <= programs
    for held, tile in ((config, config.rows * config.lines * config.block_w * 4), (pixels, pixels.block_p)):
        assert held.block_c * tile <= (64 * 256 if held.held else 32 * 256), "values in the registers"


IMPOSSIBLE = {
    # name: (configuration, sizes, parts of every reason)
    "segment": (SegmentConfig(8, 1, block_t=3, block_h=16, block_w=8), (16, 16), ("block_t=3", "do not cover 16 x 16")),
    "guide": (
        GuideConfig(8, 1, 4, 8, 16, held=True, block_c=2, rows=4, lines=2), (16, 16, 4, 4),
        ("8 x 16 cells", "rows=4 of block_h=8", "4 channels and 4 lines"),
    ),
    "guide-in-tiles": (
        GuideConfig(8, 1, 4, 8, 16, held=False, block_c=3, rows=1, lines=4), (16, 16, 4, 4), ("block_c=3", "8 x 16"),
    ),
    "pixels": (PixelConfig(8, 1, True, 4, 100), (5,), ("block_p=100", "does not cover 5 channels")),
}  # fmt: skip


@pytest.mark.parametrize(("config", "sizes", "parts"), **by_name(IMPOSSIBLE))
def test_every_reason_against_a_configuration_is_listed(config, sizes, parts):
    reasons = config.reasons(*sizes)
    assert len(reasons) == len(parts)
    assert all(any(part in reason for reason in reasons) for part in parts)


def test_programs_share_an_image_only_where_they_can():
    part = GuideConfig(8, 1, 4, 8, 16, held=True, block_c=4, rows=8, lines=4)
    assert part.reasons(16, 16, 4, 4, shared=True) == [] != part.reasons(16, 16, 4, 4)


def _forced(name):
    """A launcher with the impossible configuration of this name, at small sizes."""
    config = IMPOSSIBLE[name][0]
    p = torch.zeros(1, 5, 64, 64)
    maps = [torch.zeros(1, 3, 256)], [torch.zeros(1, 256)], [16], 16, 16
    ids, scale = torch.zeros(1, 16, 16, dtype=torch.int64), torch.tensor(7.5)
    rates = (0.5, 2.0, 15.0)
    calls = {
        "segment": lambda: KERNELS["segment"](*maps, 0.5, None, config),
        "guide": lambda: KERNELS["guide"](
            p, p, ids, ids > 0, scale, 3, 4, *rates, 0.5, "official", "conditional", 0.0, "foreground", config
        ),
        "pixels": lambda: KERNELS["guide_pixels"](p, p, scale, *rates[:2], "conditional", 0.0, config),
    }
    return calls[name]


@pytest.mark.parametrize("name", ["segment", "guide", "pixels"])
def test_an_impossible_launch_cannot_be_forced(name):
    with recorded("sm_80") as launches, pytest.raises(BackendError, match=r"the forced \w+Config cannot run: .*;"):
        _forced(name)()
    assert launches == []


@pytest.mark.parametrize(("arch", "like"), [("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_87", "sm_86")])
def test_cards_of_one_family_are_alike(arch, like):
    other = dataclasses.replace(DEVICES[like], arch=arch)
    for choose in (lambda limits: tiles_of(limits),):
        assert choose(other) == choose(DEVICES[like])


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        segment_config(8, 8).block_t = 1


def test_every_limit_of_maps_is_listed():
    q = torch.zeros(1, 2, 4, 1200, dtype=torch.float64)[..., ::2]
    reasons = " ".join(map_limits(q, q))
    for part in ("computes in fp32", "head sizes beyond 512", "stride 1"):
        assert part in reasons
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.zeros(1, 1, 1, 8, dtype=dtype).expand(65536, 1, 5000, 8)
        assert map_limits(x, x) == [], "any number of samples, queries and keys"


def test_the_public_function_reports_the_limits():
    x = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"CUDA device; the kernel computes in fp32"):
        attention_map(x, x, backend="triton")


def test_auto_takes_torch_where_a_limit_is_exceeded(monkeypatch):
    monkeypatch.setattr(_launch, "_TRITON_INSTALLED", True)
    monkeypatch.setitem(_launch.KERNELS, "complete", print)
    assert choose_backend("complete", "auto", CUDA) == "triton"
    assert choose_backend("complete", "auto", CUDA, ["too large"]) == "torch"
    with pytest.raises(BackendError, match="too large"):
        choose_backend("complete", "triton", CUDA, ["too large"])


def test_limits_of_the_other_operators():
    s, c = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(2, 3, 4).mT
    assert len(complete_limits([s] * 193, [c] * 193)) == 2 and complete_limits([s.float()], [c]) == []
    x = torch.zeros(1, 3, 4)
    assert segment_limits([x] * 192, [x[:, 0]] * 192, None, 64, 128) == []
    assert len(segment_limits([x.double().mT] * 193, [x[:, 0]] * 193, None, 128, 65)) == 4
    assert len(segment_limits([x], [x[:, 0]], None, 4, 257)) == 1
    assert segment_limits([x], [x[:, :2]], None, 64, 64) == [] != segment_limits([x], [x[:, :2]], None, 64, 65)
    many = torch.zeros(1, 2**15, 1)
    assert segment_limits([many], [many[:, 0]], None, 1, 1) == ["32768 tokens exceed 32767"]
    x = torch.zeros(1, 1, 1, 1).expand(2, 257, 256, 512)
    assert guide_limits(x, x, 4) == [] == pixel_limits(x, x[:, :256])
    double = x[:, :4].double()
    assert len(guide_limits(double, double, 3)) == 2
    assert pixel_limits(double, double) == ["the kernel computes in fp32, fp64 needs the torch implementation"]
    assert pixel_limits(x, x) == ["257 channels exceed 256"]
    far = torch.empty_strided((1, 4, 1, 2), (2**33, 2**30, 2, 1), device="meta")
    spans = ["a sample of the predictions spans 2^31 elements or more"]
    assert (
        guide_limits(far, far, 4) == spans == pixel_limits(far, far) and guide_limits(far[:, :2], far[:, :2], 4) == []
    )
