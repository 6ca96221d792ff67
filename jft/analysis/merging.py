"""The table of merging rules: one model of all task vectors of a method by each rule, its accuracy absolute and normalised."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jft.analysis import arithmetic, interpolation, run_store, settings
from jft.analysis.bases import Base
from jft.analysis.merging_inputs import Inputs
from jft.analysis.merging_rules import Entry, entries
from jft.analysis.tasks import Task
from jft.delta import TaskVector

Say = Callable[[str], None]
Row = dict[str, Any]


def check(study: Mapping[str, Any]) -> None:
    """``ValueError`` for a method, rule or task that is none, and for a metric that is no accuracy."""
    options = study["merging"]
    known = entries()
    for method, rules in options["methods"].items():
        if method not in study["methods"]:
            raise ValueError(f"merging.methods: {method!r} is not one of {', '.join(study['methods'])}")
        unknown = [rule for rule in rules if rule not in known]
        if unknown:
            raise ValueError(f"merging.methods.{method}: {unknown[0]!r} is no rule; there are {', '.join(known)}")
    if not options["methods"]:
        return
    if study["metric"] != "accuracy":
        raise ValueError(f"merging compares accuracies; metric is {study['metric']!r}")
    pair = options["pair"]
    if len(pair) != 2 or not set(pair) <= set(study["tasks"]):
        raise ValueError(f"merging.pair is {pair!r}; give two of the tasks {', '.join(study['tasks'])}")


def rows(
    config: Mapping[str, Any],
    base: Base,
    tasks: Mapping[str, Task],
    runs: Sequence[Mapping[str, Any]],
    workdir: Path,
    say: Say,
) -> list[Row]:
    """A row for each method of ``merging.methods``, seed and rule; rules that learn, of the first seeds alone.

    Rows are kept in ``merging/METHOD/RULE.json``, for another start with the same settings.
    """
    options, known, out = config["merging"], entries(), []
    for method, names in options["methods"].items():
        for at, seed in enumerate(settings.seeds_of(config, method)):
            inputs = Inputs.of(config, base, tasks, runs, method, seed, workdir)
            suffix = "" if seed is None else f"_seed_{seed}"
            for entry in [known[name] for name in names] or known.values():
                if entry.learns and at >= options["learned_seeds"]:
                    continue
                path = workdir / "merging" / method / f"{entry.name}{suffix}.json"
                compute = functools.partial(_row, entry, inputs)
                row = {"method": method, "seed": seed, **run_store.kept(path, inputs.dependencies(), compute)}
                say(f"merging, {method}{suffix}: {entry.name}: {_line(row)}")
                out.append(row)
    return out


def _row(entry: Entry, inputs: Inputs) -> Row:
    """Accuracies of one rule: as it is, and times the coefficient that validation data choose."""
    options, most = inputs.config["merging"], entry.models[1]
    if most is not None and most < len(inputs.tasks):
        inputs = inputs.chosen(options["pair"])
    # A rule of one model takes the first of the pair; both judge what it gives.
    read = inputs.chosen(options["pair"][:1]) if most == 1 else inputs
    since = time.perf_counter()
    merged = entry.run(read)
    seconds = time.perf_counter() - since
    by_task = _by_task(merged, list(inputs.tasks))

    def score(task: str, split: str, taus: Sequence[TaskVector], coefficients: Any) -> Any:
        taus = [by_task[task]]
        return inputs.tasks[task].scores(split, inputs.base.params, taus, coefficients, interpolation.STANDARD)

    keys = {"validation": "validation", "test": "score"}
    single = {split: {task: inputs.runs[task][key] for task in inputs.tasks} for split, key in keys.items()}
    found = arithmetic.addition(by_task, single, score, options["grid"])
    plain = {task: float(score(task, "test", (), [1.0])[0]) for task in inputs.tasks}
    row: Row = {
        "rule": entry.name,
        "reads": entry.reads,
        "models": most,
        "each": not isinstance(merged, TaskVector),
        "plain": arithmetic.mean(plain),
        "plain_normalised": arithmetic.mean({task: x / single["test"][task] for task, x in plain.items()}),
        **{key: found[key] for key in ("coefficient", "absolute", "normalised", "tasks", "curve")},
        "seconds": seconds,
        "objective": entry.objective,
        "first": None,
        "last": None,
    }
    if entry.start is not None and isinstance(merged, TaskVector):
        row["first"] = inputs.mean(entry.objective, entry.start(inputs), inputs.together)
        row["last"] = inputs.mean(entry.objective, merged, inputs.together)
    return row


def _by_task(merged: TaskVector | Sequence[TaskVector], names: Sequence[str]) -> dict[str, TaskVector]:
    each = [merged] * len(names) if isinstance(merged, TaskVector) else merged
    return dict(zip(names, each, strict=True))


def _line(row: Row) -> str:
    learned = "" if row["first"] is None else f", {row['objective']} {row['first']:.3f} -> {row['last']:.3f}"
    return (
        f"{100 * row['plain']:.1f}, times {row['coefficient']:.2f} {100 * row['absolute']:.1f}"
        f" ({100 * row['normalised']:.1f} normalised){learned}, {row['seconds']:.1f} s"
    )
