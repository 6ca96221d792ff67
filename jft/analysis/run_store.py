"""Records of finished parts of a study: their config and their outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jft import files, strict_json

NAME = "outcome.json"


def write_json(value: Any, path: Path) -> None:
    """``value`` as JSON, whole or not at all."""
    files.write_text(path, json.dumps(value, indent=1))


def plain(config: Any) -> Any:
    """A config as JSON would return it: the form in which two runs are compared."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    # default=str: dtypes and paths compare by their text.
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config, default=str))


def read(workdir: Path, config: Any, name: str = NAME) -> dict[str, Any] | None:
    """The outcome that :func:`write` recorded in ``workdir``, or None. Raises ``ValueError`` where it is of another config."""
    path = workdir / name
    if not path.exists():
        return None
    record = _record(path)
    current = plain(config)
    if record["config"] != current:
        different = ", ".join(
            sorted(k for k in {*current, *record["config"]} if current.get(k) != record["config"].get(k))
        )
        raise ValueError(
            f"{workdir} holds a finished run of another config (they differ in: {different}); give another "
            "workdir, or remove that folder to run it again"
        )
    return record["outcome"]


def train(run: Callable[[], Any], workdirs: Iterable[Path]) -> Any:
    """``run()``, once more where it has ended before in ``workdirs``, and a study was interrupted before it was recorded."""
    from jft.train import FinishedError

    try:
        return run()
    # Of another run this is another error, and its result stays.
    except FinishedError:
        for workdir in workdirs:
            (workdir / "task_vector.safetensors").unlink(missing_ok=True)
        return run()


def digests(paths: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each file: a run that was repeated may have written another."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def _record(path: Path) -> dict[str, Any]:
    """What :func:`write` or :func:`kept` left; ``ValueError`` with the way out where the file is damaged."""
    hint = f"remove {path}, and that part is done again"
    # Scores of runs that diverged may not be finite.
    record = strict_json.read(path, hint=hint, nan=True)
    strict_json.need(record, {"config": strict_json.OBJECT, "outcome": strict_json.OBJECT}, path, hint=hint)
    return record


def kept(path: Path, config: Any, compute: Callable[[], Any]) -> Any:
    """The result of ``compute()`` that ``path`` records for an equal ``config``; else a new one, which is recorded."""
    current = plain(config)
    if path.exists():
        record = _record(path)
        if record["config"] == current:
            return record["outcome"]
    outcome = plain(compute())
    write_json({"config": current, "outcome": outcome}, path)
    return outcome


def write(workdir: Path, config: Any, outcome: dict[str, Any], name: str = NAME) -> dict[str, Any]:
    """Mark the run in ``workdir`` as whole. Returns ``outcome``."""
    write_json({"config": plain(config), "outcome": outcome}, workdir / name)
    return outcome
