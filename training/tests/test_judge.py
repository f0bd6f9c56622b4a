import numpy as np
import torch

from lab.referee import Verdict, _verdict, summarise
from scfg_fast.models.classifier import CELL, Judge
from scfg_fast.models.vocabulary import BACKGROUNDS, COLORS, OBJECTS
from training.judge import IGNORE, targets

NOUNS = list(OBJECTS)


def _two_object_scene(renderer):
    return next(s for s in map(renderer.render, range(100)) if s.relation == "left" and s.objects[0].paint)


def test_targets_follow_the_masks(renderer):
    scene = _two_object_scene(renderer)
    objects, colors, background = targets(scene)
    assert BACKGROUNDS[background] == scene.background
    for mask, item in zip(scene.masks, scene.objects, strict=True):
        rows, columns = np.nonzero(mask)
        cell = int(rows.mean()) // CELL, int(columns.mean()) // CELL
        assert objects[cell] == 1 + NOUNS.index(item.name)
        assert colors[cell] == (COLORS.index(item.paint) if item.paint else IGNORE)
    assert set(np.unique(objects)) == {0, *(1 + NOUNS.index(item.name) for item in scene.objects)}


def test_a_perfect_reading_scores_one_and_a_swapped_one_fails_only_the_position(renderer):
    scene = _two_object_scene(renderer)
    objects, colors, background = targets(scene)
    logits = torch.nn.functional.one_hot(torch.from_numpy(colors).clamp_min(0), len(COLORS)).permute(2, 0, 1).float()
    perfect = _verdict(torch.from_numpy(objects), logits, background, scene)
    assert perfect == Verdict(1.0, 1.0, 1.0, 1.0, 1.0)
    mirrored = _verdict(torch.from_numpy(objects[:, ::-1].copy()), logits.flip(2), background, scene)
    assert mirrored == Verdict(1.0, 1.0, 1.0, 0.0, 1.0)
    empty = _verdict(torch.zeros_like(torch.from_numpy(objects)), logits, background, scene)
    assert (empty.objects, empty.exact, empty.colors, empty.position) == (0.0, 0.0, 0.0, None)


def test_summary_counts_only_the_pictures_that_were_asked():
    verdicts = [Verdict(1.0, 1.0, None, 1.0, 1.0), Verdict(0.5, 0.0, 1.0, None, 1.0)]
    table = summarise(verdicts)
    assert table["objects"] == {"mean": 0.75, "standard_error": 0.25, "pictures": 2}
    assert table["position"]["pictures"] == 1 and table["position"]["mean"] == 1.0


def test_logit_shapes():
    objects, colors, background = Judge(width=4).eval()(torch.zeros(2, 3, 128, 128))
    assert objects.shape == (2, len(OBJECTS) + 1, 16, 16)
    assert colors.shape == (2, len(COLORS), 16, 16) and background.shape == (2, len(BACKGROUNDS))
