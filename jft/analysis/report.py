"""``report.html`` from the results of one or more studies: one file, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jft import files
from jft.analysis import drawing, merging_plots, plots, seeds, tangent_plots

TEMPLATES = Path(__file__).parent / "templates"
MISSING = "–"


def percent(share: float | None) -> str:
    """A share as percent with one decimal: ``0.934 -> '93.4'``."""
    return MISSING if share is None else f"{100 * share:.1f}"


def density(share: float | None) -> str:
    """A share as percent to three significant digits: ``0.0123 -> '1.23 %'``."""
    return MISSING if share is None else f"{_digits(100 * share)} %"


def count(number: int | None) -> str:
    """Thousands separated by narrow spaces: ``171264 -> '171 264'``."""
    return MISSING if number is None else f"{number:,}".replace(",", "\u2009")


def size(nbytes: float | None) -> str:
    """Bytes in decimal units to three significant digits: ``689123 -> '689 kB'``."""
    if nbytes is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{_digits(nbytes) if unit != 'B' else int(nbytes)} {unit}"
        nbytes /= 1000
    return f"{_digits(nbytes)} TB"


def duration(seconds: float | None) -> str:
    """Seconds as ``12.3 ms``, ``4.56 s`` or ``2 min 31 s``."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{_digits(1000 * seconds)} ms"
    if seconds < 60:
        return f"{_digits(seconds)} s"
    # Rounded before it is split up: 119.6 s are 2 min 0 s, not 1 min 60 s.
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def _digits(number: float) -> str:
    """Three significant digits, without exponent."""
    if number == 0:
        return "0"
    decimals = max(0, 2 - len(str(int(abs(number)))) + 1) if abs(number) >= 1 else 3
    return f"{number:.{decimals}f}" if abs(number) >= 0.0995 else f"{number:.2g}"


def score(value: float | None, metric: str) -> str:
    """A score in the format of its metric: accuracies in percent, everything else with three decimals."""
    if value is None:
        return MISSING
    return percent(value) if metric == "accuracy" else f"{value:.3f}"


def deviation(error: float | None, metric: str) -> str:
    """A standard error in the format of its metric's scores: ``0.0041 -> '± 0.4'``; nothing for None."""
    return "" if error is None else f"±\u2009{score(error, metric)}"


def figures(study: Mapping[str, Any]) -> dict[str, Any]:
    """``{name: figure}`` for one study; only those whose data it has."""
    out = {}
    label = {"accuracy": "test accuracy, %"}.get(study["metric"], "test " + study["metric"].replace("_", " "))
    scale = 100 if study["metric"] == "accuracy" else 1
    tasks = [{**task, "base": scale * task["base"]} for task in study["tasks"]]
    runs = [_scaled(run, scale) for run in seeds.cells(study["runs"])]
    if any(run["curve"] for run in runs):
        out["learning_curves"] = plots.learning_curves(runs)
    if len(tasks) > 1:
        out["scores"] = plots.scores(tasks, runs, label)
    means = averages(study)
    if means["addition"]:
        out["addition"] = plots.coefficient_curves(means["addition"])
    if means["negation"]:
        out["negation"] = plots.negation_curves(means["negation"])
    if means["disentanglement"]:
        out["disentanglement"] = tangent_plots.disentanglement_maps(means["disentanglement"])
    if any(merging_plots.whole(row) for row in means["merging"]):
        out["merging"] = merging_plots.rules(means["merging"], tasks, runs)
    if means["grafting"]:
        out["grafting"] = merging_plots.grafts(means["grafting"])
    if study["cosine"]:
        out["cosine"] = plots.cosine_maps(study["cosine"], [task["name"] for task in tasks])
    if len(study["methods"]) > 1:
        out["size"] = plots.size_against_score([_scaled(row, scale) for row in study["methods"]], "mean " + label)
    return out


def averages(study: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of arithmetic as means over seeds, which the page shows; see :func:`jft.analysis.seeds.averaged`."""
    groups = {
        "addition": ("method",),
        "negation": ("task", "method"),
        "disentanglement": ("pair", "method"),
        "advantage": ("task", "method"),
        "merging": ("method", "rule"),
        "grafting": ("task", "density"),
    }
    return {key: seeds.averaged(study.get(key, []), keys) for key, keys in groups.items()}


def _scaled(row: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A row with its score, and the score's standard error, in other units."""
    error = row["error"]
    return {**row, "score": scale * row["score"], "error": None if error is None else scale * error}


def _image(figure: Any) -> str:
    """A figure as a data URI. As an image, so that the ids inside one SVG cannot meet those of another."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.svg(figure).encode()).decode()


def _cells(study: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(cell["task"], cell["method"]): cell for cell in seeds.cells(study["runs"])}


def _best(study: Mapping[str, Any], cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, float]:
    """The best score on each task."""
    choose = min if study["metric"] in LOWER_IS_BETTER else max
    return {
        task["name"]: choose(c["score"] for (t, _), c in cells.items() if t == task["name"]) for task in study["tasks"]
    }


LOWER_IS_BETTER = frozenset({"loss", "bits_per_byte", "perplexity"})


def render(results: Mapping[str, Any], images: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """The page for ``results`` (as in ``results.json``); ``images`` are the figures by study, drawn here if not given."""
    import jinja2

    images = images or {study["name"]: figures(study) for study in results["studies"]}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # A key that the results lack is an error, not an empty cell.
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "density": density, "count": count, "size": size, "duration": duration}
    views = [_view(study, images[study["name"]]) for study in results["studies"]]
    return environment.get_template("report.html").render(
        **{**results, "studies": views},
        score=score,
        deviation=deviation,
        config_text=json.dumps(results["config"], indent=2),
    )


def _view(study: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """A study with the derived values that the page shows."""
    cells, means = _cells(study), averages(study)
    counts = {cell["method"]: cell["seeds"] for cell in cells.values()}
    return {
        **study,
        **means,
        "negation_tasks": _by_task(means["negation"]),
        "pairs": list(dict.fromkeys(" and ".join(row["pair"]) for row in means["disentanglement"])),
        "other_seeds": {method: n for method, n in counts.items() if n != len(study["seeds"])}
        if study["seeds"]
        else {},
        "pair": study.get("merging_pair", ()),
        "merged": merging_plots.grouped(means["merging"]),
        "grafts": merging_plots.mean_grafts(means["grafting"]),
        "linearized": list(dict.fromkeys(row["method"] for row in means["advantage"])),
        "images": {name: _image(figure) for name, figure in images.items()},
        "cells": cells,
        "best": _best(study, cells),
        "mean_base": sum(task["base"] for task in study["tasks"]) / len(study["tasks"]),
        "heading": {"accuracy": "accuracy, %"}.get(study["metric"], study["metric"].replace("_", " ")),
        "lower": study["metric"] in LOWER_IS_BETTER,
    }


def _by_task(negation: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``{task: {method: row}}``."""
    tasks: dict[str, dict[str, Any]] = {}
    for row in negation:
        tasks.setdefault(row["task"], {})[row["method"]] = row
    return tasks


def write(results: Mapping[str, Any], workdir: Path) -> Path:
    """``report.html`` and ``plots/*.png`` in ``workdir``; returns the report's path."""
    images = {study["name"]: figures(study) for study in results["studies"]}
    for study, of_study in images.items():
        for name, figure in of_study.items():
            drawing.save(figure, workdir / "plots" / f"{study}_{name}.png")
    path = workdir / "report.html"
    files.write_text(path, render(results, images))
    return path
