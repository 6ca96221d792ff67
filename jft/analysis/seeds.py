"""Runs that differ in nothing but their seed: their folders, and their means with standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Mapping[str, Any]
MEASURED = ("score", "validation", "trained", "density", "bytes", "norm", "step_seconds", "seconds")


def check(seeds: Sequence[Any]) -> None:
    """``ValueError`` for seeds that are not different whole numbers from 0 on."""
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; give different whole numbers from 0 on, or none")


def folder(workdir: Path, task: str, method: str, seed: int | None) -> Path:
    """The folder of a run in a study's ``workdir``; ``seed`` is None in a study without seeds."""
    run = workdir / task / method
    return run if seed is None else run / f"seed_{seed}"


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean: ``sqrt(sum((x - mean)^2) / (n - 1) / n)``. None for fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def means(runs: Sequence[Run], keys: Sequence[str] = MEASURED) -> dict[str, Any]:
    """The mean of each of ``keys`` over the runs that have it; None where none has."""
    known = {key: [run[key] for run in runs if run[key] is not None] for key in keys}
    return {key: float(np.mean(values)) if values else None for key, values in known.items()}


def error_of_mean(runs: Sequence[Run]) -> float | None:
    """Standard error over seeds of the mean score over tasks, for the runs of one method."""
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], []).append(run["score"])
    return standard_error([float(np.mean(scores)) for scores in by_seed.values()])


def averaged(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that agree in ``by`` as one, in the order of the first of each: the mean of every number, nested ones too.

    ``errors`` has the standard errors of the outermost numbers, None for a single row; ``seeds``, how many there are.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        # As text: a pair is a list, which does not hash.
        groups.setdefault(tuple(map(str, (row[key] for key in by))), []).append(row)
    return [
        _mean_row([{key: x for key, x in row.items() if key != "seed"} for row in group]) for group in groups.values()
    ]


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = {key: standard_error([row[key] for row in rows]) for key, x in rows[0].items() if _number(x)}
    return {**_mean(rows), "seeds": len(rows), "errors": errors}


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if _number(first):
        return float(np.mean(values))
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(items) for items in zip(*values, strict=True)]
    return first


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def cells(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each task and method, in the order of ``runs``: means over seeds, ``error`` of the score, ``seeds``.

    ``curve`` is the mean loss of the seeds at each step that all of them have.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["method"]), []).append(run)
    return [
        {
            "task": task,
            "method": method,
            "seeds": len(group),
            **means(group),
            "error": standard_error([run["score"] for run in group]),
            "curve": _curve([run["curve"] for run in group]),
        }
        for (task, method), group in groups.items()
    ]


def _curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    by_step: dict[float, list[float]] = {}
    for curve in curves:
        for point in curve:
            by_step.setdefault(point["step"], []).append(point["loss"])
    return [{"step": s, "loss": float(np.mean(x))} for s, x in sorted(by_step.items()) if len(x) == len(curves)]
