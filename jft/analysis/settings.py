"""From a study's partial configs to the train config of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jft.train.config import Config, check

# Keys of a task that are the study's, not the train config's.
OF_TASK = ("test_data", "names", "templates")
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
    partial = overlay(QUIET, study["common"], own, study["methods"][method] if method else {}, seeded)
    parts = data_parts(study, task)
    return check(partial | {"data": parts["data"], "eval_data": parts["eval_data"]})


def data_parts(study: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """``data``, ``eval_data`` (validation) and ``test_data`` of a task; those not given are ``data`` with another split.

    Raises ``ValueError`` where a part is not given and ``data`` has no ``split`` to put another in the place of.
    """
    own = overlay({part: study["common"][part] for part in PARTS if part in study["common"]}, study["tasks"][task])
    if not own.get("data"):
        raise ValueError(f"task {task!r} has no data")
    splits = study["splits"]
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
            parts[part] = {key: value for key, value in data.items() if key not in ("limit", "shots")} | {
                "split": splits[part]
            }
        else:
            raise ValueError(
                f"task {task!r} has no {part}, and its data have no `split` to take another of; give {part}"
            )
    return parts
