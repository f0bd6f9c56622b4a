"""The command line: `scfg-fast generate | masks | compare | doctor`, the same as `python -m scfg_fast ...`.

Results go to stdout, everything else to stderr. An error is one line on stderr; the exit status is 0, 2 for bad input,
1 for a failure while running, 130 for an interrupt. A file appears under its name whole or not at all. Heavy packages
are imported only when a command needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import json
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ._version import __version__

if TYPE_CHECKING:
    from PIL import Image

    from .config import SCFGConfig
    from .regions import RegionRow, Regions

MIN_SIZE = 64
MAX_PANELS = 8
MIN_PANEL = 384
BUNDLED = "bundled"
BUNDLED_DEFAULTS = {"guidance_scale": 5.0, "num_inference_steps": 25, "height": 256, "width": 256}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GUIDANCE_NAMES = {"scfg": "S-CFG", "cfg": "CFG"}
RATE_METHODS = ("cfg", "scfg", "paper", "pixels")
WEIGHT_METHODS = (
    "linear", "cosine", "inverse-linear", "sine", "v", "lambda", "clamp-linear", "clamp-cosine", "power-cosine",
    "interval", "cfgpp",
)  # fmt: skip
METHODS = (*RATE_METHODS, *WEIGHT_METHODS, "characteristic")

_EXAMPLES = """examples:
  scfg-fast generate "a red apple left of a blue car"
  scfg-fast masks "a red apple left of a blue car" --out regions.png
  scfg-fast compare "a red apple left of a blue car" --num-images 4 --regions
  scfg-fast generate "a boy in a red shirt" --model OWNER/NAME
  scfg-fast doctor
"""


class CommandError(Exception):
    """An error with a message for the user and an exit status: 2 for bad input, 1 for a failure while running."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# Arguments


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the prompt is empty; write what the picture should show")
    return text


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write N for a square, or WIDTHxHEIGHT, in pixels")
    width, height = int(match[1]), int(match[2] or match[1])
    for value in (width, height):
        if value < MIN_SIZE:
            raise argparse.ArgumentTypeError(f"{value} pixels is too small; the least is {MIN_SIZE}")
        if value % 8:
            below = value - value % 8
            raise argparse.ArgumentTypeError(f"{value} is not a multiple of 8; the nearest are {below} and {below + 8}")
    return width, height


def _integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            limits = f"at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"it must be {limits}, got {value}")
        return value

    return parse


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _device(text: str) -> str:
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; use cpu, cuda, cuda:N or mps")
    return text


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; imports nothing heavy."""
    parser = _Parser(
        prog="scfg-fast",
        description="Images with semantic-aware classifier-free guidance (S-CFG).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"scfg-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", _generate, "Make images from a prompt.")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("prompt", metavar="PROMPT", nargs="?", type=_prompt, help=_PROMPT_HELP)
    prompts.add_argument("--prompt-file", metavar="FILE", help="a text file with a prompt on every line")
    picture = _add_picture(generate, "scfg.png", "images per prompt, with seeds SEED, SEED+1, ... (default 1)")
    picture.add_argument("--grid", action="store_true", help="one file with all images instead of a file for each")
    guidance = _add_guidance(generate)
    guidance.add_argument(
        "--guidance",
        metavar="METHOD",
        type=_method,
        default=("scfg",),
        help=f"{', '.join(METHODS)}, or a combination such as scfg+linear (default scfg)",
    )
    _add_model(generate)

    masks = command("masks", _masks, "Show which token owns each region at several steps, and its rate.")
    masks.add_argument("prompt", metavar="PROMPT", type=_prompt, help=_PROMPT_HELP)
    picture = _add_picture(masks, "masks.png")
    picture.add_argument(
        "--panels",
        metavar="N",
        type=_integer(1, MAX_PANELS),
        default=5,
        help="steps to show, spread evenly (default 5)",
    )
    _add_guidance(masks)
    _add_model(masks)

    compare = command("compare", _compare, "Plain CFG and S-CFG side by side, from the same noise.")
    compare.add_argument("prompt", metavar="PROMPT", type=_prompt, help=_PROMPT_HELP)
    picture = _add_picture(compare, "compare.png", "rows, with seeds SEED, SEED+1, ... (default 1)")
    picture.add_argument("--regions", action="store_true", help="add the regions of the last S-CFG column")
    picture.add_argument(
        "--methods",
        metavar="METHOD",
        type=_method,
        nargs="+",
        help=f"columns: {', '.join(METHODS)}, or a combination such as scfg+linear (default cfg scfg); each shows the "
        "mean weight that was applied and its time",
    )
    _add_guidance(compare)
    _add_model(compare)

    doctor = command("doctor", _doctor, "Versions, devices, backends, and whether a model can use S-CFG.")
    _add_model(doctor)
    return parser


_PROMPT_HELP = "what the picture should show"


def _add_picture(parser: argparse.ArgumentParser, out: str, num_images: str | None = None) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("picture")
    group.add_argument("--negative", metavar="TEXT", help="what the picture should not show")
    group.add_argument("--size", metavar="N|WxH", type=_size, help="in pixels, multiples of 8 (default: the model's)")
    group.add_argument("--steps", metavar="N", type=_integer(1), help="of the sampler (default: the model's)")
    group.add_argument("--seed", metavar="N", type=_integer(0), default=0, help="of the noise (default 0)")
    if num_images is not None:
        group.add_argument("--num-images", metavar="N", type=_integer(1), default=1, help=num_images)
    group.add_argument("--out", metavar="FILE", help=f"a .png file, or a folder that exists (default {out})")
    parser.set_defaults(default_out=out)
    return group


def _add_guidance(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("guidance")
    group.add_argument("--guidance-scale", metavar="X", type=_number, help="above 1 (default: the model's)")
    settings = group.add_mutually_exclusive_group()
    settings.add_argument(
        "--fidelity", choices=("official", "paper"), help="S-CFG as the published code (default) or its equations"
    )
    settings.add_argument("--config", metavar="FILE", help="all S-CFG parameters, JSON as SCFGConfig.to_json writes")
    return group


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="a diffusers folder or a model id on the Hugging Face hub (default: the bundled model: 256x256 "
        "pixels, 25 steps, guidance scale 5)",
    )
    group.add_argument("--device", type=_device, help="cpu, cuda, cuda:N or mps (default: the best there is)")
    group.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: fp16 on a GPU, else fp32)")
    group.add_argument("--debug", action="store_true", help="show tracebacks and all messages of the libraries")


# Checks that need no model


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of `generate`, one or one per line of the file."""
    if args.prompt_file is None:
        return [args.prompt]
    text = _read_text(args.prompt_file, "prompt file")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise CommandError(f"the prompt file {args.prompt_file!r} has no prompt; write one on every line")
    return prompts


def _read_text(name: str, what: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CommandError(f"there is no {what} {name!r}") from None
    except UnicodeDecodeError:
        raise CommandError(f"the {what} {name!r} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise CommandError(f"the {what} {name!r} cannot be read: {error.strerror}") from None


def _read_config(args: argparse.Namespace) -> SCFGConfig:
    from .config import SCFGConfig

    if args.config is None:
        return SCFGConfig.paper() if args.fidelity == "paper" else SCFGConfig.official()
    try:
        return SCFGConfig.from_json(_read_text(args.config, "configuration"))
    except (ValueError, TypeError) as error:
        raise CommandError(f"the configuration {args.config!r} cannot be used: {error}") from None


def _config_for(session: Session, args: argparse.Namespace, config: SCFGConfig) -> SCFGConfig:
    """The configuration as it was read, or the pipeline's own published values where none was asked for."""
    from .pipelines.families import default_config

    return default_config(session.pipe) if args.config is None and args.fidelity != "paper" else config


def _output_path(args: argparse.Namespace) -> Path:
    """Where the result goes; proves that files can be made there before any work is done."""
    path = Path(args.out or args.default_out).expanduser()
    if os.path.isdir(path):
        path = path / args.default_out
    if path.suffix.lower() != ".png":
        raise CommandError(f"--out {args.out!r} must be a name that ends in .png, or a folder that exists")
    if not os.path.isdir(path.parent):
        raise CommandError(f"--out: there is no folder {str(path.parent)!r}; make it first")
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(probe, "xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise CommandError(f"--out: no file can be written in {str(path.parent)!r}: {error.strerror}") from None
    return path


def _check_scale(scale: float | None, guidance: str) -> None:
    if scale is None:
        return
    if guidance == "scfg" and scale <= 1.0:
        raise CommandError(
            f"--guidance-scale {scale:g}: S-CFG needs a scale above 1, because at 1 there is no guidance; "
            "raise it, or make an image without guidance: generate --guidance cfg --guidance-scale 1"
        )
    if guidance == "cfg" and scale < 1.0:
        raise CommandError(f"--guidance-scale {scale:g}: CFG needs at least 1, which means no guidance")


def _check_device(name: str | None, dtype: str | None) -> tuple[str, str]:
    """The device and the dtype to use, by name."""
    import torch

    from .env import default_device

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


# Models


@dataclass
class Session:
    """A loaded pipeline.

    Attributes:
        pipe: the pipeline, on its device.
        model: its name for people: `bundled`, or what the user wrote.
        dtype: `fp32`, `fp16` or `bf16`.
    """

    pipe: Any
    model: str
    dtype: str

    def arguments(self, args: argparse.Namespace) -> dict[str, Any]:
        """Size, steps, scale and negative prompt of a call, with the model's defaults where the user named none."""
        values = dict(BUNDLED_DEFAULTS) if self.model == BUNDLED else _call_defaults(self.pipe, self.model)
        if args.guidance_scale is not None:
            values["guidance_scale"] = args.guidance_scale
        if args.steps is not None:
            values["num_inference_steps"] = args.steps
        if args.size is not None:
            values["width"], values["height"] = args.size
        if args.negative is not None:
            values["negative_prompt"] = args.negative
        return values


def _load(args: argparse.Namespace) -> Session:
    source, name = _find_model(args.model)
    device, dtype = _check_device(args.device, args.dtype)
    args.cleanup.enter_context(_quiet(args.debug))
    pipe = _load_pipeline(source, name, dtype)
    with _failures_as(f"the model {name!r} cannot be moved to {device}"):
        pipe.to(device)
    return Session(pipe, name, dtype)


def _find_model(model: str | None) -> tuple[str, str]:
    """(what to load, its name for people). Folders are checked; anything that could be a hub id is passed on."""
    if model is None or model == BUNDLED:
        from .models import bundled_model_path

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

    dtype_argument = "torch_dtype" if diffusers.__version__.startswith("0.") else "dtype"
    options = {dtype_argument: getattr(torch, DTYPES[dtype]), "use_safetensors": True}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(source, **options)
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
    text = _one_line(error)[:300].rstrip(".")
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


# Making images


@contextlib.contextmanager
def _failures_as(what: str) -> Iterator[None]:
    """Turn an exception into one line that says what failed and, where that is known, what to do."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise CommandError(f"{what}: out of memory; try a smaller --size, or --dtype bf16 or fp16", 1) from error
        raise CommandError(f"{what}: {type(error).__name__}: {_one_line(error)[:400]}", 1) from error


def _enable(session: Session, config: SCFGConfig, on_regions: Callable[[int, Regions], None] | None = None) -> Any:
    import scfg_fast

    support = scfg_fast.supports(session.pipe, config)
    if not support.supported:
        raise CommandError(
            f"--model: {session.model!r} cannot use S-CFG: {'; '.join(support.reasons)}; plain CFG works with: "
            "generate --guidance cfg"
        )
    return scfg_fast.enable(session.pipe, config, on_regions=on_regions, strict=True)


def _sample(session: Session, prompt: str, seed: int, values: dict[str, Any], label: str) -> Image.Image:
    """One image. Raises `CommandError` if the pipeline fails or the picture is not made of finite numbers."""
    import numpy as np
    import torch
    from PIL import Image

    session.pipe.set_progress_bar_config(desc=f"{label}, seed {seed}")
    # Noise from the CPU is the same on every device.
    generator = torch.Generator("cpu").manual_seed(seed)
    with _failures_as(f"making the image for {prompt!r} with seed {seed} failed"):
        result = session.pipe(prompt, generator=generator, output_type="np", **values)
    pixels = np.asarray(result.images[0])
    if not np.isfinite(pixels).all():
        raise CommandError(
            f"the image for {prompt!r} with seed {seed} has values that are not numbers (overflow in {session.dtype}); "
            "try --dtype fp32 or bf16, or a smaller --guidance-scale",
            1,
        )
    if any(getattr(result, "nsfw_content_detected", None) or []):
        _note(f"the model's safety checker made the image for {prompt!r} with seed {seed} black")
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _note(text: str) -> None:
    print(f"scfg-fast: note: {_one_line(text)}", file=sys.stderr)


def _note_if_cut(session: Session, prompt: str) -> None:
    """Tell the user what part of a long prompt the model will not read."""
    from .pipelines.call import tokenizer_of

    tokenizer = tokenizer_of(session.pipe)
    if tokenizer is None:
        return
    ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        cut = tokenizer.decode(ids[limit - 1 : -1]).strip()
        _note(f"the prompt is {len(ids)} tokens long and the model reads {limit}; it will not see {cut!r}")


def _labels(session: Session, prompt: str) -> list[str]:
    from .pipelines.call import tokenizer_of
    from .regions import token_labels

    tokenizer = tokenizer_of(session.pipe)
    return token_labels(tokenizer, prompt, tokenizer.model_max_length)


def _record(
    session: Session,
    prompt: str,
    seeds: Sequence[int],
    values: dict[str, Any],
    guidance: str,
    config: SCFGConfig | None,
) -> dict[str, Any]:
    """Everything that is needed to make a picture again."""
    record = {
        "software": f"scfg-fast {__version__}",
        "prompt": prompt,
        "negative_prompt": values.get("negative_prompt", ""),
        "seed": " ".join(map(str, seeds)),
        "guidance": guidance,
        "guidance_scale": values["guidance_scale"],
        "steps": values["num_inference_steps"],
        "model": session.model,
        "scheduler": type(session.pipe.scheduler).__name__,
        "dtype": session.dtype,
    }
    if "width" in values:
        record["size"] = f"{values['width']}x{values['height']}"
    if config is not None:
        record["scfg_config"] = json.dumps(config.to_dict(), sort_keys=True)
    return record


def _caption(record: dict[str, Any], guidance: str = "") -> str:
    """The settings in a line for people."""
    seeds = record["seed"].split()
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    parts = [guidance, f"guidance scale {record['guidance_scale']}", seed, f"{record['steps']} steps"]
    parts += [record["scheduler"].removesuffix("Scheduler"), record.get("size", ""), f"model {record['model']}"]
    if record["negative_prompt"]:
        parts.append(f"without: {record['negative_prompt']}")
    return ", ".join(part for part in parts if part)


def _write_png(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Write a picture with its record as PNG text, whole or not at all, and print its path."""
    from PIL import PngImagePlugin

    from .regions import replacing

    info = PngImagePlugin.PngInfo()
    for key, value in record.items():
        info.add_text(key, str(value))
    with _writing(path), replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)
    print(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{str(path)!r} cannot be written: {error.strerror or error}", 1) from error


# Commands


def _generate(args: argparse.Namespace) -> int:
    prompts = _read_prompts(args)
    guidance, kind = "+".join(args.guidance), "cfg" if args.guidance == ("cfg",) else "scfg"
    _check_scale(args.guidance_scale, kind)
    config = _read_config(args) if kind == "scfg" else None
    path = _output_path(args)
    session = _load(args)
    values = session.arguments(args)
    _check_scale(values["guidance_scale"], kind)
    label = GUIDANCE_NAMES["cfg"]
    if config is not None:
        config = _config_for(session, args, config)
        handle = _enable(session, config)
        label = _set_method(session, handle, args.guidance, values, config)
        config = handle.config
    from .regions import image_grid

    total = len(prompts) * args.num_images
    seeds = range(args.seed, args.seed + args.num_images)
    rows: list[list[Image.Image]] = []
    number = 0
    for prompt in prompts:
        _note_if_cut(session, prompt)
        rows.append([])
        for seed in seeds:
            number += 1
            image = _sample(session, prompt, seed, values, label if total == 1 else f"{number}/{total} {label}")
            if args.grid:
                rows[-1].append(image)
                continue
            target = path if total == 1 else path.with_name(f"{path.stem}-{number:04d}{path.suffix}")
            _write_png(target, image, _record(session, prompt, [seed], values, guidance, config))
    if args.grid:
        record = _record(session, "\n".join(prompts), seeds, values, guidance, config)
        captions = [[f"seed {seed}" for seed in seeds]] * len(prompts)
        if len(prompts) == 1:
            columns = math.ceil(math.sqrt(total))
            rows, captions = _folded(rows[0], columns), _folded(captions[0], columns)
        grid = image_grid(
            rows,
            captions=captions,
            row_titles=prompts if len(prompts) > 1 else (),
            title=prompts[0] if len(prompts) == 1 else "",
            subtitle=_caption(record, label),
        )
        _write_png(path, grid, record)
    return 0


def _folded(items: list, columns: int) -> list[list]:
    """A list as rows of `columns` items; the last may be shorter."""
    return [items[start : start + columns] for start in range(0, len(items), columns)]


def _masks(args: argparse.Namespace) -> int:
    _check_scale(args.guidance_scale, "scfg")
    config = _read_config(args)
    path = _output_path(args)
    session = _load(args)
    values = session.arguments(args)
    _check_scale(values["guidance_scale"], "scfg")
    steps: list[Regions] = []
    config = _config_for(session, args, config)
    _enable(session, config, lambda _, regions: steps.append(regions.clone().cpu()))
    from .regions import contact_sheet, save_regions_npz

    _note_if_cut(session, args.prompt)
    image = _sample(session, args.prompt, args.seed, values, GUIDANCE_NAMES["scfg"])
    if not steps:
        raise CommandError(
            "no step was guided by S-CFG, there are no regions to show; check start and stop in --config"
        )
    labels = _labels(session, args.prompt)
    record = _record(session, args.prompt, [args.seed], values, "scfg", config)
    count = min(args.panels, len(steps))
    shown = [steps[round(index * (len(steps) - 1) / max(count - 1, 1))] for index in range(count)]
    sheet = contact_sheet(
        image,
        shown,
        labels,
        num_steps=session.pipe.num_timesteps,
        title=args.prompt,
        subtitle=_caption(record, GUIDANCE_NAMES["scfg"]),
    )
    print(_format_table(shown, labels))
    _write_png(path, sheet, record)
    npz = path.with_suffix(".npz")
    with _writing(npz):
        save_regions_npz(npz, steps, labels=[labels], metadata=record)
    print(npz)
    return 0


def _format_table(steps: Sequence[Regions], labels: Sequence[str], most: int = 14) -> str:
    """Share and rate of the regions at each step, the largest regions first, as text."""
    from .regions import region_table, row_name

    tables = [{row.token: row for row in region_table(regions, labels)} for regions in steps]
    names: dict[int, str] = {}
    shares: dict[int, float] = {}
    for table in tables:
        for token, row in table.items():
            names[token] = row_name(row, labels)
            shares[token] = shares.get(token, 0.0) + row.share
    tokens = sorted(shares, key=lambda token: (-shares[token], token))
    width = max(len("region"), *(len(names[token]) for token in tokens[:most]))

    def cell(row: RegionRow | None) -> str:
        return f"{'-':>6}{'-':>7}" if row is None else f"{100 * row.share:>5.1f}%{row.rate:>7.2f}"

    lines = [
        " " * width + "".join(f"   {f'step {regions.step + 1}':>13}" for regions in steps),
        "region".ljust(width) + f"   {'share':>6}{'rate':>7}" * len(steps),
        *(names[token].ljust(width) + "".join(f"   {cell(t.get(token))}" for t in tables) for token in tokens[:most]),
    ]
    if len(tokens) > most:
        rest = sum(shares[token] for token in tokens[most:]) / len(steps)
        lines.append(f"{len(tokens) - most} more, {100 * rest:.1f}% on average")
    return "\n".join(lines)


def _method(text: str) -> tuple[str, ...]:
    """A column of `compare`: some of `METHODS`, joined by +, at most one of a kind."""
    parts = tuple(text.lower().split("+"))
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; use {', '.join(METHODS)}")
    for kind in (RATE_METHODS, WEIGHT_METHODS, ("characteristic",)):
        if sum(part in kind for part in parts) > 1:
            raise argparse.ArgumentTypeError(f"{text!r}: at most one of {', '.join(kind)}")
    return parts


def _set_method(session: Session, handle: Any, parts: tuple[str, ...], values: dict[str, Any], config: Any) -> str:
    """Configure the pipeline for one column; returns its caption."""
    from .config import PAPER, PIXELS, SCFGConfig
    from .guidance import CFGPlusPlus, CharacteristicGuidance, WeightSchedule
    from .guidance.cfgpp import lam_for_mean_weight

    names = []
    handle.config, handle.schedule, handle.characteristic = SCFGConfig(rates="none"), None, None
    for part in parts:
        if part in ("scfg", "paper"):
            handle.config = config if part == "scfg" else config.replace(**PAPER)
            names.append(GUIDANCE_NAMES["scfg"] + (", paper" if part == "paper" else ""))
        elif part == "pixels":
            handle.config = config.replace(**PIXELS)
            names.append("per pixel")
        elif part == "characteristic":
            handle.characteristic = CharacteristicGuidance()
            names.append("characteristic")
        elif part == "cfgpp":
            # The strength whose mean weight over these steps is the guidance scale: columns of equal dose.
            scale, steps = values["guidance_scale"], values["num_inference_steps"]
            with _failures_as("cfgpp"):
                handle.schedule = CFGPlusPlus(lam_for_mean_weight(scale, session.pipe.scheduler, steps))
            names.append(f"CFG++ {handle.schedule.lam:.2f}")
        elif part == "interval":
            handle.schedule = WeightSchedule(interval=(0.2, 0.8))
            names.append("interval 0.2 to 0.8")
        elif part != "cfg":
            handle.schedule = WeightSchedule(part, floor=2.0 if part.startswith("clamp") else 0.0)
            names.append(part)
    return " + ".join(names) or GUIDANCE_NAMES["cfg"]


def _compare(args: argparse.Namespace) -> int:
    _check_scale(args.guidance_scale, "scfg")
    config = _read_config(args)
    path = _output_path(args)
    session = _load(args)
    values = session.arguments(args)
    _check_scale(values["guidance_scale"], "scfg")
    steps: list[Regions] = []
    config = _config_for(session, args, config)
    handle = _enable(session, config, lambda _, regions: steps.append(regions.clone()) if args.regions else None)
    from .regions import image_grid, overlay, scaled

    _note_if_cut(session, args.prompt)
    methods = args.methods or [("cfg",), ("scfg",)]
    seeds = range(args.seed, args.seed + args.num_images)
    size = max(MIN_PANEL, values.get("width", 0), values.get("height", 0))
    rows: list[list[Image.Image]] = []
    captions: list[list[str]] = []
    for seed in seeds:
        rows.append([])
        captions.append([])
        steps.clear()
        for parts in methods:
            label = _set_method(session, handle, parts, values, config)
            if handle.config.rates == "regions":
                steps.clear()
            if args.methods:  # first calls load and compile: not what is timed
                kept = list(steps)
                _sample(session, args.prompt, seed, values | {"num_inference_steps": 1}, f"{label}, warm-up")
                steps[:] = kept
            started = time.perf_counter()
            image = _sample(session, args.prompt, seed, values, label)
            took = time.perf_counter() - started
            rows[-1].append(scaled(image, size))
            label += f", seed {seed}" if len(seeds) > 1 else ""
            captions[-1].append(
                f"{label}: mean {handle.stats.mean_weight:.1f}, {took:.1f} s" if args.methods else label
            )
            if steps and handle.config.rates == "regions":
                regions_of = image
        if steps:
            middle = steps[len(steps) // 2].cpu()
            labels = _labels(session, args.prompt)
            rows[-1].append(overlay(regions_of, middle, 0, labels, size=size, legend=False))
            captions[-1].append(f"regions at step {middle.step + 1}")
    record = _record(session, args.prompt, seeds, values, " ".join(map("+".join, methods)), config)
    grid = image_grid(rows, captions=captions, title=args.prompt, subtitle=_caption(record))
    _write_png(path, grid, record)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .env import environment, report

    try:
        device, dtype = _check_device(args.device, args.dtype)
    except CommandError:
        print(report(environment()))
        raise
    print(report(environment(device, DTYPES[dtype])))
    name = args.model or BUNDLED
    print(f"\nModel {name}", flush=True)
    import scfg_fast

    session = _load(args)
    support = scfg_fast.supports(session.pipe)
    print(f"  {'pipeline':<16} {type(session.pipe).__name__}, {type(session.pipe.scheduler).__name__}")
    print(f"  {'S-CFG':<16} {'supported' if support.supported else 'not supported'}")
    for index, layer in enumerate(support.layers):
        print(f"  {'captured layers' if index == 0 else '':<16} {layer}")
    for index, reason in enumerate(support.reasons):
        print(f"  {'because' if index == 0 else '':<16} {reason}")
    return 0 if support.supported else 1


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit status: 0, 2 for bad input, 1 for a failure while running, 130 for an interrupt. A malformed command
        line, `--help` and `--version` raise SystemExit, as argparse does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # token names may be in any script, terminals may not
    args = build_parser().parse_args(argv)
    try:
        with contextlib.ExitStack() as args.cleanup:
            return args.run(args)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        message, status = _explain(error)
    print(f"scfg-fast {args.command}: error: {_one_line(message)}", file=sys.stderr)
    return status


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say about an exception, and the exit status."""
    if isinstance(error, CommandError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return f"{type(error).__name__}: {error} (--debug shows the traceback)", 1
