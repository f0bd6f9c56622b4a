"""The classifier that ships with the bundled model, and losses made of it.

It looks at a 256 x 256 picture and says for every 16-pixel cell which of the 40 nouns it sees there, if any. As a loss
it steers the bundled model without training (`scfg_fast.guidance.LossGuidance`)::

    classifier = bundled_classifier()
    loss = LossGuidance(classifier.presence_loss("star"), augment=Augment())
    loss = LossGuidance(classifier.place_loss("star", mask))

It was trained on rendered scenes by ``training.judge``; ``classifier/report.json`` has its score on
scenes that it never saw. It errs, and what was steered by it must be scored by another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .vocabulary import BACKGROUNDS, COLORS, OBJECTS

NOUNS = tuple(OBJECTS)
"""The nouns, in the order of the classifier's classes 1 to 40; class 0 is background."""

CELL = 16
"""Pixels per side of a judged cell in a 256-pixel picture."""

PRESENT_CELLS = 12
"""Cells that an object is asked to fill; the smallest drawn one covers about as many."""

_FILE = Path(__file__).parent / "classifier" / "model.safetensors"

Loss = Callable[[torch.Tensor], torch.Tensor]


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
        self.object_head = nn.Conv2d(4 * width, len(NOUNS) + 1, 1)
        self.color_head = nn.Conv2d(4 * width, len(COLORS), 1)
        self.background_head = nn.Linear(4 * width, len(BACKGROUNDS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.object_head(features), self.color_head(features), self.background_head(features.mean((2, 3)))


class SceneClassifier:
    """Nouns in pictures, differentiable.

    Args:
        judge: the network; its weights never change here.

    Attributes:
        network: the same.
    """

    def __init__(self, judge: Judge) -> None:
        self.network = judge.eval().requires_grad_(False)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 16h, 16w] in about [0, 1] -> [B, 41, h, w], logits of background and the nouns in every cell; trained
        at 256 x 256.

        Raises:
            ValueError: another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % CELL or images.shape[3] % CELL:
            raise ValueError(
                f"SceneClassifier: pictures must be [B, 3, H, W] with sides that are multiples of {CELL}, got "
                f"{list(images.shape)}"
            )
        if next(self.network.parameters()).device != images.device:
            self.network.to(images.device)
        return self.network(F.avg_pool2d(images.float() * 2.0 - 1.0, 2))[0]

    def found(self, images: torch.Tensor, noun: str) -> torch.Tensor:
        """[B] bool: whether each picture shows the noun, in at least half as many cells as the smallest drawn one."""
        label = 1 + _index(noun)
        return (self.logits(images).argmax(1) == label).sum((1, 2)) >= PRESENT_CELLS // 2

    def presence_loss(self, noun: str) -> Loss:
        """A loss that is small where the picture shows the noun: -log of its mean probability over the `PRESENT_CELLS`
        cells where it is most probable.

        Returns:
            [B, 3, H, W] in about [0, 1] -> [B].

        Raises:
            ValueError: not one of `NOUNS`.
        """
        label = 1 + _index(noun)

        def loss(images: torch.Tensor) -> torch.Tensor:
            probability = self.logits(images).log_softmax(1)[:, label].flatten(1)
            best = probability.topk(min(PRESENT_CELLS, probability.shape[1]), dim=1).values
            return -(best.logsumexp(1) - best.new_tensor(best.shape[1]).log())

        return loss

    def place_loss(self, noun: str, mask: torch.Tensor) -> Loss:
        """A loss that is small where the noun fills a mask and nothing else does: cross-entropy of the cells, inside
        for the noun and outside for background, each side's mean.

        Args:
            noun: one of `NOUNS`.
            mask: [h, w] bool, cells of the picture (16 x 16 for 256 pixels).

        Returns:
            [B, 3, 16h, 16w] in about [0, 1] -> [B].

        Raises:
            ValueError: not one of `NOUNS`; or a mask without an inside or an outside, or for another size of picture.
        """
        label = 1 + _index(noun)
        inside = mask.bool()
        share = inside.float() / inside.sum().clamp(min=1)  # weights, as indexing by a mask waits for the device
        rest = (~inside).float() / (~inside).sum().clamp(min=1)
        if inside.dim() != 2 or bool(inside.all()) or not bool(inside.any()):
            raise ValueError("place_loss: mask must be [h, w] with cells inside and cells outside")

        def loss(images: torch.Tensor) -> torch.Tensor:
            log_probability = self.logits(images).log_softmax(1)
            cells = log_probability.shape[2:]
            if cells != inside.shape:
                raise ValueError(f"place_loss: the mask has {list(inside.shape)} cells, the picture {list(cells)}")
            there = (log_probability[:, label] * share.to(images.device)).sum((1, 2))
            return -there - (log_probability[:, 0] * rest.to(images.device)).sum((1, 2))

        return loss


def bundled_classifier() -> SceneClassifier:
    """Read the bundled classifier.

    Raises:
        FileNotFoundError: the file is missing, as in an installation without package data.
    """
    if not _FILE.is_file():
        raise FileNotFoundError(f"the bundled classifier {_FILE} is missing; reinstall the package")
    weights = load_file(_FILE)
    judge = Judge()
    judge.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    return SceneClassifier(judge)


def _index(noun: str) -> int:
    if noun not in NOUNS:
        raise ValueError(f"{noun!r} is not one of the classifier's nouns: {', '.join(NOUNS)}")
    return NOUNS.index(noun)
