"""The ahead-of-time lane: rules on what the compilers make of a part of the launch table, and the lane's own parts.

The whole table takes minutes and is `make aot`. Here every kernel is compiled once for one target of every kind:
mma.sync, wgmma, AMD.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import triton
from ptxsim import TARGETS
from scfg_kernels._launch import OPS

from benchmarks import aot

SOME = {
    "self_attention_map/sd15-16x16/float16": "sm_80",
    "self_attention_map/sdxl-32x32/bfloat16": "gfx942",
    "cross_attention_map/sd15-16x16/float16": "gfx942",
    "cross_attention_map/sdxl-32x32/bfloat16": "sm_90",
    "attention_map/sd15-16x16-text/float16": "sm_90",
    "complete/sd15-16x16/float32": "sm_90",
    "segment/sd15/float32": "sm_80",
    "guide/sdxl/float16": "gfx942",
    "segment_and_guide/sd15/float16": "sm_80",
    "guide_pixels/sd15/float16": "sm_90",
    "propagate/sdxl-64x64/float16": "sm_90",
    "complete_from_qk/sdxl-64x64/float16": "sm_80",
}


@pytest.fixture(scope="module")
def committed() -> aot.Record:
    return aot.read()


def case(name: str) -> aot.Case:
    return next(case for case in aot.CASES if case.name == name)


@pytest.mark.parametrize(("name", "target"), SOME.items())
def test_builds_keep_the_rules_and_do_not_grow(committed: aot.Record, name: str, target: str) -> None:
    builds = aot.compile_case(case(name), target)
    assert aot.faults(case(name), target, builds) == []
    table = {f"{name}/{target}": builds}
    # Another version of the compiler may need more; that is not this project's growth.
    expected = committed.builds if committed.triton == triton.__version__ else table
    assert aot.compare(table, expected, whole=False) == []


def test_the_table_covers_every_operator_and_the_file_the_table(committed: aot.Record) -> None:
    names = [case.name for case in aot.CASES]
    assert len(set(names)) == len(names)
    assert {case.op for case in aot.CASES} == set(OPS) == {name.split("/")[0] for name in SOME}
    assert set(aot.TARGETS) == set(TARGETS) == set(aot.MULTIPROCESSORS)
    assert set(committed.builds) == {f"{name}/{target}" for name in names for target in aot.TARGETS}


def test_the_file_lists_every_rule_that_its_builds_break(committed: aot.Record) -> None:
    found = []
    for key, builds in committed.builds.items():
        name, target = key.rsplit("/", 1)
        found += aot.faults(case(name), target, builds)
    assert sorted(found) == committed.broken
    assert not [fault for fault in found if "atomics" in fault or "tensor-core" in fault or "no program" in fault]


@pytest.fixture(scope="module")
def build(committed: aot.Record) -> aot.Build:
    return committed.builds["self_attention_map/sd15-16x16/float16/sm_80"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop_spills": 2}, "2 spill instructions in loops"),
        ({"shared": 98305}, "98305 bytes of shared memory, 98304 allowed"),
        ({"occupancy": 0.0}, "no program fits"),
        ({"matrix": ""}, "no tensor-core instruction"),
        ({"float_atomics": 1}, "1 floating-point atomics"),
        ({"loads": {4: 20}}, "no 16-byte load"),
        ({"innermost_loads": {2: 120, 16: 4}}, "loads below 4 bytes in innermost loops"),
    ],
)
def test_every_rule_is_reported(build: aot.Build, change: dict, message: str) -> None:
    subject = case("self_attention_map/sd15-16x16/float16")
    assert aot.faults(subject, "sm_80", [build]) == []
    found = aot.faults(subject, "sm_80", [dataclasses.replace(build, **change)])
    assert len(found) == 1 and message in found[0]
    assert aot.faults(subject, "sm_80", []) == ["no launch"]


def test_limits_are_those_of_the_maker() -> None:
    subject = case("complete/sd15-16x16/float32")
    build = aot.Build("k", (1, 1, 1), 4, 1, 64, 0, 0, 0, 65537, 0.5, "", 0, {16: 1}, {16: 1}, {}, 10)
    assert aot.faults(subject, "sm_100", [build]) == []
    assert "65537 bytes of shared memory, 65536 allowed" in aot.faults(subject, "gfx942", [build])[0]


def test_growth_of_ten_percent_fails(build: aot.Build) -> None:
    before = dataclasses.replace(build, registers=100, spills=0, shared=1000)
    assert aot.growth("x", dataclasses.replace(before, registers=109, shared=1099), before) == []
    assert aot.growth("x", dataclasses.replace(before, registers=50), before) == []
    for change in ({"registers": 110}, {"spills": 1}, {"shared": 1100}):
        assert len(aot.growth("x", dataclasses.replace(before, **change), before)) == 1
    table, grown = {"x": [before]}, {"x": [dataclasses.replace(before, spills=1)], "y": [before]}
    assert aot.compare(grown, table, whole=True) == [f"x: {build.kernel}: spills grew from 0 to 1",
                                                     "y is not in the file"]  # fmt: skip
    assert aot.compare({}, table, whole=True) == ["x is in the file and was not compiled"]
    assert aot.compare({}, table, whole=False) == []
    assert aot.compare({"x": [before, before]}, table, whole=False) == ["x: 1 launches became 2"]


def test_the_file_comes_back(tmp_path: Path, build: aot.Build) -> None:
    record = aot.Record("3.8.0", ["a rule", "b rule"], {"x": [build, build], "y": [build]})
    aot.write(record, tmp_path / "aot.json")
    assert aot.read(tmp_path / "aot.json") == record


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 64 / 64),
        ("sm_80", 33, 0, 4, 48 / 64),  # 1280 registers a warp: 51 of them, 12 programs
        ("sm_80", 255, 0, 8, 8 / 64),
        ("sm_90", 64, 65536, 8, 24 / 64),  # three programs by shared memory
        ("sm_86", 40, 0, 1, 16 / 48),  # sixteen programs
        ("gfx942", 128, 0, 4, 16 / 32),
        ("gfx942", 64, 32768, 8, 16 / 32),
        ("sm_80", 64, 200000, 4, 0.0),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert aot.occupancy(target, registers, shared, warps) == expected


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
    assert aot.main(["--filter", "guide_pixels/sd15/", "--targets", "sm_90", "--out", str(out)]) == 0
    assert "nothing written" in capsys.readouterr().out and not out.exists()


def test_the_check_compares_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, part = tmp_path / "aot.json", ["--filter", "guide_pixels/sd15/", "--targets", "sm_90"]
    name = "guide_pixels/sd15/float16/sm_90"
    builds = aot.compile_case(case("guide_pixels/sd15/float16"), "sm_90")
    aot.write(aot.Record(triton.__version__, [], {name: builds}), out)
    assert aot.main([*part, "--check", "--out", str(out)]) == 0
    smaller = [dataclasses.replace(build, registers=build.registers // 2) for build in builds]
    aot.write(aot.Record(triton.__version__, [], {name: smaller}), out)
    assert aot.main([*part, "--check", "--out", str(out)]) == 1
    assert f"FAILED {name}: guide_pixels_kernel: registers grew" in capsys.readouterr().err
    aot.write(aot.Record("0.0", [], {name: smaller}), out)
    assert aot.main([*part, "--check", "--out", str(out)]) == 0
    assert "from Triton 0.0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        aot.main(["--filter", "no such case"])
    assert "no case matches" in capsys.readouterr().err
