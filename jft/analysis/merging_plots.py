"""Figures of the merging part of a study: accuracy by rule, and accuracy against the density of a graft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.analysis.drawing import FAINT, INK, WIDTH, legend, looks, lowest, panels, styled

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


def whole(row: Mapping[str, Any]) -> bool:
    """Whether the rule of a row makes one model of all tasks."""
    return not row["models"] and not row["each"]


def kind_of(reads: str) -> str:
    """The data a rule reads, as one of five kinds."""
    return READS.get(reads) or ("unlabelled data" if reads.startswith("unlabelled") else _labelled(reads))


def _labelled(reads: str) -> str:
    return "labelled data" if reads.startswith("labelled") else "statistics of data"


@styled
def rules(rows: Rows, tasks: Rows, runs: Rows) -> Any:
    """A dot for every rule that makes one model of the first method's vectors, at the coefficient chosen; a bar as it is."""
    method = next(row["method"] for row in rows if whole(row))
    shown = [row for row in rows if row["method"] == method and whole(row)]
    shown.sort(key=lambda row: row["absolute"])
    kinds = looks(["no data", "statistics of data", "unlabelled data", "labelled data", "validation accuracy"])
    figure, (axis,) = panels(1, 1, 0.17 * len(shown) + 1.1)
    figure.set_figwidth(WIDTH * 0.8)
    lines = {
        "base": float(np.mean([task["base"] for task in tasks])),
        "fine-tuned": float(np.mean([run["score"] for run in runs if run["method"] == method])),
    }
    for text, value in lines.items():
        axis.axvline(value, color=FAINT, linestyle=(0, (3, 2)), linewidth=1)
        axis.text(value, len(shown) - 0.3, text, color=FAINT, fontsize=7.5, ha="center", va="bottom")
    for y, row in enumerate(shown):
        axis.plot(100 * row["plain"], y, linestyle="none", marker="|", markersize=7, color=FAINT, zorder=1)
    for kind, look in kinds.items():
        of_kind = [(y, row) for y, row in enumerate(shown) if kind_of(row["reads"]) == kind]
        if of_kind:
            axis.errorbar(
                [100 * row["absolute"] for _, row in of_kind],
                [y for y, _ in of_kind],
                xerr=[100 * (row["errors"]["absolute"] or 0) for _, row in of_kind],
                linestyle="none",
                markersize=5,
                label=kind,
                **look,
            )
    axis.set_yticks(range(len(shown)), [row["rule"] for row in shown], fontsize=7.5, color=INK)
    axis.set_ylim(-0.7, len(shown) + 0.5)
    axis.grid(False, axis="y")
    axis.set_xlabel(f"mean test accuracy of the {method} vectors merged, %")
    legend(figure, axis, 5)
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
    for axis in lowest(axes):
        axis.set_xlabel("density")
    legend(figure, axes[0], 2)
    return figure
