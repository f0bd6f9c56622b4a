"""The model of a command: found, loaded, on its device."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CommandError, failures_as, one_line

BUNDLED = "bundled"

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass
class Session:
    """A loaded pipeline.

    Attributes:
        pipe: the pipeline, on its device.
        model: its name for people: `bundled`, or what the user wrote.
        dtype: `fp32`, `fp16` or `bf16`.
        quiet: whether progress and notes are left out.
    """

    pipe: Any
    model: str
    dtype: str
    quiet: bool = False

    def arguments(self, args: argparse.Namespace) -> dict[str, Any]:
        """Size, steps, scale and negative prompt of a call, with the model's defaults where the user named none."""
        from ..models import BUNDLED_CALL

        values = dict(BUNDLED_CALL) if self.model == BUNDLED else _call_defaults(self.pipe, self.model)
        if args.guidance_scale is not None:
            values["guidance_scale"] = args.guidance_scale
        if args.steps is not None:
            values["num_inference_steps"] = args.steps
        if args.size is not None:
            values["width"], values["height"] = args.size
        if args.negative is not None:
            values["negative_prompt"] = args.negative
        return values


def load(args: argparse.Namespace) -> Session:
    source, name = find_model(args.model)
    device, dtype = check_device(args.device, args.dtype)
    _check_loras(args.lora)
    if args.offload and device == "cpu":
        raise CommandError(f"--offload {args.offload}: there is no GPU to free, the model is on the CPU already")
    args.cleanup.enter_context(quiet(args.debug))
    pipe = _load_pipeline(source, name, dtype)
    if args.scheduler is not None:
        pipe.scheduler = _scheduler(pipe, args.scheduler)
    _add_loras(pipe, args.lora)
    with failures_as(f"the model {name!r} cannot be moved to {device}"):
        if args.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif args.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
    silent = getattr(args, "quiet", False)
    if silent:
        pipe.set_progress_bar_config(disable=True)
    return Session(pipe, name, dtype, silent)


def _check_loras(loras: list[tuple[str, float]]) -> None:
    for path, _ in loras:
        if not os.path.isfile(path):
            raise CommandError(f"--lora: there is no file {path!r}")
    if loras and importlib.util.find_spec("peft") is None:
        raise CommandError("--lora needs the package peft; pip install peft", 1)


def _add_loras(pipe: Any, loras: list[tuple[str, float]]) -> None:
    """Load the files, each as an adapter of its own, and set their scales."""
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        with failures_as(f"--lora: {path!r} does not fit the model"):
            folder, file = os.path.split(os.path.abspath(path))
            pipe.load_lora_weights(folder, weight_name=file, adapter_name=name, use_safetensors=True)
            if name not in {adapter for part in pipe.get_list_adapters().values() for adapter in part}:
                raise CommandError(f"--lora: {path!r} has no weights for this model")
    if loras:
        with failures_as("--lora: the scales cannot be set"):
            pipe.set_adapters(names, [scale for _, scale in loras])


def _scheduler(pipe: Any, name: str) -> Any:
    """A scheduler that diffusers lists as compatible, with the settings of the pipeline's own."""
    compatible = {cls.__name__.removesuffix("Scheduler").lower(): cls for cls in pipe.scheduler.compatibles}
    cls = compatible.get(name.removesuffix("Scheduler").lower())
    if cls is None:
        names = ", ".join(sorted(cls.__name__.removesuffix("Scheduler") for cls in compatible.values()))
        raise CommandError(f"--scheduler: {name!r} is not one that this model can use; use {names}")
    with failures_as(f"--scheduler {name}"):
        return cls.from_config(pipe.scheduler.config)


class OneBar:
    """One progress bar over the steps of several images, in the place of the pipeline's bar for each.

    Args:
        pipe: the pipeline; `close` gives it its own method back.
        images: how many calls there will be.
    """

    def __init__(self, pipe: Any, images: int) -> None:
        self.pipe, self.images = pipe, images
        self.bar: Any = None
        self.make = pipe.progress_bar
        pipe.progress_bar = self

    def __call__(self, iterable: Any = None, total: int | None = None) -> Any:
        """What the pipeline asks for at the beginning of a call: something to iterate, or a context with `update`."""
        items = None if iterable is None else list(iterable)
        steps = (total or 0) if items is None else len(items)
        if self.bar is None:
            self.bar = self.make(total=self.images * steps)
        else:
            self.bar.set_description(self.pipe._progress_bar_config.get("desc"))
        return contextlib.nullcontext(self.bar) if items is None else self._each(items)

    def _each(self, items: list[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self.bar.update()

    def close(self) -> None:
        del self.pipe.progress_bar
        if self.bar is not None:
            self.bar.close()


def check_device(name: str | None, dtype: str | None) -> tuple[str, str]:
    """The device and the dtype to use, by name."""
    import torch

    from ..env import default_device

    device = name or default_device()
    kind, _, index = device.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            why = "is built without CUDA" if torch.version.cuda is None else "finds no usable CUDA device"
            raise CommandError(f"--device {device}: torch {torch.__version__} {why}; use --device cpu")
        if int(index or 0) >= torch.cuda.device_count():
            raise CommandError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise CommandError("--device mps: this machine has no Metal device; use --device cpu")
    if dtype is None:
        return device, "fp32" if kind == "cpu" else "fp16"
    if dtype == "fp16" and kind == "cpu":
        raise CommandError("--dtype fp16 is for GPUs: on the CPU it is slow and not exact enough; use fp32 or bf16")
    return device, dtype


def find_model(model: str | None) -> tuple[str, str]:
    """(what to load, its name for people). Folders are checked; anything that could be a hub id is passed on."""
    if model is None or model == BUNDLED:
        from ..models import bundled_model_path

        try:
            return str(bundled_model_path()), BUNDLED
        except FileNotFoundError as error:
            raise CommandError(f"{error}; or name another model with --model", 1) from None
    path = Path(model).expanduser()
    if os.path.isdir(path):
        if not (path / "model_index.json").is_file():
            raise CommandError(f"--model: the folder {model!r} has no model_index.json, it is not a diffusers pipeline")
        return str(path), model
    if os.path.isfile(path):
        raise CommandError(
            f"--model: {model!r} is a single file; convert it to a diffusers folder with "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER) and pass the folder"
        )
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) is None:
        raise CommandError(f"--model: there is no folder {model!r}, and it cannot be a hub id, which is OWNER/NAME")
    return model, model


def _load_pipeline(source: str, name: str, dtype: str) -> Any:
    """Load with safetensors only and without remote code; every failure becomes one `CommandError`."""
    import diffusers
    import torch

    from ..models.loading import load_pipeline

    dtype_argument = "torch_dtype" if diffusers.__version__.startswith("0.") else "dtype"
    options = {dtype_argument: getattr(torch, DTYPES[dtype])}
    try:
        folder = source if os.path.isdir(source) else diffusers.DiffusionPipeline.download(source, use_safetensors=True)
        return load_pipeline(folder, exact=name == BUNDLED, **options)
    except Exception as error:
        raise _load_failure(source, name, error) from error


def _load_failure(source: str, name: str, error: Exception) -> CommandError:
    """The reason why a model did not load, as one line."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = one_line(error)[:300].rstrip(".")
    if "trust_remote_code" in text:
        return CommandError(f"--model: {name!r} brings Python code of its own, which this command never runs")
    if os.path.isdir(source):
        if re.search(r"no file named \S+\.safetensors", text):
            text += "; only .safetensors weights are read: load it in Python and save_pretrained(FOLDER) it again"
        status = 2 if isinstance(error, (OSError, ValueError)) else 1
        return CommandError(f"--model: the folder {name!r} cannot be loaded: {text}", status)
    neither = f"--model: {name!r} is not a folder here, and"
    if any(isinstance(link, errors.GatedRepoError) for link in chain):
        return CommandError(
            f"--model: {name!r} is gated: accept its terms on huggingface.co, then log in with 'hf auth login'", 1
        )
    if any(isinstance(link, errors.RepositoryNotFoundError) for link in chain):
        return CommandError(
            f"{neither} the Hugging Face hub knows no such model; check the spelling, or log in with 'hf auth login' "
            "if it is private"
        )
    if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
        return CommandError(
            f"{neither} the hub cannot be asked in offline mode (HF_HUB_OFFLINE) and the local cache does not have it; "
            "leave offline mode, pass a folder, or leave out --model to use the bundled model",
            1,
        )
    if any(_is_network_error(link) for link in chain):
        return CommandError(
            f"{neither} the Hugging Face hub cannot be reached to download it (no network?); "
            "pass a folder, or leave out --model to use the bundled model",
            1,
        )
    return CommandError(f"--model: {name!r} cannot be loaded: {text}", 1)


def _is_network_error(error: BaseException) -> bool:
    """Whether an error came from a connection: of Python, or of an HTTP client that the hub library has used."""
    clients = ("httpx", "httpcore", "requests", "urllib3")
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(clients)


def _call_defaults(pipe: Any, name: str) -> dict[str, Any]:
    """Scale, steps and size that a text-to-image pipeline takes by itself."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    needed = ("prompt", "negative_prompt", "guidance_scale", "num_inference_steps", "height", "width", "generator")
    missing = [parameter for parameter in needed if parameter not in parameters]
    if missing or "image" in parameters:
        what = f"has no {', '.join(missing)}" if missing else "needs an input image"
        raise CommandError(
            f"--model: {name!r} is a {type(pipe).__name__}, which {what}; a text-to-image pipeline is needed"
        )
    defaults = {key: parameters[key].default for key in ("guidance_scale", "num_inference_steps")}
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if isinstance(size, int):
        defaults["height"] = defaults["width"] = size * pipe.vae_scale_factor
    return defaults


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Silence what the libraries print and a user of this command cannot act on; progress over the steps stays."""
    if debug:
        yield
        return
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update({name: value for name, value in quiet.items() if before[name] is None})
    restore: list[Callable[[], None]] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers.utils import logging as of_diffusers
            from transformers.utils import logging as of_transformers

            for library in (of_diffusers, of_transformers):
                restore.append(functools.partial(library.set_verbosity, library.get_verbosity()))
                library.set_verbosity(library.CRITICAL)
                if library.is_progress_bar_enabled():
                    restore.append(library.enable_progress_bar)
                    library.disable_progress_bar()
            yield
    finally:
        for undo in restore:
            undo()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
