"""The parser of all commands; imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import NoReturn

from .._version import __version__
from ..methods import METHODS_HELP, method
from . import commands
from .batch import batch
from .errors import one_line
from .session import DTYPES

MIN_SIZE = 64

MAX_PANELS = 8

_EXAMPLES = """examples:
  scfg-fast generate "a red apple left of a blue car"
  scfg-fast masks "a red apple left of a blue car" --out regions.png
  scfg-fast compare "a red apple left of a blue car" --num-images 4 --regions
  scfg-fast generate "a boy in a red shirt" --model OWNER/NAME
  scfg-fast batch prompts.jsonl --out images
  scfg-fast doctor
"""

_PROMPT_HELP = "what the picture should show"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the prompt is empty; write what the picture should show")
    return _text(text)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8; check the terminal's encoding") from None
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


MAX_STEPS = 1000
"""Of the schedules that models are trained with."""

MAX_SEED = 2**63 - 1


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
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


def _lora(text: str) -> tuple[str, float]:
    """PATH or PATH:SCALE; a colon inside of a path is the path's."""
    path, colon, scale = text.rpartition(":")
    try:
        value = float(scale) if colon else math.nan
    except ValueError:
        value = math.nan
    path, value = (path, value) if math.isfinite(value) else (text, 1.0)
    if not path.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"{path!r} must be a .safetensors file; other formats can run code when read")
    return path, value


def _setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value as in JSON, or a word."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, such as rate_max=1.5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _method(text: str) -> tuple[str, ...]:
    try:
        return method(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = subcommands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", commands.generate, "Make images from a prompt.")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("prompt", metavar="PROMPT", nargs="?", type=_prompt, help=_PROMPT_HELP)
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with a prompt on every line")
    picture = _add_picture(generate, "scfg.png", "images per prompt, with seeds SEED, SEED+1, ... (default 1)")
    picture.add_argument("--grid", action="store_true", help="one file with all images instead of a file for each")
    guidance = _add_guidance(generate)
    guidance.add_argument(
        "--guidance",
        metavar="METHOD",
        type=_method,
        default=("scfg",),
        help=f"{METHODS_HELP}, or a combination such as scfg+linear (default scfg)",
    )
    _add_model(generate, adapted=True)

    masks = command("masks", commands.masks, "Show which token owns each region at several steps, and its rate.")
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
    _add_model(masks, adapted=True)

    compare = command("compare", commands.compare, "Plain CFG and S-CFG side by side, from the same noise.")
    compare.add_argument("prompt", metavar="PROMPT", type=_prompt, help=_PROMPT_HELP)
    picture = _add_picture(compare, "compare.png", "rows, with seeds SEED, SEED+1, ... (default 1)")
    picture.add_argument("--regions", action="store_true", help="add the regions of the last S-CFG column")
    picture.add_argument(
        "--equal-dose",
        action="store_true",
        help="next to each method, plain guidance at the scale that the method acts as",
    )
    picture.add_argument(
        "--methods",
        metavar="METHOD",
        type=_method,
        nargs="+",
        help=f"columns: {METHODS_HELP}, or a combination such as scfg+linear (default cfg scfg); each shows its time",
    )
    _add_guidance(compare)
    _add_model(compare, adapted=True)

    job = command("batch", batch, "Make an image for every row of a prompt file, once, whatever dies.")
    job.add_argument("prompts", metavar="PROMPTS", nargs="?", help="a .jsonl, .csv or .parquet file of rows")
    _add_job(job)
    _add_guidance(job).add_argument(
        "--guidance", metavar="METHOD", type=_method, default=("scfg",), help="as for generate (default scfg)"
    )
    _add_model(job)

    doctor = command("doctor", commands.doctor, "Versions, devices, backends, and whether a model can use S-CFG.")
    _add_model(doctor, adapted=True)
    return parser


def _add_picture(parser: argparse.ArgumentParser, out: str, num_images: str | None = None) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("picture")
    group.add_argument("--negative", metavar="TEXT", type=_text, help="what the picture should not show")
    group.add_argument("--size", metavar="N|WxH", type=_size, help="in pixels, multiples of 8 (default: the model's)")
    group.add_argument(
        "--steps", metavar="N", type=_integer(1, MAX_STEPS), help="of the sampler (default: the model's)"
    )
    group.add_argument("--seed", metavar="N", type=_integer(0, MAX_SEED), default=0, help="of the noise (default 0)")
    if num_images is not None:
        group.add_argument("--num-images", metavar="N", type=_integer(1), default=1, help=num_images)
    group.add_argument("--out", metavar="FILE", help=f"a .png file, or a folder that exists (default {out})")
    group.add_argument("--no-clobber", action="store_true", help="refuse to replace a file that exists")
    group.add_argument("--quiet", action="store_true", help="no progress and no notes")
    parser.set_defaults(default_out=out)
    return group


def _add_job(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("job")
    job.add_argument("--out", metavar="DIR", required=True, help="the job's folder, or a URI such as s3://bucket/path")
    job.add_argument("--batch-size", metavar="N", type=_integer(1), default=4, help="images per call (default 4)")
    job.add_argument("--workers", metavar="N", type=_integer(1), default=1, help="1 needs no Ray (default 1)")
    job.add_argument("--num-gpus", metavar="X", type=_number, help="per worker, on Ray (default 1 where there are any)")
    job.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster; auto for the one of this machine")
    job.add_argument(
        "--max-attempts", metavar="N", type=_integer(1), default=3,
        help="attempts at a micro-batch that may die before its rows run alone (default 3)",
    )  # fmt: skip
    job.add_argument(
        "--seed", metavar="N", type=_integer(0, MAX_SEED), default=0, help="of rows without a seed (default 0)"
    )
    job.add_argument("--retry-errors", action="store_true", help="make micro-batches with error rows again")
    instead = job.add_mutually_exclusive_group()
    instead.add_argument("--status", action="store_true", help="say how far the job is; reads only")
    instead.add_argument("--export", metavar="DIR2", help="write its images as PNG files with a metadata.jsonl")
    job.add_argument("--shards", action="store_true", help="with --export: Parquet shards instead")
    picture = parser.add_argument_group("picture, where a row has no other")
    picture.add_argument("--negative", metavar="TEXT", type=_text, help="what the picture should not show")
    picture.add_argument("--size", metavar="N|WxH", type=_size, help="in pixels, multiples of 8 (default: the model's)")
    picture.add_argument(
        "--steps", metavar="N", type=_integer(1, MAX_STEPS), help="of the sampler (default: the model's)"
    )


def _add_guidance(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("guidance")
    group.add_argument("--guidance-scale", metavar="X", type=_number, help="above 1 (default: the model's)")
    settings = group.add_mutually_exclusive_group()
    settings.add_argument(
        "--fidelity", choices=("official", "paper"), help="S-CFG as the published code (default) or its equations"
    )
    settings.add_argument("--config", metavar="FILE", help="all S-CFG parameters, JSON as SCFGConfig.to_json writes")
    group.add_argument(
        "--set", metavar="NAME=VALUE", type=_setting, action="append", default=[],
        help="one S-CFG parameter, such as rate_max=1.5 for calmer backgrounds or tokens=words; repeatable",
    )  # fmt: skip
    return group


def _add_model(parser: argparse.ArgumentParser, adapted: bool = False) -> None:
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
    if adapted:
        group.add_argument(
            "--lora", metavar="FILE[:SCALE]", type=_lora, action="append", default=[],
            help="a .safetensors file of LoRA weights; repeatable",
        )  # fmt: skip
        group.add_argument("--scheduler", metavar="NAME", help="such as EulerDiscrete (default: the model's)")
        group.add_argument(
            "--offload",
            choices=("model", "sequential"),
            help="keep on the GPU only what is computing: parts, or layers",
        )
