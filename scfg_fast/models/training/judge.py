"""A small referee that reads pictures: which object, in which colour, where, on which background.

A fully convolutional network looks at a picture at half size (128 x 128) and labels every 16-pixel cell of the original
with an object class (or background) and a colour, and the whole picture with a background class. It is trained on
scenes of its own seeds. It errs: quote its score on real scenes beside every score of generated pictures.

    python -m scfg_fast.models.training.judge --sprites package/assets --data DATA
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from scfg_fast.models.training.autoencoder import to_model_range
from scfg_fast.models.training.files import replacing
from scfg_fast.models.training.scenes import BACKGROUNDS, JUDGE_SEED, Scene, SceneRenderer
from scfg_fast.models.training.sprites import COLORS, OBJECTS, load_sprites

CELL = 16
"""Pixels per side of a judged cell in a 256-pixel picture."""

IGNORE = -100
"""Colour label of cells without a repainted object."""

FOUND_CELLS = 6
"""An object counts as present from this many cells; the smallest drawn one covers about twelve."""

_NOUNS = list(OBJECTS)


class Judge(nn.Module):
    """Dense classifier; float32 [B, 3, 128, 128] in [-1, 1] -> logits [B, 41, 16, 16], [B, 9, 16, 16] and [B, 19]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        plan = [(3, 1, 2), (1, 2, 2), (2, 2, 1), (2, 3, 2), (3, 4, 1), (4, 4, 1)]
        layers: list[nn.Module] = []
        for index, (before, after, stride) in enumerate(plan):
            inputs = before if index == 0 else before * width
            layers += [
                nn.Conv2d(inputs, after * width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(after * width),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.object_head = nn.Conv2d(4 * width, len(_NOUNS) + 1, 1)
        self.color_head = nn.Conv2d(4 * width, len(COLORS), 1)
        self.background_head = nn.Linear(4 * width, len(BACKGROUNDS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.object_head(features), self.color_head(features), self.background_head(features.mean((2, 3)))


def half_size(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [N, 256, 256, 3] -> what the judge looks at, float32 [N, 3, 128, 128]."""
    return F.avg_pool2d(to_model_range(images), 2)


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
        objects[covered] = 1 + _NOUNS.index(item.name)
        colors[covered] = COLORS.index(item.paint) if item.paint is not None else IGNORE
    return objects, colors, BACKGROUNDS.index(scene.background)


@dataclass(frozen=True)
class Verdict:
    """What one picture scored against its caption; None where the caption does not ask.

    Attributes:
        objects: share of the named objects that are there.
        exact: all named objects are there and no other is.
        colors: share of the objects with a repaint colour that are there in that colour.
        position: the stated relation holds; None unless both objects are there.
        background: the background is the stated one.
    """

    objects: float
    exact: float
    colors: float | None
    position: float | None
    background: float


@torch.no_grad()
def assess(judge: Judge, images: np.ndarray, scenes: list[Scene]) -> list[Verdict]:
    """Judge pictures against the scenes whose captions they should show.

    Args:
        images: uint8 [N, 256, 256, 3].
        scenes: N scenes; their pictures are not looked at.
    """
    verdicts = []
    for part in range(0, len(scenes), 32):
        logits = judge(half_size(images[part : part + 32]))
        for objects, colors, background, scene in zip(*logits, scenes[part : part + 32], strict=True):
            verdicts.append(_verdict(objects.argmax(0), colors, int(background.argmax()), scene))
    return verdicts


def _verdict(labels: torch.Tensor, colors: torch.Tensor, background: int, scene: Scene) -> Verdict:
    wanted = [1 + _NOUNS.index(item.name) for item in scene.objects]
    counts = torch.bincount(labels.flatten(), minlength=len(_NOUNS) + 1)
    found = [bool(counts[label] >= FOUND_CELLS) for label in wanted]
    strangers = [label for label in range(1, len(counts)) if label not in wanted and counts[label] >= FOUND_CELLS]

    color_hits = []
    for item, label, there in zip(scene.objects, wanted, found, strict=True):
        if item.paint is not None:
            votes = colors[:, labels == label].sum(1)
            color_hits.append(float(there and int(votes.argmax()) == COLORS.index(item.paint)))

    position = None
    if scene.relation is not None and all(found):
        (y0, x0), (y1, x1) = ((labels == label).nonzero().float().mean(0).tolist() for label in wanted)
        holds = {"left": x0 < x1, "right": x0 > x1, "above": y0 < y1, "below": y0 > y1}
        position = float(holds[scene.relation])
    return Verdict(
        objects=sum(found) / len(found),
        exact=float(all(found) and not strangers),
        colors=sum(color_hits) / len(color_hits) if color_hits else None,
        position=position,
        background=float(background == BACKGROUNDS.index(scene.background)),
    )


def summarise(verdicts: list[Verdict]) -> dict[str, dict[str, float]]:
    """Mean, standard error over pictures and number of pictures asked, for every field of :class:`Verdict`."""
    table = {}
    for name in ("objects", "exact", "colors", "position", "background"):
        values = np.array([v for v in (getattr(verdict, name) for verdict in verdicts) if v is not None])
        count = len(values)
        mean = float(values.mean()) if count else float("nan")
        error = float(values.std(ddof=1) / count**0.5) if count > 1 else float("nan")
        table[name] = {"mean": round(mean, 4), "standard_error": round(error, 4), "pictures": count}
    return table


def load_judge(data: str | Path) -> Judge:
    """Read the judge of ``DATA/judge``.

    Raises:
        FileNotFoundError: if it has not been trained.
    """
    path = Path(data) / "judge" / "judge.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no judge at {path}; train it with python -m scfg_fast.models.training.judge")
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


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
