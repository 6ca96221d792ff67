"""The protocols of a study for its task vectors: addition, negation, cosines, disentanglement."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft.analysis import arithmetic, disentangle, interpolation, run_store, seeds, settings, task_runs
from jft.analysis.bases import Base
from jft.analysis.interpolation import Forward
from jft.analysis.tasks import Task
from jft.delta import TaskVector

Say = Callable[[str], None]
Row = dict[str, Any]


def examined(
    name: str,
    config: Mapping[str, Any],
    base: Base,
    tasks: Mapping[str, Task],
    runs: Sequence[Mapping[str, Any]],
    workdir: Path,
    say: Say,
) -> Row:
    """``addition``, ``negation``, ``disentanglement``: rows for each method and seed. ``cosine``: of the first seed's.

    The vectors of one method and seed are in memory at a time; their rows are kept in ``arithmetic_METHOD.json``, for another
    start with the same settings.
    """
    results: Row = {"addition": [], "negation": [], "disentanglement": [], "cosine": {}}
    # Every protocol needs a second task.
    if len(tasks) < 2:
        return results
    for method, seed in [(m, seed) for m in config["methods"] for seed in settings.seeds_of(config, m)]:
        source = settings.source(config, method)
        files = {t: seeds.folder(workdir, t, source, seed) / task_runs.VECTOR for t in tasks}
        by_task = {t: TaskVector.load(file) for t, file in files.items()}
        forward = settings.forward(config, method, next(iter(by_task.values())))
        # Masks are changes of this base; sums of them are sums of what they change.
        vectors = {t: vector.resolve(base.params) for t, vector in by_task.items()}
        if method not in results["cosine"] and source == method:
            results["cosine"][method] = arithmetic.cosines(vectors)
        # Normalised accuracies, and the constraint on the control, mean nothing for a loss.
        if config["metric"] != "accuracy":
            continue
        of_seed = {r["task"]: r for r in runs if r["method"] == method and seed in (None, r["seed"])}
        labels = {"method": method, "seed": seed}
        suffix = "" if seed is None else f"_seed_{seed}"
        compute = functools.partial(_protocols, config, base, tasks, of_seed, vectors, forward)
        dependencies = _dependencies(config, base, files, forward)
        for key, rows in run_store.kept(workdir / f"arithmetic_{method}{suffix}.json", dependencies, compute).items():
            results[key] += [labels | row for row in rows]
            for row in rows:
                say(f"{name}: {key}, {method}{'' if seed is None else f', seed {seed}'}: {_summary_line(key, row)}")
    return results


def _dependencies(config: Mapping[str, Any], base: Base, files: Mapping[str, Path], forward: Forward) -> Row:
    """All dependencies of the rows of one method and seed."""
    parts = ("arithmetic", "disentangle", "tasks", "splits", "common", "head")
    return {
        **{p: config[p] for p in parts},
        "base": base.fingerprint,
        "forward": dataclasses.asdict(forward),
        "vectors": run_store.digests(files),
    }


def _protocols(
    config: Mapping[str, Any],
    base: Base,
    tasks: Mapping[str, Task],
    runs: Mapping[str, Mapping[str, Any]],
    vectors: Mapping[str, TaskVector],
    forward: Forward,
) -> dict[str, list[Row]]:
    options = config["arithmetic"]
    grid = interpolation.grid(0, options["largest"], options["points"])

    def score(task: str, split: str, taus: Sequence[TaskVector], coefficients: Any) -> np.ndarray:
        return tasks[task].scores(split, base.params, taus, coefficients, forward)

    results: dict[str, list[Row]] = {"addition": [], "negation": [], "disentanglement": []}
    if options["addition"]:
        keys = {"validation": "validation", "test": "score"}
        single = {split: {task: runs[task][key] for task in tasks} for split, key in keys.items()}
        results["addition"].append(arithmetic.addition(vectors, single, score, grid))
    for task in tasks if options["negation"] else ():
        if task == options["control"]:
            continue
        controls = [options["control"]] if options["control"] else [t for t in tasks if t != task]
        row = arithmetic.negation(vectors[task], task, controls, score, grid, options["threshold"])
        results["negation"].append({"task": task, **row})
    for pair in config["disentangle"]["pairs"]:
        results["disentanglement"].append(_map(settings.of_maps(config), base, tasks, vectors, forward, pair))
    return results


def _map(
    grid: Sequence[float],
    base: Base,
    tasks: Mapping[str, Task],
    vectors: Mapping[str, TaskVector],
    forward: Forward,
    pair: Sequence[str],
) -> Row:
    taus = [vectors[name] for name in pair]
    first, second = (
        disentangle.Member(t.model, t.params(base.params), t.loaders["test"], t.objective, taus)
        for t in (tasks[name] for name in pair)
    )
    result = disentangle.disentanglement(first, second, grid, forward)
    return {
        "pair": list(pair),
        "grid": result.grid.tolist(),
        "xi": result.xi.round(6).tolist(),
        "within": result.within(),
    }


def _summary_line(key: str, row: Row) -> str:
    if key == "addition":
        return f"{100 * row['absolute']:.1f} ({100 * row['normalised']:.1f} normalised)"
    if key == "negation":
        return f"{row['task']} {100 * row['base_target']:.1f} -> {100 * row['target']:.1f}"
    return f"{' and '.join(row['pair'])}, mean xi {row['within']:.3f}"


def advantages(config: Mapping[str, Any], tasks: Mapping[str, Task], runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The nonlinear advantage over each linearized method, a row for each task and seed; see :mod:`jft.analysis.arithmetic`.

    Against the method ``nonlinear`` of the config, or the first one that is not linearized.
    """
    if config["metric"] != "accuracy":
        return []
    forwards = {run["method"]: run.get("forward", "standard") for run in runs}
    standard = config["nonlinear"] or next((m for m, forward in forwards.items() if forward == "standard"), None)
    score = {(run["task"], run["method"], run["seed"]): run["score"] for run in runs}
    return [
        {
            "method": run["method"],
            "task": run["task"],
            "seed": run["seed"],
            "advantage": arithmetic.nonlinear_advantage(
                run["score"], score[run["task"], standard, run["seed"]], tasks[run["task"]].classes or 2
            ),
        }
        for run in runs
        if forwards[run["method"]] == "linearized" and standard is not None
    ]
