"""The study of the layer choice, the block benchmark and the SDXL part of the overhead benchmark, on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import blocks, layers, overhead, report
from benchmarks.layers import ALL, METRICS, PLAIN, PREVIOUS, Capture, Compared
from lab.architectures import SD15_UNET, SDXL_UNET
from lab.measure import MIB
from lab.tiny.unets import tiny_sdxl_pipeline, tiny_sdxl_unet

SIZES = (("plain", 2), ("ours-all", 4), (overhead.CONTROL, 2))


@pytest.fixture(scope="module")
def compared() -> Compared:
    """Two steps of a tiny SDXL UNet, all layers among the choices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = tiny_sdxl_unet()
    stock = dict(unet.attn_processors)
    capture = Capture(unet)
    choices = {ALL: range(len(capture.infos)), **layers.stages(capture.infos)}
    result = Compared(capture.infos, choices, 7.5)
    generator = torch.Generator().manual_seed(0)
    conditions = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6)}
    states = torch.randn(2, 77, 64, generator=generator)
    with torch.no_grad(), capture:
        for timestep in (900, 500):
            latents = torch.randn(1, 4, 16, 16, generator=generator)
            prediction = unet(torch.cat([latents] * 2), timestep, states, added_cond_kwargs=conditions).sample
            result.step(capture.maps(16, 16), *prediction.chunk(2))
    assert all(unet.attn_processors[name] is processor for name, processor in stock.items())
    return result


def test_all_layers_differ_in_nothing_from_all_layers(compared: Compared) -> None:
    assert [compared.samples[ALL, metric] for metric in METRICS] == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


def test_fewer_layers_differ_and_keep_less(compared: Compared) -> None:
    one = [compared.samples["one-per-transformer", metric] for metric in METRICS]
    assert all(0.0 < value < 1.0 for value in one[0]) and all(value > 0.0 for value in one[2] + one[3])
    assert compared.kept["one-per-transformer"] == compared.kept[ALL] / 2
    assert compared.kept[ALL] == 8 * (77 + 1) * 16 * 4 / MIB
    assert len(compared.samples[PREVIOUS, "same_token"]) == 1 and len(compared.samples[PLAIN, "rate_difference"]) == 2


def test_the_study_is_written_and_read_back(compared: Compared, tmp_path: Path) -> None:
    result = report.Report({})
    layers.rows(result, "tiny", compared)
    table, _ = result.write(tmp_path / "layers-tiny", finished=True)
    assert {row.metric for row in report.read(table)} == {*METRICS, "kept"}
    assert "one-per-transformer" in layers.table(result)


def test_subsets_are_all_but_none_and_all(compared: Compared) -> None:
    assert len(layers.subsets(compared.blocks[:4])) == 2**4 - 2


def test_blocks_are_counted_and_timed() -> None:
    assert blocks.counts(SDXL_UNET) == {"all": 60, "one-per-transformer": 6}
    tiny = dict(SDXL_UNET, block_out_channels=(32, 64, 64), attention_head_dim=(1, 2, 2), sample_size=16)
    samples, allocated = blocks.measure(dict(tiny, cross_attention_dim=32), rounds=2)
    assert {len(values) for values in samples.values()} == {2} and min(map(min, samples.values())) >= 0.0
    assert set(allocated) == {"stock", "captured", "stock (again)"} and min(allocated.values()) > 0


def test_the_variants_of_sdxl() -> None:
    """At the size of the comparison ours and the literal port agree; one layer per transformer is another result."""
    subject = overhead.Subject("sdxl", 128, tiny_sdxl_pipeline())
    results = {name: subject.variant(name)() for name in (*overhead.VARIANTS, *overhead.ARCHITECTURES["sdxl"].variants)}
    assert overhead.check_agreement(results) == 0.0
    assert torch.equal(results["ours"], results["ours-all"])
    assert not torch.equal(results["ours"], results["ours-one-per-transformer"])


def test_random_unets_are_the_same_for_the_same_seed() -> None:
    small = dict(SD15_UNET, block_out_channels=(32, 32, 32, 32), cross_attention_dim=16, attention_head_dim=2)
    first, again, other = (overhead.random_unet(small, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])
    assert all(torch.isfinite(value).all() for value in first.values())


def test_metered_calls() -> None:
    call = overhead.Metered(lambda: torch.ones(1 << 18), memory=True)
    call()
    assert call.allocated == [1 << 20] and len(call.clock) == len(call.processor) == 1


def test_memory_of_metered_calls_is_written() -> None:
    result = report.Report({})
    calls = {name: overhead.Metered(lambda size=size: torch.ones(size << 18), memory=True) for name, size in SIZES}
    for call in calls.values():
        call()
    overhead.add_allocated(result, ("overhead/tiny", "overhead", "tiny", 1), calls, model=6 << 20)
    found = {(row.metric, row.provider): row.value for row in result.rows}
    assert found["peak_allocated", "plain"] == 2.0 and found["peak_allocated_ratio", "ours-all"] == 2.0
    assert found["peak_model_and_allocated_ratio", "ours-all"] == 10 / 8
    assert overhead.CONTROL not in {provider for _, provider in found}
