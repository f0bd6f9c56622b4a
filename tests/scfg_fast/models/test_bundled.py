import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from scfg_fast import models
from scfg_fast.models.loading import load_pipeline
from scfg_fast.models.vocabulary import vocabulary


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(models.bundled_model_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_folder_holds_less_than_20_mb_of_safetensors_and_no_pickle():
    files = [path for path in models.bundled_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ""}
    assert any(path.name.startswith("LICENSE") for path in files)


@pytest.mark.slow
def test_it_draws_256_pixels_from_a_prompt(pipeline):
    prompt = "a red apple left of a blue car on a green background"
    images = [
        np.asarray(pipeline(prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0])
        for _ in range(2)
    ]
    assert images[0].shape == (256, 256, 3)
    assert images[0].std() > 5
    assert np.array_equal(*images)
    latents = pipeline(prompt, num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, 4, 64, 64) and torch.isfinite(latents).all()


def test_the_shipped_tokenizer_has_every_vocabulary_word_as_one_token(pipeline):
    assert [word for word in vocabulary() if len(pipeline.tokenizer(word).input_ids) != 3] == []


def test_all_parts_load_in_one_dtype(pipeline):
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"unet/diffusion_pytorch_model\.safetensors"):
        models.bundled_model_path()


def test_every_weight_is_in_its_place(pipeline):
    """In whichever transformers runs this: version 4 wants names that version 5 drops."""
    folder = models.bundled_model_path()
    checked = models.bundled_pipeline()
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    for pipe in (pipeline, checked):
        loaded = {name.removeprefix("text_model."): w for name, w in pipe.text_encoder.state_dict().items()}
        loaded.pop("embeddings.position_ids", None)
        assert loaded.keys() == {name.removeprefix("text_model.") for name in stored}
        assert all(torch.equal(loaded[name.removeprefix("text_model.")], w.float()) for name, w in stored.items())
    for name in ("unet", "vae"):
        assert all(
            torch.equal(w, getattr(pipeline, name).state_dict()[key])
            for key, w in getattr(checked, name).state_dict().items()
        )


DAMAGES = {
    "missing": (lambda w: w.popitem(), "has 1 missing, such as"),
    "unexpected": (lambda w: w.update(stray=torch.zeros(2)), "has 1 without a place, such as stray"),
    "all renamed": (
        lambda w: [w.update({f"old.{name}": w.pop(name)}) for name in list(w)],
        r"has \d+ missing, such as",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", models._WEIGHTS)
def test_weights_that_do_not_fit_are_named(monkeypatch, tmp_path, file, damage):
    change, message = DAMAGES[damage]
    folder = shutil.copytree(models.bundled_model_path(), tmp_path / "model")
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, {"format": "pt"})
    monkeypatch.setattr(models, "_FOLDER", folder)
    with pytest.raises(ValueError, match=f"{file.split('/')[0]} {message}"):
        models.bundled_pipeline()


INDEXES = {
    "[1, 2]": "must be a JSON object, it is list",
    "null": "must be a JSON object, it is NoneType",
    "{": "is not JSON",
    "{}": "does not say in _class_name",
    '{"_class_name": "Nope"}': "'Nope', which is no pipeline of diffusers",
    '{"_class_name": "StableDiffusionPipeline", "unet": ["beside", "Model"]}': "unet names 'Model' of 'beside'",
    '{"_class_name": "StableDiffusionPipeline", "unet": 5, "vae": ["diffusers"]}': r"vae must be \[library, class\]",
    '{"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}': "tokenizer, which",
}


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_is_checked_before_anything_is_imported(tmp_path, monkeypatch, index):
    (tmp_path / "beside.py").write_text("raise SystemExit('ran')")
    (tmp_path / "model_index.json").write_text(index)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=INDEXES[index]):
        load_pipeline(tmp_path)


GREYS = """
139 134 135 138 141 141 137 136
137 139 138 135 135 133 133 134
128 150 139 135 132 132 130 131
108 122 136 152 135 136 132 134
 98  94 115 131 129 135 145 135
112  88  89 109 137 140 142 135
121 119 117 118 105 100  96  95
119 119 119 121 123 123 118 116
"""
"""Means of the picture below in 8 x 8 squares, of 255, in diffusers 0.32.2 to 0.42.1."""


def test_the_picture_is_the_same_in_every_version(pipeline):
    image = pipeline(
        "a red apple left of a blue car on a green background", num_inference_steps=8, guidance_scale=5.0,
        output_type="np", generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    means = 255 * image.reshape(8, 32, 8, 32, 3).mean((1, 3, 4))
    assert np.abs(means - np.array(GREYS.split(), int).reshape(8, 8)).max() < 1.0
