"""Layer choice and grid sizes, against the shapes that real UNets have."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from lab.tiny.unets import tiny_unet
from scfg_fast import SCFGConfig
from scfg_fast.capture import BlockInfo, choose_layers, collect, grid_size
from scfg_fast.denoisers.unet import find_blocks

SD15 = dict(
    sample_size=64, block_out_channels=(32, 64, 64, 64), layers_per_block=2, cross_attention_dim=32,
    attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, norm_num_groups=8,
)  # fmt: skip
SDXL = dict(
    sample_size=128, block_out_channels=(32, 64, 64), layers_per_block=2, cross_attention_dim=32, attention_head_dim=8,
    transformer_layers_per_block=(1, 2, 10), norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def levels(config: dict) -> dict[int, int]:
    """Number of blocks at each downsampling factor, on a model without memory."""
    with torch.device("meta"):
        blocks = [info for info, _ in find_blocks(UNet2DConditionModel(**config))]
    return {level: sum(block.level == level for block in blocks) for level in sorted({b.level for b in blocks})}


def test_the_blocks_of_sd15() -> None:
    assert levels(SD15) == {1: 5, 2: 5, 4: 5, 8: 1}


def test_the_blocks_of_sdxl() -> None:
    assert levels(SDXL) == {2: 10, 4: 60}


def test_auto_takes_the_layers_of_the_published_code() -> None:
    with torch.device("meta"):
        blocks = [info for info, _ in find_blocks(UNet2DConditionModel(**SD15))]
    chosen = choose_layers(blocks, SCFGConfig())
    assert [block.level for block in chosen] == [4, 4, 8, 4, 4, 4]
    assert [block.name.split(".attentions")[0] for block in chosen] == ["down_blocks.2"] * 2 + ["mid_block"] + [
        "up_blocks.1"
    ] * 3


def test_names_find_their_modules() -> None:
    unet = tiny_unet()
    for info, module in find_blocks(unet):
        assert unet.get_submodule(info.name) is module


@pytest.mark.parametrize("height, width", [(4, 39), (5, 7), (9, 16), (13, 25), (17, 33), (37, 38)])
def test_grid_sizes_are_those_of_the_model(height: int, width: int) -> None:
    """Token counts of every captured layer of a real UNet, at sizes that are odd at several levels."""
    unet = tiny_unet()
    counts: dict[str, int] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=info.name: counts.update({name: args[0].shape[1]}))
        for info, module in find_blocks(unet)
    ]
    with torch.no_grad():
        unet(torch.zeros(1, 4, height, width), 0, torch.zeros(1, 5, 32))
    for hook in hooks:
        hook.remove()
    for info, _ in find_blocks(unet):
        h, w = grid_size(height, width, info.level)
        assert counts[info.name] == h * w


class Maps:
    def __init__(self, tokens, start) -> None:
        self.tokens, self.start = tokens, start


def test_collect_takes_what_fits_and_names_the_rest() -> None:
    good = Maps(torch.zeros(1, 3, 12), torch.zeros(1, 12))
    merged = Maps(torch.zeros(1, 3, 6), torch.zeros(1, 6))
    absent = Maps(None, None)
    infos = [BlockInfo(name, 4) for name in ("good", "merged", "absent")]
    maps = collect(list(zip(infos, (good, merged, absent), strict=True)), 16, 12, 4)
    assert (len(maps.tokens), maps.sizes, maps.size, maps.missing) == (1, [(4, 3)], (4, 3), ["merged", "absent"])
    assert maps.nbytes == (3 * 12 + 12) * 4
    assert good.tokens is None and merged.start is None, "maps must not outlive the step"
