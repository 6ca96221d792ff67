"""The resume check: the facts that a run's checkpoints and task vector carry, and that must be the same to go on from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import delta, files, tree
from jft.methods import Method
from jft.methods.registry import comparable
from jft.train.optimizers import Given
from jft.train.state import State

SHOWN = 8  # differences named in an error


class Changed(ValueError):
    """The run in the workdir is another one: the same name, but not the same base, method, optimizer or data."""


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _dotted(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse with :class:`Changed` where the identities differ: ``what``, and each difference as ``key: old -> new``."""
    old, new = _dotted(comparable(saved)), _dotted(comparable(json.loads(json.dumps(now))))
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k, "nothing") != new.get(k, "nothing")]
    if keys:
        # What trains follows from the rest, leaf by leaf: shown last, and not to the last leaf.
        keys.sort(key=lambda k: k.startswith("trained."))
        lines = [f"  {k}: {old.get(k, 'nothing')!r} -> {new.get(k, 'nothing')!r}" for k in keys[:SHOWN]]
        lines += [f"  and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else []
        changes = "\n".join(lines)
        raise Changed(
            f"{what} of another run, so going on in this workdir would be wrong:\n{changes}\n"
            "undo the change, or give another workdir"
        )


def check_manifest(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the caller says of the run; what no task vector could hold is refused now, not after training."""
    said = delta.manifest.check(manifest or {})
    for key in ("base", "operation"):
        if key in said:
            raise ValueError(f"manifest entry {key!r} is written by finetune itself; choose another name")
    return said


def describe(
    method: Method, optimizer: Any, objective: Any, state: State, batch: Any, dtype: Any, seed: int
) -> dict[str, Any]:
    """What a run is, as JSON: a run may only go on from checkpoints that say the same."""
    if isinstance(optimizer, Given):
        options: Any = {"name": "optax", "state": sorted(tree.flatten(state.opt_state))}
    else:
        options = dataclasses.asdict(optimizer)
    linear = {} if method.forward == "standard" else {"forward": method.forward, "until": method.until}
    return {
        "method": {"name": method.name, "options": _json(method.options), **linear},
        "optimizer": _json(options),
        "objective": {"name": type(objective).__name__, **_json(getattr(objective, "__dict__", {}))},
        "batch": {p: [list(x.shape), np.dtype(x.dtype).name] for p, x in tree.flatten(batch).items()},
        "trained": {p: [list(x.shape), np.dtype(x.dtype).name] for p, x in tree.flatten(state.trained).items()},
        "dtype": None if dtype is None else np.dtype(dtype).name,
        "seed": seed,
    }


def _json(value: Any) -> Any:
    """``value`` as JSON would give it back; functions by their name, what else it cannot hold by its ``repr``."""

    def said(value: Any) -> str:
        # The repr of a function has its address, which another process puts elsewhere.
        name = getattr(value, "__qualname__", None)
        return f"{value.__module__}.{name}" if name else repr(value)

    return json.loads(json.dumps(value, default=said))


def write_config(workdir: Path | None, manifest: Mapping[str, Any]) -> None:
    """Make the folder of a run that has one, and write its manifest's ``config`` to ``config.json`` there."""
    if workdir is not None and jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if "config" in manifest:
            files.write_text(workdir / "config.json", json.dumps(manifest["config"], indent=2, default=str) + "\n")


def refuse_another(workdir: Path | None, itself: Mapping[str, Any]) -> None:
    """Refuse to start where another run has left its result, which this one would write over."""
    path = None if workdir is None else workdir / "task_vector.safetensors"
    if path is None or not path.is_file():
        return
    from jft.delta import file

    left = file.inspect(path).manifest
    before = {key: left.get(key) for key in itself} | {"base": left.get("base", {}).get("fingerprint")}
    if "narrowed" in left:  # of part of its base: the whole one is not known
        before["base"] = itself["base"]
    compare(before, itself, f"{path} is")
