"""The ahead-of-time lane: rules on what the compilers make of a part of the launch table, and the lane's own parts.

The whole table takes minutes and is `make aot`. Here every operator is compiled once, for one target of every kind:
mma.sync, wgmma, AMD.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from scfg_kernels._launch import OPS

from benchmarks import aot
from lab.ptxsim import TARGETS

SOME = {
    "attention_maps/sd15-16x16/float16": "sm_80",
    "attention_maps/sdxl-32x32/float16": "sm_90",
    "attention_maps/sdxl-32x32/float32": "sm_80",
    "attention_map/sdxl-32x32/float16": "sm_90",
    "joint_attention_maps/sd3/float16": "gfx942",
    "complete/sd15/float32": "sm_90",
    "segment/sd15/float32": "sm_80",
    "guide/sdxl/float16": "gfx942",
    "segment_and_guide/sd15/float16": "sm_80",
    "guide_pixels/sd15/float16": "sm_90",
}


@pytest.mark.parametrize(("name", "target"), SOME.items())
def test_builds_keep_the_rules(name: str, target: str) -> None:
    case = aot.CASES[name]
    assert aot.faults(case, target, aot.compile_case(case, target)) == []


def test_the_table_covers_every_operator() -> None:
    assert {case.op for case in aot.CASES.values()} == set(OPS) == {name.split("/")[0] for name in SOME}
    assert set(aot.TARGETS) == set(TARGETS)


BUILD = aot.Build("k", (1, 1, 1), 4, 64, 0, 0, 1000, "mma", 0, {16: 1}, {16: 1}, 10, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop_spills": 2}, "2 spill instructions in loops"),
        ({"shared": 98305}, "98305 bytes of shared memory, 98304 allowed"),
        ({"matrix": ""}, "no tensor-core instruction"),
        ({"float_atomics": 1}, "1 floating-point atomics"),
    ],
)
def test_every_rule_is_reported(change: dict, message: str) -> None:
    subject = aot.CASES["complete/sd15/float32"]
    assert aot.faults(subject, "sm_80", [BUILD]) == []
    found = aot.faults(subject, "sm_80", [dataclasses.replace(BUILD, **change)])
    assert len(found) == 1 and message in found[0]


def test_no_launch_breaks_a_rule() -> None:
    assert aot.faults(aot.CASES["guide/sd15/float16"], "sm_80", []) == ["guide/sd15/float16 on sm_80: no launch"]


def test_limits_are_those_of_the_maker() -> None:
    subject, build = aot.CASES["complete/sd15/float32"], dataclasses.replace(BUILD, shared=65537)
    assert aot.faults(subject, "sm_100", [build]) == []
    assert "65537 bytes of shared memory, 65536 allowed" in aot.faults(subject, "gfx942", [build])[0]


def test_the_file_has_a_line_per_build(tmp_path: Path) -> None:
    aot.write({"y": [BUILD], "x": [BUILD, BUILD]}, tmp_path / "aot.json")
    content = json.loads((tmp_path / "aot.json").read_text())
    assert [build["case"] for build in content["builds"]] == ["x", "x", "y"]
    assert content["builds"][0]["registers"] == 64 and {"triton", "commit"} < set(content)
    assert len((tmp_path / "aot.json").read_text().splitlines()) == 5


SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   STL [R1], R4 ;
.L_x_1:
        /*0030*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0040*/                   LDL.64 R4, [R1] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   BRA.U UP0, `(.L_x_0) ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""
GCN = """
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	scratch_store_dword off, v0, s33
	v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]
	s_cbranch_scc1 .LBB0_1
	buffer_store_short v0, v4, s[0:3], 0 offen
"""


def test_machine_code_is_read() -> None:
    code = aot.Code.of(SASS, **aot._SASS)
    assert len(code.instructions) == 9 and code.count("LDL|STL") == 2
    assert code.in_loops().count("LDL|STL") == 2 and code.in_innermost_loops().count("LDL|STL") == 1
    assert aot._by_bytes(code.named("LDG"), aot._sass_bytes) == {2: 1, 16: 1}
    assert aot._by_bytes(code.in_innermost_loops().named("LDG"), aot._sass_bytes) == {2: 1}
    assert aot._by_bytes(code.named("STG"), aot._sass_bytes) == {8: 1}
    assert code.in_loops().count("STG") == 0
    code = aot.Code.of(GCN, **aot._GCN)
    assert code.instructions[0] == "s_load_dwordx2" and len(code.instructions) == 6
    assert code.in_innermost_loops().count("scratch_") == 1 and code.in_loops().count("buffer_store") == 0
    assert aot._by_bytes(code.named("buffer_"), aot._gcn_bytes) == {2: 1, 16: 1}


def test_a_part_of_the_table_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "aot.json"
    assert aot.main(["--filter", "guide_pixels/sd15/float16", "--targets", "sm_90", "--out", str(out)]) == 0
    assert "nothing written" in capsys.readouterr().out and not out.exists()
    with pytest.raises(SystemExit):
        aot.main(["--filter", "no such case"])
    assert "no case matches" in capsys.readouterr().err


def test_processes_compile_in_the_order_of_the_table_and_name_what_fails() -> None:
    case = aot.CASES["guide_pixels/sd15/float16"]
    table = [(case, "sm_90"), (case, "sm_80")]
    assert list(aot.compiled(table, 2)) == [aot.compile_case(*entry) for entry in table]
    unknown = dataclasses.replace(case, sizes="nowhere", dtype=torch.float16)
    with pytest.raises(aot.CompilationError, match="nowhere/float16 on sm_80 was not compiled: KeyError"):
        list(aot.compiled([(unknown, "sm_80")], 1))
