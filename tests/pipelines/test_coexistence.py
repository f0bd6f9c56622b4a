"""What people combine a pipeline with: attention code, adapters, offloading, casting, caching, merging, CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models import attention_processor
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode

import scfg_fast
from lab.measure import IMPLEMENTATIONS
from lab.reference.replaced import replaced_run
from lab.rounding import otherwise_rounded, relative
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import Regions, SCFGWarning

STEPS = 4
TOLERANCE = 5e-6


def arguments(**overrides: Any) -> dict[str, Any]:
    common = dict(
        prompt=["a red cat on the grass", "a blue boat"],
        negative_prompt=["a car", "the sky"],
        generator=[torch.Generator().manual_seed(20 + i) for i in range(2)],
        num_inference_steps=STEPS,
        guidance_scale=6.0,
        output_type="latent",
    )
    return common | overrides


def run(pipe: DiffusionPipeline, **overrides: Any) -> torch.Tensor:
    return pipe(**arguments(**overrides)).images


def factors(pipe: DiffusionPipeline) -> tuple[int, ...]:
    return (4,) if "XL" in type(pipe).__name__ else (4, 8)


def assert_the_published_method(pipe: DiffusionPipeline, **overrides: Any) -> None:
    """Ours against the pipeline's own call with the guidance line replaced; stock again afterwards, to the bit."""
    plain = run(pipe, **overrides)
    with otherwise_rounded(pipe):
        expected = replaced_run(pipe, arguments(**overrides), observe=True, factors=factors(pipe)).images
    handle = scfg_fast.enable(pipe)
    actual = run(pipe, **overrides)
    assert handle.stats.steps_applied == STEPS and not handle.stats.steps_skipped
    assert relative(actual, expected) < TOLERANCE
    assert relative(plain, expected) > 100 * TOLERANCE
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe, **overrides), plain)


# Who computes the attention


def xformers_in_torch(query, key, value, attn_bias=None, op=None, scale=None):
    """`xformers.ops.memory_efficient_attention` for [B, N, d], on any device."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=scale)


def test_xformers(pipe, monkeypatch) -> None:
    """Its processor, its operator computed by torch: the output is the processor's, the maps come from beside it."""
    emulated = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=xformers_in_torch))
    monkeypatch.setattr(attention_processor, "xformers", emulated)
    pipe.unet.set_attn_processor(XFormersAttnProcessor())
    assert_the_published_method(pipe)


def test_xformers_where_it_cannot_run(pipe) -> None:
    """Not installed, or without a GPU: its own error, its own processor, and a stock pipeline afterwards."""
    plain, stock, theirs = run(pipe), dict(pipe.unet.attn_processors), XFormersAttnProcessor()
    pipe.unet.set_attn_processor(theirs)
    errors = (AttributeError, NotImplementedError)  # without the package; with it, on a CPU
    with pytest.raises(errors) as expected:
        run(pipe)
    scfg_fast.enable(pipe)
    with pytest.raises(type(expected.value)) as actual:
        run(pipe)
    assert str(actual.value) == str(expected.value)
    assert all(processor is theirs for processor in pipe.unet.attn_processors.values())
    pipe.unet.set_attn_processor(stock)
    with scfg_fast.disabled(pipe):
        assert torch.equal(run(pipe), plain)


class DispatchedAttnProcessor:
    """Attention through diffusers' dispatcher, which `set_attention_backend` speaks to."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = lambda x: x.unflatten(-1, (attn.heads, -1))  # noqa: E731
        query, key, value = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        self.asked.add(AttentionBackendName(self._attention_backend).value)
        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


@pytest.fixture
def native_backend_afterwards(pipe):
    """The dispatcher's choice is global: put it back."""
    yield
    pipe.unet.set_attention_backend("native")


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(pipe, native_backend_afterwards, backend: str) -> None:
    processor = DispatchedAttnProcessor()
    pipe.unet.set_attn_processor(processor)
    pipe.unet.set_attention_backend(backend)
    assert_the_published_method(pipe)
    assert processor.asked == {backend}


def outcomes(pipe: DiffusionPipeline) -> dict[str, str]:
    """What `set_attention_backend` says to every name that it knows: an error, or the processors that took it."""
    said = {}
    for backend in AttentionBackendName:
        try:
            pipe.unet.set_attention_backend(backend.value)
            took = [getattr(p, "_attention_backend", None) for p in pipe.unet.attn_processors.values()]
            said[backend.value] = f"accepted by {sum(name is not None for name in took)} layers"
        except (RuntimeError, ValueError) as error:
            said[backend.value] = f"{type(error).__name__}: {error}"
    return said


def test_names_of_attention_backends(pipe, native_backend_afterwards) -> None:
    """Sage, flash and all others: the same answers as of a stock pipeline; UNet's own processors heed none of them."""
    plain, expected = run(pipe), outcomes(pipe)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    assert {"sage", "flash", "xformers", "native"} <= set(expected)
    assert outcomes(pipe) == expected and expected["native"] == "accepted by 0 layers"
    assert torch.equal(run(pipe), guided)
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe), plain)


def test_a_replaced_scaled_dot_product_attention(pipe, monkeypatch) -> None:
    """How SageAttention is put into Stable Diffusion: it computes the output of all layers, captured or not."""
    exact, calls = F.scaled_dot_product_attention, []

    def approximate(query, key, value, *args, **kwargs):
        calls.append(query.shape)
        return exact(0.97 * query, key, value, *args, **kwargs)

    before = run(pipe)
    monkeypatch.setattr(F, "scaled_dot_product_attention", approximate)
    assert relative(run(pipe), before) > 1e-4
    calls.clear()
    scfg_fast.enable(pipe)
    run(pipe)
    assert len(calls) == STEPS * len(pipe.unet.attn_processors) + text_encoder_calls(pipe)
    scfg_fast.disable(pipe)
    assert_the_published_method(pipe)


def text_encoder_calls(pipe: DiffusionPipeline) -> int:
    """Attention layers that encoding the two prompts runs."""
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    return 2 * sum(encoder.config.num_hidden_layers for encoder in encoders if encoder is not None)


# Adapters


def add_lora(pipe: DiffusionPipeline) -> None:
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(config)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_lora(pipe, fused: bool) -> None:
    base = run(pipe)
    add_lora(pipe)
    if fused:
        pipe.unet.fuse_lora()
    assert relative(run(pipe), base) > 1e-3
    assert_the_published_method(pipe)


@pytest.fixture(params=["sd", "sdxl"])
def ip_pipe(request) -> DiffusionPipeline:
    """Image prompt adapters need one number of layers for all blocks."""
    return tiny_sd_pipeline(uniform=True) if request.param == "sd" else tiny_sdxl_pipeline()


def ip_adapter_weights(pipe: DiffusionPipeline, width: int = 24) -> dict[str, dict[str, torch.Tensor]]:
    """An image prompt adapter with four tokens for this UNet, as its files hold it."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator) * shape[-1] ** -0.5  # noqa: E731
    cross = pipe.unet.config.cross_attention_dim
    layers = {}
    index = 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            layers[f"{index}.to_k_ip.weight"] = draw(hidden, cross)
            layers[f"{index}.to_v_ip.weight"] = draw(hidden, cross)
            index += 2
    projection = {
        "proj.weight": draw(4 * cross, width), "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.mark.parametrize("masked", [False, True], ids=["whole picture", "masks"])
def test_ip_adapter(ip_pipe, masked: bool) -> None:
    pipe = ip_pipe
    base = run(pipe)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe)], low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(0.8)
    picture = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
    overrides: dict[str, Any] = {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(picture), picture])]}
    if masked:
        mask = torch.zeros(1, 1, 128, 128)
        mask[..., :64] = 1.0
        overrides["cross_attention_kwargs"] = {"ip_adapter_masks": [mask]}
    assert relative(run(pipe, **overrides), base) > 1e-3
    assert_the_published_method(pipe, **overrides)


def test_a_callback_that_cuts_the_image_prompt_off(ip_pipe) -> None:
    """diffusers' own callback finds the adapter's processors by class, while the capture stands in their place."""
    pipe = ip_pipe
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe)], low_cpu_mem_usage=False)
    picture = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
    embeds = [torch.cat([torch.zeros_like(picture), picture])]

    def cut(pipe, step, timestep, tensors):
        if step == 1:
            pipe.set_ip_adapter_scale(0.0)
        return tensors

    call = {"ip_adapter_image_embeds": embeds}
    scfg_fast.enable(pipe)
    pipe.set_ip_adapter_scale(0.8)
    kept = run(pipe, **call)
    assert relative(run(pipe, **call, callback_on_step_end=cut), kept) > 1e-4
    scales = [p.scale for name, p in pipe.unet.attn_processors.items() if name.endswith("attn2.processor")]
    assert all(scale == [0.0] for scale in scales)


def test_weights_of_an_adapter_are_free_once_it_is_unloaded(ip_pipe) -> None:
    pipe = ip_pipe
    stock = dict(pipe.unet.attn_processors)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe)], low_cpu_mem_usage=False)
    picture = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
    scfg_fast.enable(pipe)
    run(pipe, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(picture), picture])])
    name = next(name for name in pipe.unet.attn_processors if name.endswith("attn2.processor"))
    weight = weakref.ref(pipe.unet.attn_processors[name].to_k_ip[0].weight)
    pipe.unet.encoder_hid_proj, pipe.unet.config.encoder_hid_dim_type = None, None
    pipe.unet.set_attn_processor(stock)
    gc.collect()
    assert weight() is None


# Where the weights are


def test_fused_projections(pipe) -> None:
    pipe.fuse_qkv_projections()
    assert_the_published_method(pipe)


def test_sequential_offload() -> None:
    """Weights live on the meta device and arrive layer by layer; emulated with the CPU as the accelerator."""
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe)
    expected = run(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}
    handle = scfg_fast.enable(pipe)
    assert torch.equal(run(pipe), expected) and handle.stats.steps_applied == STEPS


def test_model_offload_that_comes_and_goes_with_the_call() -> None:
    """diffusers removes and adds the offload hook at the end of every call; ours is not in its way."""
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe)
    expected = run(pipe)
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    assert torch.equal(run(pipe), expected)
    hook.remove()
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind: str) -> None:
    pipe = tiny_sd_pipeline()
    scfg_fast.enable(pipe)
    expected = run(pipe)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks)
    handle = scfg_fast.enable(pipe)
    assert torch.equal(run(pipe), expected) and handle.stats.steps_applied == STEPS


def test_layerwise_casting_to_fp8() -> None:
    """Weights are stored in 8 bits and cast for each layer; the maps come from the cast ones."""
    pipe = tiny_sd_pipeline()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float64)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.unet.parameters()}
    assert_the_published_method(pipe)


# Layers that are skipped or merged


def test_a_cache_that_skips_the_deep_blocks(pipe) -> None:
    """DeepCache runs the outer layers alone in two of three steps: regions are kept, rates follow every step."""
    cache: dict[str, Any] = {}
    step = {"index": -1}
    outer = pipe.unet.register_forward_pre_hook(lambda *_: step.update(index=step["index"] + 1))
    block = pipe.unet.down_blocks[2]
    middle, up = pipe.unet.mid_block, pipe.unet.up_blocks[1]
    originals = {module: module.forward for module in (block, middle, up)}

    def cached(module: torch.nn.Module):
        def forward(*args, **kwargs):
            if step["index"] % 3 == 0:
                cache[module] = originals[module](*args, **kwargs)
            return cache[module]

        return forward

    for module in originals:
        module.forward = cached(module)
    seen: list[Regions] = []
    handle = scfg_fast.enable(pipe, on_regions=lambda step, regions: seen.append(regions.clone()))
    run(pipe)
    outer.remove()
    assert handle.stats.steps_applied == STEPS
    assert all(torch.equal(regions.token_index, seen[0].token_index) for regions in seen[:3])
    assert not torch.equal(seen[0].rate, seen[1].rate)


def test_merged_tokens_leave_their_layer_out() -> None:
    """Token merging attends among half of the tokens: that map has no place in the picture, the others do."""
    pipe = tiny_sd_pipeline()
    name = "down_blocks.2.attentions.0.transformer_blocks.0"
    block = pipe.unet.get_submodule(name)
    assert isinstance(block, BasicTransformerBlock)
    attend = block.attn1.forward

    def merged(hidden_states, **kwargs):
        out = attend(hidden_states[:, ::2], **kwargs)
        return out.repeat_interleave(2, 1)[:, : hidden_states.shape[1]]

    block.attn1.forward = merged
    handle = scfg_fast.enable(pipe)
    with pytest.warns(SCFGWarning, match=f"{name}.*left no usable attention map") as caught:
        run(pipe)
    assert len(caught) == 1 and handle.stats.steps_applied == STEPS


# CUDA graphs: what a step must not do to be captured in one


READS_BACK = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique")
"""Operators that wait for the device, or whose result has a size that depends on the data."""


class StepTrace(TorchDispatchMode):
    """What every step dispatches, from the denoiser's call to the scheduler's: names, shapes, dtypes, in order.

    Operators of `scfg_kernels` run their torch implementation in plain sight.
    """

    def __init__(self, pipe: DiffusionPipeline, monkeypatch) -> None:
        super().__init__()
        self.steps: list[list[tuple]] = []
        self._inside = False
        step = pipe.scheduler.step

        def leave(*args, **kwargs):
            self._inside = False
            return step(*args, **kwargs)

        monkeypatch.setattr(pipe.scheduler, "step", leave)
        self._hook = pipe.unet.register_forward_pre_hook(self._enter)  # before ours, which come with the call

    def _enter(self, module: torch.nn.Module, args: tuple) -> None:
        self._inside = True
        self.steps.append([])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if self._inside:
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.steps[-1].append((name, tuple((tuple(x.shape), x.dtype) for x in tensors)))
            if name in IMPLEMENTATIONS:
                with self:
                    return IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def traced(pipe: DiffusionPipeline, monkeypatch, **overrides: Any) -> list[list[tuple]]:
    with monkeypatch.context() as patch, StepTrace(pipe, patch) as trace:
        run(pipe, **overrides)
    trace._hook.remove()
    return trace.steps


def test_a_step_reads_nothing_back_and_does_the_same_whatever_the_data(pipe, monkeypatch) -> None:
    """Same operators on the same shapes in every step and for every prompt, and none that waits for the device."""
    scfg_fast.enable(pipe)
    run(pipe)  # what is made once, is made
    first = traced(pipe, monkeypatch)
    other = traced(
        pipe, monkeypatch, prompt=["", "a house"], negative_prompt=["a dog and a cat", "red"],
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    )  # fmt: skip
    names = {name.partition("::")[2].rstrip("_") for step in first for name, _ in step}
    assert len(first) == STEPS and {"segment_and_guide", "complete", "argmax"} <= names
    assert names.isdisjoint(READS_BACK)
    assert first[0] == other[0], "the first step of a run also makes the guidance scale a tensor"
    assert all(step == first[1] for step in (*first[1:], *other[1:]))
