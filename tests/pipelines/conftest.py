"""What the tests of pipelines share: the two pipelines with a UNet, and the guard against near ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import Regions


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """A tiny Stable Diffusion and a tiny SDXL pipeline in fp64."""
    return tiny_sd_pipeline() if request.param == "sd" else tiny_sdxl_pipeline()


@pytest.fixture(autouse=True)
def regions_are_found_in_fp64(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Regions that a test finds are found in fp64, so that no processor's order of sums decides what it compares.

    A test that needs another dtype says why in `@pytest.mark.any_rounding(reason)`: what it asserts holds whichever
    token a cell falls to.
    """
    dtypes: set[torch.dtype] = set()
    make = Regions.__init__

    def watched(self: Regions, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        dtypes.add(self.rate.dtype)

    monkeypatch.setattr(Regions, "__init__", watched)
    yield
    if dtypes - {torch.float64} and request.node.get_closest_marker("any_rounding") is None:
        pytest.fail(
            f"regions were found in {sorted(map(str, dtypes))}: near ties of random weights are then decided by the "
            "order of sums; run in torch.float64, or say in @pytest.mark.any_rounding(reason) why nothing depends on it"
        )
