"""The tables of a study as CSV files: one for scores, their means over seeds, addition and negation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jft import files
from jft.analysis import seeds

Rows = list[dict[str, Any]]
OF_RUN = (
    "task",
    "method",
    "seed",
    "score",
    "validation",
    "trained",
    "density",
    "bytes",
    "norm",
    "step_seconds",
    "seconds",
)
OF_MEANS = ("task", "method", "seeds", "score", "error", "validation", "trained", "density", "bytes")
OF_NEGATION = ("task", "method", "seed", "coefficient", "base_target", "target", "base_control", "control")
OF_MERGING = (
    "method",
    "rule",
    "seed",
    "reads",
    "each",
    "plain",
    "plain_normalised",
    "coefficient",
    "absolute",
    "normalised",
    "objective",
    "first",
    "last",
    "seconds",
)


def rows(study: Mapping[str, Any]) -> dict[str, Rows]:
    """``{table: rows}``, a table for each part that the study has."""
    base = {task["name"]: task["base"] for task in study["tasks"]}
    cells = seeds.cells(study["runs"])
    tables: dict[str, Rows] = {
        "scores": [{key: run[key] for key in OF_RUN} | {"base": base[run["task"]]} for run in study["runs"]],
        "means": [{key: cell[key] for key in OF_MEANS} for cell in cells if cell["seeds"] > 1],
        "addition": [
            {
                "method": row["method"],
                "seed": row.get("seed"),
                "coefficient": row["coefficient"],
                "task": task,
                **values,
            }
            for row in study["addition"]
            for task, values in (row["tasks"] | {"mean": {k: row[k] for k in ("absolute", "normalised")}}).items()
        ],
        "negation": [{key: row.get(key) for key in OF_NEGATION} for row in study["negation"]],
        "disentanglement": [
            {"first": row["pair"][0], "second": row["pair"][1], "method": row["method"], "seed": row["seed"]}
            | {"alpha_1": a, "alpha_2": b, "xi": row["xi"][i][j]}
            for row in study.get("disentanglement", ())
            for i, a in enumerate(row["grid"])
            for j, b in enumerate(row["grid"])
        ],
        "advantage": list(study.get("advantage", ())),
        "merging": [
            {key: row[key] for key in OF_MERGING} | {task: x["absolute"] for task, x in row["tasks"].items()}
            for row in study.get("merging", ())
        ],
        "grafting": list(study.get("grafting", ())),
    }
    # A table without rows has no columns to write.
    return {name: table for name, table in tables.items() if table}


def write(study: Mapping[str, Any], workdir: Path) -> list[Path]:
    """``STUDY_TABLE.csv`` files in ``workdir``, each whole or not at all."""
    paths = []
    for name, table in rows(study).items():
        text = io.StringIO()
        # The same bytes on every platform; csv's default is \r\n.
        # Of all rows: a rule of two models has no column of the other tasks.
        columns = list(dict.fromkeys(key for row in table for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        path = workdir / f"{study['name']}_{name}.csv"
        files.write_text(path, text.getvalue())
        paths.append(path)
    return paths
