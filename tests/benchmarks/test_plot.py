"""Pictures of the results: what is drawn, from which file, and what is a table."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgba

from benchmarks import plot, report

CURVES = [
    {"step": 0, "residuals": [[1e-2, 2e-2], [1e-3, 1e-2], [5e-5, 8e-3], [5e-5, 7e-3]], "converged": [True, False]},
    {"step": 3, "residuals": [[3e-2, 2e-2], [4e-5, 3e-5]], "converged": [True, True]},
]


def characteristic(folder: Path) -> Path:
    result = report.Report({})
    for projection in ("ridge", "identity"):
        case = f"characteristic/{projection}/g5/steps4"
        result.add(case, "characteristic", "steps4", 2, projection, "iterations", "1", 1.75)
        result.details[case] = CURVES
    return result.write(folder / "guidance-characteristic", finished=True)[0]


def test_a_line_ends_where_its_sample_did() -> None:
    """At the accepted evaluation with a dot, at the last one with a cross and in another colour."""
    figure, axes = plt.subplots()
    plot._convergence_panel(axes, CURVES, tolerance=1e-4)
    *lines, level = axes.lines
    assert [len(line.get_xdata()) for line in lines] == [3, 4, 2, 2] and set(level.get_ydata()) == {1e-4}
    fallback = to_rgba(plot.COLOURS["literal"])
    assert [to_rgba(line.get_color()) == fallback for line in lines] == [False, True, False, False]
    ends = [tuple(points.get_offsets()[0]) for points in axes.collections]
    assert ends == [(2, 5e-5), (3, 7e-3), (1, 4e-5), (1, 3e-5)]
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "evaluations; mean 1.8, 3 of 4 converged"
    plt.close(figure)


def test_convergence_is_drawn_from_the_json_beside_the_table(tmp_path: Path) -> None:
    table = characteristic(tmp_path)
    assert plot.plot(table, tmp_path).read_bytes().startswith(b"\x89PNG")
    table.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError):
        plot.plot(table, tmp_path)


def test_methods_are_drawn_with_their_errors(tmp_path: Path) -> None:
    result = report.Report({})
    for method in ("cfg", "linear"):
        for metric, value in (("objects", 0.8), ("objects_error", 0.05), ("saturation", 0.4), ("clipped", 0.01)):
            result.add(f"methods/{method}/g5/steps15", "methods", "g5/steps15", 8, method, metric, "share", value)
    table, _ = result.write(tmp_path / "guidance-methods", finished=True)
    assert plot.plot(table, tmp_path).read_bytes().startswith(b"\x89PNG")


def test_every_result_file_is_drawn_or_known_to_be_a_table(tmp_path: Path) -> None:
    pictures = {path.stem: plot.picture_of(report.read(path)) for path in report.RESULTS.glob("*.csv")}
    tables = {name for name, draw in pictures.items() if draw is None}
    assert tables == {name for name in pictures if name.startswith(("blocks-", "layers-")) or name == "overhead-sdxl"}
    assert pictures["ops"] is plot.plot_speedups and pictures["overhead-sd15"] is plot.plot_overhead
    with pytest.raises(ValueError, match="neither time ratios with operators, speed-ups nor guidance to draw"):
        plot.plot(report.RESULTS / "blocks-sdxl.csv", tmp_path)
