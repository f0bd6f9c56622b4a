"""What each command does."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..methods import GUIDANCE_NAMES, set_method
from .errors import CommandError, escaped, failures_as, say, writing
from .images import caption_of, enable_scfg, labels_of, note_if_cut, record_of, sample_image, write_png
from .session import BUNDLED, DTYPES, OneBar, Session, check_device, load

if TYPE_CHECKING:
    from PIL import Image

    from ..config import SCFGConfig
    from ..regions import RegionRow, Regions


MIN_PANEL = 384


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of `generate`, one or one per line of the file."""
    if args.prompts is None:
        return [args.prompt]
    text = _read_text(args.prompts, "prompt file")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise CommandError(f"the prompt file {args.prompts!r} has no prompt; write one on every line")
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


def read_config(args: argparse.Namespace) -> SCFGConfig:
    """The configuration that `--fidelity`, `--config` and `--set` name."""
    from ..config import SCFGConfig

    if args.config is None:
        config = SCFGConfig.paper() if args.fidelity == "paper" else SCFGConfig.official()
    else:
        try:
            config = SCFGConfig.from_json(_read_text(args.config, "configuration"))
        except (ValueError, TypeError) as error:
            raise CommandError(f"the configuration {args.config!r} cannot be used: {error}") from None
    return _with_settings(config, args)


def _with_settings(config: SCFGConfig, args: argparse.Namespace) -> SCFGConfig:
    try:
        return config.replace(**dict(args.set))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--set: {error}") from None


def _config_for(session: Session, args: argparse.Namespace, config: SCFGConfig) -> SCFGConfig:
    """The configuration as it was read, or the pipeline's own published values where no other was asked for."""
    from ..pipelines.families import default_config

    if args.config is None and args.fidelity != "paper":
        return _with_settings(default_config(session.pipe), args)
    return config


def _refuse_settings_without_effect(args: argparse.Namespace) -> None:
    given = [name for name in ("fidelity", "config", "set") if getattr(args, name)]
    if given:
        raise CommandError(f"--{given[0]} sets S-CFG, and --guidance {'+'.join(args.guidance)} does not use it")


def _output_path(args: argparse.Namespace, *others: Callable[[Path], Path]) -> Path:
    """Where the result goes; proves that files can be made there before any work is done.

    Args:
        args: of the command line.
        others: for each further file, its path from the first's.
    """
    if args.out == "":
        raise CommandError("--out is empty; write a name that ends in .png, or a folder that exists")
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
    if args.no_clobber:
        there = [str(file) for file in (other(path) for other in others or (lambda path: path,)) if file.exists()]
        if there:
            raise CommandError(f"--no-clobber: {', '.join(there[:3])}{', ...' if there[3:] else ''} exists already")
    return path


def _numbered(number: int) -> Callable[[Path], Path]:
    """The name of one of several images."""
    return lambda path: path.with_name(f"{path.stem}-{number:04d}{path.suffix}")


def check_scale(scale: float | None, guidance: str) -> None:
    if scale is None:
        return
    if guidance == "scfg" and scale <= 1.0:
        raise CommandError(
            f"--guidance-scale {scale:g}: S-CFG needs a scale above 1, because at 1 there is no guidance; "
            "raise it, or make an image without guidance: generate --guidance cfg --guidance-scale 1"
        )
    if guidance == "cfg" and scale < 1.0:
        raise CommandError(f"--guidance-scale {scale:g}: CFG needs at least 1, which means no guidance")


def generate(args: argparse.Namespace) -> int:
    prompts = _read_prompts(args)
    guidance, kind = "+".join(args.guidance), "cfg" if args.guidance == ("cfg",) else "scfg"
    check_scale(args.guidance_scale, kind)
    if kind == "cfg":
        _refuse_settings_without_effect(args)
    config = read_config(args) if kind == "scfg" else None
    total = len(prompts) * args.num_images
    single = total == 1 or args.grid
    path = _output_path(args, *(() if single else map(_numbered, range(1, total + 1))))
    session = load(args)
    values = session.arguments(args)
    check_scale(values["guidance_scale"], kind)
    label = GUIDANCE_NAMES["cfg"]
    if config is not None:
        config = _config_for(session, args, config)
        handle = enable_scfg(session, config)
        with failures_as("+".join(args.guidance)):
            label = set_method(session.pipe, handle, args.guidance, values, config)
        config = handle.config
    from ..pictures.sheets import image_grid

    seeds = range(args.seed, args.seed + args.num_images)
    rows: list[list[Image.Image]] = []
    number = 0
    bar = OneBar(session.pipe, total) if total > 1 else None
    try:
        for prompt in prompts:
            note_if_cut(session, prompt)
            rows.append([])
            for seed in seeds:
                number += 1
                text = label if total == 1 else f"{number}/{total} {label}"
                image = sample_image(session, prompt, seed, values, text)
                if args.grid:
                    rows[-1].append(image)
                    continue
                target = path if total == 1 else _numbered(number)(path)
                write_png(target, image, record_of(session, prompt, [seed], values, guidance, config))
    finally:
        if bar is not None:
            bar.close()
    if args.grid:
        record = record_of(session, "\n".join(prompts), seeds, values, guidance, config)
        captions = [[f"seed {seed}" for seed in seeds]] * len(prompts)
        if len(prompts) == 1:
            columns = math.ceil(math.sqrt(total))
            rows, captions = _folded(rows[0], columns), _folded(captions[0], columns)
        grid = image_grid(
            rows,
            captions=captions,
            row_titles=prompts if len(prompts) > 1 else (),
            title=prompts[0] if len(prompts) == 1 else "",
            subtitle=caption_of(record, label),
        )
        write_png(path, grid, record)
    return 0


def _folded(items: list, columns: int) -> list[list]:
    """A list as rows of `columns` items; the last may be shorter."""
    return [items[start : start + columns] for start in range(0, len(items), columns)]


def masks(args: argparse.Namespace) -> int:
    check_scale(args.guidance_scale, "scfg")
    config = read_config(args)
    path = _output_path(args, lambda path: path, lambda path: path.with_suffix(".npz"))
    session = load(args)
    values = session.arguments(args)
    check_scale(values["guidance_scale"], "scfg")
    steps: list[Regions] = []
    config = _config_for(session, args, config)
    enable_scfg(session, config, lambda _, regions: steps.append(regions.clone().cpu()))
    from ..pictures.sheets import contact_sheet
    from ..regions import save_regions_npz

    note_if_cut(session, args.prompt)
    image = sample_image(session, args.prompt, args.seed, values, GUIDANCE_NAMES["scfg"])
    if not steps:
        raise CommandError(
            "no step was guided by S-CFG, there are no regions to show; check start and stop in --config"
        )
    labels = labels_of(session, args.prompt)
    record = record_of(session, args.prompt, [args.seed], values, "scfg", config)
    count = min(args.panels, len(steps))
    shown = [steps[round(index * (len(steps) - 1) / max(count - 1, 1))] for index in range(count)]
    sheet = contact_sheet(
        image,
        shown,
        labels,
        num_steps=session.pipe.num_timesteps,
        title=args.prompt,
        subtitle=caption_of(record, GUIDANCE_NAMES["scfg"]),
    )
    say(_format_table(shown, labels))
    write_png(path, sheet, record)
    npz = path.with_suffix(".npz")
    with writing(npz):
        save_regions_npz(npz, steps, labels=[labels], metadata=record)
    say(str(npz))
    return 0


def _format_table(steps: Sequence[Regions], labels: Sequence[str], most: int = 14) -> str:
    """Share and rate of the regions at each step, the largest regions first, as text."""
    from ..regions import region_table, row_name

    tables = [{row.token: row for row in region_table(regions, labels)} for regions in steps]
    names: dict[int, str] = {}
    shares: dict[int, float] = {}
    for table in tables:
        for token, row in table.items():
            names[token] = escaped(row_name(row, labels))
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


def compare(args: argparse.Namespace) -> int:
    check_scale(args.guidance_scale, "scfg")
    config = read_config(args)
    path = _output_path(args)
    session = load(args)
    values = session.arguments(args)
    check_scale(values["guidance_scale"], "scfg")
    steps: list[Regions] = []
    config = _config_for(session, args, config)
    handle = enable_scfg(session, config, lambda _, regions: steps.append(regions.clone()) if args.regions else None)
    from ..pictures.overlay import overlay, scaled
    from ..pictures.sheets import image_grid

    note_if_cut(session, args.prompt)
    methods = args.methods or ([("scfg",)] if args.equal_dose else [("cfg",), ("scfg",)])
    seeds = range(args.seed, args.seed + args.num_images)
    size = max(MIN_PANEL, values.get("width", 0), values.get("height", 0))
    rows: list[list[Image.Image]] = []
    captions: list[list[str]] = []
    for seed in seeds:
        rows.append([])
        captions.append([])
        steps.clear()
        for parts in methods:
            with failures_as("+".join(parts)):
                label = set_method(session.pipe, handle, parts, values, config)
            if handle.config.rates == "regions":
                steps.clear()
            if args.methods:  # first calls load and compile: not what is timed
                kept = list(steps)
                sample_image(session, args.prompt, seed, values | {"num_inference_steps": 1}, f"{label}, warm-up")
                steps[:] = kept
            started = time.perf_counter()
            image = sample_image(session, args.prompt, seed, values, label)
            took = f", {time.perf_counter() - started:.1f} s" if args.methods else ""
            rows[-1].append(scaled(image, size))
            label += f", seed {seed}" if len(seeds) > 1 else ""
            dose = handle.stats.effective_weight
            captions[-1].append(f"{label}: scale {values['guidance_scale']:.1f}, acts as {dose:.1f}{took}")
            if steps and handle.config.rates == "regions":
                regions_of = image
            if args.equal_dose and parts != ("cfg",):
                set_method(session, handle, ("cfg",), values, config)
                plain = sample_image(session, args.prompt, seed, values | {"guidance_scale": max(dose, 1.0)}, "CFG")
                rows[-1].append(scaled(plain, size))
                captions[-1].append(f"CFG: scale {max(dose, 1.0):.1f}")
        if steps:
            middle = steps[len(steps) // 2].cpu()
            labels = labels_of(session, args.prompt)
            rows[-1].append(overlay(regions_of, middle, 0, labels, size=size, legend=False))
            captions[-1].append(f"regions at step {middle.step + 1}")
    record = record_of(session, args.prompt, seeds, values, " ".join(map("+".join, methods)), config)
    grid = image_grid(rows, captions=captions, title=args.prompt, subtitle=caption_of(record))
    write_png(path, grid, record)
    return 0


def doctor(args: argparse.Namespace) -> int:
    from ..env import environment, report

    try:
        device, dtype = check_device(args.device, args.dtype)
    except CommandError:
        say(report(environment()))
        raise
    say(report(environment(device, DTYPES[dtype])))
    name = args.model or BUNDLED
    say(f"\nModel {name}")
    import scfg_fast

    session = load(args)
    support = scfg_fast.supports(session.pipe)
    say(f"  {'pipeline':<16} {type(session.pipe).__name__}, {type(session.pipe.scheduler).__name__}")
    say(f"  {'S-CFG':<16} {'supported' if support.supported else 'not supported'}")
    for index, layer in enumerate(support.layers):
        say(f"  {'captured layers' if index == 0 else '':<16} {layer}")
    for index, reason in enumerate(support.reasons):
        say(f"  {'because' if index == 0 else '':<16} {reason}")
    return 0 if support.supported else 1
