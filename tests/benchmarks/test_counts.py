"""The table of counts at real layer sizes: its arithmetic, its cases, its file. The counting itself is ptxsim's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import scfg_kernels
import torch
from scfg_kernels._launch import OPS

from benchmarks import simulated
from benchmarks.simulated import Count
from lab.ptxsim import Traffic

CASES = {case.name: case for case in simulated.CASES}


def committed() -> list[tuple[str, ...]]:
    """The cells of the file's table."""
    lines = simulated.OUT.read_text(encoding="utf-8").splitlines()
    return [tuple(line.strip("| ").split(" | ")) for line in lines if line.startswith("| ")]


def test_the_table_covers_every_operator_and_the_file_the_table() -> None:
    assert {case.op for case in simulated.CASES} == set(OPS) - {"attention_map"}  # a part of attention_maps
    header, _, *rows = committed()
    assert header == simulated.HEADER
    named = [(case.name, str(arch)) for case in simulated.CASES for arch in simulated.ARCHITECTURES]
    assert [cells[:2] for cells in rows] == named


@pytest.mark.parametrize(
    ("name", "arch"), [("attention_maps/sd15-8x8", 90), ("complete/sd15-8x8", 80), ("guide_pixels/sd15", 80)]
)
def test_what_is_counted_is_verified(name: str, arch: int) -> None:
    cells = simulated.row(CASES[name], arch, simulated.count(CASES[name], arch))
    assert cells[:2] == (name, str(arch)) and len(cells) == len(simulated.HEADER)


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


def test_results_are_verified() -> None:
    """Results that are the twin's pass; any other ends the count of its case with an error."""
    rates = CASES["guide_pixels/sd15"]
    arguments, options = rates.make()
    guided, rate = scfg_kernels.guide_pixels(*arguments, **options)
    simulated.verify(rates, arguments, options, (guided, rate))
    for wrong in ((guided, rate + 1e-4), (guided.index_fill(3, torch.tensor(5), 0.0), rate)):
        with pytest.raises(simulated.DisagreementError, match="guide_pixels/sd15: result"):
            simulated.verify(rates, arguments, options, wrong)

    both = CASES["segment_and_guide/sd15"]
    arguments, options = both.make()
    guided, rate, ids, foreground = scfg_kernels.segment_and_guide(*arguments, **options)
    simulated.verify(both, arguments, options, (guided, rate, ids, foreground))
    with pytest.raises(simulated.DisagreementError, match=r"ids: .* differ away from a tie"):
        simulated.verify(both, arguments, options, (guided, rate, ids.roll(1), foreground))
    with pytest.raises(simulated.DisagreementError, match=r"foreground: .* differ away from a tie"):
        simulated.verify(both, arguments, options, (guided, rate, ids, ~foreground))
    with pytest.raises(simulated.DisagreementError, match="segment_and_guide/sd15: result 0"):
        simulated.verify(both, arguments, options, (guided * 1.1, rate, ids, foreground))


def test_a_result_that_disagrees_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (uncond, cond, scale), options = CASES["guide_pixels/sd15"].make()
    nothing_is_close = dataclasses.replace(
        CASES["guide_pixels/sd15"], make=lambda: ((uncond, cond, scale * torch.nan), options)
    )
    monkeypatch.setattr(simulated, "CASES", (nothing_is_close,))
    monkeypatch.setattr(simulated, "ARCHITECTURES", (80,))
    out = tmp_path / "simulated.md"
    assert simulated.main(["--out", str(out), "--arch", "80"]) == 1
    assert not out.exists()
    assert "FAILED sm_80: guide_pixels/sd15: result 0" in capsys.readouterr().err
