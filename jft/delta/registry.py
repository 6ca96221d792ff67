"""The registry of encodings, and the rules for pairs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax

if TYPE_CHECKING:
    from jft.delta.encoding import Encoding

E = TypeVar("E", bound="Encoding")

_KINDS: dict[str, type[Encoding]] = {}
_RULES: dict[tuple[str, type, type], Callable[[Any, Any], Any]] = {}


def register(kind: str, *, data: tuple[str, ...], static: tuple[str, ...] = ()) -> Callable[[type[E]], type[E]]:
    """Class decorator: a frozen dataclass as an encoding and a pytree; ``kind`` is its name in files.

    data: the fields that hold arrays (or tuples of encodings); static: the hashable, JSON-able others.
    """

    def add(cls: type[E]) -> type[E]:
        # A second class of this name would silently read the first one's files.
        if kind in _KINDS:
            raise ValueError(f"encoding {kind!r} is registered already")
        cls.kind, cls._data, cls._static = kind, data, static

        def flatten(x: E) -> tuple[tuple, tuple]:
            return tuple(getattr(x, f) for f in data), tuple(getattr(x, f) for f in static)

        def flatten_with_keys(x: E) -> tuple[tuple, tuple]:
            children, aux = flatten(x)
            return tuple(zip(map(jax.tree_util.GetAttrKey, data), children, strict=True)), aux

        def unflatten(aux: tuple, children: Any) -> E:
            # Past __init__: JAX also rebuilds pytrees around placeholders, which no check could accept.
            new = object.__new__(cls)
            for name, value in zip((*data, *static), (*children, *aux), strict=True):
                object.__setattr__(new, name, value)
            return new

        # With keys, errors and paths name the fields.
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        _KINDS[kind] = cls
        return cls

    return add


def kinds() -> dict[str, type[Encoding]]:
    """Every registered encoding, by its name in files."""
    # A copy: only `register` adds.
    return dict(_KINDS)


def rule(operation: str, first: type, second: type) -> Callable[[Callable], Callable]:
    """Decorator: the implementation of ``operation`` ("+" or "dot") for this pair of encodings, in either order.

    The function may return None where it cannot (say, values not known under ``jit``); the default then applies.
    """

    def add(fn: Callable) -> Callable:
        # By exact types: a subclass may break what a rule relies on.
        _RULES[operation, first, second] = fn
        return fn

    return add


def by_rule(operation: str, a: Encoding, b: Encoding) -> Any:
    """The result of the rule for this pair; None where there is none, or it cannot."""
    # Both operations commute.
    for x, y in ((a, b), (b, a)):
        fn = _RULES.get((operation, type(x), type(y)))
        if fn is not None:
            return fn(x, y)
    return None
