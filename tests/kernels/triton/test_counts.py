"""The table of counts at real layer sizes: its arithmetic, its cases, its file. The counting itself is ptxsim's."""

from __future__ import annotations

from pathlib import Path

import pytest
from ptxsim import Traffic
from scfg_kernels._launch import OPS

from benchmarks import simulated
from benchmarks.simulated import Count


def test_the_table_covers_every_operator_and_the_file_the_table() -> None:
    assert {case.op for case in simulated.CASES} == set(OPS)
    rows = [line for line in simulated.OUT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert rows[0] == f"| {' | '.join(simulated.HEADER)} |"
    named = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in rows[2:]]
    assert named == [(case.name, str(arch)) for case in simulated.CASES for arch in simulated.ARCHITECTURES]


def test_ratios() -> None:
    traffic = {
        "q": Traffic(load_sectors=4, unique_load_bytes=128),
        "k": Traffic(load_sectors=16, unique_load_bytes=64),
        "out": Traffic(store_sectors=2, unique_store_bytes=64),
    }
    counted = Count(("a", "b"), 256, traffic, 30, 20, 300)
    assert counted.moved == 32 * 22 and counted.touched == 256
    assert counted.moved_once({"k"}) == 256 and counted.moved_once({"q"}) == counted.moved
    assert counted.reread() == {"k": 8.0}
    case = simulated.Case("op", "sizes", lambda: ((), {}), scores=60, values=60, sweeps=2)
    cells = simulated.row(case, 80, counted)
    assert cells == ("op/sizes", "80", "2", "0.000", "2.75", "1.00", "1.00", "1.00", "k 8x", "1.50", "2.50", "1.67")
    assert simulated.table([cells]).splitlines()[2].startswith("| op/sizes | 80 | 2 |")


def test_a_case_is_counted_and_only_the_whole_table_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "simulated.md"
    assert simulated.main(["--filter", "guide_pixels/sd15", "--arch", "80", "--out", str(out)]) == 0
    assert not out.exists()
    cells = capsys.readouterr().out.splitlines()[0].split("] ")[1].split(" | ")
    # uncond, cond, result in fp16 and the rate in fp32 of 64 x 64 pixels; one scale
    assert cells[:4] == ["guide_pixels/sd15", "80", "1", f"{(3 * 4 * 2 + 4) * 4096 / 1e6:.3f}"]
    with pytest.raises(SystemExit):
        simulated.main(["--filter", "no such case"])
    assert "no case matches" in capsys.readouterr().err
