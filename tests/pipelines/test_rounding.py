"""The guard against near ties: it moves what another processor moves, it notices what that can turn over."""

from __future__ import annotations

import pytest
import torch

import scfg_fast
from lab.rounding import otherwise_rounded, relative
from lab.tiny.unets import tiny_sd_pipeline

pytest_plugins = ["pytester"]


def test_every_weight_is_one_rounding_away_and_comes_back() -> None:
    pipe = tiny_sd_pipeline()
    weights = [weight for part in (pipe.unet, pipe.vae, pipe.text_encoder) for weight in part.parameters()]
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(ZeroDivisionError), otherwise_rounded(pipe):
        for weight, kept in zip(weights, before, strict=True):
            up, down = (torch.nextafter(kept, torch.full_like(kept, end)) for end in (torch.inf, -torch.inf))
            assert bool(((weight == up) | (weight == down)).all())
        raise ZeroDivisionError
    assert all(torch.equal(weight, kept) for weight, kept in zip(weights, before, strict=True))


def test_nothing_to_move_is_an_error() -> None:
    with pytest.raises(ValueError, match="no owner has a weight"), otherwise_rounded(torch.nn.ReLU()):
        pass


def test_it_turns_a_near_tie_over() -> None:
    """Two tokens whose scores are one rounding apart: which of them owns the cell is left to the processor."""
    scores = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        scores.weight.copy_(torch.tensor([[1.0], [1.0 + torch.finfo(torch.float32).eps]]))
    owners = set()
    for seed in range(16):
        with otherwise_rounded(scores, seed=seed):
            owners.add(int(scores(torch.ones(1)).argmax()))
    assert owners == {0, 1}


def test_a_whole_run_in_fp64_moves_by_roundings_alone() -> None:
    """Far below every tolerance of the comparisons, for several choices of roundings."""
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe)

    def run() -> torch.Tensor:
        return pipe(
            "a red cat", generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="latent"
        )[0]

    expected = run()
    for seed in range(3):
        with otherwise_rounded(pipe, seed=seed):
            assert 0.0 < relative(run(), expected) < 1e-11


@pytest.mark.any_rounding("the guard itself is looked at")
@pytest.mark.parametrize(("dtype", "mark", "outcome"), [
    ("float64", "", dict(passed=1)), ("float32", "", dict(passed=1, errors=1)),
    ("float32", "@pytest.mark.any_rounding('one run')", dict(passed=1)),
], ids=["fp64", "fp32", "fp32 with a reason"])  # fmt: skip
def test_regions_of_fp32_are_refused_without_a_reason(
    pytester: pytest.Pytester, dtype: str, mark: str, outcome: dict[str, int]
) -> None:
    pytester.makeconftest("from tests.pipelines.conftest import regions_are_found_in_fp64")
    pytester.makeini("[pytest]\nmarkers = any_rounding(reason): see the suite's own")
    pytester.makepyfile(f"""
        import pytest
        import torch
        from scfg_fast import Regions

        {mark}
        def test_regions():
            cells = torch.zeros(1, 1, 1, dtype=torch.int64)
            Regions(0, cells, cells.bool(), torch.ones(1, 1, 4, 4, dtype=torch.{dtype}))
    """)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(**outcome)
