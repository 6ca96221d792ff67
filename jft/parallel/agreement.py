"""Agreement of the processes of a run: what decides the program, the data and the run is compared before the first step.

Each process compiles its own copy of the program and reads its own rows: one that was started with another learning rate
trains on in silence, and one with other steps waits for the rest for ever.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from jft.parallel import peers
from jft.version import __version__

SHOWN = 8  # differences named in an error
LENGTH = 80  # characters of a value


class Disagreement(ValueError):
    """The processes of a run were started with different settings."""


def environment() -> dict[str, Any]:
    """What decides the program beside the settings of a run: versions, and options of JAX and XLA."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
    return {
        "jft version": __version__,
        "jax version": jax.__version__,
        **{name: getattr(jax.config, name, None) for name in names},
        **{name: _flags(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    }


def _flags(name: str) -> list[str]:
    # Where XLA dumps programs to is each process's own matter.
    return [flag for flag in os.environ.get(name, "").split() if not flag.startswith("--xla_dump")]


def dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in dotted(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def _text(value: Any) -> str:
    def name_of(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, os.PathLike):
            return os.path.abspath(value)
        # The repr of a function or object may have its address, which is another in each process.
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"

    return json.dumps(value, sort_keys=True, default=name_of)


def agree(point: str, facts: Mapping[str, Any]) -> None:
    """Refuse ``facts`` that are not the same on all processes, with each key, its values, and who has which.

    All must call it, at the same ``point`` of the run; nothing is compiled. Raises :class:`Disagreement` on every process.
    """
    if jax.process_count() == 1:
        return
    texts = {key: _text(value) for key, value in dotted(facts).items()}
    # Digests first: facts are sent where they are to be shown.
    digest = hashlib.sha256(_text(texts).encode()).hexdigest()
    if len(set(peers.exchange(point, digest))) == 1:
        return
    each = peers.exchange(f"{point}: differences", texts)
    keys = [k for k in dict.fromkeys(k for x in each for k in x) if len({x.get(k) for x in each}) > 1]
    more = f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    shown = "; ".join(f"{key} is {_values([x.get(key, 'nothing') for x in each])}" for key in keys[:SHOWN])
    raise Disagreement(f"the processes of this run differ: {shown}{more}; start all of them with the same")


def _values(texts: list[str]) -> str:
    """``3 on process 0, 4 on processes 1, 2, 3``."""
    groups: dict[str, list[int]] = {}
    for k, text in enumerate(texts):
        groups.setdefault(text, []).append(k)
    # Long values from just before they differ, or they would look the same.
    same = next((i for i, each in enumerate(zip(*texts, strict=False)) if len(set(each)) > 1), min(map(len, texts)))
    start = max(0, same - LENGTH // 4) if max(map(len, texts)) > LENGTH else 0
    out = []
    for text, members in groups.items():
        end = start + LENGTH
        short = f"{'...' if start else ''}{text[start:end]}{'...' if text[end:] else ''}"
        who = ", ".join(map(str, members[:SHOWN])) + (
            f" and {len(members) - SHOWN} more" if len(members) > SHOWN else ""
        )
        out.append(f"{short} on process{'es' if len(members) > 1 else ''} {who}")
    return ", ".join(out)
