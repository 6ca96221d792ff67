"""Every model type that jft reads and writes, found by the ``model_type`` of a ``config.json``."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from jft.models.hf.checkpoint import LoadError
from jft.models.hf.mapping import Family
from jft.names import nearest

MODULES = ("decoders", "encoders", "vision", "seq2seq")


@functools.cache
def families() -> dict[str, Family]:
    """``{model_type: Family}`` over all modules; imported at first use."""
    merged: dict[str, Family] = {}
    for module in MODULES:
        of_module: dict[str, Family] = importlib.import_module(f"jft.models.hf.{module}").FAMILIES
        duplicates = merged.keys() & of_module.keys()
        if duplicates:
            raise ValueError(
                f"model type {min(duplicates)!r} is defined twice, the second time in jft.models.hf.{module}"
            )
        merged |= of_module
    return merged


def family_of(description: dict[str, Any], where: Any) -> Family:
    """The family of a ``config.json``; ``LoadError`` listing what is known, the nearest first."""
    model_type = description.get("model_type")
    known = families()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    near = nearest(model_type, known, cutoff=0.5, hint="nearest: {}; ")
    raise LoadError(
        f"{where}: model_type {model_type!r} (architectures {description.get('architectures')}) is not one that jft knows; "
        f"{near}known: {', '.join(sorted(known))}"
    )


def family_named(name: str) -> Family:
    """The family of a config's ``family`` field; ``ValueError`` where the architecture has no Hugging Face form."""
    known = families()
    if name not in known:
        raise ValueError(f"family {name!r} has no Hugging Face form; known: {', '.join(sorted(known))}")
    return known[name]
