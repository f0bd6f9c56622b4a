"""Draw the result files: `python -m benchmarks.plot [CSV ...] [--out docs/img]`.

A file with overhead rows becomes overhead bars, one of guidance methods bars of what they reached, one of
Characteristic Guidance the course of its residuals (from the JSON beside the CSV, which alone has them); any other
with speed-ups becomes those over the literal way; what is left are tables, which are not drawn. Picture names are the
files' names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from scfg_fast.guidance import CharacteristicGuidance

from .report import RESULTS, ROOT, Row, read

COLOURS = {"plain": "#8c96a3", "ours": "#1f6fb4", "compiled": "#54a868", "literal": "#d1683c"}
LABELS = {
    "plain": "plain guidance",
    "ours": "scfg_fast",
    "literal": "literal port of the published code",
    "compiled": "scfg_fast operators under torch.compile",
}
NOISE = "#f0c75e"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "figure.facecolor": "white",
}


def provenance(rows: Sequence[Row]) -> str:
    """One line that says where the numbers come from."""
    row = rows[0]
    commit = f"commit {row.commit}" + (" with uncommitted changes" if row.dirty else "")
    threads = f"{row.threads} thread" + ("s" if row.threads != 1 else "")
    return f"{row.cpu}, {row.cores} cores, {threads}  |  torch {row.torch}, fp32  |  {commit}  |  {row.date[:10]}"


def _pick(rows: Sequence[Row], metric: str) -> dict[str, Row]:
    return {row.provider: row for row in rows if row.metric == metric and row.value is not None}


def _finish(figure: Figure, rows: Sequence[Row], title: str, path: Path) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.text(0.01, 0.01, provenance(rows), fontsize=7.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _ratio(value: float) -> str:
    return f"{value:.3f}"


def _mebibytes(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _overhead_panel(axes: Axes, rows: Sequence[Row], metric: str, title: str, form: Callable[[float], str]) -> None:
    found = _pick(rows, metric)
    names = [name for name in ("plain", "ours", "literal") if name in found]
    values = [found[name].value for name in names]
    for position, name in enumerate(names):
        row = found[name]
        axes.bar(position, row.value, width=0.62, color=COLOURS[name], zorder=2)
        if row.samples > 1:
            axes.vlines(position, row.low, row.high, color="#222222", linewidth=1.4, zorder=3)
        top = max(row.value, row.high)
        axes.text(
            position, top + 0.02 * max(values), form(row.value), ha="center", va="bottom", fontweight="bold", zorder=5
        )
    axes.set_xticks(range(len(names)), ["plain", "scfg_fast", "literal"][: len(names)])
    axes.set_ylim(0, 1.16 * max(max(row.high, row.value) for row in found.values()))
    axes.set_title(title)
    axes.yaxis.grid(True, color="#e6e6e6", zorder=0)


def plot_overhead(rows: Sequence[Row], path: Path) -> Path:
    """Time, memory and operators of one step against plain guidance; the A/A control is a band in the first panel."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 4, figsize=(13, 4.5))
        figure.subplots_adjust(left=0.045, right=0.985, top=0.83, bottom=0.20, wspace=0.24)
        _overhead_panel(panels[0], rows, "time_ratio", "time, ratio to plain", _ratio)
        control = _pick(rows, "control_ratio")["plain"]
        panels[0].axhspan(control.low, control.high, color=NOISE, alpha=0.5, zorder=1)
        panels[0].axhline(control.value, color="#b8860b", linestyle="--", linewidth=1.2, zorder=4)
        label = f"plain against plain: {control.value:.3f} [{control.low:.3f}, {control.high:.3f}]"
        panels[0].set_xlabel(f"median of {control.samples} rounds, quartiles\n{label}", fontsize=8, color="#555555")
        _overhead_panel(panels[1], rows, "peak_resident_ratio", "peak memory, ratio to plain", _ratio)
        panels[1].set_xlabel("resident size of a fresh process, model included", fontsize=8, color="#555555")
        _overhead_panel(panels[2], rows, "peak_allocated", "memory above the model, MiB", _mebibytes)
        panels[2].set_xlabel("peak of torch's allocator in one step", fontsize=8, color="#555555")
        _overhead_panel(
            panels[3], rows, "ops_dispatched_extra", "extra operators per step", lambda count: f"+{count:.0f}"
        )
        inside = _pick(rows, "ops_inside_extra")["ours"]
        note = f"dispatched, views excluded; scfg_fast: +{inside.value:.0f}\ncounted inside its torch implementation"
        panels[3].set_xlabel(note, fontsize=8, color="#555555")
        return _finish(figure, rows, f"One denoising step, {rows[0].sizes} px, one image", path)


def plot_speedups(rows: Sequence[Row], path: Path) -> Path:
    """Speed-up over the literal way, one line per case, with the control's noise band around 1."""
    speed = [row for row in rows if row.metric == "speedup" and row.value is not None and row.provider != "literal"]
    cases = list(dict.fromkeys(row.case for row in speed))
    providers = [name for name in ("ours", "compiled") if any(row.provider == name for row in speed)]
    height = 0.8 / len(providers)
    controls = {row.case: row for row in rows if row.metric == "control_ratio"}
    with plt.rc_context(STYLE):
        tall = 1.9 + 0.36 * len(cases)
        figure, axes = plt.subplots(figsize=(10.5, tall))
        figure.subplots_adjust(left=0.30, right=0.97, top=1 - 0.85 / tall, bottom=0.85 / tall)
        for row in speed:
            y = cases.index(row.case) + (providers.index(row.provider) - (len(providers) - 1) / 2) * height
            axes.barh(y, row.value, height=0.9 * height, color=COLOURS[row.provider], zorder=2)
            axes.hlines(y, row.low, row.high, color="#222222", linewidth=1, zorder=3)
            axes.text(1.04 * max(row.value, row.high), y, f"{row.value:.2f}x", va="center", fontsize=7.5, zorder=4)
        for index, case in enumerate(cases):
            low, high = controls[case].low, controls[case].high
            axes.fill_betweenx([index - 0.48, index + 0.48], low, high, color=NOISE, alpha=0.6, zorder=3, linewidth=0)
        axes.axvline(1.0, color="#b8860b", linestyle="--", linewidth=1.2, zorder=1)
        axes.set_xscale("log")
        longest = max(max(row.value, row.high) for row in speed)
        axes.set_xlim(min(0.5, 0.8 * min(min(row.value, row.low) for row in speed)), 1.6 * longest)
        left, right = axes.get_xlim()
        ticks = [tick for tick in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if left <= tick <= right]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(cases)), cases, fontsize=8.5)
        axes.set_ylim(len(cases) - 0.4, -0.6)
        axes.xaxis.grid(True, color="#e6e6e6", zorder=0)
        axes.set_xlabel(
            "times faster than the literal port (median of paired rounds, quartiles), log scale", fontsize=9
        )
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=LABELS[name]) for name in providers]
        handles.append(plt.Rectangle((0, 0), 1, 1, color=NOISE, label="control: scfg_fast against itself"))
        handles.append(Line2D([], [], color="#b8860b", linestyle="--", label="as fast as the literal port"))
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.43, 1.0), ncols=4, frameon=False, fontsize=8)
        return _finish(figure, rows, "Speed-up over the literal port of the published code", path)


def plot_guidance(rows: Sequence[Row], path: Path) -> Path:
    """What each method reached, one panel per metric, one bar per setting; whiskers are standard errors."""
    titles = {
        "objects": "named nouns found by a judge",
        "exact": "all of them, and no other noun",
        "background": "background as asked for",
        "found": "noun found by another classifier",
        "found_by_guide": "noun found by the guiding classifier",
        "in_place": "share of the noun's cells in the mask",
        "saturation": "saturation",
        "clipped": "channel values clipped",
        "seconds_per_picture": "seconds per picture",
    }
    metrics = [metric for metric in titles if any(row.metric == metric for row in rows)]
    names = list(dict.fromkeys(row.provider for row in rows))
    sizes = list(dict.fromkeys(row.sizes for row in rows))
    shades = ["#8ab8de", "#1f6fb4", "#0f3f6b"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(metrics), figsize=(3.1 * len(metrics) + 1.6, 1.7 + 0.42 * len(names)))
        figure.subplots_adjust(left=0.16, right=0.985, top=0.78, bottom=0.16, wspace=0.12)
        for axes, metric in zip(panels, metrics, strict=True):
            for index, size in enumerate(sizes):
                here = [row for row in rows if row.sizes == size]
                found, errors = _pick(here, metric), _pick(here, f"{metric}_error")
                at = [names.index(name) + (index - (len(sizes) - 1) / 2) * 0.8 / len(sizes) for name in found]
                values = [float(row.value or 0.0) for row in found.values()]
                spread = [float(errors[name].value or 0.0) if name in errors else 0.0 for name in found]
                axes.barh(at, values, height=0.72 / len(sizes), color=shades[index % 3], label=size, zorder=2)
                if errors:
                    axes.errorbar(values, at, xerr=spread, fmt="none", ecolor="#222222", elinewidth=1, zorder=3)
                for y, value, error in zip(at, values, spread, strict=True):
                    axes.text(value + error, y, f" {value:.2f}", va="center", fontsize=7.5, zorder=4)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
            axes.set_title(titles[metric], fontsize=9)
            axes.margins(x=0.2)
            axes.xaxis.grid(True, color="#e6e6e6", zorder=0)
        panels[-1].legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.1), ncols=len(sizes))
        return _finish(figure, rows, f"Guidance: {rows[0].op}", path)


def _convergence_panel(axes: Axes, curves: Sequence[dict[str, Any]], tolerance: float) -> None:
    """One line per image and step, up to where it ended; curves as `benchmarks.guidance characteristic` writes them."""
    shades = plt.get_cmap("Blues")
    last_step = max(1, max(curve["step"] for curve in curves))
    used, done = [], []
    for curve in curves:
        colour = shades(0.35 + 0.6 * curve["step"] / last_step)
        for course, converged in zip(zip(*curve["residuals"], strict=True), curve["converged"], strict=True):
            end = next((k for k, value in enumerate(course) if value < tolerance), len(course) - 1)
            used.append(end)
            done.append(converged)
            line = dict(color=colour) if converged else dict(color=COLOURS["literal"], linestyle=(0, (4, 2)))
            axes.plot(range(end + 1), course[: end + 1], linewidth=0.8, alpha=0.7, zorder=2 if converged else 1, **line)
            marker = dict(marker="o", s=8) if converged else dict(marker="x", s=16, linewidths=0.9)
            axes.scatter([end], [course[end]], color=line["color"], zorder=3, **marker)
    axes.axhline(tolerance, color="#b8860b", linestyle="--", linewidth=1.2, zorder=1)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.grid(True, color="#e6e6e6", zorder=0)
    axes.set_xlabel(
        f"evaluations; mean {sum(used) / len(used):.1f}, {sum(done)} of {len(done)} converged", fontsize=8.5
    )


def plot_convergence(rows: Sequence[Row], details: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Residual over evaluations of Characteristic Guidance, one panel per projection, weight and number of steps."""
    tolerance = CharacteristicGuidance().tolerance
    columns = 2 if len(details) > 1 else 1
    count = -(-len(details) // columns)
    tall = 1.7 + 2.6 * count
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            count, columns, figsize=(5.4 * columns, tall), sharex=True, sharey=True, squeeze=False
        )
        figure.subplots_adjust(left=0.085, right=0.985, top=1 - 1.0 / tall, bottom=0.8 / tall, wspace=0.06, hspace=0.36)
        for axes, (case, curves) in zip(panels.flat, details.items(), strict=False):
            _, projection, weight, steps = case.split("/")
            axes.set_title(f"{projection}, guidance {weight[1:]}, {steps[5:]} steps")
            axes.tick_params(labelbottom=True)
            _convergence_panel(axes, curves, tolerance)
        for axes in panels[:, 0]:
            axes.set_ylabel("RMS residual")
        early, late = (plt.get_cmap("Blues")(shade) for shade in (0.35, 0.95))
        handles = [
            Line2D([], [], color=early, marker="o", markersize=3, label="converged, first step"),
            Line2D([], [], color=late, marker="o", markersize=3, label="converged, last step"),
            Line2D([], [], color=COLOURS["literal"], marker="x", markersize=4, linestyle=(0, (4, 2)),
                   label="not converged: plain guidance in that step"),
            Line2D([], [], color="#b8860b", linestyle="--", label="tolerance"),
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1 - 0.34 / tall), ncols=4, frameon=False, fontsize=8
        )
        return _finish(figure, rows, "Characteristic Guidance: one line per image and step", path)


def picture_of(rows: Sequence[Row]) -> Callable[..., Path] | None:
    """What draws these rows; None if nothing does: layer choices, blocks, overhead without operators are tables."""
    metrics = {row.metric for row in rows}
    if any(row.op == "characteristic" for row in rows):
        return plot_convergence
    if {"time_ratio", "ops_inside_extra"} <= metrics:
        return plot_overhead
    if "speedup" in metrics:
        return plot_speedups
    return plot_guidance if metrics & {"found", "saturation"} else None


def plot(table: Path, folder: Path) -> Path:
    """Draw one CSV into `folder`; returns the picture's path.

    Raises:
        ValueError: the file holds nothing to draw.
        FileNotFoundError: rows of Characteristic Guidance without the JSON file beside them.
    """
    rows = read(table)
    path = folder / f"{table.stem}.png"
    draw = picture_of(rows)
    if draw is None:
        raise ValueError(f"{table} has neither time ratios with operators, speed-ups nor guidance to draw")
    if draw is plot_convergence:
        record = json.loads(table.with_suffix(".json").read_text(encoding="utf-8"))
        return plot_convergence(rows, record["details"], path)
    return draw(rows, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw result files.")
    parser.add_argument("tables", type=Path, nargs="*", help="CSV files; default: all in benchmarks/results but tables")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img", help="folder; default: docs/img")
    arguments = parser.parse_args(argv)
    tables = arguments.tables or [path for path in sorted(RESULTS.glob("*.csv")) if picture_of(read(path))]
    if not tables:
        parser.error("there are no result files: run python -m benchmarks.run or python -m benchmarks.overhead first")
    for table in tables:
        print(f"wrote {plot(table, arguments.out).name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
