"""Every script of examples/ runs, with arguments that make it quick, and makes what it says."""

from __future__ import annotations

import importlib.util
import io
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import scfg_fast
from lab.tiny.unets import tiny_sdxl_pipeline
from scfg_fast.models import bundled_pipeline

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples"
PROMPT = "a panda on a beach"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(file: str | Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def drawn(steps: int, seed: int = 0, settings: dict | None = None) -> np.ndarray:
    pipe = bundled_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if settings is not None:
        scfg_fast.enable(pipe, scfg_fast.SCFGConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(PROMPT, guidance_scale=5.0, num_inference_steps=steps, generator=generator).images[0])


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl_pipeline(dtype=torch.float32).save_pretrained(folder)
    return folder


def test_the_list_names_every_script() -> None:
    listed = re.findall(r"\[(\w+\.py)\]\((\w+\.py)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(name for name, _ in listed) == sorted(path.name for path in FOLDER.glob("*.py"))
    assert all(name == target for name, target in listed)


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("quickstart").main(["--prompt", PROMPT, "--steps", "3", "--out", str(tmp_path / "panda")])
    assert (pixels(tmp_path / "panda-cfg.png") == drawn(3)).all()
    assert (pixels(tmp_path / "panda-scfg.png") == drawn(3, settings={})).all()
    assert "S-CFG guided 3 steps" in capsys.readouterr().out


def test_sdxl_with_regions(sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("sdxl_regions").main(["--model", str(sdxl), "--steps", "3", "--out", str(tmp_path / "owl")])
    picture, regions = pixels(tmp_path / "owl.png"), pixels(tmp_path / "owl-regions.png")
    assert regions.shape[0] >= picture.shape[0] and regions.shape[1] > picture.shape[1]
    shares = [float(share) for share in re.findall(r"([\d.]+) % of the picture", capsys.readouterr().out)]
    assert shares and abs(sum(shares) - 100) < 1


def test_modular_pipeline(sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "owl.png"
    script("modular").main(["--model", str(sdxl), "--size", "64", "--steps", "3", "--out", str(out)])
    assert pixels(out).shape == (64, 64, 3) and "S-CFG guided 3 steps" in capsys.readouterr().out


@pytest.fixture(scope="module")
def server() -> Iterator[object]:
    server = script("server").build_server("127.0.0.1", 0, waiting=2)
    server.RequestHandlerClass.log_message = lambda *_: None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    server.worker.close()
    assert type(server.worker.pipe).__call__ is type(bundled_pipeline()).__call__


def ask(server, query: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/?{query}", timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_served_picture_is_the_librarys_with_the_settings_of_its_request(server) -> None:
    answers: dict[str, tuple[int, bytes]] = {}
    prompt = urllib.parse.urlencode({"prompt": PROMPT, "steps": 2})
    queries = {
        f"{prompt}&seed=1": {},
        f"{prompt}&seed=2&rate_max=1.25&fidelity=paper": dict(rate_max=1.25, fidelity="paper"),
    }
    threads = [threading.Thread(target=lambda q=q: answers.update({q: ask(server, q)})) for q in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, (query, settings) in enumerate(queries.items(), 1):
        status, body = answers[query]
        assert status == 200 and (pixels(io.BytesIO(body)) == drawn(2, seed, settings)).all()


@pytest.mark.parametrize("query, reason", [
    ("", "there is no prompt"), ("prompt=+", "there is no prompt"), ("prompt=a&steps=x", "invalid literal"),
    ("prompt=a&steps=101", "from 1 to 100, got 101"), ("prompt=a&nope=1", "nope is unknown"),
    ("prompt=a&rate_max=-1", "rate_max"), ("prompt=a&fidelity=other", "fidelity"), ("prompt=a&rate_max=1e", ""),
])  # fmt: skip
def test_a_bad_request_is_400_and_the_next_is_served(server, query: str, reason: str) -> None:
    status, body = ask(server, query)
    assert status == 400 and reason in body.decode()
    assert ask(server, "prompt=a+panda&steps=1")[0] == 200


def test_words_draws_the_stock_picture_and_four_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "words.png"
    script("words").main([PROMPT, "panda", "beach", "--steps", "2", "--out", str(out)])
    sheet, stock = pixels(out), drawn(2)
    height, width = stock.shape[:2]
    assert sheet.shape == (height, 5 * width, 3) and (sheet[:, :width] == stock).all()
    assert "panda times 2: acts as" in capsys.readouterr().out


def test_a_full_queue_is_503(server) -> None:
    held = threading.Event()
    pipe, server.worker.pipe = server.worker.pipe, lambda **job: held.wait() and drawn(1)
    try:
        futures = [server.worker.submit({})]
        while not server.worker.jobs.empty():
            pass
        futures += [server.worker.submit({}) for _ in range(2)]
        assert ask(server, "prompt=a")[0] == 503
    finally:
        held.set()
        for future in futures:
            future.exception(timeout=60)
        server.worker.pipe = pipe
