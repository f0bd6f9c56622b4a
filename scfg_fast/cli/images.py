"""Images of a session, and files of them with a record of how they were made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .errors import CommandError, failures_as, one_line, say, writing
from .session import Session

if TYPE_CHECKING:
    from PIL import Image

    from ..config import SCFGConfig
    from ..regions import Regions


def enable_scfg(session: Session, config: SCFGConfig, on_regions: Callable[[int, Regions], None] | None = None) -> Any:
    import scfg_fast

    support = scfg_fast.supports(session.pipe, config)
    if not support.supported:
        raise CommandError(
            f"--model: {session.model!r} cannot use S-CFG: {'; '.join(support.reasons)}; plain CFG works with: "
            "generate --guidance cfg"
        )
    return scfg_fast.enable(session.pipe, config, on_regions=on_regions, strict=True)


def sample_image(session: Session, prompt: str, seed: int, values: dict[str, Any], label: str) -> Image.Image:
    """One image. Raises `CommandError` if the pipeline fails or the picture is not made of finite numbers."""
    import numpy as np
    import torch
    from PIL import Image

    session.pipe.set_progress_bar_config(desc=f"{label}, seed {seed}", **({"disable": True} if session.quiet else {}))
    # Noise from the CPU is the same on every device.
    generator = torch.Generator("cpu").manual_seed(seed)
    with failures_as(f"making the image for {prompt!r} with seed {seed} failed"):
        result = session.pipe(prompt, generator=generator, output_type="np", **values)
    pixels = np.asarray(result.images[0])
    if not np.isfinite(pixels).all():
        raise CommandError(
            f"the image for {prompt!r} with seed {seed} has values that are not numbers (overflow in {session.dtype}); "
            "try --dtype fp32 or bf16, or a smaller --guidance-scale",
            1,
        )
    if any(getattr(result, "nsfw_content_detected", None) or []):
        note(session, f"the model's safety checker made the image for {prompt!r} with seed {seed} black")
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def note(session: Session, text: str) -> None:
    if not session.quiet:
        print(f"scfg-fast: note: {one_line(text)}", file=sys.stderr)


def note_if_cut(session: Session, prompt: str) -> None:
    """Tell the user what part of a long prompt the model will not read."""
    from ..pipelines.call import tokenizer_of

    tokenizer = tokenizer_of(session.pipe)
    if tokenizer is None:
        return
    ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        cut = tokenizer.decode(ids[limit - 1 : -1]).strip()
        note(session, f"the prompt is {len(ids)} tokens long and the model reads {limit}; it will not see {cut!r}")


def labels_of(session: Session, prompt: str) -> list[str]:
    from ..pipelines.call import tokenizer_of
    from ..regions import token_labels

    tokenizer = tokenizer_of(session.pipe)
    return token_labels(tokenizer, prompt, tokenizer.model_max_length)


def record_of(
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


def caption_of(record: dict[str, Any], guidance: str = "") -> str:
    """The settings in a line for people."""
    seeds = record["seed"].split()
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    parts = [guidance, f"guidance scale {record['guidance_scale']}", seed, f"{record['steps']} steps"]
    parts += [record["scheduler"].removesuffix("Scheduler"), record.get("size", ""), f"model {record['model']}"]
    if record["negative_prompt"]:
        parts.append(f"without: {record['negative_prompt']}")
    return ", ".join(part for part in parts if part)


def write_png(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Write a picture with its record as PNG text, whole or not at all, and print its path."""
    from PIL import PngImagePlugin

    from ..files import replacing

    info = PngImagePlugin.PngInfo()
    for key, value in record.items():
        info.add_text(key, str(value))
    with writing(path), replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)
    say(str(path))
