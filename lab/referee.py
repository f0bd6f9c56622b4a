"""Scores of pictures against the scenes that they should show, by a trained `Judge`.

The judge errs: quote its score on real scenes alongside every score of generated pictures. `python -m training.judge`
trains one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lab.scenes import Scene, to_model_range
from scfg_fast.models.classifier import NOUNS, Judge
from scfg_fast.models.vocabulary import BACKGROUNDS, COLORS

FOUND_CELLS = 6
"""An object counts as present from this many cells; the smallest drawn one covers about twelve."""


def half_size(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [N, 256, 256, 3] -> what the judge looks at, float32 [N, 3, 128, 128]."""
    return F.avg_pool2d(to_model_range(images), 2)


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
    wanted = [1 + NOUNS.index(item.name) for item in scene.objects]
    counts = torch.bincount(labels.flatten(), minlength=len(NOUNS) + 1)
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
        raise FileNotFoundError(f"no judge at {path}; train it with python -m training.judge")
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()
