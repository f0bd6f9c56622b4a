"""torch.compile(unet, fullgraph=True) with the capture on: one graph, the same images, no growth from call to call."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import scfg_fast
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast.guidance import WeightSchedule


def run(pipe, **kwargs) -> torch.Tensor:
    options = dict(num_inference_steps=3, guidance_scale=7.5, output_type="latent") | kwargs
    return pipe("a red cat", generator=torch.Generator().manual_seed(0), **options).images


@pytest.fixture()
def compiled():
    """An enabled pipeline, its eager image, and the counter of the backend that its UNet is compiled with."""
    torch._dynamo.reset()
    pipe = tiny_sd_pipeline(sample_size=16)
    scfg_fast.enable(pipe)
    eager = run(pipe)
    counter = CompileCounterWithBackend("aot_eager")
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counter)
    yield pipe, eager, counter
    torch._dynamo.reset()


def test_the_compiled_denoiser_gives_the_same_image(compiled) -> None:
    pipe, eager, counter = compiled
    torch.testing.assert_close(run(pipe), eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    run(pipe)
    run(pipe, guidance_scale=5.0)
    assert counter.frame_count == 1, "another call or another scale must not compile again"


def test_switching_off_and_on_costs_one_graph_once(compiled) -> None:
    pipe, eager, counter = compiled
    run(pipe)
    plain = run(pipe, scfg_kwargs={"enabled": False})
    assert counter.frame_count == 2
    for _ in range(2):
        torch.testing.assert_close(run(pipe), eager, rtol=1e-5, atol=1e-5)
        assert torch.equal(run(pipe, scfg_kwargs={"enabled": False}), plain)
    assert counter.frame_count == 2


def test_enable_after_compile() -> None:
    torch._dynamo.reset()
    pipe = tiny_sd_pipeline(sample_size=16)
    scfg_fast.enable(pipe)
    eager = run(pipe)
    scfg_fast.disable(pipe)
    plain = run(pipe)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(pipe), plain, rtol=1e-5, atol=1e-5)
    scfg_fast.enable(pipe)
    torch.testing.assert_close(run(pipe), eager, rtol=1e-5, atol=1e-5)
    scfg_fast.disable(pipe)
    torch.testing.assert_close(run(pipe), plain, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_denoiser_compiled_in_place() -> None:
    """`unet.compile()` traces its hooks; S-CFG stays outside of the graph, and takes itself out at the end."""
    pipe = tiny_sd_pipeline(sample_size=16)
    scfg_fast.enable(pipe)
    expected = run(pipe)
    pipe.unet.compile(fullgraph=True, backend="eager")
    compiled_call = pipe.unet._compiled_call_impl
    handle = scfg_fast.enable(pipe, schedule=WeightSchedule(interval=(0.0, 0.5)))
    run(pipe)
    assert len(set(handle.stats.weights)) == 2 and handle.stats.samples == 2 * len(handle.stats.weights)
    handle.schedule = None
    torch.testing.assert_close(run(pipe), expected, rtol=1e-5, atol=1e-5)
    assert pipe.unet._compiled_call_impl is compiled_call
    scfg_fast.disable(pipe)


@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sdxl_pipeline], ids=["sd", "sdxl"])
def test_regional_compilation(make) -> None:
    """`compile_repeated_blocks`: one graph more, for captured layers of all sizes, however often it is toggled."""
    torch._dynamo.reset()
    pipe = make(sample_size=16)
    plain = run(pipe)
    scfg_fast.enable(pipe)
    eager = run(pipe)
    counter = CompileCounterWithBackend("eager")
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    with scfg_fast.disabled(pipe):
        torch.testing.assert_close(run(pipe), plain, rtol=1e-5, atol=1e-5)
    stock = counter.frame_count
    torch.testing.assert_close(run(pipe), eager, rtol=1e-5, atol=1e-5)
    graphs = counter.frame_count
    assert graphs - stock == 1
    for _ in range(2):
        torch.testing.assert_close(run(pipe), eager, rtol=1e-5, atol=1e-5)
        with scfg_fast.disabled(pipe):
            torch.testing.assert_close(run(pipe), plain, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == graphs
    scfg_fast.disable(pipe)
    torch.testing.assert_close(run(pipe), plain, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
