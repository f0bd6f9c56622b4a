"""Launch configurations are pure functions of sizes and device limits; what a kernel cannot take is a listed reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scfg_kernels import BackendError, _launch, attention_map, choose_backend
from scfg_kernels._launch import (
    AttentionConfig,
    DeviceLimits,
    FlashConfig,
    GuideConfig,
    PixelConfig,
    PropagateConfig,
    SegmentConfig,
    attention_config,
    attention_limits,
    flash_config,
    guide_config,
    guide_limits,
    head_widths,
    next_power_of_2,
    pixel_config,
    pixel_limits,
    propagate_config,
    resident_programs,
    segment_config,
    segment_limits,
    two_widths,
)
from scfg_kernels._triton import KERNELS
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


def config_of(limits=DEVICES["sm_80"], heads=8, keys=77, head_dim=64):
    return attention_config(heads, keys, head_dim, limits)


@every_device
@pytest.mark.parametrize("heads", [1, 2, 5, 8, 10, 20])
@pytest.mark.parametrize("keys", [1, 64, 77, 96])
def test_attention_in_one_sweep(limits, heads, keys):
    for head_dim in (40, 64, 160):
        config = config_of(limits, heads=heads, keys=keys, head_dim=head_dim)
        assert config.heads == config.num_warps, "one head per warp"
        assert keys <= sum(config.block_n)
        assert config.block_m >= 16 and config.block_d >= 16, "the smallest tile of a tensor core"
        assert config.num_stages == 1, "an asynchronous copy cannot be permuted"
        assert config.reasons(keys) == []
        if limits.arch == "gfx942":
            assert config.heads <= 4


@pytest.mark.parametrize(("heads", "at_once"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (10, 4), (20, 4), (24, 8)])
def test_few_warps_are_idle(heads, at_once):
    assert config_of(heads=heads).heads == at_once


def flash_of(limits=DEVICES["sm_80"], batch=2, heads=8, rows=256, head_dim=64, dtype=torch.float16):
    return flash_config(batch, heads, rows, rows, head_dim, dtype, limits)


@every_device
def test_attention_in_two_parts(limits):
    for head_dim, rows, dtype in ((64, 1024, torch.float16), (160, 256, torch.bfloat16), (80, 256, torch.float32)):
        config = flash_of(limits, rows=rows, head_dim=head_dim, dtype=dtype)
        assert config.block_m >= 16 * config.num_warps, "16 rows for a warp"
        assert min(config.block_m, config.block_n, config.map_n) >= 16
        ahead = dtype != torch.float32 and not (limits.arch.startswith("gfx") and head_dim > 96)
        assert (config.num_stages > 1) == ahead


def test_rows_are_many_where_programs_are():
    sd15 = flash_of(head_dim=160)
    assert (sd15.block_m, sd15.map_n, sd15.num_warps) == (64, 64, 4), "64 programs of the first part"
    sdxl = flash_of(heads=20, rows=1024)
    assert (sdxl.block_m, sdxl.map_n, sdxl.num_warps) == (128, 128, 8), "320 of the first, 128 of the second"
    assert flash_of(DEVICES["sm_90"], heads=20, rows=1024).map_n == 64, "128 tiles are not one for each of 132"
    assert flash_of(heads=20, rows=1024, head_dim=160).block_m == 64, "registers"


def test_propagate_takes_the_tiles_of_attention():
    config = propagate_config(2, 10, 4096, 77, 64, torch.float16, DEVICES["sm_80"])
    assert (config.block_m, config.block_n, config.num_warps, config.block_t) == (64, 32, 4, (64, 16))
    assert propagate_config(2, 10, 4096, 200, 64, torch.float16, DEVICES["sm_80"]).block_t == (128, 0)


@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_propagate_fits_the_registers_of_every_device(limits, dtype):
    config = propagate_config(2, 10, 4096, 77, 64, dtype, limits)
    few = limits.arch in ("sm_90", "sm_100", "sm_120") or dtype == torch.float32
    assert config.block_m == (32 if few else 64), "products of a warp, not of a warp group; registers on sm_120"
    assert config.num_warps == config.block_m // 16, "16 rows for a warp"
    assert config.map_n <= 32 and sum(config.block_t) == 80
    amd = limits.arch.startswith("gfx")
    assert (config.num_stages > 1) == (amd and dtype != torch.float32), "values copied ahead would be spilled on NVIDIA"
    assert config.precision == ("ieee" if amd else "tf32x3")
    assert config.reasons() == []


def test_products_of_fp32():
    assert flash_of(dtype=torch.float32).precision == "tf32x3"
    assert flash_of(DEVICES["gfx942"], dtype=torch.float32).precision == "ieee", "TF32 three times is NVIDIA's"


@pytest.mark.parametrize(
    ("size", "widths"),
    [(1, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (77, (64, 16)), (96, (64, 32)), (128, (128, 0)),
     (120, (128, 0)), (160, (128, 32))],
)  # fmt: skip
def test_two_widths_cover_with_little_waste(size, widths):
    assert two_widths(size) == widths


@pytest.mark.parametrize(
    ("size", "widths"), [(8, (16, 0)), (40, (64, 0)), (48, (32, 16)), (72, (64, 16)), (160, (128, 32))]
)
def test_widths_of_a_head_do_not_cut_sectors(size, widths):
    assert head_widths(size) == widths


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
    "attention": (
        AttentionConfig(3, 0, heads=2, block_m=8, block_n=(32, 16), block_d=24, precision="ieee"), (77,),
        ("num_stages=0", "num_warps=3", "block_m=8 is below", "block_d=24 is no", "does not cover 77 keys"),
    ),
    "flash": (
        FlashConfig(4, 2, block_m=48, block_n=8, map_n=0, precision="tf32x4"), (),
        ("block_m=48", "block_n=8 is below", "map_n=0 is no power", "map_n=0 is below", "'tf32x4' is unknown"),
    ),
    "propagate": (
        PropagateConfig(2, 1, block_m=32, block_n=32, map_n=24, block_t=(64, 8), precision="ieee"), (),
        ("map_n=24", "second width=8 is below"),
    ),
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
    q, s, p = torch.zeros(1, 2, 80, 16), torch.zeros(1, 80, 80), torch.zeros(1, 5, 64, 64)
    maps = [torch.zeros(1, 3, 256)], [torch.zeros(1, 256)], [16], 16, 16
    ids, scale = torch.zeros(1, 16, 16, dtype=torch.int64), torch.tensor(7.5)
    rates = (0.5, 2.0, 15.0)
    calls = {
        "attention": lambda: KERNELS["attention_map"](q, q, 1.0, config),
        "flash": lambda: KERNELS["self_attention_map"](q, q, q, 1.0, config),
        "propagate": lambda: KERNELS["propagate"](q, q, s, 1.0, config),
        "segment": lambda: KERNELS["segment"](*maps, 0.5, None, config),
        "guide": lambda: KERNELS["guide"](
            p, p, ids, ids > 0, scale, 3, 4, *rates, 0.5, "official", "conditional", 0.0, "foreground", config
        ),
        "pixels": lambda: KERNELS["guide_pixels"](p, p, scale, *rates[:2], "conditional", 0.0, config),
    }
    return calls[name]


@pytest.mark.parametrize("name", ["attention", "flash", "propagate", "segment", "guide", "pixels"])
def test_an_impossible_launch_cannot_be_forced(name):
    with recorded("sm_80") as launches, pytest.raises(BackendError, match=r"the forced \w+Config cannot run: .*;"):
        _forced(name)()
    assert launches == []


@pytest.mark.parametrize(("arch", "like"), [("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_87", "sm_86")])
def test_cards_of_one_family_are_alike(arch, like):
    other = dataclasses.replace(DEVICES[like], arch=arch)
    for choose in (
        lambda limits: flash_of(limits),
        lambda limits: propagate_config(2, 10, 4096, 77, 64, torch.float16, limits),
    ):
        assert choose(other) == choose(DEVICES[like])


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        segment_config(8, 8).block_t = 1


def test_every_limit_of_attention_is_listed():
    q = torch.zeros(1, 2, 4, 600, dtype=torch.float64)[..., ::2]
    k = torch.zeros(1, 2, 2000, 600, dtype=torch.float64)[..., ::2]
    reasons = " ".join(attention_limits(q, k, None))
    for part in ("computes in fp32", "2000 keys", "head sizes beyond 160", "stride 1"):
        assert part in reasons
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert (
            attention_limits(q[..., :64].to(dtype).contiguous(), k[:, :, :77, :64].to(dtype).contiguous(), None) == []
        )
    many = torch.zeros(1, 1, 1, 8).expand(65536, 1, 4, 8)
    assert attention_limits(many, many, None) == ["65536 samples exceed 65535"]
    wide = torch.zeros(1, 2, 4, 97)
    assert attention_limits(wide, wide, None) == ["head sizes beyond 96 in fp32 are not supported, got [97, 97]"]
    assert attention_limits(wide.half(), wide.half(), None) == []


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
