"""Turn a training state into the diffusers folder that ships.

Averaged weights, float16, safetensors only. The folder is replaced as a whole; the texts beside the weights (``*.md``,
``LICENSE*``) are carried over.

    python -m training.export --data DATA --out scfg_fast/models/scenes256
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, cast

from diffusers.models import AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from training.files import replacing
from training.latents import encode_captions
from training.network import build_scheduler, build_text_encoder, build_unet
from training.tokenizer import load_tokenizer
from training.train import TrainConfig, Trainer, read_state


def build_pipeline(data: str | Path, state_path: str | Path) -> StableDiffusionPipeline:
    """The pipeline with the averaged weights of a training state, in float32.

    Args:
        data: working folder with ``vae`` and ``tokenizer``.
        state_path: a ``state.pt`` of :mod:`training.train`.
    """
    state = read_state(state_path)
    tokenizer = load_tokenizer(Path(data) / "tokenizer")
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    config = TrainConfig(**state["config"])
    trainer = Trainer(unet, text_encoder, encode_captions(tokenizer, [""])[0], config)
    trainer.load_state_dict(state["trainer"])
    trainer.use_average()
    unet.set_attn_processor(AttnProcessor2_0())
    return cast(Any, StableDiffusionPipeline)(  # its annotations forbid the None that it takes
        vae=AutoencoderTiny.from_pretrained(Path(data) / "vae"),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipeline: StableDiffusionPipeline, tokenizer_folder: str | Path, out: str | Path) -> int:
    """Write a pipeline as float16 and return the size of its weights in bytes.

    Args:
        pipeline: from :func:`build_pipeline`; its parts are converted in place.
        tokenizer_folder: where :mod:`training.tokenizer` wrote its files.
        out: folder to replace.
    """
    out = Path(out)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.half()
    with replacing(out) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        # transformers before version 5 reads these instead of tokenizer.json
        for name in ("vocab.json", "merges.txt"):
            shutil.copy2(Path(tokenizer_folder) / name, folder / "tokenizer" / name)
        _prefix_weights(folder / "text_encoder" / "model.safetensors", "text_model.")
        # transformers would load the text encoder in the stored dtype, unlike the other parts
        _edit_json(folder / "text_encoder" / "config.json", dtype="float32")
        # how this tokenizer was opened here says nothing about how users open it
        _edit_json(folder / "tokenizer" / "tokenizer_config.json", is_local=None, local_files_only=None)
        # AutoencoderTiny writes the first entry and warns when it reads it; the second is a path on this machine
        _edit_json(folder / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
        for text in (*out.glob("*.md"), *out.glob("LICENSE*")):
            shutil.copy2(text, folder / text.name)
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _prefix_weights(path: Path, prefix: str) -> None:
    """Put a prefix before the names of weights that lack it: transformers 4 needs it, 5 takes both."""
    weights = load_file(path)
    save_file(
        {name if name.startswith(prefix) else prefix + name: w for name, w in weights.items()}, path, {"format": "pt"}
    )


def _edit_json(path: Path, **changes: str | None) -> None:
    """Set entries of a JSON object, or drop those set to None."""
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if key not in changes or value is not None}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="working folder of the training")
    parser.add_argument("--name", default="main", help="run under DATA/runs")
    parser.add_argument("--state", default="state.pt", help="file in the run's folder")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    data = Path(args.data)
    pipeline = build_pipeline(data, data / "runs" / args.name / args.state)
    size = export(pipeline, data / "tokenizer", args.out)
    print(f"{args.out}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
