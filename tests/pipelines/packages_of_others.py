"""The real DeepCache and tomesd, which the suite emulates; not collected by default.

pip install --no-deps DeepCache tomesd
python -m pytest tests/pipelines/packages_of_others.py
"""

from __future__ import annotations

import pytest
import tomesd
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DiffusionPipeline

import scfg_fast
from lab.rounding import relative
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import Regions, SCFGWarning
from tests.pipelines.test_coexistence import STEPS, run


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request) -> DiffusionPipeline:
    return tiny_sd_pipeline(uniform=True) if request.param == "sd" else tiny_sdxl_pipeline()


def test_deepcache(pipe) -> None:
    """Regions are kept in the steps that run the outer blocks alone; the rates follow; stock again at the end."""
    plain = run(pipe)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    cached = run(pipe)
    assert relative(cached, plain) > 1e-4
    helper.disable()
    seen: list[Regions] = []
    handle = scfg_fast.enable(pipe, on_regions=lambda step, regions: seen.append(regions.clone()))
    helper.enable()
    guided = run(pipe)
    helper.disable()
    assert handle.stats.steps_applied == STEPS and not handle.stats.steps_skipped
    assert relative(guided, cached) > 1e-4
    assert torch.equal(seen[0].token_index, seen[1].token_index)
    assert not torch.equal(seen[0].rate, seen[1].rate)
    assert not torch.equal(seen[1].token_index, seen[2].token_index)
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("max_downsample", [2, 8])
def test_tomesd(pipe, max_downsample: int) -> None:
    """Up to half the latent's size no captured layer is merged; at 8 all are, and plain guidance is left."""
    plain = run(pipe)
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=max_downsample, use_rand=False)
    merged = run(pipe)
    assert relative(merged, plain) > 1e-4
    handle = scfg_fast.enable(pipe)
    if max_downsample == 2:
        guided = run(pipe)
        assert handle.stats.steps_applied == STEPS and relative(guided, merged) > 1e-4
    else:
        with pytest.warns(SCFGWarning, match="no captured layer left a usable attention map"):
            assert torch.equal(run(pipe), merged)
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe), merged)
    tomesd.remove_patch(pipe)
    assert torch.equal(run(pipe), plain)
