"""From a study's partial configs to the train config of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.analysis.interpolation import Forward, grid
from jft.delta import TaskVector
from jft.train.config import Config, check

# Keys of a task that are the study's, not the train config's.
OF_TASK = ("test_data", "names", "templates")
# Keys of a method that are the study's: whose task vectors it takes instead of training, and in which forward pass.
OF_METHOD = ("of", "forward", "until")
QUIET = {"log": {"progress": False}}
PARTS = ("data", "eval_data", "test_data")


def overlay(*partials: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other, the last one winning key by key.

    A part that names another preset or source replaces the one below it: the options of one mean nothing to another.
    """
    out: dict[str, Any] = {}
    for partial in partials:
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
    own = {key: value for key, value in study["tasks"][task].items() if key not in OF_TASK}
    seeded = {} if seed is None else {"seed": seed}
    how = {key: value for key, value in study["methods"][method].items() if key not in OF_METHOD} if method else {}
    partial = overlay(QUIET, study["common"], own, how, seeded)
    parts = data_parts(study, task)
    return check(partial | {"data": parts["data"], "eval_data": parts["eval_data"]})


def source(study: Mapping[str, Any], method: str) -> str:
    """The method whose runs train the task vectors of ``method``: itself, or ``of`` whose it says."""
    return study["methods"][method].get("of") or method


def forward(study: Mapping[str, Any], method: str, tau: TaskVector) -> Forward:
    """The forward pass in which ``method`` evaluates ``tau``: the one it says, or else the one ``tau`` was trained with."""
    said = study["methods"][method]
    return Forward(said["forward"], said.get("until")) if said.get("forward") else Forward.of(tau)


def check_method(study: Mapping[str, Any], method: str) -> None:
    """Refuse what a method says of others' task vectors, where it makes no sense. Raises ``ValueError``."""
    said = study["methods"][method]
    own = {key for key in said if key in OF_METHOD}
    if "of" not in said:
        if own:
            raise ValueError(f"method {method!r} trains; {', '.join(sorted(own))} belong in its method, or give `of`")
        return
    if set(said) - own:
        raise ValueError(f"method {method!r} takes the task vectors of another; it has no {min(set(said) - own)!r}")
    trained = [name for name, other in study["methods"].items() if "of" not in other]
    if said["of"] not in trained:
        raise ValueError(f"method {method!r}: of={said['of']!r} is not one that trains: {', '.join(trained)}")
    Forward(said.get("forward") or "standard", said.get("until"))


def of_maps(study: Mapping[str, Any]) -> tuple[float, ...]:
    """The coefficients of a study's disentanglement maps.

    Raises ``ValueError`` for pairs that are none of two tasks, and where no coefficient is one that arithmetic might take.
    """
    said = study["disentangle"]
    for pair in said["pairs"]:
        if len(pair) != 2 or not set(pair) <= set(study["tasks"]):
            raise ValueError(f"{pair!r} is no pair of the tasks {', '.join(study['tasks'])}")
    found = grid(said["lowest"], said["largest"], said["points"])
    if said["pairs"] and not any(0 <= c <= 1 for c in found):
        raise ValueError(f"disentangle.lowest, largest, points: of the coefficients {found} none lies in [0, 1]")
    return found


def data_parts(study: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """``data``, ``eval_data`` (validation) and ``test_data`` of a task; those not given are ``data`` with another split.

    Raises ``ValueError`` where a part is not given and ``data`` has no ``split`` to put another in the place of.
    """
    own = overlay({part: study["common"][part] for part in PARTS if part in study["common"]}, study["tasks"][task])
    if not own.get("data"):
        raise ValueError(f"task {task!r} has no data")
    splits = study["splits"]
    # The built-in sets have splits of known names, so that a config can leave them out.
    data = (
        {"split": splits["data"], **own["data"]}
        if own["data"].get("source") in ("digits", "stdlib")
        else dict(own["data"])
    )
    parts = {"data": data}
    for part in PARTS[1:]:
        if own.get(part):
            parts[part] = overlay(own[part])
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
