"""The kernels agree with their twins on attention of the bundled model, and the comparison would see it if not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import scfg_fast
from benchmarks import agreement
from benchmarks.agreement import Row, Step
from benchmarks.guidance import SCALE, open_pipeline, pair
from scfg_fast.regions import Regions


@pytest.fixture(scope="module")
def taken() -> list[Step]:
    """The first and the last of two steps, one picture."""
    return agreement.steps(1, 2, (0, 1))


def test_the_operands_are_those_that_the_pipeline_captures(taken: list[Step]) -> None:
    """In the first step the latents are the same, so the regions are those that S-CFG finds."""
    pipe, seen = open_pipeline(), dict[int, Regions]()
    scfg_fast.enable(pipe, on_regions=seen.__setitem__)
    pipe(
        [pair(0).caption], num_inference_steps=2, guidance_scale=SCALE,
        generator=[torch.Generator().manual_seed(0)], output_type="latent",
    )  # fmt: skip
    found = agreement.chain(taken[0], "torch")
    assert torch.equal(found.ids, seen[0].token_index) and torch.equal(found.foreground, seen[0].foreground)
    assert [layer.size for layer in taken[0].layers] == [(16, 16)] + 4 * [(8, 8)] + 2 * [(16, 16)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_regions_are_equal_away_from_ties_and_noise_is_as_accurate(taken: list[Step], dtype: torch.dtype) -> None:
    twin, kernels = agreement.compare(taken[1:], [dtype], [80])
    assert (twin.by, kernels.by, kernels.cells) == ("torch", "sm_80", 256)
    assert kernels.ids_band <= agreement.BANDS[dtype] and kernels.foreground_band <= agreement.BANDS[dtype]
    assert kernels.in_ids_band <= 0.01 and kernels.in_foreground_band <= 0.01
    assert kernels.noise_rms_ratio <= 2.0 and kernels.noise_max_ratio <= 2.0
    assert kernels.given_regions_rms_ratio <= 2.0 and kernels.given_regions_max_ratio <= 2.0


def test_a_cell_that_differs_and_noise_that_is_off_are_seen(taken: list[Step]) -> None:
    step = taken[1]
    right, limits = agreement.chain(step, "torch"), agreement.margins(step.to(torch.float64))
    truth = agreement.chain(step.to(torch.float64), "torch")
    ids = right.ids.clone()
    ids[0, 3, 5] += 1
    wrong = replace(right, ids=ids, guided=right.guided + 1e-3 * right.guided.abs().max())
    row = agreement.measure("float32", "wrong", [wrong], [right], [limits], [truth], [truth.guided])
    assert (row.cells, row.same_ids, row.same_foreground) == (256, 1 - 1 / 256, 1.0)
    assert row.ids_band == float(limits.ids[0, 3, 5]) and row.in_ids_band >= 1 / 256
    assert row.maps_max < 1e-5
    assert row.noise_max == pytest.approx(1e-3, rel=1e-3) and row.noise_rms == pytest.approx(1e-3, rel=1e-3)


def test_the_table_has_a_line_per_row() -> None:
    row = Row("float16", "sm_80", 256, 0.999, 1.0, 2e-4, 0.002, 0.0, 0.0, *(6 * [1e-5]), *(6 * [1.5]))
    lines = agreement.table([row, row]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "99.9000% | 2.0e-04 | 0.200%" in lines[2]
