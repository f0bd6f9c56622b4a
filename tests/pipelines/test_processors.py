"""Processors that users set, in a call and around it: what they do is what stock does, in captured layers too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

import scfg_fast
from lab.tiny.transformers import TINY
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import SCFGConfig

pytestmark = pytest.mark.filterwarnings("ignore:scfg_fast. this pipeline sets every guided token back")

OWN = AttnProcessor2_0()


def processors(model: torch.nn.Module) -> dict[str, Any]:
    """`attn_processors`, which not every transformer has."""
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def run(pipe: Any, **kwargs: Any) -> torch.Tensor:
    options = dict(num_inference_steps=3, guidance_scale=7.5, output_type="latent") | kwargs
    return pipe("a red cat", generator=torch.Generator().manual_seed(0), **options)[0]


class Bare:
    """Its objects can have no weak references."""

    __slots__ = ()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return OWN(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class Named:
    """Parameters with the names of our own."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        call=None,
        call_=2,
        inner=3,
    ):
        assert (call, call_, inner) == (None, 2, 3)
        return OWN(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class Weighted(torch.nn.Module):
    """A processor with weights, as those of IP-Adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return self.gain * OWN(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def everywhere(kind: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda pipe: pipe.unet.set_attn_processor({name: kind() for name in pipe.unet.attn_processors})


CHANGES: dict[str, Callable[[Any], None]] = {
    "eager": everywhere(AttnProcessor),
    "sliced": everywhere(lambda: SlicedAttnProcessor(1)),
    "slots": everywhere(Bare),
    "names": everywhere(Named),
    "weights": everywhere(Weighted),
    "default": lambda pipe: pipe.unet.set_default_attn_processor(),
    "slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "unload": lambda pipe: pipe.unload_ip_adapter(),
    "fuse": lambda pipe: pipe.fuse_qkv_projections(),
    "put back": lambda pipe: pipe.unet.set_attn_processor(dict(pipe.unet.attn_processors)),
}


@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sdxl_pipeline], ids=["sd", "sdxl"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "config",
    [SCFGConfig(), SCFGConfig(reuse_every=2), SCFGConfig(stop=0.5)],
    ids=["every step", "reused", "half the run"],
)
def test_what_a_callback_does_to_processors_is_what_it_does_in_stock(
    make: Any, change: str, config: SCFGConfig
) -> None:
    def trial(on: bool) -> tuple[dict[str, type], list[dict[str, type]]]:
        pipe, seen = make(), []
        if on:
            scfg_fast.enable(pipe, config, strict=True)

        def callback(pipe, index, timestep, tensors):
            if index == 0:
                CHANGES[change](pipe)
            seen.append({name: type(p) for name, p in pipe.unet.attn_processors.items()})
            return tensors

        run(pipe, callback_on_step_end=callback)
        scfg_fast.disable(pipe)
        found = {name: type(p) for name, p in pipe.unet.attn_processors.items()}
        run(pipe, num_inference_steps=1)
        return found, seen

    assert trial(True) == trial(False)


@pytest.mark.parametrize("change", ["slots", "names", "weights", "eager"])
def test_processors_set_in_a_call_compute_the_output_of_captured_layers(change: str) -> None:
    """These compute what the default computes: the picture is the same to rounding."""
    pipe = tiny_sd_pipeline().to(torch.float64)
    scfg_fast.enable(pipe, strict=True)
    expected = run(pipe)

    def callback(pipe, index, timestep, tensors):
        if index == 0:
            CHANGES[change](pipe)
            pipe.unet.to(torch.float64)
        return tensors

    torch.testing.assert_close(run(pipe, callback_on_step_end=callback), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_between_evaluations_transformers_have_their_own_processors(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.pipeline()
    before = processors(pipe.transformer)
    between: list[bool] = []
    scheduler_step = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        between.append(processors(pipe.transformer) == before)
        return scheduler_step(*args, **kwargs)

    pipe.scheduler.step = step
    handle = scfg_fast.enable(pipe)
    pipe(**tiny.call([0]))
    assert handle.stats.steps_applied > 0 and between and all(between)


@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sdxl_pipeline], ids=["sd", "sdxl"])
def test_processor_classes_that_are_made_per_request_are_collected(make: Any) -> None:
    pipe, seen = make(), []
    scfg_fast.enable(pipe)

    def request() -> None:
        scale = torch.ones(())

        class Regional:
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
                return scale * OWN(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

        seen.append(weakref.ref(Regional))
        pipe.unet.set_attn_processor(Regional())
        run(pipe, num_inference_steps=1)
        pipe.unet.set_attn_processor(AttnProcessor2_0())

    for _ in range(3):
        request()
    gc.collect()
    assert [reference() for reference in seen] == [None] * 3


def test_an_evaluation_that_fails_and_is_caught_leaves_stock_processors() -> None:
    """A callback may call the denoiser and catch what it raises."""
    pipe = tiny_sd_pipeline()
    before = dict(pipe.unet.attn_processors)
    scfg_fast.enable(pipe)

    class Stop(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Stop

    hook = pipe.unet.mid_block.register_forward_hook(fail)
    with pytest.raises(Stop):
        run(pipe)
    hook.remove()
    assert pipe.unet.attn_processors == before
    run(pipe)
    assert pipe.unet.attn_processors == before
