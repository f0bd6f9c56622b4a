"""`scfg-fast batch`.

The exit status is 0 if all rows have an image, 2 for error rows, bad input or other settings, 1 if something is
missing, 130 for an interrupt and 143 for SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import warnings
from typing import Any

from .errors import CommandError, say


def batch(args: argparse.Namespace) -> int:
    from ..batch import FolderError, MissingPackageError, ModelError, Terminated

    if args.shards and not args.export:
        raise CommandError("--shards belongs to --export DIR2")
    try:
        if args.status:
            return _status(args)
        if args.export:
            return _export(args)
        return _generate(args)
    except (ValueError, FolderError) as error:  # InputError, and UnsupportedPipelineError of the model
        raise CommandError(str(error)) from None
    except (MissingPackageError, ModelError) as error:
        raise CommandError(str(error), 1) from error
    except Terminated:
        raise CommandError("terminated", 143) from None
    except OSError as error:
        raise CommandError(f"{args.out!r} cannot be used: {error.strerror or error}", 1) from error


def _status(args: argparse.Namespace) -> int:
    from ..batch import read_status
    from ..batch.folder import Folder

    folder = Folder(args.out)
    if folder.read("run.json") is None:
        raise CommandError(f"--out: {args.out!r} is not the folder of a job")
    status = read_status(folder)
    say(str(status))
    return 1 if status.missing else 2 if status.errors else 0


def _export(args: argparse.Namespace) -> int:
    from ..batch import export
    from ..batch.folder import Folder

    if Folder(args.out).read("run.json") is None:
        raise CommandError(f"--out: {args.out!r} is not the folder of a job")
    say(f"{export(args.out, args.export, shards=args.shards)} images in {args.export}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..batch import generate
    from .commands import check_scale, read_config
    from .session import check_device, find_model

    if args.prompts is None:
        raise CommandError("PROMPTS is missing: a .jsonl, .csv or .parquet file with a column prompt")
    guidance = "+".join(args.guidance)
    check_scale(args.guidance_scale, "cfg" if guidance == "cfg" else "scfg")
    default = args.config is None and args.fidelity is None and not args.set
    config = None if default else read_config(args)
    _, name = find_model(args.model)
    if args.address is None and (args.device or args.dtype):
        check_device(args.device, args.dtype)
    if not args.debug:
        _quiet(args)
    summary = generate(
        args.prompts,
        args.out,
        model=name,
        guidance=guidance,
        config=None if guidance == "cfg" else config,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        workers=args.workers,
        num_gpus=args.num_gpus,
        address=args.address,
        max_attempts=args.max_attempts,
        retry_errors=args.retry_errors,
        **_call(args),
    )
    say(str(summary))
    return summary.exit_status


def _quiet(args: argparse.Namespace) -> None:
    """Silence the libraries without importing them: a finished job needs neither torch nor a model."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        if name not in os.environ:
            os.environ[name] = "error"
            args.cleanup.callback(os.environ.pop, name, None)
    args.cleanup.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")


def _call(args: argparse.Namespace) -> dict[str, Any]:
    """What the user named for every call."""
    width, height = args.size or (None, None)
    values = {
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.steps,
        "width": width,
        "height": height,
        "negative_prompt": args.negative,
    }
    return {name: value for name, value in values.items() if value is not None}
