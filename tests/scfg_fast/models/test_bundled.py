import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from scfg_fast import models
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
