"""The ahead-of-time lane: rules on what the compilers make of a part of the launch table, and the lane's own parts.

The whole table takes minutes and is `make aot`. Here every kernel is compiled once for one target of every kind:
mma.sync, wgmma, AMD.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from scfg_kernels import _launch
from scfg_kernels._launch import MAX_HEAD_DIM_FP32, OPS, DeviceLimits

from benchmarks import aot
from benchmarks.gpu import grid
from lab.ptxsim import TARGETS

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
    "propagate/sdxl-64x64/bfloat16": "sm_90",
    "complete_from_qk/sdxl-64x64/float16": "sm_80",
}


@pytest.fixture(scope="module")
def committed() -> aot.Record:
    return aot.read()


@pytest.mark.parametrize(("name", "target"), SOME.items())
def test_builds_keep_the_rules_and_do_not_grow(committed: aot.Record, name: str, target: str) -> None:
    builds = aot.compile_case(aot.CASES[name], target)
    assert aot.faults(aot.CASES[name], target, builds) == []
    table = {f"{name}/{target}": builds}
    # Another version of the compiler may need more; that is not this project's growth.
    expected = committed.builds if committed.triton == triton.__version__ else table
    assert aot.compare(table, expected, whole=False) == []


def test_the_table_covers_every_operator_and_the_file_the_table(committed: aot.Record) -> None:
    keys = [f"{case.name}/{target}" for case, target in aot.TABLE]
    assert len(set(keys)) == len(keys)
    assert {case.op for case in aot.CASES.values()} == set(OPS) == {name.split("/")[0] for name in SOME}
    assert set(aot.TARGETS) == set(TARGETS) == set(aot.MULTIPROCESSORS)
    assert set(committed.builds) == set(keys)


def test_nothing_is_compiled_twice() -> None:
    variants = [(case.variant(aot.limits_of(target)), target) for case, target in aot.TABLE]
    assert len(set(variants)) == len(variants)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def chosen(
    op: str, sizes: grid.Sizes, batch: int, dtype: torch.dtype, limits: DeviceLimits
) -> Iterator[tuple[str, Any, Any]]:
    """(operator, configuration, head size or 0) of every launch of a case of the GPU benchmark."""
    if op == "step":
        for layer in dict.fromkeys(sizes.layers):
            for part in ("self_attention_map", "cross_attention_map", "complete"):
                yield from chosen(part, dataclasses.replace(sizes, layers=(layer,)), batch, dtype, limits)
        yield from chosen("segment_and_guide", sizes, batch, dtype, limits)
        return
    layer = sizes.layers[0] if sizes.layers else grid.Layer(1, 1, 1, 1)
    rows, heads, dim, cells = layer.rows, layer.heads, layer.head_dim, sizes.side // aot.CELL
    programs, latent = _launch.resident_programs(batch, limits), (sizes.channels, sizes.side, sizes.side)
    if dtype == torch.float32 and dim > MAX_HEAD_DIM_FP32 and op not in aot.WITHOUT_HEADS:
        return  # torch's
    if op.endswith("attention_map"):
        keys = rows if op == "self_attention_map" else layer.text
        if _launch.in_one_sweep(keys, dtype):
            yield op, _launch.attention_config(heads, keys, dim, limits), dim
        else:
            yield "two parts", _launch.flash_config(2 * batch, heads, rows, keys, dim, dtype, limits), dim
    elif op in ("propagate", "complete_from_qk"):
        yield op, _launch.propagate_config(2 * batch, heads, rows, grid.TOKENS, dim, dtype, limits), dim
    elif op == "complete":
        config = _launch.complete_config(batch, rows, grid.TOKENS, limits)
        yield "one program" if rows <= config.block_m else op, config, 0
    elif op == "segment":
        yield op, _launch.segment_config(cells, cells), 0
    elif op == "guide":
        yield op, _launch.guide_config(*latent, aot.CELL, dtype.itemsize, programs), 0
    elif op == "segment_and_guide":
        yield op, _launch.guide_config(*latent, aot.CELL, dtype.itemsize), 0
        yield from chosen("guide", sizes, batch, dtype, limits)  # in steps that keep their regions
    else:
        assert op == "guide_pixels"
        yield op, _launch.pixel_config(sizes.channels, sizes.side**2, dtype.itemsize, programs), 0


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_configuration_of_a_real_size_is_in_the_table(target: str) -> None:
    """Choices for the layers of SD 1.5, SDXL and SD 3, the batches and the dtypes of the GPU benchmark and fp32: each
    is compiled, in one of the dtypes of its size."""
    limits, compiled = aot.limits_of(target), set()
    for case, where in aot.TABLE:
        if where == target:
            variant = case.variant(limits)
            attention = variant.kernel.endswith(("attention_map_kernel", "propagate_kernel", "from_qk_kernel"))
            shared = {"self_attention_map_kernel": "two parts", "complete_whole_kernel": "one program"}
            op = shared.get(variant.kernel, case.op)
            compiled.add((op, variant.config, variant.constants[0] if attention else 0, variant.dtype.itemsize))
    needed = {
        (*choice, 4 if choice[0] in ("complete", "one program", "segment") else dtype.itemsize)
        for op, sizes in {(case.op, case.sizes) for case in grid.CASES}
        for batch in grid.BATCHES
        for dtype in DTYPES
        for choice in chosen(op, sizes, batch, dtype, limits)
    }
    assert len(needed) > 25
    assert needed <= compiled, f"no case compiles {needed - compiled}"


def test_the_file_lists_every_rule_that_its_builds_break(committed: aot.Record) -> None:
    found = []
    for key, builds in committed.builds.items():
        name, target = key.rsplit("/", 1)
        found += aot.faults(aot.CASES[name], target, builds)
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
        ({"loads": {4: 20, 8: 2}}, "no 16-byte load"),
        ({"innermost_loads": {2: 120, 16: 4}}, "loads below 4 bytes in innermost loops"),
    ],
)
def test_every_rule_is_reported(build: aot.Build, change: dict, message: str) -> None:
    subject = aot.CASES["self_attention_map/sd15-16x16/float16"]
    assert aot.faults(subject, "sm_80", [build]) == []
    found = aot.faults(subject, "sm_80", [dataclasses.replace(build, **change)])
    assert len(found) == 1 and message in found[0]
    assert aot.faults(subject, "sm_80", []) == ["no launch"]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("guide/sd15/float16", []),  # a line of a cell is 8 bytes
        ("guide/sd15/float32", ["no 16-byte load"]),
        ("guide_pixels/sd15/float16", ["no 16-byte load", "loads below 4 bytes in innermost loops: {2: 1}"]),
        ("segment_and_guide/sd15/float16", ["no 16-byte load"]),  # its parts leave tokens of 2 bytes
        ("complete/sd15-16x16/float32", ["no tensor-core instruction", "no 16-byte load"]),
    ],
)
def test_rules_on_loads_and_tensor_cores_are_those_of_the_operator(
    build: aot.Build, name: str, broken: list[str]
) -> None:
    loops = {2: 1} if name.startswith(("guide_pixels", "segment")) else {4: 1}
    subject = dataclasses.replace(build, loads={1: 3, 8: 2}, innermost_loads=loops, matrix="")
    found = aot.faults(aot.CASES[name], "sm_80", [subject])
    assert [fault.split(": ", 2)[2] for fault in found] == broken


def test_limits_are_those_of_the_maker() -> None:
    subject = aot.CASES["complete/sd15-16x16/float32"]
    build = aot.Build("k", (1, 1, 1), 4, 1, 64, 0, 0, 0, 65537, 0.5, "mma", 0, {16: 1}, {16: 1}, {}, 10)
    assert aot.faults(subject, "sm_100", [build]) == []
    assert "65537 bytes of shared memory, 65536 allowed" in aot.faults(subject, "gfx942", [build])[0]


def test_growth_of_ten_percent_fails(build: aot.Build) -> None:
    before = dataclasses.replace(build, registers=100, spills=0, shared=1000)
    assert aot.growth("x", dataclasses.replace(before, registers=109, shared=1099), before) == []
    assert aot.growth("x", dataclasses.replace(before, registers=50), before) == []
    assert aot.growth("x", dataclasses.replace(before, occupancy=0.91 * before.occupancy), before) == []
    for change in (
        {"registers": 110}, {"spills": 1}, {"shared": 1100}, {"occupancy": 0.75 * before.occupancy},
    ):  # fmt: skip
        assert len(aot.growth("x", dataclasses.replace(before, **change), before)) == 1
    table, grown = {"x": [before]}, {"x": [dataclasses.replace(before, spills=1)], "y": [before]}
    assert aot.compare(grown, table, whole=True) == [f"x: {build.kernel}: spills grew from 0 to 1",
                                                     "y is not in the file"]  # fmt: skip
    assert aot.compare({}, table, whole=True) == ["x is in the file and was not compiled"]
    assert aot.compare({}, table, whole=False) == []
    assert aot.compare({"x": [before, before]}, table, whole=False) == ["x: 1 launches became 2"]


def test_the_file_comes_back(tmp_path: Path, build: aot.Build) -> None:
    record = aot.Record("3.8.0", "abc", ["a rule", "b rule"], {"x": [build, build], "y": [build]})
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
    assert aot.main(["--filter", "guide_pixels/sd15/float16", "--targets", "sm_90", "--out", str(out)]) == 0
    assert "nothing written" in capsys.readouterr().out and not out.exists()


def test_the_check_compares_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, part = tmp_path / "aot.json", ["--filter", "guide_pixels/sd15/float16", "--targets", "sm_90"]
    name = "guide_pixels/sd15/float16/sm_90"
    builds = aot.compile_case(aot.CASES["guide_pixels/sd15/float16"], "sm_90")
    aot.write(aot.Record(triton.__version__, "abc", [], {name: builds}), out)
    assert aot.main([*part, "--check", "--out", str(out)]) == 0
    smaller = [dataclasses.replace(build, registers=build.registers // 2) for build in builds]
    aot.write(aot.Record(triton.__version__, "abc", [], {name: smaller}), out)
    assert aot.main([*part, "--check", "--out", str(out)]) == 1
    assert f"FAILED {name}: guide_pixels_kernel: registers grew" in capsys.readouterr().err
    aot.write(aot.Record("0.0", "abc", [], {name: smaller}), out)
    assert aot.main([*part, "--check", "--out", str(out)]) == 0
    assert "from Triton 0.0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        aot.main(["--filter", "no such case"])
    assert "no case matches" in capsys.readouterr().err


def test_processes_compile_in_the_order_of_the_table_and_name_what_fails() -> None:
    case = aot.CASES["guide_pixels/sd15/float16"]
    table = [(case, "sm_90"), (case, "sm_80")]
    assert list(aot.compiled(table, 2)) == [aot.compile_case(*entry) for entry in table]
    unknown = dataclasses.replace(case, sizes="nowhere")
    with pytest.raises(aot.CompilationError, match="nowhere/float16 on sm_80 was not compiled: KeyError"):
        list(aot.compiled([(unknown, "sm_80")], 1))


def test_a_launch_that_is_not_the_variant_is_an_error() -> None:
    case = aot.CASES["guide_pixels/sd15/float16"]
    other = dataclasses.replace(case, variant=aot.CASES["guide/sd15/float16"].variant)
    with pytest.raises(aot.CompilationError, match=r"launched .*guide_pixels_kernel.*, the table says .*guide_kernel"):
        aot.compile_case(other, "sm_80")
