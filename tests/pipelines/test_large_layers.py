"""Large layers, which hold queries and keys and not their map: all else is as with a map."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from scfg_kernels.testing import Recorder, assert_as_accurate_as

import scfg_fast
from lab.reference.official import literal_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.capture import processors
from scfg_fast.capture.maps import BatchLayout
from scfg_fast.capture.processors import CrossAttentionCapture, SelfAttentionCapture, wrap_block

TOKENS = 1056
LAYOUTS = {
    "both": (BatchLayout(), 2),
    "conditional-foreground": (BatchLayout(foreground="conditional"), 2),
    "three-groups": (BatchLayout(groups=3), 3),
    "conditional-pass": (BatchLayout(branch="conditional"), 1),
    "unconditional-pass": (BatchLayout(branch="unconditional"), 1),
}


class Own(AttnProcessor):
    """A user's processor, of a class that the capture does not know."""


def block(dtype: torch.dtype = torch.float32) -> BasicTransformerBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval().to(dtype)
        with torch.no_grad():
            for attn in (made.attn1, made.attn2):
                attn.to_q.weight *= 2.5
                attn.to_k.weight *= 2.5
    return made


def install(module: BasicTransformerBlock) -> tuple[SelfAttentionCapture, CrossAttentionCapture]:
    """Capture processors in the block."""
    own, cross = wrap_block(module, SCFGConfig())
    module.attn1.processor, module.attn2.processor = own, cross
    return own, cross


def inputs(batch: int, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, *shape, generator=rng).to(dtype) for shape in ((tokens, 16), (77, 12)))


@torch.no_grad()
def captured(module: BasicTransformerBlock, layout: BatchLayout, batch: int):
    """The block's output, and what it left."""
    own, cross = install(module)
    cross.layout = layout
    states, text = inputs(batch, dtype=module.attn1.to_q.weight.dtype)
    out = module(states, encoder_hidden_states=text)
    assert own.held is None, "nothing is held after the cross-attention"
    return out, cross.tokens, cross.start


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor, Own])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_leaves_what_it_leaves_with_a_map(name: str, processor: type, monkeypatch) -> None:
    layout, groups = LAYOUTS[name]
    truth = {}
    for how, dtype in (("map", torch.float32), ("held", torch.float32), ("truth", torch.float64)):
        module = block(dtype=dtype)
        module.attn1.processor, module.attn2.processor = processor(), processor()
        with monkeypatch.context() as patch:
            if how != "held":
                patch.setattr(processors, "MAP_TOKENS", 2048)
            truth[how] = captured(module, layout, 2 * groups)
    out, tokens, start = truth["held"]
    assert torch.equal(out, truth["map"][0])
    for found, by_map, exact in zip((tokens, start), truth["map"][1:], truth["truth"][1:], strict=True):
        assert found.is_contiguous() and found.dtype == torch.float32
        assert_as_accurate_as(found, by_map, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_the_output_is_stock_and_what_is_held_are_the_layers_own_tensors(dtype: torch.dtype) -> None:
    module, (states, text) = block(dtype=dtype), inputs(2, dtype=dtype)
    stock = module(states, encoder_hidden_states=text)
    own, _ = install(module)
    projected: list[torch.Tensor] = []
    for projection in (module.attn1.to_q, module.attn1.to_k):
        projection.register_forward_hook(lambda _module, _args, out: projected.append(out))
    seen: list[Any] = []
    module.attn2.register_forward_pre_hook(lambda *_: seen.append(own.held))
    assert torch.equal(module(states, encoder_hidden_states=text), stock)
    (held,) = seen
    pair = held[:2]
    assert [x.shape for x in pair] == [(2, 2, TOKENS, 8)] * 2
    assert [x.untyped_storage().data_ptr() for x in pair] == [x.untyped_storage().data_ptr() for x in projected]


def seen_by(monkeypatch, operator: str) -> list[torch.Size]:
    """Shapes of the first operand of every call of an operator by the capture."""
    shapes: list[torch.Size] = []
    original = getattr(processors, operator)

    def call(first: torch.Tensor, *others: Any, **options: Any) -> Any:
        shapes.append(first.shape)
        return original(first, *others, **options)

    monkeypatch.setattr(processors, operator, call)
    return shapes


@torch.no_grad()
def test_up_to_1024_tokens_the_map_is_made(monkeypatch) -> None:
    made, without = seen_by(monkeypatch, "complete"), seen_by(monkeypatch, "complete_from_qk")
    module = block()
    install(module)
    for tokens in (1024, 1025):
        states, text = inputs(2, tokens)
        module(states, encoder_hidden_states=text)
    assert made == [(2, 1024, 1024)] and without == [(2, 2, 1025, 8)]


@pytest.mark.parametrize("tokens", [256, TOKENS])
@torch.no_grad()
def test_only_samples_that_are_used_are_compared(monkeypatch, tokens: int) -> None:
    """Without a negative prompt that is the conditional half alone."""
    seen = seen_by(monkeypatch, "attention_maps" if tokens == 256 else "complete_from_qk")
    module = block()
    _, cross = install(module)
    cross.layout = BatchLayout(foreground="conditional")
    states, text = inputs(4, tokens)
    module(states, encoder_hidden_states=text)
    assert seen == [(2, 2, tokens, 8)]
    assert cross.tokens.shape == (2, 77, tokens) and cross.start.shape == (2, tokens)


@torch.no_grad()
def test_masked_layers_hold_nothing() -> None:
    module, (states, text) = block(), inputs(2)
    mask = torch.zeros(2, 1, TOKENS).index_fill_(2, torch.arange(9), -1e4)
    stock = module(states, encoder_hidden_states=text, attention_mask=mask)
    own, cross = install(module)
    seen: list[Any] = []
    module.attn2.register_forward_pre_hook(lambda *_: seen.append(own.held))
    assert torch.equal(module(states, encoder_hidden_states=text, attention_mask=mask), stock)
    assert seen == [None] and cross.tokens is None and cross.start is None


@torch.no_grad()
def test_other_image_tokens_in_the_cross_attention_leave_nothing() -> None:
    """Token merging between the two layers: their maps do not fit together."""
    module, (states, text) = block(), inputs(2)
    own, cross = install(module)
    module.attn1(states)
    module.attn2(states[:, 1:], encoder_hidden_states=text)
    assert own.held is None and cross.tokens is None and cross.start is None


@torch.no_grad()
def test_a_block_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    module, (states, text) = block(), inputs(2)
    own, cross = install(module)
    out = module(states, encoder_hidden_states=text)
    expected = out, cross.tokens, cross.start
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(states, encoder_hidden_states=text), cross.tokens, cross.start
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert own.held is None
    torch._dynamo.reset()


# Whole pipelines: at 512x528 pixels the attention at latent / 2 has 32 x 33 tokens.

PROMPTS, NEGATIVES, STEPS = ["a red cat on the grass", "a blue boat"], ["", "a car"], 2
CONFIG = SCFGConfig(levels=[2, 4, 8])
SIZE = dict(height=512, width=528)


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd_pipeline(sample_size=32)


@pytest.fixture(autouse=True)
def stock_again(pipe):
    yield
    scfg_fast.disable(pipe)


def run(pipe, **options: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    options = dict(num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent", **SIZE) | options
    return pipe(PROMPTS, negative_prompt=NEGATIVES, generator=generators, **options).images


@pytest.mark.parametrize("map_tokens", [0, 8192], ids=["products", "maps"])
@pytest.mark.parametrize("fidelity", ["official", "paper"])
def test_the_published_method_at_a_size_that_holds_queries_and_keys(
    pipe, fidelity: str, map_tokens: int, monkeypatch
) -> None:
    monkeypatch.setattr(sys.modules["scfg_kernels.complete_from_qk"], "MAP_TOKENS", map_tokens)
    literal: dict[str, Any] = {}
    config = CONFIG
    if fidelity == "paper":
        config = SCFGConfig.paper(levels=[2, 4, 8])
        literal = dict(completion="paper", rate_min=None, rate_max=None, max_scale=None, sigma=0.0)
    with otherwise_rounded(pipe):
        expected, history = literal_run(
            pipe, PROMPTS, NEGATIVES, steps=STEPS, seeds=[0, 1], factors=(4, 8, 2), **SIZE, **literal
        )
    assert (32, 33) in history[0]["sizes"]
    plain = run(pipe)
    handle = scfg_fast.enable(pipe, config, strict=True)
    actual = run(pipe)
    assert handle.stats.steps_applied == STEPS and len(handle.stats.layers) == 7
    assert relative(actual, expected) < 1e-5  # as in test_parity
    assert relative(plain, expected) > 1e-3
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe), plain)


def test_maps_of_large_layers_are_made_one_sample_at_a_time(pipe) -> None:
    sizes = []
    for config in (None, CONFIG):
        if config is not None:
            scfg_fast.enable(pipe, config, strict=True)
        with Recorder() as recorder:
            run(pipe, num_inference_steps=1)
        sizes.append(recorder.largest.numel)
    assert sizes[0] < sizes[1] == TOKENS**2


@torch.no_grad()
def test_xformers_leaves_its_own_log_sum_exp(monkeypatch) -> None:
    """Its operator stood in: called as the stock processor calls it, with the layer's output and what it leaves."""
    calls: list[tuple[Any, ...]] = []

    def attention(query, key, value, attn_bias=None, op=None, scale=None):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)

    def with_lse(query, key, value, scale=None, op=None):
        calls.append((tuple(query.shape), op, scale))
        lse = (query @ key.mT * scale).logsumexp(-1)
        return attention(query, key, value, scale=scale), torch.nn.functional.pad(lse, (0, -lse.shape[1] % 32))[:, None]

    ops = SimpleNamespace(
        memory_efficient_attention=attention, memory_efficient_attention_forward_requires_grad=with_lse
    )
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops), raising=False)
    module, (states, text) = block(), inputs(2, 250)
    module.attn1.processor, module.attn2.processor = (
        XFormersAttnProcessor(("forward", "backward")), XFormersAttnProcessor(),
    )  # fmt: skip
    stock = module(states, encoder_hidden_states=text)
    _, cross = install(module)
    assert torch.equal(module(states, encoder_hidden_states=text), stock)
    scale = module.attn1.scale
    assert calls == [((4, 250, 8), "forward", scale), ((4, 250, 8), None, scale)]
    found = cross.tokens, cross.start
    module.attn1.processor, module.attn2.processor = AttnProcessor2_0(), AttnProcessor2_0()
    _, cross = install(module)
    module(states, encoder_hidden_states=text)
    torch.testing.assert_close(found, (cross.tokens, cross.start), rtol=1e-5, atol=1e-7)
