"""A pipeline's own `__call__` in which nothing but the guidance line is replaced, by the literal published method.

The strictest check of a drop-in: whatever else the pipeline does, the reference does too, because it is the same source
text. The attention maps come from `LiteralCaptureProcessor` in every layer.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from lab.reference.official import LiteralCaptureProcessor, LiteralStore, head_mean, literal_guidance

GUIDANCE_LINE = re.compile(
    r"noise_pred_uncond\s*\+ ((?:self\.)?guidance_scale) \* \(noise_pred_text - noise_pred_uncond\)"
)


def replace_guidance_line(function: Callable) -> Callable:
    """The same function, with `_guidance(self, noise_pred_uncond, noise_pred_text, scale)` for the guidance line.

    Raises:
        ValueError: the source has no such line, or more than one.
    """
    source = textwrap.dedent(inspect.getsource(function))
    source, count = GUIDANCE_LINE.subn(r"self._guidance(noise_pred_uncond, noise_pred_text, \1)", source)
    if count != 1:
        raise ValueError(f"{function.__qualname__} has {count} guidance lines, expected one")
    scope = dict(vars(sys.modules[function.__module__]))
    exec(compile(source, inspect.getsourcefile(function) or "<source>", "exec"), scope)
    return scope[function.__name__]


def observer(inner: Any, capture: LiteralCaptureProcessor) -> Any:
    """A processor that stores the literal map and leaves the output to `inner`, whatever that does.

    The map is of the text keys alone: image prompts bring keys of their own beside them.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        out = inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(hidden_states if text is None else text))
        probabilities = attn.get_attention_scores(query, key)
        capture.store.add("self" if text is None else "cross", head_mean(probabilities, attn.heads))
        return out

    __call__.__signature__ = inspect.signature(type(inner).__call__)  # type: ignore[attr-defined]
    return type("Observer", (), {"__call__": __call__})()


def replaced_run(pipe: Any, arguments: dict[str, Any], *, observe: bool = False, **options: Any) -> Any:
    """Call a copy of the pipeline whose guidance line is `literal_guidance`.

    Args:
        pipe: a stock pipeline with a UNet; left as it was.
        arguments: of the call.
        observe: keep the pipeline's own processors at work and store the maps beside them, for processors that do more
            than attention.
        options: keyword arguments of `literal_guidance`.
    """
    processor = LiteralCaptureProcessor(LiteralStore((1, 1)))

    def start_step(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        processor.store = LiteralStore((sample.shape[-2], sample.shape[-1]))

    def guidance(self, uncond: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
        store = processor.store
        return literal_guidance(store, torch.cat([uncond, cond]), float(scale), store.latent_hw, **options)[0]

    cls = type(pipe)
    perturbed = "_apply_perturbed_attention_guidance"
    method = perturbed if hasattr(cls, perturbed) else "__call__"
    namespace = {"_guidance": guidance, method: replace_guidance_line(getattr(cls, method))}
    reference = copy.copy(pipe)
    reference.__class__ = type(cls.__name__, (cls,), namespace)
    layers = [module for module in pipe.unet.modules() if isinstance(module, Attention)]
    originals = [dict(layer.__dict__) for layer in layers]
    hook = pipe.unet.register_forward_pre_hook(start_step, with_kwargs=True)
    try:
        for layer in layers:
            layer.__dict__["processor"] = observer(layer.processor, processor) if observe else processor
        return reference(**arguments)
    finally:
        hook.remove()
        for layer, before in zip(layers, originals, strict=True):
            layer.__dict__.pop("processor")
            layer.__dict__.update(before)
