"""The manifest of a task vector: what it changes, how it came about, and which base it belongs to.

A manifest is a JSON-able dict. Keys jft itself reads:

- ``base``: ``{"fingerprint": str, "parameters": int, "leaves": {path: [checksum, size, dtype]}}``, see
  :func:`describe_base`. Absent where the base is not known; then nothing can be checked.
- ``operation``: how it came about: ``"difference"``, ``"finetune"``, ``"linear"``, or the name of a merging rule.
- ``parents``: what went into a result of arithmetic, a list of ``{"coefficient": c, "manifest": {...}}`` for
  ``"linear"``: the result is the sum of ``c`` times the parents. Sums of sums are flattened, so the list names runs.
- ``narrowed``: the selections made since, in order.

Runs add ``method``, ``config``, ``data``, ``seed``, ``created`` and ``versions`` (:func:`describe`).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jft import strict_json, tree
from jft.version import __version__

Manifest = dict[str, Any]
_UNCHECKED = "pass check=False (--no-check) to go on"


class BaseMismatch(ValueError):
    """The base is not the one a task vector was made for."""


def describe(base: Any = None, *, operation: str = "finetune", **facts: Any) -> Manifest:
    """A manifest for a vector on ``base``: its description, ``facts`` (method, config, data, seed ...), versions, time.

    base: the parameters before fine-tuning; None leaves them out, and then nothing can be checked. The fingerprint reads
    every weight once, where it is.
    """
    manifest = {} if base is None else {"base": describe_base(base)}
    # Time and versions last: no fact can replace them.
    return manifest | {"operation": operation} | check(facts) | {"created": _now(), "versions": versions()}


def describe_base(base: Any) -> dict[str, Any]:
    """The ``base`` entry of a manifest: fingerprint, number of parameters; checksum, size and dtype of every leaf."""
    flat = tree.flatten(base)
    sums = tree.checksums(flat)
    return _base({path: [sums[path], tree.size(x), np.dtype(x.dtype).name] for path, x in flat.items()})


def check(manifest: Mapping[str, Any]) -> Manifest:
    """``manifest`` as a dict, refused with ``ValueError`` where a value is not JSON or ``base`` is no description."""
    for key, value in manifest.items():
        try:
            # One entry at a time, so that the error can name it.
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"manifest entry {key!r} cannot be written as JSON: {error}") from None
    base = manifest.get("base")
    if base is not None and not (isinstance(base, Mapping) and {"fingerprint", "parameters", "leaves"} <= set(base)):
        raise ValueError(f"manifest entry 'base' must come from jft.delta.describe_base(params), not {base!r:.80}")
    return dict(manifest)


_LEAF = strict_json.Kind(
    "a checksum, a size and a dtype",
    lambda x: isinstance(x, list) and len(x) == 3 and all(isinstance(x[i], str) for i in (0, 2)) and type(x[1]) is int,
)
_BASE = {
    "fingerprint": strict_json.TEXT,
    "parameters": strict_json.Kind("a whole number", lambda x: type(x) is int and x >= 0),
    "leaves": strict_json.Kind(
        "leaves, at least one, each a checksum, a size and a dtype",
        lambda x: isinstance(x, dict) and len(x) > 0 and all(map(_LEAF.test, x.values())),
    ),
}
_READ = {
    "operation": strict_json.TEXT,
    "parents": strict_json.listed(strict_json.OBJECT),
    "narrowed": strict_json.listed(strict_json.TEXT),
    "method": strict_json.TEXT | strict_json.OBJECT | strict_json.NULL,
}


def check_read(manifest: Manifest) -> None:
    """``ValueError`` for a manifest of a file that says of what jft reads in it (of the base above all) something else than it
    may. An empty list of leaves is refused: every base would agree with it.
    """
    strict_json.check(manifest, _READ, "its manifest")
    if manifest.get("base") is not None:
        base = manifest["base"]
        strict_json.need(base, _BASE, "its manifest: base")
        if base["fingerprint"] != tree.fingerprint_of({path: leaf[0] for path, leaf in base["leaves"].items()}):
            raise ValueError("its manifest: base: the fingerprint is not that of the leaves")
    for parent in manifest.get("parents", ()):
        strict_json.need(parent, {"manifest": strict_json.OBJECT}, "its manifest: a parent")
        coefficient = {"coefficient": strict_json.NUMBER | strict_json.NULL}
        strict_json.check(parent, coefficient, "its manifest: a parent")


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    return {"jft": __version__, "jax": importlib.metadata.version("jax"), "python": platform.python_version()}


def narrow(manifest: Manifest, keep: Callable[[str], bool], note: str) -> Manifest:
    """The manifest of a vector and its base restricted to the paths that ``keep`` keeps."""
    result = dict(manifest) | {"narrowed": [*manifest.get("narrowed", ()), note]}
    if manifest.get("base"):
        leaves = {p: leaf for p, leaf in manifest["base"]["leaves"].items() if keep(p)}
        # Of no leaf nothing is known: a description without any would agree with every base.
        result = {k: v for k, v in result.items() if k != "base"} | ({"base": _base(leaves)} if leaves else {})
    return result


def linear(terms: Iterable[tuple[Any, Manifest]], check_base: bool = True) -> Manifest:
    """The manifest of ``sum(coefficient * vector)``; raises :class:`BaseMismatch` unless all have the same base."""
    parents: list[dict[str, Any]] = []
    # It is read twice, and may be a generator.
    terms = list(terms)
    for coefficient, manifest in terms:
        # A narrowed sum stays a parent: its parents still describe all paths.
        if manifest.get("operation") == "linear" and "narrowed" not in manifest:
            flattened = [p | {"coefficient": _number(coefficient, p["coefficient"])} for p in manifest["parents"]]
            parents += flattened
        else:
            parents.append({"coefficient": _number(coefficient), "manifest": _parent(manifest)})
    return derive([m for _, m in terms], "linear", check_base=check_base) | {"parents": parents}


def derive(manifests: Iterable[Manifest], operation: str, check_base: bool = True, **options: Any) -> Manifest:
    """The manifest of a result of ``operation`` on vectors with these manifests; ``options`` are entries of it."""
    manifests = list(manifests)
    base = common_base(manifests, check_base)
    result = {"base": base} if base else {}
    parents = [{"manifest": _parent(m)} for m in manifests]
    return result | {"operation": operation} | check(options) | {"parents": parents}


def common_base(manifests: Iterable[Manifest], check_base: bool = True) -> dict[str, Any] | None:
    """The base that vectors share; leaves known to only some of them (a task head) are all in it.

    Raises :class:`BaseMismatch` where two know the same leaf differently, unless ``check_base`` is false: then no
    base is known of the result beyond what they agree on.
    """
    bases = [m["base"] for m in manifests if m.get("base")]
    leaves: dict[str, list] = {}
    conflicts = set()
    for base in bases:
        for path, leaf in base["leaves"].items():
            # Checksums cover shape and dtype: equal values in another dtype are another base.
            if leaves.setdefault(path, leaf) != leaf:
                conflicts.add(path)
    if conflicts and check_base:
        other = _other_dtypes({p: [base["leaves"][p][2] for base in bases if p in base["leaves"]] for p in conflicts})
        if other:
            raise BaseMismatch(
                f"task vectors of bases of different dtypes: {other}; make them from one base in one dtype, or use "
                "TaskVector.combine(..., check=False)"
            )
        # Each once, in the order of the vectors.
        fingerprints = list(dict.fromkeys(base["fingerprint"] for base in bases))
        raise BaseMismatch(
            f"task vectors of different bases: fingerprints {' and '.join(fingerprints)} differ in {_some(conflicts)}; "
            "leave out what is not shared with .exclude(pattern), or use TaskVector.combine(..., check=False)"
        )
    shared = {path: leaf for path, leaf in leaves.items() if path not in conflicts}
    return _base(shared) if shared else None


def verify(manifest: Manifest, params: Any, what: str = "these parameters") -> None:
    """Raise :class:`BaseMismatch` unless ``params`` are, where the manifest knows its base, that base bit for bit.

    Leaves of ``params`` that the base does not have (a task head added to a backbone) are not looked at.
    """
    base = manifest.get("base")
    if not base:
        return
    if not base["leaves"]:
        raise BaseMismatch(f"the task vector names no leaf of its base, so {what} cannot be verified; {_UNCHECKED}")
    flat = tree.flatten(params)
    missing = [path for path in base["leaves"] if path not in flat]
    # Only leaves of the base: a checksum reads every weight of a leaf.
    sums = tree.checksums({path: flat[path] for path in base["leaves"] if path in flat})
    different = [path for path, total in sums.items() if total != base["leaves"][path][0]]
    if missing or different:
        # The usual reason, and easier to mend than another base.
        other = _other_dtypes({p: [np.dtype(flat[p].dtype).name, base["leaves"][p][2]] for p in different})
        if other:
            raise BaseMismatch(
                f"{what} are of another dtype than the base that the task vector was made from: {other}; load the base in its "
                f"dtype (jft.load(..., dtype=...)), or {_UNCHECKED}"
            )
        difference = f"differ in {_some(different)}" if different else f"lack {_some(missing)}"
        raise BaseMismatch(
            f"{what} have fingerprint {tree.fingerprint_of(sums)}, the task vector's base has {base['fingerprint']}; "
            f"they {difference}. Load the base it was made from, or {_UNCHECKED}"
        )


def _other_dtypes(dtypes: Mapping[str, list[str]]) -> str:
    """The first path of several dtypes with these, and how many more there are; empty where there is none."""
    paths = sorted(p for p, names in dtypes.items() if len(set(names)) > 1)
    if not paths:
        return ""
    more = f", and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{' and '.join(dict.fromkeys(dtypes[paths[0]]))} in {paths[0]}{more}"


def _base(leaves: dict[str, list]) -> dict[str, Any]:
    fingerprint = tree.fingerprint_of({path: checksum for path, (checksum, *_) in leaves.items()})
    return {"fingerprint": fingerprint, "parameters": sum(n for _, n, _ in leaves.values()), "leaves": leaves}


def _parent(manifest: Manifest) -> Manifest:
    """A manifest without the table of leaves: its fingerprint says which base it was."""
    if not manifest.get("base"):
        return manifest
    return manifest | {"base": {k: v for k, v in manifest["base"].items() if k != "leaves"}}


def _number(*factors: Any) -> float | None:
    """The product as a float; None where a factor is not known (traced under ``jit``)."""
    product = 1.0
    for factor in factors:
        if factor is None or isinstance(factor, jax.core.Tracer):
            return None
        product *= float(factor)
    return product


def _some(paths: Iterable[str], limit: int = 3) -> str:
    # Sets come in no order, and errors should read the same each time.
    paths = sorted(paths)
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(paths[:limit]) + more


def _now() -> str:
    # UTC, so that times of several machines compare.
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
