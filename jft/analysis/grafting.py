"""Accuracy kept by few entries of a task vector: the largest, and those that a learned mask keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jft import merge, tree
from jft.analysis import interpolation, run_store, settings
from jft.analysis.bases import Base
from jft.analysis.merging_inputs import Inputs
from jft.analysis.tasks import Task
from jft.delta import TaskVector

Say = Callable[[str], None]
Row = dict[str, Any]


def check(study: Mapping[str, Any]) -> None:
    """``ValueError`` for a method that is none, and for densities outside (0, 1]."""
    options = study["grafting"]
    if options["method"] and options["method"] not in study["methods"]:
        raise ValueError(f"grafting.method {options['method']!r} is not one of {', '.join(study['methods'])}")
    if not all(0 < density <= 1 for density in options["densities"]):
        raise ValueError(f"grafting.densities are {options['densities']}; they lie in (0, 1]")


def rows(
    config: Mapping[str, Any],
    base: Base,
    tasks: Mapping[str, Task],
    runs: Sequence[Mapping[str, Any]],
    workdir: Path,
    say: Say,
) -> list[Row]:
    """A row for each seed, task and density of ``grafting``; all are kept in ``grafting.json`` for another start.

    ``largest``, ``learned``: test accuracy with the ``density`` entries of the largest magnitude, and with those of a mask
    that began there and learned on training data (:func:`jft.merge.graft`); ``entries``: the share of all weights that it
    keeps. ``first``, ``last``: its objective before and after. Which step's mask is kept, validation accuracy says.
    """
    options, out = config["grafting"], list[Row]()
    if not options["method"]:
        return out
    for seed in settings.seeds_of(config, options["method"])[: options["seeds"]]:
        inputs = Inputs.of(config, base, tasks, runs, options["method"], seed, workdir)
        path = workdir / f"grafting{'' if seed is None else f'_seed_{seed}'}.json"
        compute = functools.partial(_rows, inputs, options, say)
        out += [{"seed": seed, **row} for row in run_store.kept(path, inputs.dependencies("grafting"), compute)]
    return out


def _rows(inputs: Inputs, options: Mapping[str, Any], say: Say) -> list[Row]:
    rows = []
    for (name, task), batches in zip(inputs.tasks.items(), inputs.numbered, strict=True):
        for density in options["densities"]:
            row = {"task": name, **_row(inputs, name, task, batches, density, options)}
            shown = [f"{100 * row[key]:.1f}" for key in ("largest", "learned", "tuned")]
            say("grafting, {}, {:g}: {} by magnitude, {} learned, of {}".format(name, density, *shown))
            rows.append(row)
    return rows


def _row(
    inputs: Inputs, name: str, task: Task, batches: Sequence[Any], density: float, options: Mapping[str, Any]
) -> Row:
    tau, base = inputs.vectors[name], inputs.base.params

    def score(vector: TaskVector) -> float:
        return float(task.scores("test", base, [vector], [1.0], interpolation.STANDARD)[0])

    def grafted(steps: int) -> TaskVector:
        return merge.graft(
            tau,
            base=base,
            objective=inputs.objectives["cross_entropy"],
            batches=batches,
            data=inputs.data,
            density=density,
            bias=options["bias"],
            learning_rate=options["learning_rate"],
            steps=steps,
            score=functools.partial(task.score, "validation") if steps else None,
        )

    largest, learned = grafted(0), grafted(options["steps"])
    return {
        "density": density,
        "base": task.base,
        "tuned": inputs.runs[name]["score"],
        "largest": score(largest),
        "learned": score(learned),
        "entries": learned.manifest["entries"] / tree.count(base),
        "first": inputs.mean("cross_entropy", largest, batches),
        "last": inputs.mean("cross_entropy", learned, batches),
    }
