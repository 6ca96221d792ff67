"""Figures of a study: learning curves, coefficient curves, similarity of task vectors, accuracy against size.

Colours are Okabe and Ito's, told apart by readers with any colour vision; each method also has its own marker. Every
function takes plain rows (see :mod:`jft.analysis.study` for their keys) and returns a matplotlib figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft import files

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9A9A9A",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "jft",
}
WIDTH = 9.6  # inches: the text width of the report


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``{name: matplotlib line properties}``: the same name looks the same in every figure of a study."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def _panels(count: int, columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of ``count`` small multiples, and its axes in reading order."""
    from matplotlib.figure import Figure

    rows = math.ceil(count / max(1, columns))
    columns = math.ceil(count / rows)  # as even as it gets: six panels are 3 + 3, not 4 + 2
    width = WIDTH if columns > 2 else WIDTH * (0.45 + 0.25 * (columns - 1))
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _legend(figure: Any, axis: Any, count: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(count, 9))


def _styled(draw: Any) -> Any:
    """Run ``draw`` under :data:`STYLE`, whatever the caller's matplotlib settings are."""
    import functools

    @functools.wraps(draw)
    def wrapped(*args: Any, **options: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return wrapped


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """Centred running mean over ``span`` points, shorter at the ends, ``[N] -> [N]``."""
    x = np.asarray(values, np.float64)
    if span <= 1 or len(x) < 3:
        return x
    span = min(span, len(x))
    kernel = np.ones(span)
    return np.convolve(x, kernel, "same") / np.convolve(np.ones(len(x)), kernel, "same")


@_styled
def learning_curves(runs: Sequence[Mapping[str, Any]], label: str = "training loss") -> Any:
    """Small multiples, one for each task: the loss of every method over steps, on shared axes."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    methods = looks(dict.fromkeys(run["method"] for run in runs))
    figure, axes = _panels(len(tasks), 4, 2.1, sharex=True, sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for run in (r for r in runs if r["task"] == task and r["curve"]):
            steps = [point["step"] for point in run["curve"]]
            losses = smooth([point["loss"] for point in run["curve"]], max(1, len(steps) // 20))
            axis.plot(steps, losses, color=methods[run["method"]]["color"], label=run["method"])
        axis.set_title(task)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(label)
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("step")
    _legend(figure, axes[0], len(methods))
    return figure


@_styled
def scores(tasks: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], label: str) -> Any:
    """A dot for each task and method, its ``error`` as a line through it, and a bar where the base stands."""
    names = [task["name"] for task in tasks]
    methods = looks(dict.fromkeys(run["method"] for run in runs))
    figure, (axis,) = _panels(1, 1, 0.36 * len(names) + 0.9)
    figure.set_figwidth(WIDTH * 0.8)
    for row, task in enumerate(tasks):
        axis.plot(
            [task["base"]] * 2, [row - 0.3, row + 0.3], color=FAINT, linewidth=2.2, label="base" if row == 0 else None
        )
    offsets = np.linspace(-0.18, 0.18, len(methods)) if len(methods) > 1 else [0.0]
    for offset, (method, look) in zip(offsets, methods.items(), strict=True):
        mine = [run for run in runs if run["method"] == method]
        axis.errorbar(
            [r["score"] for r in mine],
            [names.index(r["task"]) + offset for r in mine],
            xerr=[r["error"] or 0 for r in mine],
            linestyle="none",
            markersize=6,
            label=method,
            **look,
        )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlabel(label)
    _legend(figure, axis, len(methods) + 1)
    return figure


@_styled
def coefficient_curves(addition: Sequence[Mapping[str, Any]]) -> Any:
    """One panel for each method: normalised validation accuracy of every task, and their mean, over the coefficient."""
    figure, axes = _panels(len(addition), 3, 2.5, sharey=True)
    tasks = looks(addition[0]["tasks"])
    for axis, row in zip(axes, addition, strict=True):
        x = [point["coefficient"] for point in row["curve"]]
        for task, look in tasks.items():
            axis.plot(
                x,
                [100 * point["tasks"][task] for point in row["curve"]],
                color=look["color"],
                linewidth=1,
                alpha=0.75,
                label=task,
            )
        axis.plot(x, [100 * point["mean"] for point in row["curve"]], color=INK, linewidth=2.4, label="mean")
        axis.axvline(row["coefficient"], color=FAINT, linestyle=(0, (3, 2)), linewidth=1)
        axis.set_title(row["method"])
        axis.set_xlabel("coefficient")
    axes[0].set_ylabel("normalised accuracy, %")
    _legend(figure, axes[0], len(tasks) + 1)
    return figure


@_styled
def negation_curves(negation: Sequence[Mapping[str, Any]]) -> Any:
    """One panel for each task: accuracy on it (solid) and on the control (dashed) as its task vector is subtracted."""
    tasks = list(dict.fromkeys(row["task"] for row in negation))
    methods = looks(dict.fromkeys(row["method"] for row in negation))
    figure, axes = _panels(len(tasks), 4, 2.1, sharex=True, sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for row in (r for r in negation if r["task"] == task):
            x = [point["coefficient"] for point in row["curve"]]
            colour = methods[row["method"]]["color"]
            axis.plot(x, [100 * point["target"] for point in row["curve"]], color=colour, label=row["method"])
            axis.plot(
                x,
                [100 * point["control"] for point in row["curve"]],
                color=colour,
                linestyle=(0, (3, 1.5)),
                linewidth=1.1,
            )
        axis.set_title(task)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("accuracy, %")
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("coefficient subtracted")
    _legend(figure, axes[0], len(methods))
    return figure


@_styled
def cosine_maps(cosine: Mapping[str, Sequence[Sequence[float]]], tasks: Sequence[str]) -> Any:
    """One heat map for each method: the cosine between the task vectors of every two tasks."""
    side = min(3.6, max(2.3, 0.42 * len(tasks) + 0.9))
    figure, axes = _panels(len(cosine), 3, side)
    for axis, (method, matrix) in zip(axes, cosine.items(), strict=True):
        values = np.asarray(matrix, np.float64)
        image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        for i, j in np.ndindex(*values.shape):
            axis.text(
                j,
                i,
                f"{round(float(values[i, j]), 2) + 0.0:.2f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=7.5 if len(tasks) <= 8 else 5,
                color="white" if abs(values[i, j]) > 0.6 else INK,
            )
        axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(tasks)), tasks)
        if not axis.get_subplotspec().is_first_col():
            axis.set_yticklabels([])
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_title(method)
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, label="cosine")
    return figure


def _bytes(nbytes: float) -> str:
    """A tick of an axis of sizes: ``20 kB``."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999:
            return f"{nbytes:g} {unit}"
        nbytes /= 1000
    return f"{nbytes:g} GB"


@_styled
def size_against_score(methods: Sequence[Mapping[str, Any]], label: str) -> Any:
    """Mean score over tasks, with its ``error``, against mean bytes of a task vector on disk (log axis), by method."""
    drawn = looks(row["name"] for row in methods)
    figure, (axis,) = _panels(1, 1, 2.6)
    for row in methods:
        axis.errorbar(
            row["bytes"], row["score"], row["error"] or 0, linestyle="none", markersize=8, **drawn[row["name"]]
        )
        axis.annotate(
            row["name"], (row["bytes"], row["score"]), xytext=(8, 0), textcoords="offset points", va="center", color=INK
        )
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: _bytes(nbytes)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.25, y=0.2)
    axis.set_xlabel("task vector on disk")
    axis.set_ylabel(label)
    return figure


@_styled
def metric_curves(series: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Any:
    """One panel for each metric of ``{metric: {run: (steps, values)}}``, a line for each run."""
    runs = looks(dict.fromkeys(run for lines in series.values() for run in lines))
    figure, axes = _panels(len(series), 3, 2.2)
    for axis, (metric, lines) in zip(axes, series.items(), strict=True):
        for run, (steps, values) in lines.items():
            few = {"marker": "o", "markersize": 3} if len(steps) < 20 else {}
            axis.plot(steps, values, color=runs[run]["color"], label=run, **few)
        axis.set_title(metric)
        axis.set_xlabel("step")
    _legend(figure, max(axes, key=lambda a: len(a.lines)), 3)
    return figure


@_styled
def save(figure: Any, path: Path) -> None:
    """Write a figure as the PNG ``path``, whole or not at all."""
    with files.whole(path) as beside:
        figure.savefig(beside, format="png", dpi=150)


@_styled
def svg(figure: Any) -> str:
    """A figure as SVG text, the same bytes for the same figure."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
