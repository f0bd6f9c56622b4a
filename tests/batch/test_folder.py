"""A job's folder: on file systems without a disk (T13), with ten thousand rows (T14), and what comes out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pyarrow
import pytest
from PIL import Image
from pyarrow import fs, parquet

import scfg_fast
from scfg_fast.batch import FolderError, InputError, export, generate, read_status
from scfg_fast.batch.folder import Folder
from scfg_fast.batch.plan import new_batches
from scfg_fast.batch.rows import read_rows
from scfg_fast.batch.run import Worker, encode
from scfg_fast.batch.settings import Settings
from tests.batch.jobs import FAKE, assert_equal_images, pixels_of, rows_of, write_rows
from tests.batch.pipelines import FakePipeline, fake

FAKE_HERE = FAKE | {"load": fake}
ROWS = [{"prompt": f"prompt {i}"} for i in range(12)]


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing handles it, so nothing is tidied up."""


def memory() -> fs.FileSystem:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return fs.PyFileSystem(fs.FSSpecHandler(system))


FILE_SYSTEMS = {"MockFS": fs._MockFileSystem, "fsspec memory": memory, "local": fs.LocalFileSystem}


@pytest.fixture(params=FILE_SYSTEMS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, fs.FileSystem]:
    out = str(tmp_path / "out") if request.param == "local" else "bucket/out"
    return out, FILE_SYSTEMS[request.param]()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("job") / "out"
    assert generate(ROWS, out, **FAKE_HERE).images == 12
    return out


def test_killed_resumed_finished_and_torn_anywhere(
    place: tuple[str, fs.FileSystem], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T13: T2, T3 and T7 on file systems that are not local; the markers are files of theirs."""
    out, system = place
    folder = Folder(out, system)
    calls: list[int] = []
    whole = FakePipeline.__call__

    def dies(self: FakePipeline, prompt: list[str], **call: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            monkeypatch.setattr(Folder, "delete", lambda *_: None)  # a killed process takes nothing back
            raise Killed
        return whole(self, prompt, **call)

    with monkeypatch.context() as patch:
        patch.setattr(FakePipeline, "__call__", dies)
        with pytest.raises(Killed):
            generate(ROWS, out, filesystem=system, **FAKE_HERE)
    monkeypatch.undo()
    assert len(folder.committed_names()) == 3
    assert len(folder.markers()) == 4
    lock = json.loads(folder.read("lock") or b"")
    folder.write("lock", json.dumps(lock | {"start": "0"}).encode())  # of a process that has ended
    summary = generate(ROWS, out, filesystem=system, **FAKE_HERE)
    assert (summary.images, summary.resumed, summary.retried, summary.twice) == (12, 6, 1, 0)
    assert_equal_images(folder, undisturbed)

    assert generate(ROWS, out, filesystem=system, **FAKE_HERE | {"load": fake}).resumed == 12

    files = folder.names("images")
    folder.delete(f"images/{files[0]}")
    folder.write(f"images/{files[1]}", (folder.read(f"images/{files[1]}") or b"")[:-100])
    assert generate(ROWS, out, filesystem=system, **FAKE_HERE).resumed == 8
    assert_equal_images(folder, undisturbed)
    assert not [name for name in folder.names("", recursive=True) if name.endswith(".tmp") or name == "lock"]


def test_a_broken_file_system_ends_the_job_and_loses_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """T11 with errors in the middle of a write: whatever write fails, a rerun completes."""
    for failing in range(1, 14):
        out = tmp_path / str(failing)
        left = [failing]
        real = Folder.write_table

        def write_table(
            self: Folder, name: str, table: pyarrow.Table, left: list[int] = left, real: Any = real
        ) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            real(self, name, table)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Folder, "write_table", write_table)
            with pytest.raises(OSError, match="No space left"):
                generate(ROWS, out, **FAKE_HERE)
        assert not (out / "lock").exists()
        assert generate(ROWS, out, **FAKE_HERE).missing == 0
        assert_equal_images(out, undisturbed)


def test_an_unreadable_disk_is_no_lost_file(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error of a data file ends the run; it does not make the images again."""

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    before = sorted(path.name for path in (undisturbed / "images").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "read_metadata", fails)
        with pytest.raises(OSError, match="Input/output"):
            generate(ROWS, undisturbed, **FAKE_HERE)
    assert sorted(path.name for path in (undisturbed / "images").iterdir()) == before


def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(OSError):
        generate(ROWS, "/proc/scfg-fast", **FAKE_HERE)


@pytest.mark.slow
def test_ten_thousand_rows(tmp_path: Path) -> None:
    """T14: the driver's memory is flat, and shards are few."""
    process = psutil.Process()
    rows = [{"prompt": f"prompt {i}"} for i in range(10_000)]
    sizes: list[int] = []

    class Watched(FakePipeline):
        def __call__(self, prompt: list[str], **call: Any) -> Any:
            sizes.append(process.memory_info().rss)
            return super().__call__(prompt, **call)

    summary = generate(rows, tmp_path / "out", load=Watched, guidance="cfg", batch_size=50)
    assert (summary.images, summary.missing, summary.twice) == (10_000, 0, 0)
    # 10,000 images of 64x64 are 123 MB of pixels.
    assert sizes[-1] - sizes[len(sizes) // 4] < 30 * 2**20
    assert export(tmp_path / "out", tmp_path / "shards", shards=True, shard_bytes=2**26) == 10_000
    shards = sorted((tmp_path / "shards").iterdir())
    assert 2 <= len(shards) <= 4 and process.memory_info().rss - sizes[-1] < 200 * 2**20
    assert sum(parquet.read_metadata(path).num_rows for path in shards) == 10_000


def test_export(undisturbed: Path, tmp_path: Path) -> None:
    assert export(undisturbed, tmp_path / "e") == 12
    lines = [json.loads(line) for line in (tmp_path / "e" / "metadata.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"{i:08d}" for i in range(1, 13)]
    rows = rows_of(undisturbed)
    for line in lines:
        assert next(iter(line)) == "file_name"
        with Image.open(tmp_path / "e" / line["file_name"]) as image:
            assert (np.asarray(image) == pixels_of(rows[line["id"]])).all() and not image.info
    assert len(list((tmp_path / "e").iterdir())) == 13


def test_shards_carry_everything(undisturbed: Path, tmp_path: Path) -> None:
    assert export(undisturbed, tmp_path / "s", shards=True) == 12
    table = parquet.read_table(tmp_path / "s" / "images-00000.parquet")
    assert {row["id"]: row for row in table.to_pylist()} == rows_of(undisturbed)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and list(features) == table.schema.names


def test_export_of_an_unfinished_job_leaves_errors_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "it fails"}, {"prompt": "b", "id": "../up/x y"}]
    assert generate(rows, tmp_path / "out", **FAKE_HERE).exit_status == 2
    folder = Folder(tmp_path / "out")
    folder.drop(folder.look(folder.read_plan()).files[folder.read_plan()[0].name])
    status = read_status(folder)
    assert (status.images, status.errors, status.missing) == (1, 0, 2)
    assert export(tmp_path / "out", tmp_path / "e") == 1
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["_up_x_y.png", "metadata.jsonl"]


def test_export_refuses_two_ids_with_one_name(tmp_path: Path) -> None:
    generate([{"prompt": "a", "id": "a/b"}, {"prompt": "b", "id": "A_b"}], tmp_path / "out", **FAKE_HERE)
    with pytest.raises(InputError, match="ids 'a/b' and 'A_b' would both be"):
        export(tmp_path / "out", tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_plan_that_is_lost_is_not_guessed(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    (out / "plan.parquet").unlink()
    with pytest.raises(FolderError, match=r"which its plan\.parquet does not know"):
        generate(ROWS[:4], out, **FAKE_HERE | {"batch_size": 2} | {"seed": 0})


def test_the_worker_alone(tmp_path: Path, undisturbed: Path) -> None:
    """As a Slurm array calls it: no driver, only a worker, a plan and a folder."""
    settings = Settings(guidance="cfg")
    folder = Folder(tmp_path / "out")
    folder.make()
    worker = Worker(settings, folder, load=fake)
    for batch in new_batches(read_rows(ROWS, guidance="cfg"), [], 2):
        folder.commit(encode(worker.make(batch)), batch.name)
    assert {id: row["sha256"] for id, row in rows_of(folder).items()} == {
        id: row["sha256"] for id, row in rows_of(undisturbed).items()
    }


@pytest.mark.parametrize("guidance", ["cfg", "cfgpp"])
def test_named_guidance(tmp_path: Path, guidance: str) -> None:
    """Methods mean what they mean for generate: plain guidance is stock, CFG++ gets its strength for each call."""
    import diffusers
    import torch

    from scfg_fast.guidance import CFGPlusPlus
    from scfg_fast.guidance.cfgpp import lam_for_mean_weight

    call = {"guidance_scale": 4.0, "num_inference_steps": 2, "height": 64, "width": 64}
    prompts = write_rows(tmp_path / "p.jsonl", ["a red apple"])
    generate(prompts, tmp_path / "out", guidance=guidance, **call)
    row = rows_of(tmp_path / "out")["00000001"]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(scfg_fast.bundled_model_path())
    pipe.set_progress_bar_config(disable=True)
    if guidance == "cfgpp":
        schedule = CFGPlusPlus(lam_for_mean_weight(4.0, pipe.scheduler, 2))
        scfg_fast.enable(pipe, scfg_fast.SCFGConfig(rates="none"), schedule=schedule)
    generator = torch.Generator("cpu").manual_seed(row["seed"])
    image = pipe(["a red apple"], generator=[generator], output_type="np", **call).images[0]
    assert (pixels_of(row) == (image * 255).round().astype(np.uint8)).all()
    assert row["mean_weight"] == pytest.approx(4.0)
