"""The bundled classifier: what it sees, its losses, and what they do to the bundled model."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

import scfg_fast
from scfg_fast import SCFGConfig, bundled_model_path
from scfg_fast.guidance import Augment, LossGuidance
from scfg_fast.models.classifier import NOUNS, SceneClassifier, bundled_classifier

CORNER = torch.zeros(16, 16, dtype=torch.bool)
CORNER[1:9, 1:9] = True


@pytest.fixture(scope="module")
def classifier() -> SceneClassifier:
    return bundled_classifier()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(bundled_model_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt: str, **kwargs) -> torch.Tensor:
    options = dict(num_inference_steps=8, guidance_scale=3.0, generator=torch.Generator().manual_seed(3)) | kwargs
    return pipe(prompt, output_type="pt", **options).images


@pytest.mark.slow
def test_it_sees_what_the_model_draws_and_nothing_else(classifier, pipe) -> None:
    for noun in ("pizza", "penguin"):
        picture = draw(pipe, f"a {noun} on a blue background")
        seen = [name for name in NOUNS if bool(classifier.found(picture, name))]
        assert seen == [noun]
        others = [classifier.presence_loss(name)(picture).item() for name in NOUNS if name != noun]
        assert classifier.presence_loss(noun)(picture).item() < min(others)


def test_losses_have_gradients_per_picture(classifier) -> None:
    pictures = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for loss in (classifier.presence_loss("star"), classifier.place_loss("star", CORNER)):
        values = loss(pictures)
        assert values.shape == (2,) and bool((values > 0).all())
        (gradient,) = torch.autograd.grad(values[0], pictures)
        assert gradient[0].abs().max() > 0 and gradient[1].abs().max() == 0


@pytest.mark.slow
def test_the_place_of_an_object_counts(classifier, pipe) -> None:
    """A drawn object costs less where it is than where it is not."""
    picture = draw(pipe, "a pizza on a blue background")
    here = classifier.logits(picture).argmax(1)[0] == 1 + NOUNS.index("pizza")
    elsewhere = here.roll((8, 8), (0, 1))
    there, away = (classifier.place_loss("pizza", mask)(picture).item() for mask in (here, elsewhere))
    assert there < 0.5 * away


@pytest.mark.slow
def test_loss_guidance_puts_the_object_where_the_mask_is(classifier, pipe) -> None:
    loss = classifier.place_loss("star", CORNER)
    picture = draw(pipe, "a yellow star on a blue background")
    settings = LossGuidance(loss, rule="freedom", scale=0.15, augment=Augment(copies=2, color=0.0), repeats=2)
    handle = scfg_fast.enable(pipe, SCFGConfig(rates="none"), loss=settings)
    try:
        moved = draw(pipe, "a yellow star on a blue background")
    finally:
        scfg_fast.disable(pipe)
    assert loss(moved).item() < 0.7 * loss(picture).item()
    assert len(handle.stats.loss_curve) == 8 * 2


@pytest.mark.parametrize("call, message", [
    (lambda c: c.presence_loss("dragon"), "'dragon' is not one of the classifier's nouns: apple"),
    (lambda c: c.found(torch.zeros(1, 3, 256, 256), "dragon"), "'dragon' is not one"),
    (lambda c: c.place_loss("star", torch.ones(16, 16)), "cells inside and cells outside"),
    (lambda c: c.place_loss("star", CORNER)(torch.zeros(1, 3, 128, 128)), r"\[16, 16\] cells, the picture \[8, 8\]"),
    (lambda c: c.logits(torch.zeros(1, 4, 64, 64)), r"\[B, 3, H, W\]"),
])  # fmt: skip
def test_bad_input(classifier, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(classifier)


def test_the_report_is_that_of_unseen_scenes(classifier) -> None:
    """The half-precision file is the network that the report is about: same answers on a picture."""
    answers = classifier.logits(torch.full((1, 3, 256, 256), 0.5)).softmax(1)
    assert bool((answers[:, 0] > 0.5).float().mean() > 0.9), "an empty picture is background"
