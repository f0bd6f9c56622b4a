"""The command line, run for real on a small pipeline: what it makes, what it says, and what it refuses."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import scfg_fast
from lab.tiny.unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from scfg_fast import SCFGConfig
from scfg_fast.cli import commands, images, main
from scfg_fast.cli.errors import CommandError, explain
from scfg_fast.guidance import CFGPlusPlus, WeightSchedule
from scfg_fast.guidance.cfgpp import lam_for_mean_weight
from scfg_fast.models import bundled_pipeline
from scfg_fast.pictures import sheets
from scfg_fast.regions import Regions, token_labels

PROMPT = "a red cat on the blue sea"
ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr."""
        assert self.err.endswith("\n") and self.err.count("\n") == 1, f"not one line: {self.err!r}"
        return self.err


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd_pipeline(sample_size=8, max_tokens=16, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> Result:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as error:
            status = int(error.code or 0)
        return Result(status, *capsys.readouterr())

    return call


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def text_of(path: str | Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


def sample(pipe: diffusers.StableDiffusionPipeline, seed: int = 0, **kwargs) -> np.ndarray:
    """What a diffusers user gets from the pipeline, as bytes."""
    options = {"num_inference_steps": 3, "output_type": "np"} | kwargs
    image = pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(seed), **options).images[0]
    return (image * 255).round().astype(np.uint8)


def open_pipeline(folder: Path) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Making images


def test_generate_is_what_the_library_makes(run: Run, model: Path) -> None:
    result = run("generate", PROMPT, "--model", model, "--steps", 3, "--guidance-scale", 5, "--seed", 4)
    assert (result.status, result.out) == (0, "scfg.png\n")
    pipe = open_pipeline(model)
    scfg_fast.enable(pipe)
    assert (pixels("scfg.png") == sample(pipe, 4, guidance_scale=5.0)).all()
    assert os.listdir() == ["scfg.png"]


METHODS = ["cfg", "scfg", "paper", "linear", "clamp-cosine:2", "interval:0.2:0.8", "cfgpp", "scfg+sine"]


@pytest.mark.slow
def test_compare_shows_a_column_for_every_method(run: Run, model: Path) -> None:
    options = ("--model", model, "--steps", 4, "--guidance-scale", 5)
    assert run("compare", PROMPT, *options, "--out", "two.png").status == 0
    assert run("compare", PROMPT, *options, "--methods", *METHODS, "--regions", "--out", "all.png").status == 0
    assert text_of("all.png")["guidance"] == " ".join(METHODS)
    two, many = pixels("two.png"), pixels("all.png")
    assert many.shape[1] > 3.5 * two.shape[1]


@pytest.mark.slow
def test_compare_at_equal_dose_adds_plain_guidance_at_the_scale_that_the_method_acts_as(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float]] = []
    captions: list[list[str]] = []
    call = images.sample_image

    def sampled(session, prompt, seed, values, label):
        picture = call(session, prompt, seed, values, label)
        handle = scfg_fast.enable(session.pipe, SCFGConfig(rates="none")) if label == "CFG" else None
        asked.append((values["guidance_scale"], 0.0 if handle is None else handle.stats.effective_weight))
        return picture

    grid = sheets.image_grid
    monkeypatch.setattr(commands, "sample_image", sampled)
    monkeypatch.setattr(sheets, "image_grid", lambda *a, **kw: captions.extend(kw["captions"]) or grid(*a, **kw))
    options = ("--model", model, "--steps", 3, "--seed", 4, "--guidance-scale", 5, "--equal-dose")
    assert run("compare", PROMPT, *options).status == 0
    (first, _), (second, plain) = asked
    assert first == 5.0 != second and plain == pytest.approx(second, rel=1e-6)
    assert captions == [[f"S-CFG: scale 5.0, acts as {second:.1f}", f"CFG: scale {second:.1f}"]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "scfg+cosine", "cfgpp", "interval:0.2:0.8"])
def test_generate_with_a_schedule_is_what_the_library_makes(run: Run, model: Path, method: str) -> None:
    options = ("--model", model, "--steps", 3, "--seed", 4, "--guidance-scale", 5)
    assert run("generate", PROMPT, *options, "--guidance", method).status == 0
    pipe = open_pipeline(model)
    if method == "cfgpp":
        schedule = CFGPlusPlus(lam_for_mean_weight(5.0, pipe.scheduler, 3))
    elif method.startswith("interval"):
        schedule = WeightSchedule(interval=(0.2, 0.8))
    else:
        schedule = WeightSchedule(method.split("+")[-1])
    scfg_fast.enable(pipe, None if "scfg" in method else SCFGConfig(rates="none"), schedule=schedule)
    assert (pixels("scfg.png") == sample(pipe, 4, guidance_scale=5.0)).all()
    assert text_of("scfg.png")["guidance"] == method


@pytest.mark.parametrize("method, message", [
    ("magic", "'magic' is unknown; use cfg, scfg"), ("scfg+paper", "at most one of cfg, scfg, paper"),
    ("linear+sine", "at most one of linear"), ("interval", "'interval': write interval:START:STOP, in numbers"),
    ("clamp-linear:two", "write clamp-linear:FLOOR, in numbers"), ("linear:2", "'linear:2': write linear"),
])  # fmt: skip
def test_methods_that_make_no_sense(run: Run, method: str, message: str) -> None:
    result = run("generate", PROMPT, "--guidance", method)
    assert result.status == 2 and message in result.error


@pytest.mark.slow
def test_a_model_of_the_xl_family(run: Run, tmp_path: Path) -> None:
    pipe = tiny_sdxl_pipeline(sample_size=16, dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "xl")
    options = ("--model", tmp_path / "xl", "--steps", 3, "--seed", 4, "--guidance-scale", 5)
    assert run("generate", PROMPT, *options).status == 0
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")  # weights where a file's are in memory
    scfg_fast.enable(pipe)
    assert (pixels("scfg.png") == sample(pipe, 4, guidance_scale=5.0)).all()
    assert run("masks", PROMPT, *options, "--out", "masks.png").status == 0
    assert np.load("masks.npz")["labels"][0, 0] == "<start>"


@pytest.mark.slow
def test_generate_cfg_is_the_stock_pipeline_with_its_own_defaults(run: Run, model: Path) -> None:
    assert run("generate", PROMPT, "--model", model, "--steps", 3, "--guidance", "cfg").status == 0
    assert (pixels("scfg.png") == sample(open_pipeline(model))).all()
    text = text_of("scfg.png")
    assert (text["guidance"], text["guidance_scale"], text["size"]) == ("cfg", "7.5", "64x64")
    assert "scfg_config" not in text
    assert (
        run("generate", PROMPT, "--model", model, "--steps", 3, "--guidance", "cfg", "--guidance-scale", 1).status == 0
    )
    assert (pixels("scfg.png") == sample(open_pipeline(model), guidance_scale=1.0)).all()


def test_stderr_is_the_progress_alone_and_the_libraries_get_their_voices_back(run: Run, model: Path) -> None:
    before = diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()
    result = run("generate", PROMPT, "--model", model, "--steps", 3)
    lines = [line for line in re.split(r"[\r\n]+", result.err) if line.strip()]
    assert lines and all(line.startswith("S-CFG, seed 0: ") for line in lines)
    assert "3/3" in lines[-1]
    assert (diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()) == before


@pytest.mark.slow
def test_several_images_are_each_reproducible_alone(run: Run, model: Path) -> None:
    options = ("--model", model, "--steps", 2, "--size", "64x72")
    result = run("generate", PROMPT, *options, "--num-images", 3, "--seed", 7, "--out", "many.png")
    assert result.out.split() == ["many-0001.png", "many-0002.png", "many-0003.png"]
    assert sorted(os.listdir()) == result.out.split()
    assert run("generate", PROMPT, *options, "--seed", 8, "--out", "one.png").status == 0
    assert (pixels("many-0002.png") == pixels("one.png")).all()
    assert (pixels("many-0001.png") != pixels("one.png")).any()
    assert text_of("many-0002.png") == text_of("one.png")
    assert pixels("one.png").shape == (72, 64, 3)


@pytest.mark.slow
def test_the_record_in_the_picture_makes_it_again(run: Run, model: Path) -> None:
    Path("paper.json").write_text(scfg_fast.SCFGConfig.paper(rate_max=1.5).to_json())
    first = run(
        "generate", PROMPT, "--model", model, "--steps", 3, "--negative", "a dog, café", "--guidance-scale", 4.5,
        "--config", "paper.json", "--seed", 11, "--size", 72,
    )  # fmt: skip
    assert first.status == 0
    text = text_of("scfg.png")
    assert text["software"] == f"scfg-fast {scfg_fast.__version__}"
    assert json.loads(text["scfg_config"]) == scfg_fast.SCFGConfig.paper(rate_max=1.5).to_dict()
    Path("again.json").write_text(text["scfg_config"])
    again = run(
        "generate", text["prompt"], "--model", text["model"], "--steps", text["steps"], "--negative",
        text["negative_prompt"], "--guidance-scale", text["guidance_scale"], "--guidance", text["guidance"],
        "--config", "again.json", "--seed", text["seed"], "--size", text["size"], "--dtype", text["dtype"],
        "--out", "again.png",
    )  # fmt: skip
    assert again.status == 0
    assert (pixels("again.png") == pixels("scfg.png")).all() and text_of("again.png") == text


@pytest.mark.slow
def test_fidelity_changes_the_picture(run: Run, model: Path) -> None:
    for fidelity in ("official", "paper"):
        assert run(
            "generate", PROMPT, "--model", model, "--steps", 2, "--fidelity", fidelity, "--out", f"{fidelity}.png"
        )
    assert (pixels("official.png") != pixels("paper.png")).any()
    assert json.loads(text_of("paper.png")["scfg_config"])["fidelity"] == "paper"


@pytest.mark.slow
def test_bf16_runs_on_the_cpu(run: Run, model: Path) -> None:
    assert run("generate", PROMPT, "--model", model, "--steps", 2, "--dtype", "bf16", "--device", "cpu").status == 0
    assert text_of("scfg.png")["dtype"] == "bf16"
    assert pixels("scfg.png").std() > 1


@pytest.mark.slow
def test_a_prompt_file_makes_a_picture_for_every_line(run: Run, model: Path) -> None:
    Path("prompts.txt").write_text("a red cat\r\n\n  a blue dog  \n", encoding="utf-8")
    Path("out").mkdir()
    result = run(
        "generate", "--prompts", "prompts.txt", "--model", model, "--steps", 1, "--num-images", 2, "--out", "out"
    )
    assert result.out.split() == [f"out/scfg-000{number}.png" for number in (1, 2, 3, 4)]
    records = [text_of(name) for name in result.out.split()]
    assert [(r["prompt"], r["seed"]) for r in records] == [
        ("a red cat", "0"), ("a red cat", "1"), ("a blue dog", "0"), ("a blue dog", "1"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_grid_is_one_file_with_every_image(run: Run, model: Path) -> None:
    options = ("--model", model, "--steps", 1)
    result = run("generate", PROMPT, *options, "--num-images", 3, "--grid", "--out", "grid.png")
    assert result.out == "grid.png\n" and os.listdir() == ["grid.png"]
    grid = pixels("grid.png")
    run("generate", PROMPT, *options, "--num-images", 3, "--out", "one.png")
    for name in ("one-0001.png", "one-0002.png", "one-0003.png"):
        assert contains(grid, pixels(name))
    assert text_of("grid.png")["seed"] == "0 1 2"
    Path("prompts.txt").write_text("a red cat\na blue dog\n", encoding="utf-8")
    assert run("generate", "--prompts", "prompts.txt", *options, "--grid", "--out", "rows.png").out == "rows.png\n"
    assert text_of("rows.png")["prompt"] == "a red cat\na blue dog"


def contains(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture is somewhere in a sheet, pixel by pixel."""
    height, width, _ = picture.shape
    starts = np.argwhere((sheet[: 1 - height, : 1 - width] == picture[0, 0]).all(-1))
    return any((sheet[y : y + height, x : x + width] == picture).all() for y, x in starts)


@pytest.mark.slow
def test_masks_shows_saves_and_prints_the_same_regions(run: Run, model: Path) -> None:
    result = run("masks", PROMPT, "--model", model, "--steps", 6, "--panels", 3, "--out", "m.png", "--size", 96)
    assert result.status == 0 and sorted(os.listdir()) == ["m.npz", "m.png"]
    assert result.out.endswith("m.png\nm.npz\n")
    seen: list[Regions] = []
    pipe = open_pipeline(model)
    scfg_fast.enable(pipe, on_regions=lambda step, regions: seen.append(regions.clone()))
    sample(pipe, num_inference_steps=6, height=96, width=96)
    with np.load("m.npz", allow_pickle=False) as file:
        assert file["step"].tolist() == [0, 1, 2, 3, 4, 5]
        assert (file["token_index"] == np.stack([r.token_index.numpy() for r in seen])).all()
        assert (file["foreground"] == np.stack([r.foreground.numpy() for r in seen])).all()
        assert (file["rate"] == np.stack([r.rate.numpy() for r in seen])).all()
        assert file["labels"][0].tolist() == token_labels(pipe.tokenizer, PROMPT, 16)
        assert json.loads(str(file["metadata"]))["prompt"] == PROMPT
    lines = result.out.splitlines()
    assert re.findall(r"step (\d+)", lines[0]) == ["1", "3", "6"], "the first, a middle and the last step"
    assert lines[1].split() == ["region"] + ["share", "rate"] * 3
    largest = int(np.bincount(seen[0].token_index.flatten()).argmax())
    share = 100 * float((seen[0].token_index == largest).float().mean())
    assert any(f"{share:.1f}%" in line for line in lines[2:-2])
    assert len({len(line) for line in lines[:4]}) == 1, "columns line up"


@pytest.mark.slow
def test_masks_with_fewer_guided_steps_than_panels(run: Run, model: Path) -> None:
    Path("late.json").write_text(scfg_fast.SCFGConfig(start=0.5).to_json())
    result = run("masks", PROMPT, "--model", model, "--steps", 4, "--config", "late.json")
    assert result.status == 0
    assert re.findall(r"step (\d+)", result.out.splitlines()[0]) == ["3", "4"]
    Path("never.json").write_text(scfg_fast.SCFGConfig(start=0.0, stop=0.0).to_json())
    refused = run("masks", PROMPT, "--model", model, "--steps", 2, "--config", "never.json", "--out", "none.png")
    assert refused.status == 2 and "no step was guided" in refused.err
    assert not Path("none.png").exists() and not Path("none.npz").exists()


@pytest.mark.slow
def test_masks_names_any_script_on_any_terminal(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert main(["masks", "猫 é", "--model", str(model), "--steps", "1", "--out", str(tmp_path / "m.png")]) == 0
    sys.stdout.flush()
    assert b"region" in screen.getvalue() and b"\\x" in screen.getvalue()


@pytest.mark.slow
def test_compare_has_both_guidances_from_the_same_noise(run: Run, model: Path) -> None:
    options = ("--model", model, "--steps", 2, "--size", 384, "--seed", 3)
    assert run("compare", PROMPT, *options).out == "compare.png\n"
    run("generate", PROMPT, *options, "--guidance", "cfg", "--out", "cfg.png")
    run("generate", PROMPT, *options, "--out", "scfg.png")
    sheet = pixels("compare.png")
    assert contains(sheet, pixels("cfg.png")) and contains(sheet, pixels("scfg.png"))
    assert (pixels("cfg.png") != pixels("scfg.png")).any()


@pytest.mark.slow
def test_compare_with_regions_and_several_seeds_grows_by_panels(run: Run, model: Path) -> None:
    options = ("--model", model, "--steps", 2)
    run("compare", PROMPT, *options, "--out", "two.png")
    result = run("compare", PROMPT, *options, "--out", "six.png", "--regions", "--num-images", 2)
    two, six = pixels("two.png"), pixels("six.png")
    assert six.shape[1] - two.shape[1] == 384 + 16 and six.shape[0] > two.shape[0] + 384
    assert text_of("six.png")["seed"] == "0 1"
    runs = re.findall(r"(S-CFG|CFG), seed (\d): 100%", result.err)
    assert list(dict.fromkeys(runs)) == [("CFG", "0"), ("S-CFG", "0"), ("CFG", "1"), ("S-CFG", "1")]


def test_a_long_prompt_is_cut_with_a_note(run: Run, model: Path) -> None:
    result = run("generate", "red " * 14 + "cat dog", "--model", model, "--steps", 1)
    notes = [line for line in result.err.splitlines() if line.startswith("scfg-fast: note:")]
    assert result.status == 0 and len(notes) == 1
    assert "18 tokens long and the model reads 16" in notes[0] and notes[0].endswith("'cat dog'")


def test_an_existing_picture_is_replaced(run: Run, model: Path) -> None:
    Path("scfg.png").write_bytes(b"old")
    assert run("generate", PROMPT, "--model", model, "--steps", 1).status == 0
    assert pixels("scfg.png").shape == (64, 64, 3)


@pytest.mark.slow
def test_the_model_that_ships_is_the_default(run: Run) -> None:
    result = run("generate", "a red apple on a green background")
    assert (result.status, result.out) == (0, "scfg.png\n")
    text = text_of("scfg.png")
    assert (text["model"], text["size"], text["steps"], text["guidance_scale"]) == ("bundled", "256x256", "25", "5.0")
    again = run("generate", text["prompt"], "--model", "bundled", "--out", "again.png")
    assert again.status == 0 and (pixels("again.png") == pixels("scfg.png")).all()


# doctor


def test_doctor_reports_the_machine_and_the_model(run: Run, model: Path) -> None:
    result = run("doctor", "--model", model)
    assert result.status == 0 and result.err == ""
    for part in (
        f"torch            {torch.__version__.split('+')[0]}",
        "Operators on",
        "StableDiffusionPipeline, DDIMScheduler",
    ):
        assert part in result.out
    assert re.search(r"S-CFG +supported\n", result.out)
    assert result.out.count("transformer_blocks.0") == 6


@pytest.fixture(scope="module")
def shallow_model(model: Path) -> Path:
    """A pipeline whose UNet has attention where S-CFG does not look."""
    folder = model.parent / "shallow"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=2, layers_per_block=1,
        cross_attention_dim=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def test_a_model_without_the_needed_layers_is_refused_with_the_reason(run: Run, shallow_model: Path) -> None:
    result = run("doctor", "--model", shallow_model)
    assert result.status == 1 and re.search(r"S-CFG +not supported\n +because +no attention layer", result.out)
    refused = run("generate", PROMPT, "--model", shallow_model)
    assert refused.status == 2 and "cannot use S-CFG: no attention layer" in refused.error
    assert os.listdir() == []
    assert run("generate", PROMPT, "--model", shallow_model, "--guidance", "cfg", "--steps", 1).status == 0


def test_a_pipeline_without_prompts_is_refused(run: Run, tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    refused = run("generate", PROMPT, "--model", "ddpm")
    assert refused.status == 2 and "'ddpm' is a DDPMPipeline, which has no prompt" in refused.error
    assert run("doctor", "--model", "ddpm").status == 1


# Bad input


BAD_ARGUMENTS = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["paint", PROMPT], "invalid choice: 'paint'"),
    "no prompt": (["generate"], "PROMPT --prompts is required"),
    "empty prompt": (["generate", ""], "the prompt is empty"),
    "blank prompt": (["masks", "  \n "], "the prompt is empty"),
    "prompt and file": (["generate", PROMPT, "--prompts", "p.txt"], "not allowed with"),
    "no such prompt file": (["generate", "--prompts", "nope.txt"], "there is no prompt file 'nope.txt'"),
    "prompt file is a folder": (["generate", "--prompts", "."], "cannot be read: Is a directory"),
    "prompt file without prompts": (["generate", "--prompts", "blank.txt"], "has no prompt"),
    "prompt file in latin-1": (["generate", "--prompts", "latin.txt"], "not UTF-8"),
    "size not a multiple of 8": (["generate", PROMPT, "--size", "100"], "the nearest are 96 and 104"),
    "height not a multiple of 8": (["compare", PROMPT, "--size", "256x250"], "250 is not a multiple of 8"),
    "size too small": (["generate", PROMPT, "--size", "56"], "too small; the least is 64"),
    "size zero": (["generate", PROMPT, "--size", "0x64"], "too small"),
    "size in words": (["generate", PROMPT, "--size", "large"], "is not a size"),
    "size negative": (["generate", PROMPT, "--size=-64"], "is not a size"),
    "scale one for S-CFG": (["generate", PROMPT, "--guidance-scale", "1"], "needs a scale above 1"),
    "scale one for masks": (["masks", PROMPT, "--guidance-scale", "1"], "needs a scale above 1"),
    "scale one for compare": (["compare", PROMPT, "--guidance-scale", "0.5"], "needs a scale above 1"),
    "scale below one for CFG": (
        ["generate", PROMPT, "--guidance", "cfg", "--guidance-scale", "0.9"], "CFG needs at least 1",
    ),
    "scale negative": (["generate", PROMPT, "--guidance-scale=-3"], "needs a scale above 1"),
    "scale nan": (["generate", PROMPT, "--guidance-scale", "nan"], "not a finite number"),
    "scale infinite": (["generate", PROMPT, "--guidance-scale", "inf"], "not a finite number"),
    "scale in words": (["generate", PROMPT, "--guidance-scale", "strong"], "not a finite number"),
    "no steps": (["generate", PROMPT, "--steps", "0"], "at least 1, got 0"),
    "half a step": (["generate", PROMPT, "--steps", "2.5"], "not a whole number"),
    "no images": (["generate", PROMPT, "--num-images", "0"], "at least 1, got 0"),
    "seed negative": (["generate", PROMPT, "--seed=-1"], "from 0 to 9223372036854775807, got -1"),
    "seed too large": (["generate", PROMPT, "--seed", str(2**63)], "from 0 to 9223372036854775807"),
    "too many panels": (["masks", PROMPT, "--panels", "9"], "from 1 to 8, got 9"),
    "unknown guidance": (["generate", PROMPT, "--guidance", "magic"], "is unknown; use cfg, scfg"),
    "unknown dtype": (["generate", PROMPT, "--dtype", "fp8"], "invalid choice: 'fp8'"),
    "fp16 on the CPU": (["doctor", "--model", "MODEL", "--device", "cpu", "--dtype", "fp16"], "use fp32 or bf16"),
    "unknown device": (["generate", PROMPT, "--device", "gpu"], "'gpu' is unknown; use cpu, cuda, cuda:N or mps"),
    "second CPU": (["generate", PROMPT, "--device", "cpu:1"], "'cpu:1' is unknown"),
    "CUDA device that is not there": (["doctor", "--model", "MODEL", "--device", "cuda:99"], "--device cuda:99: "),
    "output folder missing": (["generate", PROMPT, "--out", "no/such/x.png"], "no folder 'no/such'; make it first"),
    "output not a png": (["generate", PROMPT, "--out", "x.jpg"], "must be a name that ends in .png"),
    "output name impossible": (["generate", PROMPT, "--out", "x" * 300 + ".png"], "no file can be written in '.'"),
    "output below a file": (["masks", PROMPT, "--out", "blank.txt/x.png"], "no folder 'blank.txt'"),
    "unknown option": (["generate", PROMPT, "--fast"], "unrecognized arguments: --fast"),
    "abbreviated option": (["generate", PROMPT, "--guid", "cfg"], "unrecognized arguments"),
    "config and fidelity": (["masks", PROMPT, "--config", "c.json", "--fidelity", "paper"], "not allowed with"),
    "no such config": (["generate", PROMPT, "--config", "c.json"], "there is no configuration 'c.json'"),
    "config not JSON": (["generate", PROMPT, "--config", "blank.txt"], "cannot be used: Expecting value"),
    "config unknown name": (["generate", PROMPT, "--config", "unknown.json"], "unknown parameters ['speed']"),
    "config out of range": (["generate", PROMPT, "--config", "range.json"], "powers must be an integer"),
    "no such folder": (["generate", PROMPT, "--model", "./nope"], "there is no folder './nope'"),
    "no such absolute folder": (["compare", PROMPT, "--model", "/nope/model"], "there is no folder '/nope/model'"),
    "not a hub id": (["generate", PROMPT, "--model", "my model"], "it cannot be a hub id"),
    "folder without a pipeline": (["doctor", "--model", "."], "has no model_index.json"),
    "a single file": (["generate", PROMPT, "--model", "blank.txt"], "is a single file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_input_is_one_line_and_status_2(run: Run, model: Path, tmp_path: Path, case: str) -> None:
    files = {
        "blank.txt": b"\n \n", "latin.txt": "café".encode("latin-1"),
        "unknown.json": b'{"speed": 9}', "range.json": b'{"powers": 0}',
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    argv, expected = BAD_ARGUMENTS[case]
    result = run(*(model if argument == "MODEL" else argument for argument in argv))
    assert result.status == 2
    assert re.match(r"scfg-fast( \w+)?: error: ", result.error) and expected in result.error
    assert result.out == "" or argv[0] == "doctor"
    assert sorted(os.listdir(tmp_path)) == sorted(files), "nothing is written"


def break_weights(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "unet/diffusion_pytorch_model.safetensors", 500)


def remove_autoencoder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def add_code(folder: Path) -> None:
    """A component that is Python code in the folder; running it leaves a file behind."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["mine", "Mine"]}))
    (folder / "unet/mine.py").write_text(
        f"open({str(folder.parent / 'ran')!r}, 'w')\nfrom diffusers import UNet2DConditionModel as Mine\n"
    )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (break_weights, "only .safetensors weights are read"),
        (cut_weights, "Unable to load weights"),
        (remove_autoencoder, "the folder vae, which model_index.json names, is missing"),
        (break_index, "model_index.json is not JSON"),
        (add_code, "code of other origin is never run"),
    ],
)
def test_a_damaged_model_is_one_line_and_status_2(
    run: Run, model: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    damage(tmp_path / "model")
    result = run("generate", PROMPT, "--model", "model")
    assert result.status == 2 and expected in result.error
    assert os.listdir() == ["model"]


def test_debug_adds_the_traceback(run: Run, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    break_index(tmp_path / "model")
    result = run("generate", PROMPT, "--model", "model", "--debug")
    assert result.status == 2 and "Traceback" in result.err and "CommandError" in result.err


# Failures while running


def test_a_picture_of_nan_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, torch.nan)
    pipe.save_pretrained(tmp_path / "nan")
    result = run("generate", PROMPT, "--model", "nan", "--steps", 1)
    assert result.status == 1 and "values that are not numbers" in result.err.splitlines()[-1]
    assert os.listdir() == ["nan"]


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 2000 bytes, as on a full disk. Not a fixture: pytest itself writes when a test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["generate", "masks", "compare"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(run: Run, model: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "x.png").write_bytes(b"old")
    with small_files():
        result = run(command, PROMPT, "--model", model, "--steps", 1, "--out", "x.png")
    assert result.status == 1 and result.err.splitlines()[-1].startswith(
        f"scfg-fast {command}: error: 'x.png' cannot be written"
    )
    assert os.listdir() == ["x.png"] and Path("x.png").read_bytes() == b"old"


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(run: Run, model: Path) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        result = run("generate", PROMPT, "--model", model, "--steps", 900)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert result.status == 130 and result.err.splitlines()[-1] == "scfg-fast generate: error: interrupted"
    assert os.listdir() == []


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A model hub that knows nothing, guards one model, and hangs up on everything else."""

    def do_GET(self) -> None:
        if "/guarded" in self.path or "/missing" in self.path:
            guarded = "/guarded" in self.path
            self.send_response(403 if guarded else 404)
            self.send_header("X-Error-Code", "GatedRepo" if guarded else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_hub_failures_are_told_apart(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code = f"""
import os
os.chdir({str(tmp_path)!r})
from huggingface_hub import constants, utils
from scfg_fast.cli import commands, images, main
models = ["someone/missing", "someone/guarded", "someone/unreachable"]
print([main(["generate", "a cat", "--model", model]) for model in models])
constants.HF_HUB_OFFLINE = True
getattr(utils, "reset_sessions", lambda: None)()  # hub 0 reads the constant when it opens a session
print(main(["generate", "a cat", "--model", "someone/offline"]))
"""
        result = python(code, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "cache"))
    finally:
        server.shutdown()
    assert result.stdout.split("\n")[:2] == ["[2, 1, 1]", "1"]
    missing, guarded, unreachable, offline = re.findall(r"^scfg-fast .*", result.stderr, re.M)  # hub 0 has a bar
    assert "'someone/missing' is not a folder here, and the Hugging Face hub knows no such model" in missing
    assert "'someone/guarded' is gated" in guarded
    assert "cannot be reached to download it (no network?)" in unreachable
    assert "offline mode" in offline
    assert not list(tmp_path.glob("*.png"))


# Start-up


def test_help_and_bad_arguments_import_nothing_heavy() -> None:
    result = python("""
import sys
from scfg_fast.cli import commands, images, main
for argv in (["--help"], ["generate", "--help"], ["masks", "a", "--size", "7"], ["generate", "--prompts", "nope"]):
    try:
        main(argv)
    except SystemExit:
        pass
heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "triton", "scfg_kernels"} & set(sys.modules)
print("HEAVY", sorted(heavy))
""")
    assert result.stdout.splitlines()[-1] == "HEAVY []"
    assert "usage: scfg-fast generate" in result.stdout


def test_module_and_version(run: Run) -> None:
    result = python(
        "import runpy, sys; sys.argv = ['scfg-fast', '--version']; runpy.run_module('scfg_fast', run_name='__main__')"
    )
    assert (result.returncode, result.stdout) == (0, f"scfg-fast {scfg_fast.__version__}\n")
    assert run("--version").out == result.stdout


@pytest.mark.parametrize("command", [[], ["generate"], ["masks"], ["compare"], ["doctor"]])
def test_help_fits_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*command, "--help")
    assert result.status == 0 and max(map(len, result.out.splitlines())) <= 80
    assert "None" not in result.out


# What a command adapts


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights for the bundled model's UNet, as the pipeline saves them."""
    pipe = bundled_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe.unet.add_adapter(config)
    folder = tmp_path_factory.mktemp("lora")
    layers = peft.get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(folder, unet_lora_layers=layers, weight_name="style.safetensors")
    return folder / "style.safetensors"


@pytest.mark.slow
def test_loras_are_the_librarys(run: Run, lora: Path) -> None:
    pictures = []
    for scales in ((), (1.0,), (0.25, 0.5)):
        named = [argument for scale in scales for argument in ("--lora", lora if scale == 1.0 else f"{lora}:{scale}")]
        assert run("generate", PROMPT, "--steps", 2, *named).status == 0
        pipe = bundled_pipeline()
        pipe.set_progress_bar_config(disable=True)
        names = [f"style{number}" for number in range(len(scales))]
        for name in names:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name=name)
        if names:
            pipe.set_adapters(names, list(scales))
        scfg_fast.enable(pipe)
        pictures.append(pixels("scfg.png"))
        assert (pictures[-1] == sample(pipe, guidance_scale=5.0, num_inference_steps=2)).all()
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "eulerdiscrete"])
def test_a_scheduler_is_the_librarys(run: Run, model: Path, name: str) -> None:
    result = run("generate", PROMPT, "--model", model, "--steps", 3, "--guidance-scale", 5, "--scheduler", name)
    assert result.status == 0
    pipe = open_pipeline(model)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scfg_fast.enable(pipe)
    assert (pixels("scfg.png") == sample(pipe, guidance_scale=5.0)).all()
    assert text_of("scfg.png")["scheduler"] == "EulerDiscreteScheduler"


def test_single_settings_are_the_configurations(run: Run, model: Path) -> None:
    options = ("--model", model, "--steps", 3, "--guidance-scale", 5)
    assert run("generate", PROMPT, *options, "--set", "rate_max=1.1", "--set", "tokens=words").status == 0
    pipe = open_pipeline(model)
    scfg_fast.enable(pipe, SCFGConfig(rate_max=1.1, tokens="words"))
    assert (pixels("scfg.png") == sample(pipe, guidance_scale=5.0)).all()
    assert json.loads(text_of("scfg.png")["scfg_config"])["rate_max"] == 1.1


def test_several_images_have_one_bar_and_quiet_has_none(run: Run, model: Path) -> None:
    options = ("--model", model, "--steps", 2, "--num-images", 3)
    bars = run("generate", PROMPT, *options).err
    assert bars.count("6/6") and "3/3 S-CFG" in bars and "2/2" not in bars
    assert run("generate", "a " * 40, *options, "--quiet").err == ""


@pytest.mark.parametrize("command, there", [
    (("generate",), "scfg.png"), (("generate", "--num-images", 2), "scfg-0002.png"), (("masks",), "masks.npz"),
    (("compare",), "compare.png"),
])  # fmt: skip
def test_no_clobber_keeps_what_is_there(run: Run, command: tuple, there: str) -> None:
    Path(there).write_text("mine")
    result = run(command[0], PROMPT, *command[1:], "--no-clobber", "--model", "there/is-none")
    assert result.status == 2 and f"--no-clobber: {there} exists already" in result.error
    assert Path(there).read_text() == "mine" and os.listdir() == [there]


REFUSED = {
    "a pickled lora": (["--lora", "style.ckpt"], "'style.ckpt' must be a .safetensors file"),
    "a scale without a file": (["--lora", "nope.safetensors:0.5"], "there is no file 'nope.safetensors'"),
    "no scheduler": (["--scheduler", "Nope"], "'Nope' is not one that this model can use; use DDIM"),
    "offloading from the CPU": (["--offload", "model", "--device", "cpu"], "there is no GPU to free"),
    "no setting": (["--set", "nope=1"], "nope"),
    "no value": (["--set", "rate_max"], "must be NAME=VALUE, such as rate_max=1.5"),
    "a bad value": (["--set", "rate_max=-1"], "rate_max"),
    "settings of plain guidance": (["--set", "rate_max=2", "--guidance", "cfg"], "--guidance cfg does not use it"),
    "fidelity of plain guidance": (["--fidelity", "paper", "--guidance", "cfg"], "--guidance cfg does not use it"),
    "a file of plain guidance": (["--config", "nope.json", "--guidance", "cfg"], "--guidance cfg does not use it"),
    "no name": (["--out", ""], "--out is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_one_line(run: Run, model: Path, case: str) -> None:
    arguments, message = REFUSED[case]
    result = run("generate", PROMPT, "--model", model, *arguments)
    assert result.status == 2 and message in result.error and not os.listdir()


def test_a_lora_of_another_model_is_refused(run: Run, model: Path) -> None:
    save_file({"unet.nothing.here.lora.down.weight": torch.zeros(2, 2)}, "other.safetensors")
    result = run("generate", PROMPT, "--model", model, "--lora", "other.safetensors")
    assert result.status and "--lora: 'other.safetensors'" in result.error and os.listdir() == ["other.safetensors"]


# Hostile surroundings

UNFIT = {
    "too many steps": (["--steps", 1001], "from 1 to 1000, got 1001"),
    "a prompt that is no text": (["--negative", "caf\udce9"], "is not UTF-8"),
    "a long argument": (["--config", "x" * 5000], " ... "),
    "control characters": (["--config", "a\x1b[31m\x07"], "a\\x1b[31m\\x07"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_is_typed_cannot_disturb_the_terminal(run: Run, case: str) -> None:
    arguments, message = UNFIT[case]
    result = run("generate", PROMPT, *arguments)
    assert result.status == 2 and message in result.error and not os.listdir()
    assert len(result.error) < 1200 and result.error[:-1].isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("output", ["closed", "/dev/full"])
@pytest.mark.parametrize("command", ["masks", "--help"])
def test_nobody_reads_standard_output(model: Path, tmp_path: Path, command: str, output: str, buffered: bool) -> None:
    """All files are there, the status is 0, and there is at most a line about it."""
    arguments = ["--help"] if command == "--help" else [command, PROMPT, "--model", str(model), "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    if not buffered:
        environment["PYTHONUNBUFFERED"] = "1"
    if output == "closed":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(output, os.O_WRONLY)
    try:
        line = [sys.executable, "-m", "scfg_fast", *arguments]
        result = subprocess.run(line, cwd=tmp_path, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    errors = [line for line in result.stderr.splitlines() if "S-CFG, seed" not in line and line]
    assert result.returncode == 0 and len(errors) <= (output != "closed"), result.stderr
    assert sorted(os.listdir(tmp_path)) == ([] if command == "--help" else ["masks.npz", "masks.png"])


def test_an_interrupt_that_a_library_wraps_is_an_interrupt() -> None:
    wrapped = RuntimeError("Failed to import")
    wrapped.__cause__ = KeyboardInterrupt()
    outer = CommandError("the model cannot be loaded")
    outer.__context__ = wrapped
    assert explain(outer) == ("interrupted", 130)
