"""Score a pipeline on held-out captions with the judge, beside the score of real scenes.

Prompts are the captions of held-out scenes that name their background. Pictures come from plain classifier-free
guidance with the same initial noise at every scale. Two ceilings are measured on the very same scenes: as rendered, and
after a round trip through the autoencoder, which every generated picture also passes.

    python -m training.evaluate --sprites package/assets --data DATA \
        --model scfg_fast/models/scenes256 --prompts 96 --guidance 3 5 7.5 --out scores.json
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image, ImageDraw

from lab.referee import assess, load_judge, summarise
from lab.scenes import Scene, to_model_range
from training.autoencoder import to_pixels
from training.files import replacing
from training.scenes import HELD_OUT_SEED, SceneRenderer
from training.sprites import load_sprites

_OFFSET = 1000
"""Held-out scenes before this one are used elsewhere (autoencoder figures)."""


def held_out_scenes(renderer: SceneRenderer, number: int) -> list[Scene]:
    """The first ``number`` held-out full scenes whose captions are complete and free of filler words."""
    scenes: list[Scene] = []
    for seed in count(HELD_OUT_SEED + _OFFSET):
        scene = renderer.render(seed)
        if scene.plain_caption:
            scenes.append(scene)
        if len(scenes) == number:
            break
    return scenes


def generate(
    pipeline: StableDiffusionPipeline, prompts: list[str], guidance_scale: float, steps: int, batch: int = 8
) -> np.ndarray:
    """Pictures with initial noise from seed i for prompt i; uint8 [N, 256, 256, 3]."""
    pictures = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
        images = pipeline(part, guidance_scale=guidance_scale, num_inference_steps=steps, generator=generators).images
        pictures += [np.asarray(image) for image in images]
    return np.stack(pictures)


def contact_sheet(pictures: np.ndarray, captions: list[str], columns: int = 8) -> Image.Image:
    """Pictures in rows with their captions underneath."""
    side, strip = pictures.shape[1], 26
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = index % columns * side, index // columns * (side + strip)
        sheet.paste(Image.fromarray(picture), (x, y))
        words = caption.split()
        half = (len(words) + 1) // 2 if len(caption) > 40 else len(words)
        draw.multiline_text((x + 3, y + side + 1), "\n".join((" ".join(words[:half]), " ".join(words[half:]))), fill=0)
    return sheet


@torch.no_grad()
def _evaluate(args: argparse.Namespace) -> None:
    scenes = held_out_scenes(SceneRenderer(load_sprites(args.sprites)), args.prompts)
    captions = [scene.caption for scene in scenes]
    judge = load_judge(args.data)
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    real = np.stack([scene.image for scene in scenes])
    rebuilt = [pipeline.vae.decoder(pipeline.vae.encoder(to_model_range(part))) for part in np.array_split(real, 12)]
    report = {
        "prompts": len(scenes),
        "steps": args.steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "real": summarise(assess(judge, real, scenes)),
        "real_through_autoencoder": summarise(assess(judge, to_pixels(torch.cat(rebuilt)), scenes)),
        "guidance": {},
    }
    out = Path(args.out)
    for scale in args.guidance:
        start = time.time()
        pictures = generate(pipeline, captions, scale, args.steps)
        scores = summarise(assess(judge, pictures, scenes))
        seconds = round((time.time() - start) / len(scenes), 3)
        report["guidance"][f"{scale:g}"] = scores | {"seconds_per_picture": seconds}
        print(f"{scale:g}", json.dumps(report["guidance"][f"{scale:g}"]), flush=True)
        with replacing(out.with_name(f"{out.stem}-{scale:g}.png")) as path:
            contact_sheet(pictures[:32], captions[:32]).save(path, format="png")
    with replacing(out) as path:
        path.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", required=True, help="folder with the .webp sprites")
    parser.add_argument("--data", required=True, help="working folder with the judge")
    parser.add_argument("--model", required=True, help="diffusers folder to score")
    parser.add_argument("--out", required=True, help="JSON to write; contact sheets are put beside it")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 5.0, 7.5])
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    _evaluate(args)


if __name__ == "__main__":
    main()
