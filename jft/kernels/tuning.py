"""Tables of configurations that were timed on a device, by its kind: what a kernel takes before its heuristic.

A table is ``KIND.json`` with ``{"kernel shape": {field: value}}``; ``jft bench kernels --tune`` writes it into :func:`folder`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jft import files, strict_json


def folder() -> Path:
    """Where tables lie: the environment's ``JFT_TUNED``, or ``~/.cache/jft/tuned``."""
    return Path(os.environ.get("JFT_TUNED") or Path.home() / ".cache" / "jft" / "tuned")


def device_kind() -> str | None:
    """The kind of accelerator that a program is lowered for: that of the mesh in whose context it is, or that is here."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() != "cpu" else None


def sddmm_case(x: Any, dy: Any, n: int, block: tuple[int, int]) -> str:
    """The name of a product in a table: ``block_sddmm bfloat16 T=8192 I=4096 O=4096 n=102 block=128x128``."""
    return f"block_sddmm {x.dtype} T={x.shape[0]} I={x.shape[1]} O={dy.shape[1]} n={n} block={block[0]}x{block[1]}"


def lookup(case: str) -> Mapping[str, Any] | None:
    """The fields of the configuration that was fastest for ``case`` on this kind of device; None where none was timed."""
    kind = device_kind()
    path = None if kind is None else path_of(kind)
    return None if path is None or not path.exists() else _table(path, path.stat().st_mtime_ns).get(case)


def path_of(kind: str) -> Path:
    """The table of a kind of device, such as ``TPU v5 lite``."""
    return folder() / f"{re.sub('[^a-z0-9]+', '_', kind.lower())}.json"


def write(kind: str, cases: Mapping[str, Mapping[str, Any]]) -> Path:
    """Put ``cases`` into the table of a kind of device, beside what it has."""
    path = path_of(kind)
    before = _table(path, path.stat().st_mtime_ns) if path.exists() else {}
    files.write_text(path, json.dumps({**before, **cases}, indent=1, sort_keys=True) + "\n")
    return path


# By its time of change too, so that a table that is written anew is read anew.
@functools.lru_cache(maxsize=8)
def _table(path: Path, changed: int) -> Mapping[str, Mapping[str, Any]]:
    try:
        table = strict_json.read(path)
        valid = isinstance(table, dict) and all(isinstance(config, dict) for config in table.values())
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"{path} is no table of kernel configurations: delete it, and jft bench kernels --tune writes another"
        )
    return table
