"""A small referee that reads pictures: which object, in which colour, where, on which background.

A fully convolutional network looks at a picture at half size (128 x 128) and labels every 16-pixel cell of the original
with an object class (or background) and a colour, and the whole picture with a background class. It is trained on
scenes of its own seeds. It errs: quote its score on real scenes beside every score of generated pictures.

    python -m training.judge --sprites package/assets --data DATA
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lab.referee import assess, half_size, summarise
from lab.scenes import Scene
from scfg_fast.models.classifier import CELL, NOUNS, Judge
from scfg_fast.models.vocabulary import BACKGROUNDS, COLORS
from training.files import replacing
from training.scenes import JUDGE_SEED, SceneRenderer
from training.sprites import load_sprites

IGNORE = -100
"""Colour label of cells without a repainted object."""


def targets(scene: Scene) -> tuple[np.ndarray, np.ndarray, int]:
    """What the judge should say of a scene.

    Returns:
        objects: int64 [16, 16], 0 for background, else 1 + index into OBJECTS, where an object covers 40 % of the cell.
        colors: int64 [16, 16], index into COLORS where a repainted object is, else IGNORE.
        background: index into BACKGROUNDS.
    """
    cells = scene.image.shape[0] // CELL
    objects = np.zeros((cells, cells), np.int64)
    colors = np.full((cells, cells), IGNORE, np.int64)
    for mask, item in zip(scene.masks, scene.objects, strict=True):
        covered = mask.reshape(cells, CELL, cells, CELL).mean((1, 3)) > 0.4
        objects[covered] = 1 + NOUNS.index(item.name)
        colors[covered] = COLORS.index(item.paint) if item.paint is not None else IGNORE
    return objects, colors, BACKGROUNDS.index(scene.background)


def _train(args: argparse.Namespace) -> None:
    renderer = SceneRenderer(load_sprites(args.sprites))
    images, labels = [], []
    for first in range(0, args.scenes, 100):
        scenes = [renderer.render(JUDGE_SEED + first + i) for i in range(100)]
        images.append(half_size(np.stack([scene.image for scene in scenes])).half())
        labels += [targets(scene) for scene in scenes]
    pictures = torch.cat(images)
    objects, colors, backgrounds = (torch.from_numpy(np.array(column)) for column in zip(*labels, strict=True))

    torch.manual_seed(args.seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), args.learning_rate, weight_decay=1e-3)
    steps = args.epochs * (args.scenes // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    start = time.time()
    for epoch in range(args.epochs):
        order = torch.randperm(args.scenes)
        for rows in order[: args.scenes // args.batch * args.batch].split(args.batch):
            x = pictures[rows].float()
            if torch.rand(()) < 0.5:  # generated pictures are softer than rendered ones
                x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
            x = x + 0.15 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
            object_logits, color_logits, background_logits = judge(x)
            loss = F.cross_entropy(object_logits, objects[rows])
            loss = loss + 0.5 * F.cross_entropy(color_logits, colors[rows], ignore_index=IGNORE)
            loss = loss + 0.3 * F.cross_entropy(background_logits, backgrounds[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} {time.time() - start:.0f}s loss {loss.item():.3f}", flush=True)

    judge.eval()
    held_out = [renderer.render(JUDGE_SEED + args.scenes + i) for i in range(256)]
    report = {
        "scenes": args.scenes,
        "epochs": args.epochs,
        "seed": args.seed,
        "real_scenes": summarise(assess(judge, np.stack([scene.image for scene in held_out]), held_out)),
    }
    print(json.dumps(report), flush=True)
    with replacing(Path(args.data) / "judge") as folder:
        folder.mkdir()
        save_file(judge.state_dict(), folder / "judge.safetensors")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", required=True, help="folder with the .webp sprites")
    parser.add_argument("--data", required=True, help="working folder; writes DATA/judge")
    parser.add_argument("--scenes", type=int, default=5000, help="training scenes, a multiple of 100")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    _train(args)


if __name__ == "__main__":
    main()
