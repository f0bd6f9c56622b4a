"""The choice of layers: all of the levels, or one block of every transformer."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import scfg_fast
from lab.architectures import SD15_UNET, SDXL_UNET
from lab.tiny.unets import tiny_sdxl_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.capture import BlockInfo, choose_layers
from scfg_fast.denoisers.unet import find_blocks

ONE = SCFGConfig(layers="one-per-transformer")


def blocks_of(config: dict) -> list[BlockInfo]:
    with torch.device("meta"):
        return [info for info, _ in find_blocks(UNet2DConditionModel(**config))]


def test_one_block_of_every_transformer_of_sdxl() -> None:
    """Two on the way down, one in the middle, three on the way up, as many as Stable Diffusion 1.5 has."""
    blocks = blocks_of(SDXL_UNET)
    assert len(choose_layers(blocks, SCFGConfig())) == 60
    assert [info.name for info in choose_layers(blocks, ONE)] == [
        f"{stage}.transformer_blocks.5"
        for stage in (
            "down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0",
            "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "up_blocks.0.attentions.2",
        )
    ]  # fmt: skip


def test_levels_choose_among_them_too() -> None:
    chosen = choose_layers(blocks_of(SDXL_UNET), SCFGConfig(layers="one-per-transformer", levels=[2]))
    assert [info.level for info in chosen] == [2] * 5
    assert {info.name.rpartition(".")[2] for info in chosen} == {"1"}, "the later one of two middles"


def test_stable_diffusion_has_one_block_in_every_transformer() -> None:
    blocks = blocks_of(SD15_UNET)
    assert choose_layers(blocks, ONE) == choose_layers(blocks, SCFGConfig()) and len(choose_layers(blocks, ONE)) == 6


@pytest.mark.parametrize("layers", ["all", "auto", "one-per-transformer"])
def test_the_words_survive_saving(layers: str) -> None:
    assert SCFGConfig.from_json(SCFGConfig(layers=layers).to_json()).layers == layers


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers must be one of .*'one-per-transformer'.* got 'some'"):
        SCFGConfig(layers="some")


def run(pipe: StableDiffusionXLPipeline, **options) -> torch.Tensor:
    return pipe(
        "a red cat", negative_prompt="the sky", generator=torch.Generator().manual_seed(0), num_inference_steps=3,
        output_type="latent", **options,
    ).images  # fmt: skip


def test_the_words_on_a_pipeline() -> None:
    """They are the layers that they name: the same image as by name, fewer bytes, another image than all of them."""
    pipe = tiny_sdxl_pipeline()
    handle = scfg_fast.enable(pipe)
    auto, names, nbytes = run(pipe), handle.stats.layers, handle.stats.bytes
    assert torch.equal(run(pipe, scfg_kwargs={"layers": "all"}), auto) and handle.stats.layers == names
    one = run(pipe, scfg_kwargs={"layers": "one-per-transformer"})
    chosen = handle.stats.layers
    assert chosen == names[1::2] == tuple(scfg_fast.supports(pipe, ONE).layers)
    assert handle.stats.bytes == nbytes // 2
    assert not torch.equal(one, auto)
    assert torch.equal(run(pipe, scfg_kwargs={"layers": chosen}), one)
