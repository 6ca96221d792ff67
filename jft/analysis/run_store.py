"""Files that say a part of a study is whole: what was run, and what came of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jft import files

NAME = "outcome.json"


def write_json(value: Any, path: Path) -> None:
    """``value`` as JSON, whole or not at all."""
    files.write_text(path, json.dumps(value, indent=1))


def plain(config: Any) -> Any:
    """A config as JSON would give it back: what two runs are compared by."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config, default=str))


def read(workdir: Path, config: Any, name: str = NAME) -> dict[str, Any] | None:
    """What :func:`write` left in ``workdir``, or None. Raises ``ValueError`` where it is of another config."""
    path = workdir / name
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    now = plain(config)
    if kept["config"] != now:
        changed = ", ".join(sorted(k for k in {*now, *kept["config"]} if now.get(k) != kept["config"].get(k)))
        raise ValueError(
            f"{workdir} holds a finished run of another config (they differ in: {changed}); give another "
            "workdir, or remove that folder to run it again"
        )
    return kept["outcome"]


def kept(path: Path, config: Any, compute: Callable[[], Any]) -> Any:
    """What ``compute()`` gave for an equal ``config`` when it was asked last; else what it gives now, kept in ``path``."""
    now = plain(config)
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["config"] == now:
            return found["outcome"]
    outcome = plain(compute())
    write_json({"config": now, "outcome": outcome}, path)
    return outcome


def write(workdir: Path, config: Any, outcome: dict[str, Any], name: str = NAME) -> dict[str, Any]:
    """Mark the run in ``workdir`` as whole. Returns ``outcome``."""
    write_json({"config": plain(config), "outcome": outcome}, workdir / name)
    return outcome
