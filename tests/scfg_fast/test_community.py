"""Pipeline files for engines: loaded by `from_pretrained`, their images equal those of `enable` bit for bit."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import scfg_fast
from lab.tiny import transformers as tiny
from lab.tiny.deepfloyd import if_arguments, tiny_if_pipeline
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast.community import FILES, FOLDER, source_of
from scfg_fast.pipelines.families import FAMILIES

TEXT = {"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": 2, "output_type": "latent"}
TRANSFORMERS: dict[str, Callable[[], tiny.Tiny]] = {
    "sd3": tiny.sd3, "pixart_alpha": tiny.pixart, "hunyuan_dit": tiny.hunyuan, "sana": tiny.sana, "ltx_video": tiny.ltx,
    "flux": tiny.flux, "flux2_klein": tiny.flux2, "chroma": lambda: tiny.flux(chroma=True), "qwen_image": tiny.qwen,
    "cogview4": tiny.cogview4, "lumina2": tiny.lumina2, "z_image": tiny.z_image, "wan": tiny.wan,
    "aura_flow": tiny.auraflow,
}  # fmt: skip


Arguments = Callable[[], dict[str, Any]]


def sample(file: str) -> tuple[Any, Arguments]:
    """A tiny pipeline of the file's class, and what makes the arguments of a call."""
    if file in TRANSFORMERS:
        made = TRANSFORMERS[file]()
        return made.build(), lambda: made.call([0], torch.float32)
    if file.startswith("deepfloyd"):
        name = FILES[file]
        return tiny_if_pipeline(name, dtype=torch.float32), lambda: if_arguments(name, [0], dtype=torch.float32)
    if file == "kolors":
        base = tiny_sdxl_pipeline(sample_size=16, dtype=torch.float32)
        components = {"vae": base.vae, "unet": base.unet, "scheduler": base.scheduler}
        return diffusers.KolorsPipeline(text_encoder=None, tokenizer=None, **components), embedded
    if file == "sd":
        return tiny_sd_pipeline(sample_size=8, max_tokens=16, dtype=torch.float32), seeded
    return tiny_sdxl_pipeline(sample_size=16, dtype=torch.float32), seeded


def seeded() -> dict[str, Any]:
    return TEXT | {"generator": torch.Generator().manual_seed(4)}


def embedded() -> dict[str, Any]:
    """Prompts as embeddings: the language model of Kolors is not needed."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(4))
    return seeded() | {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": draw(1, 40, 64),
        "negative_prompt_embeds": draw(1, 40, 64),
        "pooled_prompt_embeds": draw(1, 32),
        "negative_pooled_prompt_embeds": draw(1, 32),
    }


def call(pipe: Any, arguments: Arguments, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    result = pipe(**arguments() | more | {"return_dict": False})[0]
    return torch.as_tensor(result[0] if isinstance(result, list) else result)


@pytest.mark.filterwarnings("ignore:scfg_fast. this pipeline sets every guided token back")  # Qwen-Image's own rule
@pytest.mark.parametrize("file", ["sd", "sdxl", "kolors", "deepfloyd_if", "deepfloyd_if_stage_2", *TRANSFORMERS])
def test_loaded_by_from_pretrained(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe, arguments = sample(file)
    pipe.save_pretrained(tmp_path / "model")
    base = getattr(diffusers, FILES[file])
    absent = {name: None for name, component in pipe.components.items() if component is None}
    stock = base.from_pretrained(tmp_path / "model", **absent)
    served = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(FOLDER / f"{file}.py"), trust_remote_code=True, **absent
    )
    assert isinstance(served, base) and type(served).__name__ == f"SCFG{FILES[file]}"
    assert "scfg_kwargs" in inspect.signature(served.__call__).parameters
    plain = call(stock, arguments)
    assert (call(served, arguments, scfg_kwargs={"enabled": False}) == plain).all()
    guided = call(served, arguments)
    assert (guided != plain).any()
    scfg_fast.enable(stock)
    assert (guided == call(stock, arguments)).all()
    other = {"rate_max": 1.0}
    assert (call(served, arguments, scfg_kwargs=other) == call(stock, arguments, scfg_kwargs=other)).all()


def test_every_family_has_a_file_that_the_generator_writes() -> None:
    assert list(FILES.values()) == [family.pipelines[0] for family in FAMILIES]
    for file, pipeline in FILES.items():
        assert (FOLDER / f"{file}.py").read_text(encoding="utf-8") == source_of(pipeline)


def test_the_command_prints_a_file_or_says_what_there_is() -> None:
    def run(name: str) -> subprocess.CompletedProcess:
        argv = [sys.executable, "-m", "scfg_fast.community", name]
        return subprocess.run(argv, capture_output=True, text=True, cwd=FOLDER.parents[1])

    good = run("StableDiffusionXLImg2ImgPipeline")
    assert good.returncode == 0 and good.stdout == source_of("StableDiffusionXLImg2ImgPipeline")
    bad = run("DanceDiffusionPipeline")
    assert bad.returncode == 2 and "StableDiffusionPipeline" in bad.stderr and bad.stderr.count("\n") == 1
