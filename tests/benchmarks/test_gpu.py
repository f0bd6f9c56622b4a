"""The GPU benchmark without a GPU: its grid, its clock, its file, its checks, and every case once at a small size."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from scfg_kernels._launch import OPS
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.gpu import cases as ways_of
from benchmarks.gpu import grid
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.grid import BATCHES, CASES, HALF, Case, select
from benchmarks.gpu.record import ROOT, Record, Row
from benchmarks.gpu.run import HANGS, OUT_OF_TIME, _add_graph, main, run, run_case

REDUCED = list(dict.fromkeys(case.reduced() for case in CASES))
FIRST_OF_OP = {case.op: case.reduced() for case in reversed(CASES) if case.batch == 4}
BY_OP = pytest.mark.parametrize("case", FIRST_OF_OP.values(), ids=list(FIRST_OF_OP))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_grid_is_what_was_registered() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    of_ours = {*OPS, "step", "complete_from_qk", *grid.ATTENTION} - {"attention_maps", "joint_attention_maps"}
    assert {case.op for case in CASES} == of_ours == set(FIRST_OF_OP)
    attention = {(c.sizes.label, c.batch, c.dtype) for c in CASES if c.op == "self_attention"}
    models = ("sd15-16x16", "sd15-8x8", "sdxl-32x32", "sd3-32x32")
    assert attention == {(label, batch, dtype) for label in models for batch in BATCHES for dtype in HALF}
    assert [case.dtype for case in CASES if case.dtype in HALF] == sorted(
        (case.dtype for case in CASES if case.dtype in HALF), reverse=True
    ), "bf16 comes last, so that it is what a short run leaves out"
    assert select("step sd15 b4") == [case for case in CASES if case.op == "step" and case.sizes.label == "sd15"
                                      and case.batch == 4]  # fmt: skip
    assert select("nothing like it") == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reduced_cases_are_small(case: Case) -> None:
    small = case.reduced()
    assert (small.op, small.dtype) == (case.op, case.dtype) and small.batch <= 2
    assert all(layer.rows <= 256 and layer.heads * layer.head_dim == 32 for layer in small.sizes.layers)
    assert small.sizes.side * 4 == case.sizes.side
    assert len({small.name for small in REDUCED}) == len(REDUCED)


def test_the_budget_hands_on_what_is_not_used() -> None:
    now = [100.0]
    budget = Budget(60.0, lambda: now[0])
    assert budget.left() == 60.0 and budget.allows() and budget.allows(59.0) and not budget.allows(60.0)
    assert budget.share(4, kept=20.0).left() == 10.0
    now[0] += 5.0
    assert budget.share(3, kept=20.0).left() == pytest.approx(35.0 / 3.0)
    now[0] += 50.0
    assert budget.share(2, kept=20.0).left() == 0.0 and not budget.share(2, kept=20.0).allows()
    assert budget.left() == 5.0


def test_rows_say_where_they_come_from(tmp_path: Path) -> None:
    record = Record(Cpu().description)
    record.add(CASES[0], "ours", "time", "ms", [3.0, 1.0, 2.0])
    record.add(CASES[1], "compiled", "time", "ms", status="not run:\n  a compiler, with reasons")
    record.write(tmp_path / "folder" / "gpu.csv")
    first, second = rows_of(tmp_path / "folder" / "gpu.csv")
    assert list(first) == [field.name for field in fields(Row)]
    assert (first["value"], first["low"], first["high"], first["samples"]) == ("2", "1.5", "2.5", "3 1 2")
    assert (second["value"], second["samples"]) == ("", "")
    assert second["status"] == "not run: a compiler, with reasons"
    assert first["torch"] == torch.__version__ and first["commit"] and first["device"] and first["triton"]


def test_every_case_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.csv"
    assert main(["--dry-run", "--no-compile", "--out", str(out)]) == 0
    assert f"{len(REDUCED)} cases, 0 disagree, 0 not finished in time" in capsys.readouterr().out
    rows = rows_of(out)
    assert {row["status"] for row in rows} == {
        "ok", "not measured on a CPU", "not run: there is no published code",
    }  # fmt: skip
    agreed = [row for row in rows if row["metric"] == "agreement" and row["provider"] == "ours"]
    assert [row["case"] for row in agreed] == [case.name for case in REDUCED] and all(
        row["status"] == "ok" for row in agreed
    )
    for case in FIRST_OF_OP.values():
        timed = {row["provider"] for row in rows if row["case"] == case.name and row["metric"] == "time"}
        graphs = {"ours (graph)", "eager (graph)"} if case.op == "step" else set()
        assert timed == {"ours", "eager", "published", *graphs}
    assert all(float(row["value"]) > 0 for row in rows if row["metric"] == "time" and row["status"] == "ok")


def test_the_compiled_twin_is_timed_beside_ours(tmp_path: Path) -> None:
    out = tmp_path / "gpu.csv"
    words = "attention_map/sd15-16x16/b1/float16"
    assert main(["--dry-run", "--filter", words, "--out", str(out)]) == 0
    rows = {(row["case"].split("/")[0], row["provider"], row["metric"]): row for row in rows_of(out)}
    for provider in ("compiled", "ours (beside compiled)"):
        assert rows["attention_map", provider, "time"]["status"] == "ok"
    assert float(rows["attention_map", "compiled", "first_call"]["value"]) > 0


def test_what_is_not_compiled_says_why() -> None:
    reasons = {case.name: case.not_compiled() for case in CASES}
    assert "unrolls" in reasons["self_attention/sdxl-32x32/b1/float16"]
    assert "unrolls" in reasons["step/sdxl-6of60layers/b1/float16"]
    assert reasons["step/sd15/b1/float16"] == reasons["guide/sd15/b1/float16"] == ""


def test_what_does_not_fit_in_the_time_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.csv"
    assert main(["--dry-run", "--minutes", "1e-9", "--out", str(out)]) == 0
    rows = rows_of(out)
    assert {row["provider"] for row in rows} == {"ours", "compiled"} and len(rows) == 2 * len(REDUCED)
    assert all(row["status"] == OUT_OF_TIME or "unrolls" in row["status"] for row in rows)
    assert "0 disagree" in capsys.readouterr().out


def test_a_small_budget_is_kept() -> None:
    """Rounds go on until a case's share is used, and no further case begins after the end."""
    lines: list[str] = []
    budget, record = Budget(1.0), Record(Cpu().description)
    cases = [case.reduced() for case in select("guide_pixels")]
    run(cases, Cpu(), record, budget, "torch", with_compiler=False, rounds=(1, 10**6), say=lines.append)
    assert -1.0 < budget.left() <= 0.0
    timed = [row for row in record.rows if row.metric == "time" and row.provider == "ours"]
    assert sum(len(row.samples.split()) for row in timed) > len(cases)


@BY_OP
def test_a_wrong_result_is_refused(case: Case) -> None:
    """Every tensor of every result, spoilt in one element."""
    x = ways_of.make_inputs(case, "cpu")
    result = ways_of.ways(case, x, "torch")["ours"]()
    ways_of.check(case, x, result)
    leaves, structure = tree_flatten(result)
    for index, leaf in enumerate(leaves):
        wrong = leaf.clone()
        last = (-1,) * leaf.dim()
        wrong[last] = ~leaf[last] if leaf.dtype == torch.bool else leaf[last] + 1
        spoilt = tree_unflatten([*leaves[:index], wrong, *leaves[index + 1 :]], structure)
        with pytest.raises(ways_of.DisagreementError, match=case.name.replace("(", r"\(")):
            ways_of.check(case, x, spoilt)


def test_a_kernel_that_cannot_run_leaves_the_others() -> None:
    record, case = Record(Cpu().description), FIRST_OF_OP["complete"]
    assert run_case(case, Cpu(), record, Budget(1.0), "triton", (1, 1))
    status = {(row.provider, row.metric): row.status for row in record.rows}
    assert "not run" in status["ours", "agreement"] and ("ours", "time") not in status
    assert status["eager", "time"] == status["published", "time"] == "ok"


def test_an_error_is_a_row_and_the_run_goes_on() -> None:
    record, lines = Record(Cpu().description), []
    broken = Case("no_such_operator", FIRST_OF_OP["complete"].sizes, 1, "float32")
    failed = run(
        [broken, FIRST_OF_OP["complete"]], Cpu(), record, Budget(30.0), "torch", False, (1, 1), say=lines.append
    )
    assert failed == [broken.name] and len(lines) == 4
    assert [line.endswith("begins") for line in lines] == [True, False, True, False], "whoever hangs has been named"
    assert record.rows[0].status.startswith("FAILED: KeyError")
    assert record.rows[1].status == "ok"


def test_a_case_that_hangs_is_a_row_and_the_end(tmp_path: Path) -> None:
    """In a process of its own, which does not survive it."""
    out = tmp_path / "gpu.csv"
    code = f"""
import pathlib, time
from benchmarks.gpu import run
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.grid import CASES
from benchmarks.gpu.record import Record
run.run_case = lambda *arguments: time.sleep(60)
record = Record(Cpu().description)
run.run(CASES[:2], Cpu(), record, Budget(1.0), "torch", False, write=lambda: record.write(pathlib.Path({str(out)!r})),
        say=lambda text: print(text, flush=True), patience=0.5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == HANGS, done.stderr
    (row,) = rows_of(out)
    assert row["case"] == CASES[0].name and row["status"].endswith("taken to hang")
    assert done.stdout.splitlines()[0].endswith(f"{CASES[0].name} begins")


def test_a_device_that_does_not_recover_ends_the_run() -> None:
    class Broken(Cpu):
        def release(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    record, lines = Record(Cpu().description), []
    cases = [FIRST_OF_OP["guide"], FIRST_OF_OP["complete"]]
    failed = run(cases, Broken(), record, Budget(30.0), "torch", False, (1, 1), say=lines.append)
    assert failed == [cases[0].name] and "illegal memory access" in lines[-1]
    assert record.rows[-1].case == cases[1].name and "the device failed in" in record.rows[-1].status


def test_without_a_gpu_there_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--filter", "nothing"], "no case matches 'nothing'"), (["--minutes", "0"], "--minutes must be above 0")],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dry-run", *arguments])
    assert message in capsys.readouterr().err


def test_a_bare_checkout_with_torch_alone_is_enough() -> None:
    """No path set, and none of the packages that a GPU machine need not have."""
    absent = ["diffusers", "transformers", "accelerate", "psutil", "matplotlib", "scfg_fast"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
from benchmarks.gpu.run import main
raise SystemExit(main(["--dry-run", "--no-compile", "--filter", "guide sd15 b1 float16"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0 disagree" in done.stdout


def test_a_graph_must_repeat_the_call() -> None:
    numbers = iter(range(10))
    calls = {
        "same": lambda: torch.ones(3),
        "other": lambda: torch.tensor(next(numbers)),
        "none": lambda: torch.ones(-1),
    }
    assert [_add_graph(name, calls, Cpu()).split(":")[0] for name in ("same", "other", "none")] == [
        "ok", "FAILED", "FAILED",
    ]  # fmt: skip
    assert set(calls) == {"same", "other", "none", "same (graph)"}
