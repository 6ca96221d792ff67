"""Figures of a study: learning curves, coefficient curves, similarity of task vectors, accuracy against size.

Every function takes plain rows (see :mod:`jft.analysis.study` for their keys) and returns a matplotlib figure, which
:mod:`jft.analysis.drawing` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.analysis.drawing import (
    DASHES,
    FAINT,
    INK,
    WIDTH,
    curve,
    legend,
    logarithmic,
    looks,
    lowest,
    name_points,
    panels,
    styled,
)

SPLITS = {"train": "training", "eval": "evaluation"}


@styled
def learning_curves(runs: Sequence[Mapping[str, Any]], label: str = "training loss") -> Any:
    """Small multiples, one for each task: the loss of every method over steps, smoothed, on shared axes."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    methods = looks(dict.fromkeys(run["method"] for run in runs))
    figure, axes = panels(len(tasks), 4, 2.1, sharex=True, sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for run in (r for r in runs if r["task"] == task and r["curve"]):
            steps = [point["step"] for point in run["curve"]]
            curve(axis, steps, [point["loss"] for point in run["curve"]], methods[run["method"]], label=run["method"])
        axis.set_title(task)
        logarithmic(axis)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(label)
    for axis in lowest(axes):
        axis.set_xlabel("step")
    legend(figure, axes[0], len(methods))
    return figure


@styled
def scores(tasks: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], label: str) -> Any:
    """A dot for each task and method, its ``error`` as a line through it, and a bar at the score of the base."""
    names = [task["name"] for task in tasks]
    methods = looks(dict.fromkeys(run["method"] for run in runs))
    figure, (axis,) = panels(1, 1, 0.46 * len(names) + 0.9)
    figure.set_figwidth(WIDTH * 0.8)
    for row, task in enumerate(tasks):
        axis.plot(
            [task["base"]] * 2, [row - 0.4, row + 0.4], color=FAINT, linewidth=2.2, label="base" if row == 0 else None
        )
    # Next to each other, so that equal scores do not hide each other.
    offsets = np.linspace(-0.3, 0.3, len(methods)) if len(methods) > 1 else [0.0]
    for offset, (method, look) in zip(offsets, methods.items(), strict=True):
        of_method = [run for run in runs if run["method"] == method]
        axis.errorbar(
            [r["score"] for r in of_method],
            [names.index(r["task"]) + offset for r in of_method],
            xerr=[r["error"] or 0 for r in of_method],
            linestyle="none",
            markersize=6,
            label=method,
            **look,
        )
    axis.set_yticks(range(len(names)), names)
    # The first task on top, as in the tables.
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlabel(label)
    legend(figure, axis, len(methods) + 1)
    return figure


@styled
def coefficient_curves(addition: Sequence[Mapping[str, Any]]) -> Any:
    """One panel for each method: normalised validation accuracy of every task, and their mean, over the coefficient."""
    figure, axes = panels(len(addition), 3, 2.5, sharey=True)
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
    legend(figure, axes[0], len(tasks) + 1)
    return figure


@styled
def negation_curves(negation: Sequence[Mapping[str, Any]]) -> Any:
    """One panel for each task: accuracy on it (solid) and on the control (dashed) as its task vector is subtracted."""
    tasks = list(dict.fromkeys(row["task"] for row in negation))
    methods = looks(dict.fromkeys(row["method"] for row in negation))
    figure, axes = panels(len(tasks), 4, 2.1, sharex=True, sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for row in (r for r in negation if r["task"] == task):
            x, look = [point["coefficient"] for point in row["curve"]], methods[row["method"]]
            curve(axis, x, [100 * point["target"] for point in row["curve"]], look, label=row["method"])
            curve(axis, x, [100 * point["control"] for point in row["curve"]], look, dashed=True)
        axis.set_title(task)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("accuracy, %")
    for axis in lowest(axes):
        axis.set_xlabel("coefficient subtracted")
    legend(figure, axes[0], len(methods))
    return figure


@styled
def cosine_maps(cosine: Mapping[str, Sequence[Sequence[float]]], tasks: Sequence[str]) -> Any:
    """One heat map for each method: the cosine between the task vectors of every two tasks."""
    side = min(3.6, max(2.3, 0.42 * len(tasks) + 0.9))
    figure, axes = panels(len(cosine), 3, side)
    for axis, (method, matrix) in zip(axes, cosine.items(), strict=True):
        values = np.asarray(matrix, np.float64)
        image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        for i, j in np.ndindex(*values.shape):
            axis.text(
                j,
                i,
                # + 0.0 makes 0.0 of -0.0, which would be labelled "−0.00".
                f"{round(float(values[i, j]), 2) + 0.0:.2f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=7.5 if len(tasks) <= 8 else 5,
                # Legible on the dark ends of the colour map.
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


@styled
def size_against_score(methods: Sequence[Mapping[str, Any]], label: str) -> Any:
    """Mean score over tasks, with its ``error``, against mean bytes of a task vector on disk (log axis), by method."""
    look_of = looks(row["name"] for row in methods)
    figure, (axis,) = panels(1, 1, 2.6)
    for row in methods:
        axis.errorbar(
            row["bytes"], row["score"], row["error"] or 0, linestyle="none", markersize=8, **look_of[row["name"]]
        )
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: _bytes(nbytes)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.25, y=0.2)
    axis.set_xlabel("task vector on disk")
    axis.set_ylabel(label)
    name_points(axis, {row["name"]: (row["bytes"], row["score"]) for row in methods})
    return figure


@styled
def metric_curves(series: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], title: str = "") -> Any:
    """One panel for each metric of ``{split/metric: {run: (steps, values)}}``, a colour for each run.

    Training and evaluation are in one panel, smoothed; evaluation is dashed, its markers hollow.
    """
    from matplotlib.lines import Line2D

    runs = looks(dict.fromkeys(run for lines in series.values() for run in lines))
    metrics = list(dict.fromkeys(name.partition("/")[2] for name in series))
    figure, axes = panels(len(metrics), 3, 2.3)
    for axis, metric in zip(axes, metrics, strict=True):
        for split in SPLITS:
            for run, (steps, values) in series.get(f"{split}/{metric}", {}).items():
                curve(axis, steps, values, runs[run], dashed=split == "eval")
        axis.set_title(metric.replace("_", " "))
        axis.set_xlabel("step")
        logarithmic(axis)
    handles = [Line2D([], [], label=run, markersize=4.5, **look) for run, look in runs.items()]
    present = {name.partition("/")[0] for name in series}
    for split in (split for split in SPLITS if split in present):
        dashed: Any = {"linestyle": (0, DASHES), "markerfacecolor": "white"} if split == "eval" else {}
        handles.append(Line2D([], [], label=SPLITS[split], color=INK, marker="o", markersize=4.5, **dashed))
    legend(figure, axes[0], 6, handles, title or None)
    return figure
