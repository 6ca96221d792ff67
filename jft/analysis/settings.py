"""The train config of one run, from a study's partial configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.analysis.interpolation import Forward, grid
from jft.data.config import derived
from jft.delta import TaskVector
from jft.train.config import Config, check, check_length

# Keys of a task that are the study's, not the train config's.
OF_TASK = ("test_data", "names", "templates")
# Keys of a method that are the study's: whose task vectors it takes instead of training, and in which forward pass.
OF_METHOD = ("of", "forward", "until")
# And which seeds it is run with, in place of the study's.
SEEDS = "seeds"
QUIET = {"log": {"progress": False}}
PARTS = ("data", "eval_data", "test_data")
BUILT_IN = ("digits", "fashion_mnist", "mnist", "stdlib")  # sources whose splits have the names of a study's


def overlay(*partials: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other, the last one winning key by key.

    A part that names another preset or source replaces the one below it: the options of one mean nothing to another.
    """
    out: dict[str, Any] = {}
    for partial in partials:
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            # Of the two the last one that is given.
            if partial.get(one) and other not in partial:
                out.pop(other, None)
        for key, value in partial.items():
            below = out.get(key)
            if not isinstance(value, Mapping) or not isinstance(below, Mapping) or _renamed(below, value):
                out[key] = overlay(value) if isinstance(value, Mapping) else value
            else:
                out[key] = overlay(below, value)
    return out


def _renamed(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    return any(key in below and key in above and below[key] != above[key] for key in ("name", "source"))


def of_run(study: Mapping[str, Any], task: str, method: str | None = None, seed: int | None = None) -> Config:
    """The train config of a run: defaults, ``common``, the task, the method, the seed.

    Raises ``ValueError`` for unknown keys.
    """
    task_part = {key: value for key, value in study["tasks"][task].items() if key not in OF_TASK}
    seed_part = {} if seed is None else {"seed": seed}
    method_part = (
        {key: value for key, value in study["methods"][method].items() if key not in (*OF_METHOD, SEEDS)}
        if method
        else {}
    )
    partial = overlay(QUIET, study["common"], task_part, method_part, seed_part)
    parts = data_parts(study, task)
    config = check(partial | {"data": parts["data"], "eval_data": parts["eval_data"]})
    # Without a method only part of it is there.
    if method is not None:
        check_length(config)
    return config


def source(study: Mapping[str, Any], method: str) -> str:
    """The method whose runs train the task vectors of ``method``: itself, or its ``of``."""
    return study["methods"][method].get("of") or method


def seeds_of(study: Mapping[str, Any], method: str) -> tuple[int | None, ...]:
    """The seeds of a method's runs: its own, those of the method it takes vectors of, or the study's; (None,) for none."""
    named = study["methods"][method].get(SEEDS) or study["methods"][source(study, method)].get(SEEDS)
    return tuple(named or study["seeds"]) or (None,)


def forward(study: Mapping[str, Any], method: str, tau: TaskVector) -> Forward:
    """The forward pass in which ``method`` evaluates ``tau``: its ``forward``, or else the one ``tau`` was trained with."""
    options = study["methods"][method]
    return Forward(options["forward"], options.get("until")) if options.get("forward") else Forward.of(tau)


def check_method(study: Mapping[str, Any], method: str) -> None:
    """``ValueError`` for a method that trains and evaluates another's task vectors, or does neither rightly."""
    options = study["methods"][method]
    evaluation_keys = {key for key in options if key in OF_METHOD}
    if "of" not in options:
        if evaluation_keys:
            raise ValueError(
                f"method {method!r} trains; {', '.join(sorted(evaluation_keys))} belong in its method, or give `of`"
            )
        return
    if set(options) - evaluation_keys - {SEEDS}:
        raise ValueError(
            f"method {method!r} takes the task vectors of another; it has no {min(set(options) - evaluation_keys - {SEEDS})!r}"
        )
    training_methods = [name for name, other in study["methods"].items() if "of" not in other]
    if options["of"] not in training_methods:
        raise ValueError(
            f"method {method!r}: of={options['of']!r} is not one that trains: {', '.join(training_methods)}"
        )
    Forward(options.get("forward") or "standard", options.get("until"))


def of_maps(study: Mapping[str, Any]) -> tuple[float, ...]:
    """The coefficients of a study's disentanglement maps.

    Raises ``ValueError`` for pairs that are none of two tasks, and where no coefficient is one that arithmetic might take.
    """
    options = study["disentangle"]
    for pair in options["pairs"]:
        if len(pair) != 2 or not set(pair) <= set(study["tasks"]):
            raise ValueError(f"{pair!r} is no pair of the tasks {', '.join(study['tasks'])}")
    coefficients = grid(options["lowest"], options["largest"], options["points"])
    if options["pairs"] and not any(0 <= c <= 1 for c in coefficients):
        raise ValueError(f"disentangle.lowest, largest, points: of the coefficients {coefficients} none lies in [0, 1]")
    return coefficients


def data_parts(study: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """``data``, ``eval_data`` (validation) and ``test_data`` of a task; those not given are ``data`` with another split, those
    without a source ``data`` with their keys.

    Raises ``ValueError`` where a part is not given and ``data`` has no ``split`` to put another in the place of.
    """
    config = overlay({part: study["common"][part] for part in PARTS if part in study["common"]}, study["tasks"][task])
    if not config.get("data"):
        raise ValueError(f"task {task!r} has no data")
    splits = study["splits"]
    # The built-in sets have splits of known names, so that a config can leave them out.
    data = (
        {"split": splits["data"], **config["data"]}
        if config["data"].get("source") in BUILT_IN
        else dict(config["data"])
    )
    parts = {"data": data}
    for part in PARTS[1:]:
        if config.get(part):
            parts[part] = derived(data, overlay(config[part]))
        elif "split" in data:
            # ``limit`` and ``shots`` are for scarce training data; evaluation keeps its whole split.
            parts[part] = {key: value for key, value in data.items() if key not in ("limit", "shots")} | {
                "split": splits[part]
            }
        else:
            raise ValueError(
                f"task {task!r} has no {part}, and its data have no `split` to take another of; give {part}"
            )
    return parts
