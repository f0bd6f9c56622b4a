"""One call of a pipeline -> what the hooks must know about it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..config import SCFGConfig
from ..denoisers.install import unwrap
from ..denoisers.registry import denoiser_of
from ..denoisers.unet import UNet
from ..guidance.characteristic import CharacteristicGuidance
from ..guidance.loss import LossGuidance
from ..guidance.steps import StepWeight
from ..step.context import CallContext
from ..step.rates import Given, GivenRates
from .checks import check_combination, check_corrections, check_inversion
from .families import Family, denoisers_of, family_of, scale_of, stock_class
from .interception import described


def tokenizer_of(pipe: DiffusionPipeline) -> Any:
    """The tokenizer whose tokens are the columns of the cross-attention maps; None if the pipeline has none.

    SDXL joins the states of its two text encoders by channel, so both tokenizers count the same columns; its refiner
    has only the second.
    """
    return getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)


def read_arguments(
    pipe: DiffusionPipeline, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call by name, as the pipeline of diffusers would get them.

    What a call takes as `**kwargs` counts as named. What it does not name has the default of the stock class.

    Returns:
        The arguments, or None if they do not fit the call.
    """
    try:
        bound = inspect.signature(described(call)).bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    stock = inspect.signature(described(cast(Any, stock_class(pipe)).__call__)).parameters.values()
    arguments = {p.name: p.default for p in stock if p.default is not p.empty}
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(bound.arguments[name])
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[name] = bound.arguments[name]
    return arguments


def names_a_prompt(pipe: DiffusionPipeline, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt, or its embeddings, can be read from the arguments of a call."""
    arguments = read_arguments(pipe, call, args, kwargs) or {}
    return any(arguments.get(name) is not None for name in ("prompt", "prompt_embeds"))


def read_call(
    pipe: Any,
    arguments: dict[str, Any],
    config: SCFGConfig,
    schedule: StepWeight | None = None,
    characteristic: CharacteristicGuidance | None = None,
    loss: LossGuidance | None = None,
    rates: Given | None = None,
    watcher: Any = None,
    watches_only: bool = False,
) -> CallContext | None:
    """What the hooks must know about one call.

    Args:
        pipe: a pipeline of one of `FAMILIES`.
        arguments: of its `__call__`, bound, with defaults.
        config: the configuration of this call.
        schedule: weight of each step, or None for `guidance_scale`.
        characteristic, loss: settings of Characteristic Guidance and of loss guidance, or None.
        rates: the user's, or None.
        watcher: what reads the maps (`scfg_fast.watch`), or None.
        watches_only: whether the predictions stay as they are.

    Returns:
        The context, or None if the call names no prompt (the pipeline's own check will say so).

    Raises:
        ValueError: `tokens="words"` or words without the prompt's text or without a tokenizer; or a word that is in no
            prompt; or the schedule does not work
            with this scheduler or with `eta`; or methods are combined that do not go together.
    """
    prompt = arguments.get("prompt")
    embeds: Any = arguments.get("prompt_embeds")
    if isinstance(prompt, str):
        prompts: list[str] | None = [prompt]
    elif isinstance(prompt, (list, tuple)):
        prompts = list(prompt)
    else:
        prompts = None
    if prompts is None and embeds is None:
        return None
    if schedule is not None:
        schedule.check(pipe.scheduler, eta=float(arguments.get("eta") or 0.0))
    if type(pipe.scheduler).__name__ == "DDIMExactInverseScheduler":
        check_inversion(config, schedule, characteristic, loss)
    family = cast(Family, family_of(pipe))
    check_combination(config, _guidance_rescale(pipe, arguments), schedule, characteristic, loss)
    check_corrections(pipe, family, arguments, schedule, characteristic, loss)
    per_prompt = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
    samples = len(prompts if prompts is not None else embeds) * per_prompt
    mask = None

    def word_rows(words: Sequence[str], what: str) -> torch.Tensor:
        text, tokenizer = _text_and_tokenizer(pipe, family, prompts, what, "Leave the words out")
        return word_tokens(tokenizer, text, words).repeat_interleave(per_prompt, 0).to(pipe._execution_device)

    if config.tokens == "words":
        text, tokenizer = _text_and_tokenizer(pipe, family, prompts, "tokens='words'", "Use tokens='all'")
        mask = word_mask(tokenizer, text).repeat_interleave(per_prompt, 0).to(pipe._execution_device)
    watched = None if watcher is None or not watcher.words else word_rows(watcher.words, "watch")
    if watcher is not None:
        watcher.begin(watched)
    given = None
    if isinstance(rates, Mapping):
        if config.rates != "regions":
            raise ValueError(f"scfg_fast: rates of words need regions, got SCFGConfig(rates={config.rates!r})")
        factors = torch.tensor([float(factor) for factor in rates.values()])
        rows = word_rows(tuple(rates), "rates of words")  # [B, W, T]
        given = GivenRates(None, torch.where(rows, factors[:, None].to(rows.device), 1.0).prod(1), config.max_scale)
    elif rates is not None:
        given = GivenRates(rates, None, config.max_scale)
    return CallContext(
        samples=samples,
        guidance_scale=functools.partial(scale_of(pipe), pipe, arguments),
        guidance_rescale=lambda: _guidance_rescale(pipe, arguments),
        num_steps=functools.partial(_num_steps, pipe, arguments),
        groups=lambda: 3 if getattr(pipe, "do_perturbed_attention_guidance", False) else 2,
        foreground=_foreground(pipe, family, arguments, config),
        token_mask=mask,
        schedule=schedule,
        scheduler=pipe.scheduler,
        characteristic=characteristic,
        loss=loss,
        decode=_decoder(pipe) if loss is not None and loss.space == "pixels" else None,
        two_pass=family.two_pass,
        rereads=not isinstance(denoiser_of(unwrap(denoisers_of(pipe)[0])), UNet),
        size=_packed_size(pipe, arguments) if family.packed else None,
        switch=family.switch,
        undone_by="" if watches_only else family.undone_by,
        rates=given,
        watcher=watcher,
        watches_only=watches_only,
    )


def _text_and_tokenizer(
    pipe: Any, family: Family, prompts: list[str] | None, what: str, instead: str
) -> tuple[list[str], Any]:
    """The prompts as the tokenizer gets them, and it.

    Raises:
        ValueError: there are none, with what was asked for and what to do instead.
    """
    tokenizer: Any = tokenizer_of(pipe) if family.denoisers == ("unet",) else None
    ends = (getattr(tokenizer, name, None) is not None for name in ("bos_token_id", "eos_token_id"))
    known = all(ends) and tokenizer.padding_side == "right"
    if prompts is None or not known:
        raise ValueError(
            f"scfg_fast: {what} needs the prompt's text and a tokenizer of CLIP's layout (start, words, end, padding), "
            f"and a UNet; this is {family.name}. {instead}"
        )
    if hasattr(pipe, "maybe_convert_prompt"):
        prompts = pipe.maybe_convert_prompt(prompts, tokenizer)  # textual inversion: one word, several tokens
    return prompts, tokenizer


def _packed_size(pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of latents that are packed in patches of 2 x 2: the picture's, in whole patches."""
    factor, default = 2 * pipe.vae_scale_factor, pipe.default_sample_size * pipe.vae_scale_factor
    height, width = (2 * (int(arguments.get(name) or default) // factor) for name in ("height", "width"))
    return height, width


def _decoder(pipe: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """x0 in latents [B, C, H, W] -> pictures [B, 3, 8H, 8W] in about [0, 1], unclamped and differentiable."""
    vae = pipe.vae
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        scaled = latents / vae.config.scaling_factor
        if mean is not None and deviation is not None:
            shape = (1, -1, 1, 1)
            scaled = scaled * scaled.new_tensor(deviation).view(shape) + scaled.new_tensor(mean).view(shape)
        scaled = scaled + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float() / 2.0 + 0.5

    return decode


def _guidance_rescale(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> float:
    """From the pipeline where it has the property, as callbacks may change it; some keep the bare argument; else 0."""
    rescale = getattr(pipe, "guidance_rescale", None)
    return float((arguments.get("guidance_rescale") if rescale is None else rescale) or 0.0)


def _num_steps(pipe: Any, arguments: dict[str, Any]) -> int:
    """Denoiser calls of this run. The adapter and IF pipelines do not publish the number; theirs is the scheduler's,
    cut."""
    published = getattr(pipe, "num_timesteps", None)
    if published is not None:
        return published
    count, end = len(pipe.scheduler.timesteps), arguments.get("denoising_end")
    if arguments.get("strength") is not None:  # image to image starts late
        count = min(int(count * arguments["strength"]), count)
    return max(1, round(count * end)) if isinstance(end, float) and 0.0 < end < 1.0 else count


def _foreground(pipe: DiffusionPipeline, family: Family, arguments: dict[str, Any], config: SCFGConfig) -> str:
    """Which half the foreground is read from; see `SCFGConfig.foreground`."""
    if config.foreground != "auto":
        return config.foreground
    if family.denoisers != ("unet",):
        denoiser = denoiser_of(unwrap(denoisers_of(pipe)[0]))
        return getattr(denoiser, "foreground", None) or "unconditional"
    if not getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        return "unconditional"
    embeds = arguments.get("negative_prompt_embeds")
    if embeds is not None:  # as `encode_prompt` gives them; read once, before the run
        return "unconditional" if bool(embeds.any()) else "conditional"
    return "conditional" if arguments.get("negative_prompt") is None else "unconditional"


def word_mask(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """[len(prompts), T] bool: the tokens of the prompt's own words. A prompt without words keeps all its tokens."""
    ids = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    position = torch.arange(ids.shape[1])
    end = (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    mask = (position > 0) & (position < end)
    return mask | ~mask.any(1, keepdim=True)


def word_tokens(tokenizer: Any, prompts: list[str], words: Sequence[str]) -> torch.Tensor:
    """[len(prompts), len(words), T] bool: the tokens that each word becomes, wherever it stands in a prompt.

    Raises:
        ValueError: a word stands in no prompt; lists all of them.
    """
    ids = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    found = torch.zeros(len(prompts), len(words), ids.shape[1], dtype=torch.bool)
    for index, word in enumerate(words):
        pieces = torch.tensor(tokenizer(word, add_special_tokens=False).input_ids, dtype=ids.dtype)
        if len(pieces) == 0 or len(pieces) > ids.shape[1]:
            continue
        starts = (ids.unfold(1, len(pieces), 1) == pieces).all(-1)  # [P, T - n + 1]
        for offset in range(len(pieces)):
            found[:, index, offset : offset + starts.shape[1]] |= starts
    missing = [word for word, there in zip(words, found.any(-1).any(0).tolist(), strict=True) if not there]
    if missing:
        raise ValueError(
            f"scfg_fast: no prompt has the words {missing}; they must stand there as they are spelled here"
        )
    return found
