"""Figures of the merging part of a study: accuracy by rule, and accuracy against the density of a graft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.analysis.drawing import FAINT, GRID, INK, legend, looks, panels, styled

Rows = Sequence[Mapping[str, Any]]
READS = {"": "no data", "validation accuracy": "validation accuracy"}


def grouped(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """``{title: rows}``, the best first: one model for all tasks by method, a vector for each task, rules of two models."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kind = "two tasks" if row["models"] else "one vector for each task" if row["each"] else "one model"
        groups.setdefault(f"{kind}, {row['method']}", []).append(row)
    return {title: sorted(group, key=lambda row: -row["normalised"]) for title, group in groups.items()}


def mean_grafts(rows: Rows) -> list[dict[str, Any]]:
    """By density: means over tasks of accuracies, and of what is kept of the accuracy and of its gain over the base."""
    densities = list(dict.fromkeys(row["density"] for row in rows))
    out = []
    for density in densities:
        of_density = [row for row in rows if row["density"] == density]
        mean = lambda f, of_density=of_density: float(np.mean([f(row) for row in of_density]))
        keys = ("base", "tuned", "largest", "learned", "entries", "first", "last")
        means = {key: mean(lambda row, key=key: row[key]) for key in keys}
        # Of means, as a task may gain nothing.
        gain = means["tuned"] - means["base"]
        shares = {
            f"{key}_{part}": value
            for key in ("largest", "learned")
            for part, value in (
                ("kept", mean(lambda row, key=key: row[key] / row["tuned"])),
                ("gain", (means[key] - means["base"]) / gain if gain else None),
            )
        }
        out.append({"density": density, **means, **shares})
    return out


def kind_of(reads: str) -> str:
    """The data a rule reads, as one of five kinds."""
    return READS.get(reads) or ("unlabelled data" if reads.startswith("unlabelled") else _labelled(reads))


def _labelled(reads: str) -> str:
    return "labelled data" if reads.startswith("labelled") else "statistics of data"


@styled
def rules(rows: Rows, tasks: Rows, runs: Rows) -> Any:
    """A dot for every rule of one model: mean accuracy at the chosen coefficient, its error as a line, as it is in grey."""
    shown = [row for row in rows if not row["models"] and not row["each"]]
    methods = list(dict.fromkeys(row["method"] for row in shown))
    kinds = looks(["no data", "statistics of data", "unlabelled data", "labelled data", "validation accuracy"])
    tallest = max(sum(row["method"] == method for row in shown) for method in methods)
    figure, axes = panels(len(methods), 2, 0.19 * tallest + 1.1)
    base = float(np.mean([task["base"] for task in tasks]))
    for axis, method in zip(axes, methods, strict=True):
        group = sorted((r for r in shown if r["method"] == method), key=lambda row: row["absolute"])
        tuned = float(np.mean([run["score"] for run in runs if run["method"] == method]))
        for value, text in ((base, "base"), (tuned, "fine-tuned")):
            axis.axvline(value, color=FAINT, linestyle=(0, (3, 2)), linewidth=1)
            axis.text(value, len(group) - 0.4, text, color=FAINT, fontsize=7.5, ha="center", va="bottom")
        for y, row in enumerate(group):
            look = kinds[kind_of(row["reads"])]
            axis.plot([100 * row["plain"]], [y], linestyle="none", marker="|", markersize=7, color=GRID, zorder=1)
            error = 100 * (row["errors"]["absolute"] or 0)
            axis.errorbar(100 * row["absolute"], y, xerr=error, linestyle="none", markersize=5, **look)
        # One of each kind for the legend.
        for name, look in kinds.items():
            if any(kind_of(row["reads"]) == name for row in group):
                axis.plot([], [], linestyle="none", markersize=5, label=name, **look)
        axis.set_yticks(range(len(group)), [row["rule"] for row in group], fontsize=7, color=INK)
        axis.set_ylim(-0.7, len(group) + 0.6)
        axis.grid(False, axis="y")
        axis.set_title(method)
        axis.set_xlabel("mean test accuracy, %")
    legend(figure, axes[0], 5)
    return figure


@styled
def grafts(rows: Rows) -> Any:
    """A panel for each task: accuracy over density, by magnitude and by a learned mask; dashed the tuned model and the base."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = looks(["largest", "learned"])
    labels = {"largest": "largest entries", "learned": "learned mask"}
    figure, axes = panels(len(tasks), 4, 2.1, sharex=True, sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        of_task = [row for row in rows if row["task"] == task]
        for key, look in names.items():
            x = [row["density"] if key == "largest" else max(row["entries"], 1e-6) for row in of_task]
            y = [100 * row[key] for row in of_task]
            axis.plot(x, y, markersize=4, label=labels[key], **look)
        for key in ("base", "tuned"):
            axis.axhline(100 * of_task[0][key], color=FAINT, linestyle=(0, (3, 2)), linewidth=1)
        axis.set_xscale("log")
        axis.set_title(task)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("test accuracy, %")
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("density")
    legend(figure, axes[0], 2)
    return figure
