"""The benchmarks themselves: well-formed cases, refusal of wrong results, files that come back, counted operators."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import scfg_fast
from benchmarks import overhead, plot, registry, report, run, verify
from lab.measure import CountOps, Spread, allocated_peak, interleaved, ratios
from lab.reference import official

EAGER = ("literal", "ours")
SMALL = [case for case in registry.QUICK_CASES if case.batch == 2]
BY_NAME = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


def small(op: str) -> registry.Case:
    return next(case for case in SMALL if case.op == op)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_every_operator_has_cases_at_both_models_and_batches() -> None:
    names = [case.name for case in registry.CASES]
    assert len(set(names)) == len(names)
    for op in registry.OPERATORS:
        found = {(case.model.label, case.batch) for case in registry.CASES if case.op == op}
        assert found == {(label, batch) for label in ("sd15", "sdxl-6of60layers") for batch in (1, 4)}
    assert all(set(operator.providers) == set(registry.PROVIDERS) for operator in registry.OPERATORS.values())
    assert all(case.operator.flops(case) > 0 and case.operator.bytes(case) > 0 for case in registry.CASES)


def test_filter_needs_every_word() -> None:
    assert {case.name for case in registry.select("complete sd15 b4")} == {
        "complete/sd15-16x16/b4",
        "complete/sd15-8x8/b4",
    }
    assert registry.select("no such case") == []


def test_declared_bytes_are_the_bytes_of_the_tensors() -> None:
    """Where inputs and outputs are exactly what must move, the formula and the tensors agree."""
    case = small("cross_attention")
    prepared = registry.prepare(case)
    tensors = [*prepared.inputs.values(), *prepared.call("ours")()]
    assert case.operator.bytes(case) == sum(t.numel() * t.element_size() for t in tensors)


@BY_NAME
def test_inputs_repeat(case: registry.Case) -> None:
    first, second = registry.in_double(case.operator.inputs(case)), registry.in_double(case.operator.inputs(case))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name


def test_attention_inputs_are_neither_uniform_nor_one_hot() -> None:
    """The effective number of keys (exponential of a head's entropy) is a part of all; the start token stands out."""
    layer, rng = registry.SD15.layers[0], torch.Generator().manual_seed(1)
    for make, keys in (
        (registry.self_attention_inputs, layer.n),
        (registry.cross_attention_inputs, registry.TOKENS),
    ):
        x = make(layer, 1, rng)
        p = torch.softmax(x["q"] @ x["k"].transpose(-1, -2) / layer.head_dim**0.5, -1)
        effective = torch.special.entr(p).sum(-1).exp().mean().item()
        assert 2 < effective < keys / 2
    assert p[..., 0].mean() > 5 / registry.TOKENS


def test_verify_passes_on_the_smallest_sizes() -> None:
    lines: list[str] = []
    assert verify.verify(registry.QUICK_CASES, EAGER, lines.append) == []
    assert len(lines) == len(registry.QUICK_CASES)
    assert all("literal ok, ours ok" in line for line in lines)


@BY_NAME
def test_a_provider_that_disagrees_is_refused(case: registry.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of each result, spoilt by little: the check names it and nothing is timed."""
    honest = case.operator.providers["ours"]
    for name, tensor in honest.view(honest.run(case.operator.inputs(case))).items():

        def spoilt(raw, name=name):
            result = dict(honest.view(raw))
            old = result[name]
            result[name] = ~old if old.dtype == torch.bool else old + 1 if not old.is_floating_point() else old * 1.001
            return result

        providers = {**case.operator.providers, "ours": dataclasses.replace(honest, view=spoilt)}
        monkeypatch.setitem(registry.OPERATORS, case.op, dataclasses.replace(case.operator, providers=providers))
        with pytest.raises(registry.DisagreementError, match=f"{case.name}: ours disagrees.*{name}"):
            registry.prepare(case).check("ours")
        monkeypatch.undo()
        assert tensor.numel() > 0


def test_run_ends_with_an_error_when_a_provider_disagrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = registry.OPERATORS["complete"]
    wrong = registry.Provider(lambda x: operator.providers["ours"].run({**x, "self_map": x["self_map"].flip(1)}),
                              operator.providers["ours"].view)  # fmt: skip
    wrong_operator = dataclasses.replace(operator, providers={**operator.providers, "ours": wrong})
    monkeypatch.setitem(registry.OPERATORS, "complete", wrong_operator)
    out = tmp_path / "wrong"
    assert run.main(["--quick", "--no-compile", "--filter", "complete tiny-4x4 b1", "--out", str(out)]) == 1
    assert "REFUSED TO TIME: complete/tiny-4x4/b1: ours disagrees" in capsys.readouterr().err
    assert not out.with_suffix(".csv").exists()


def test_near_ties_are_forgiven_and_nothing_else() -> None:
    expected = torch.zeros(1, 10, 20, dtype=torch.int64)
    margin = torch.full(expected.shape, 0.5)
    margin[0, 0, 0] = 0.5 * registry.TIE_BAND
    tie, clear = expected.clone(), expected.clone()
    tie[0, 0, 0], clear[0, 5, 5] = 3, 3
    assert registry._same_regions("ids", tie, expected, margin) == []
    assert registry._same_regions("ids", clear, expected, margin) == [
        "ids differs in 1 of 200 cells that are no near-tie"
    ]
    many = registry._same_regions("ids", expected + 1, expected, torch.zeros(expected.shape))
    assert many == ["ids differs in 100.0% of the cells, all near-ties"]


def test_the_literal_step_is_the_oracle_bit_for_bit() -> None:
    """`literal_step_from_maps` leaves out what `literal_guidance` computes for its report, and nothing else."""
    case = small("step_from_maps")
    x = registry.prepare(case).inputs
    store = official.LiteralStore((case.model.side, case.model.side))
    for self_map, cross_map in zip(x["self_maps"], x["cross_maps"], strict=True):
        store.add("self", self_map)
        store.add("cross", cross_map)
    noise = torch.cat([x["uncond"], x["cond"]])
    expected, stages = official.literal_guidance(store, noise, registry.GUIDANCE_SCALE, store.latent_hw)
    guided, rate, masks, foreground = registry.literal_step_from_maps(x)
    assert torch.equal(guided, expected) and torch.equal(rate, stages["rate"])
    assert torch.equal(masks, stages["masks"]) and torch.equal(foreground, stages["foreground"])


def test_files_come_back_and_are_drawn(tmp_path: Path) -> None:
    """A real (tiny) run is written, read back equal to six digits, and drawn from the CSV alone."""
    out = tmp_path / "ops"
    assert run.main(["--quick", "--no-compile", "--filter", "guide", "--out", str(out)]) == 0
    table = out.with_suffix(".csv")
    rows = report.read(table)
    assert {row.metric for row in rows} >= {"time", "speedup", "control_ratio", "peak_allocated", "useful_compute"}
    assert {row.case for row in rows} == {"guide/tiny/b1", "guide/tiny/b2"}
    assert all(row.commit and row.cpu and row.threads >= 1 for row in rows)
    out.with_suffix(".json").unlink()
    picture = plot.plot(table, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    table.write_text("case,value\nx,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has the columns"):
        report.read(table)


def test_rows_round_trip(tmp_path: Path) -> None:
    result = report.Report({"seed": 0})
    result.add("a/b/b1", "a", "b", 1, "ours", "time", "ms", Spread(1.25, 1.0, 1.5, 7))
    result.add("a/b/b1", "a", "b", 1, "compiled", "time", "ms", None, "not run: no compiler, none at all")
    table, _ = result.write(tmp_path / "x", finished=True)
    assert report.read(table) == result.rows


def test_interleaving_times_everyone_in_every_round() -> None:
    calls: list[str] = []
    samples = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 6, {"a": 2})
    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert calls.count("a") == 12 and calls.count("b") == calls.count("c") == 6
    by_round = [calls[start : start + 4] for start in range(0, 24, 4)]
    assert all(set(found) == {"a", "b", "c"} for found in by_round)
    assert len({tuple(found) for found in by_round}) > 1
    stopped = interleaved({"a": lambda: None}, 6, after_round=lambda index, latest: index < 1)
    assert len(stopped["a"]) == 2


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that slows down tenfold between rounds changes no ratio."""
    spread = ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (spread.value, spread.low, spread.high, spread.count) == (2.0, 2.0, 2.0, 3)


def test_allocated_peak_counts_temporaries() -> None:
    """A second profile does not count the first one's; a few bytes are the Python numbers that became tensors."""
    x = torch.ones(1 << 16)
    one = x.numel() * x.element_size()

    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    for expected, call in ((1, lambda: x + 1), (2, lambda: (x + 1) * 2), (3, lambda: both(x + 1, x + 2))):
        for _ in range(2):
            assert expected * one <= allocated_peak(call) < expected * one + 100


def test_counting_leaves_out_views_and_opens_custom_ops() -> None:
    x = torch.ones(1, 1, 4, 4)
    with CountOps() as counter:
        x.view(4, 4).t().unsqueeze(0)
        torch.empty(3)
        registry.scfg_kernels.attention_map(x, x)
        registry.scfg_kernels.complete(x[0], x[0, :, :, :3], powers=1)
    assert counter.counts.dispatched["scfg_kernels::complete"] == 1
    inside = +counter.counts.inside
    assert inside["aten::_softmax"] == inside["aten::addmm"] == 1, "attention_map in torch is no custom operator"
    assert inside["aten::bmm"] > 0, "what complete is made of"
    assert not {"scfg_kernels::complete", "aten::softmax", "aten::matmul"} & set(inside)


@pytest.fixture(scope="module")
def subject() -> overhead.Subject:
    return overhead.Subject("tiny")


def counted(step) -> CountOps:
    with CountOps() as counter:
        step()
    return counter


def test_ours_attends_as_plain_does_and_dispatches_a_bounded_number_more(subject: overhead.Subject) -> None:
    """Attention is the very operator of plain guidance. Beyond it, per captured block: one completion, and on a CPU
    three operators a head of either map, a few a map; and one for the step."""
    plain, ours, literal = (counted(subject.variant(name)).counts for name in overhead.VARIANTS)
    extra = ours.dispatched.copy()
    extra.subtract(plain.dispatched)
    blocks = 6
    assert extra["aten::_scaled_dot_product_flash_attention_for_cpu"] == 0
    assert extra["scfg_kernels::complete"] == blocks and extra["scfg_kernels::segment_and_guide"] == 1
    samples, heads = 2, 2
    assert 0 < extra.total() <= blocks * 2 * samples * (4 * heads + 4)
    assert plain.dispatched == plain.inside
    assert ours.inside.total() > ours.dispatched.total()
    assert literal.dispatched == literal.inside and literal.dispatched.total() - plain.dispatched.total() > 250


def test_variants_agree_and_leave_the_pipeline_stock(subject: overhead.Subject) -> None:
    before = dict(subject.pipe.unet.attn_processors)
    results = {name: subject.variant(name)() for name in overhead.VARIANTS}
    assert overhead.check_agreement(results) <= overhead.DISAGREEING_PIXELS_ALLOWED
    assert dict(subject.pipe.unet.attn_processors) == before
    assert not subject.pipe.unet._forward_hooks and not subject.pipe.unet._forward_pre_hooks
    assert torch.equal(subject.plain(), results["plain"])


def test_overhead_refuses_what_does_not_agree(subject: overhead.Subject) -> None:
    plain = subject.plain()
    with pytest.raises(overhead.DisagreementError, match="nothing was guided"):
        overhead.check_agreement({"plain": plain, "ours": plain, "literal": plain})
    with pytest.raises(overhead.DisagreementError, match="differ in"):
        overhead.check_agreement({"plain": plain, "ours": plain * 1.1, "literal": plain})


def test_the_variant_that_is_measured_is_the_drop_in(subject: overhead.Subject) -> None:
    """`ours` is `scfg_fast.enable` and nothing else."""
    handle = scfg_fast.enable(subject.pipe)
    try:
        result = subject.plain()
    finally:
        scfg_fast.disable(subject.pipe)
    assert handle.stats.steps_applied == 1 and len(handle.stats.layers) == 6
    assert torch.equal(result, subject.ours())


def test_overhead_rows_are_drawn(tmp_path: Path) -> None:
    result = report.Report({})
    place = ("overhead/tiny-128/b1", "overhead", "tiny-128", 1)
    prints = {
        name: overhead.Footprint(100, 1000 + 10 * index, 900, 50 + index, 400 + 10 * index, 400 + 20 * index)
        for index, name in enumerate(overhead.VARIANTS)
    }
    overhead.add_footprints(result, place, prints)
    overhead.add_times(result, place, {"plain": [2.0, 2.2], "ours": [2.02, 2.2], "literal": [3.0, 3.3],
                                       overhead.CONTROL: [2.0, 2.1]})  # fmt: skip
    found = {(row.metric, row.provider): row.value for row in result.rows}
    assert found["peak_resident_ratio", "literal"] == 1020 / 1000
    assert found["peak_model_and_allocated_ratio", "ours"] == 151 / 150
    assert found["ops_dispatched_extra", "ours"] == 10 and found["ops_inside_extra", "literal"] == 40
    assert found["time_ratio", "literal"] == pytest.approx(1.5)
    table, _ = result.write(tmp_path / "overhead-tiny", finished=True)
    assert plot.plot(table, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert "time_ratio" in overhead.table(result)
