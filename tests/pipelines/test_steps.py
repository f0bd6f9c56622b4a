"""Whose evaluation of the denoiser is whose: callbacks, users' code that sees the batch, layers with others' keys."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

import scfg_fast
from lab.tiny.transformers import TINY
from scfg_fast import SCFGConfig, SCFGWarning
from scfg_fast.denoisers.install import can_halve
from scfg_fast.guidance import WeightSchedule
from tests.pipelines.test_calls import CALLS, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:scfg_fast. this pipeline sets every guided token back"),
    pytest.mark.any_rounding("a run is compared with itself, bit for bit, or regions alone are counted"),
]


@pytest.mark.parametrize("name", CALLS)
def test_an_evaluation_in_a_callback_changes_nothing_and_is_stock(name: str) -> None:
    case = Case(name)
    denoiser = getattr(case.pipe, "unet", None) or case.pipe.transformer
    last: list[tuple[tuple, dict]] = []
    seen: list[Any] = []
    inside = []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if not inside:
            last[:] = [(args, {key: list(v) if isinstance(v, list) else v for key, v in kwargs.items()})]

    def look_ahead(*args: Any, **kwargs: Any) -> Any:
        inside.append(True)
        processors = [module.processor for module in denoiser.modules() if hasattr(module, "processor")]
        with torch.no_grad():
            denoiser(*last[0][0], **last[0][1])
        seen.append(not any(type(processor).__module__.startswith("scfg_fast") for processor in processors))
        inside.clear()
        return args[3] if len(args) > 3 else None

    new = "callback_on_step_end" in inspect.signature(case.stock.__call__).parameters
    handle = scfg_fast.enable(case.pipe)
    expected, before = case.run(), (handle.stats.steps_applied, handle.stats.samples, handle.stats.weights)
    hook = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    actual = case.run(**{"callback_on_step_end" if new else "callback": look_ahead})
    hook.remove()
    assert seen and all(seen) and torch.equal(actual, expected)
    assert (handle.stats.steps_applied, handle.stats.samples, handle.stats.weights) == before


class ConditionalHalf:
    """Changes the conditional half alone, as attention control does."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        uncond, cond = out.chunk(2)
        return torch.cat([uncond, 1.1 * cond])


def foreign_processor(unet: torch.nn.Module) -> None:
    name = next(iter(unet.attn_processors))
    unet.set_attn_processor({**unet.attn_processors, name: ConditionalHalf()})


def recorder(unet: torch.nn.Module) -> None:
    unet.mid_block.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [foreign_processor, recorder])
def test_the_batch_stays_whole_where_the_users_code_sees_it(pipe, change) -> None:
    """In a captured layer or in any other: an interval then saves nothing, and changes nothing."""
    assert can_halve(pipe.unet, {}) and not can_halve(pipe.unet, {"cross_attention_kwargs": {"scale": 0.5}})
    change(pipe.unet)
    assert not can_halve(pipe.unet, {})
    runs = []
    for half_batch in (True, False):
        schedule = WeightSchedule(interval=(0.2, 0.8), half_batch=half_batch)
        handle = scfg_fast.enable(pipe, SCFGConfig(rates="none"), schedule=schedule)
        generator = torch.Generator().manual_seed(0)
        runs.append(pipe("a cat", num_inference_steps=5, output_type="latent", generator=generator).images)
        assert handle.stats.samples == 2 * 5 and 1.0 in handle.stats.weights
    assert torch.equal(*runs)


@pytest.mark.parametrize("everywhere", [True, False], ids=["all layers", "one layer"])
def test_self_attention_with_other_images_keys_is_left_out(pipe, everywhere: bool) -> None:
    names = list(scfg_fast.supports(pipe).layers)
    for name in names if everywhere else names[:1]:
        attn = pipe.unet.get_submodule(name).attn1

        def forward(x, encoder_hidden_states=None, own=attn.forward, **kwargs):
            return own(x, encoder_hidden_states=torch.cat([x, x.flip(1)], 1), **kwargs)

        attn.forward = forward
    handle = scfg_fast.enable(pipe)
    message = "no captured layer left" if everywhere else f"{names[0]}.*left no usable attention map"
    with pytest.warns(SCFGWarning, match=message) as caught:
        pipe("a cat", num_inference_steps=2, output_type="latent")
    assert len(caught) == 1 and handle.stats.steps_applied == (0 if everywhere else 2)


@pytest.mark.parametrize(
    "name", [name for name, tiny in TINY.items() if "attn1" in tiny.layers and len(tiny.layers) > 1]
)
def test_foreign_keys_in_transformers(name: str) -> None:
    """A block whose self-attention looks at other images leaves no map that nothing spreads in."""
    case = Case(name)
    handle = scfg_fast.enable(case.pipe)
    case.run()
    chosen = handle.stats.layers[0]
    attn = case.pipe.transformer.get_submodule(chosen).attn1
    own = attn.processor

    class Banked:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
            return own(attn, hidden_states, None, attention_mask, *args, **kwargs)

    attn.set_processor(Banked())
    forward = attn.forward

    def banked(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = args[0] if args else kwargs.pop("hidden_states")
        kwargs.pop("encoder_hidden_states", None)
        return forward(x, torch.cat([x, x], 1), *args[2:], **kwargs)

    attn.forward = banked
    with pytest.warns(SCFGWarning, match=f"{chosen}.*left no usable attention map"):
        case.run()
    assert handle.stats.steps_applied >= 1


class ImagePrompt(torch.nn.Module):
    """The last four states are an image prompt, with keys and values of their own, as in the first IP-Adapter."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.k, self.v = (torch.nn.Linear(text, width, bias=False) for _ in "kv")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text, image = encoder_hidden_states[:, :-4], encoder_hidden_states[:, -4:]
        heads = lambda x: x.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        query = heads(attn.to_q(hidden_states))
        pairs = ((attn.to_k(text), attn.to_v(text)), (self.k(image), self.v(image)))
        out = sum(F.scaled_dot_product_attention(query, heads(k), heads(v)) for k, v in pairs)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_an_image_prompt_at_the_end_of_the_text_owns_no_region(pipe) -> None:
    unet, dtype = pipe.unet, pipe.unet.dtype
    layers = {name: unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors}
    width = unet.config.cross_attention_dim
    unet.set_attn_processor({
        name: ImagePrompt(attn.to_q.out_features, width).to(dtype) if "attn2" in name else AttnProcessor2_0()
        for name, attn in layers.items()
    })  # fmt: skip
    encoded = pipe.encode_prompt("a red cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    image = 3 * torch.randn(1, 4, width, generator=torch.Generator().manual_seed(5), dtype=dtype)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    call = dict(zip(names, encoded, strict=False))
    call["prompt_embeds"] = torch.cat([call["prompt_embeds"], image], 1)
    call["negative_prompt_embeds"] = torch.cat([call["negative_prompt_embeds"], 0 * image], 1)
    handle = scfg_fast.enable(pipe)
    pipe(**call, num_inference_steps=2, output_type="latent")
    assert handle.stats.steps_applied == 2 and int(handle.regions.token_index.max()) < 77
