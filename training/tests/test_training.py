import numpy as np
import pytest
import torch

from training import files
from training.latents import LatentCache, encode_captions, scene_masks, scene_slots
from training.muon import Muon, orthogonalise
from training.network import build_text_encoder, build_unet, diffusion_loss, token_loss
from training.tokenizer import load_tokenizer, write_tokenizer
from training.train import HELD_OUT, TrainConfig, Trainer, learning_rate_scale


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def cache(renderer, tokenizer):
    """Two rendered close-ups with random latents, repeated beyond the held-out rows."""
    scenes = [renderer.render(seed, "close") for seed in range(2)]
    ids = encode_captions(tokenizer, [scene.caption for scene in scenes])
    slots = [scene_slots(s, tokenizer.convert_ids_to_tokens(row)) for s, row in zip(scenes, ids, strict=True)]
    rows = np.arange(HELD_OUT + 8)
    latents = np.random.default_rng(0).normal(size=(len(rows), 4, 16, 16)).astype(np.float16)
    masks = np.stack([scene_masks(scene) for scene in scenes])
    return LatentCache(latents, np.array(ids, np.int16)[rows % 2], masks[rows % 2], np.array(slots)[rows % 2], 1.0)


def _trainer(tokenizer, focus=(), **config):
    torch.manual_seed(0)
    empty = encode_captions(tokenizer, [""])[0]
    unet, text_encoder = build_unet((8, 8, 16, 16)), build_text_encoder(tokenizer, layers=1)
    return Trainer(unet, text_encoder, empty, TrainConfig(batch=2, **config), focus=focus)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_restored_state_continues_bit_for_bit(tokenizer, cache, tmp_path, optimizer):
    trainer = _trainer(tokenizer, optimizer=optimizer)
    for _ in range(2):
        trainer.update(cache)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    expected = [trainer.update(cache) for _ in range(2)]

    restored = _trainer(tokenizer, optimizer=optimizer)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [restored.update(cache) for _ in range(2)] == expected
    for ours, theirs in zip(
        [*restored.unet.parameters(), *restored.text_encoder.parameters(), *restored.average],
        [*trainer.unet.parameters(), *trainer.text_encoder.parameters(), *trainer.average],
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_state_of_the_other_optimizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="--optimizer adamw"):
        _trainer(tokenizer).load_state_dict(_trainer(tokenizer, optimizer="adamw").state_dict())


def test_held_out_loss_leaves_the_weights_alone(tokenizer, cache):
    trainer = _trainer(tokenizer)
    trainer.update(cache)
    before = [p.detach().clone() for p in trainer.unet.parameters()]
    assert np.isfinite(trainer.held_out_loss(cache, count=4))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.unet.parameters(), strict=True))


def test_slots_name_the_masks(renderer, tokenizer):
    scene = next(s for s in map(renderer.render, range(200)) if s.plain_caption and len(s.objects) == 2)
    tokens = tokenizer.convert_ids_to_tokens(encode_captions(tokenizer, [scene.caption])[0])
    slots = scene_slots(scene, tokens)
    for row, item in zip(slots, scene.objects, strict=False):
        assert tokens[row[0]] == f"{item.name}</w>"
        assert row[1] == -1 if item.word is None else tokens[row[1]] == f"{item.word}</w>"
    assert tokens[slots[2, 0]] in ("background</w>", "meadow</w>", "beach</w>")
    masks = scene_masks(scene).astype(int)
    assert masks.shape == (3, 16, 16) and np.abs(masks.sum(0) - 255).max() <= 2


def test_token_loss_is_zero_inside_one_outside_and_ignores_unnamed_rows():
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 0, :2], masks[0, 2, 2:] = 1.0, 1.0
    slots = torch.tensor([[[1, -1], [-1, -1], [-1, -1]]])
    inside = torch.zeros(1, 4, 4, 3)
    inside[0, :2, :, 1] = 0.1
    weight = torch.ones(1)
    assert token_loss([inside.view(1, 16, 3)], masks, slots, weight).item() == pytest.approx(0.0, abs=1e-6)
    assert token_loss([inside.flip(1).reshape(1, 16, 3)], masks, slots, weight).item() == pytest.approx(1.0)
    assert token_loss([inside.view(1, 16, 3)], masks, torch.full_like(slots, -1), weight).item() == 0.0


def test_diffusion_loss_vanishes_at_the_true_velocity():
    latents, noise, alphas = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.1])
    a = alphas.view(-1, 1, 1, 1)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    assert diffusion_loss(velocity, latents, noise, alphas).item() == 0.0
    assert diffusion_loss(velocity + 0.5, latents, noise, alphas).item() == pytest.approx(0.25, rel=1e-5)


def test_muon_flattens_the_spectrum_and_refuses_vectors():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 60)))
    assert values.min() > 0.5 and values.max() < 1.3
    assert orthogonalise(torch.randn(60, 24)).shape == (60, 24)
    with pytest.raises(ValueError, match="two dimensions"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_learning_rate_falls_to_zero_at_the_end_only():
    scales = [learning_rate_scale(second, 100.0, 20.0) for second in (0, 79, 80, 90, 100)]
    assert scales[:3] == [1.0, 1.0, 1.0]
    assert scales[3:] == pytest.approx([0.5, 0.0])
    assert learning_rate_scale(99.0, 100.0, 0.0) == 1.0


def test_a_failed_write_leaves_the_old_artefact(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(RuntimeError), files.replacing(target) as folder:
        folder.mkdir()
        raise RuntimeError("disk full")
    assert (target / "weights").read_text() == "old"
    with files.replacing(target) as folder:
        folder.mkdir()
        (folder / "weights").write_text("new")
    assert (target / "weights").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_focus_draws_scenes_of_its_words_that_many_times_as_often(tokenizer, cache):
    scenes_differ = cache.tokens[0] != cache.tokens[1]
    word = int(cache.tokens[0][scenes_differ][0])
    assert word not in cache.tokens[1]
    trainer = _trainer(tokenizer, focus=(word,), focus_weight=4.0)
    generator = torch.Generator().manual_seed(0)
    rows = np.concatenate([trainer._draw_rows(cache, generator) for _ in range(600)])
    assert rows.max() < len(cache) - HELD_OUT
    assert np.mean(rows % 2 == 0) == pytest.approx(0.8, abs=0.04)


def test_logit_normal_timesteps_leave_the_ends_thin(tokenizer, cache, monkeypatch):
    trainer, seen = _trainer(tokenizer, timesteps="logit-normal"), []
    inner = trainer._losses
    monkeypatch.setattr(trainer, "_losses", lambda b, t, c, steps, n: seen.append(steps) or inner(b, t, c, steps, n))
    for _ in range(40):
        trainer.update(cache)
    steps = torch.cat(seen).double()
    assert steps.min() >= 0 and steps.max() <= 999
    # sigmoid(0.3) = 0.574 is the median; the outer tenths hold 1.8 % and 5.7 % of the mass.
    assert steps.median() == pytest.approx(574, abs=60)
    assert (steps < 100).double().mean() < 0.05


def test_an_unknown_distribution_of_timesteps_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'uniform' or 'logit-normal', not 'cosine'"):
        _trainer(tokenizer, timesteps="cosine")
