"""Directions brought to one form, so that one pass differentiates along all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft.kernels import slices
from jft.models import sparse
from jft.tangent.lean import Change, Parts, Thin, Whole
from jft.tangent.linearized import Direction

Group = tuple[tuple[int, ...], list[Direction]]


def scaled(change: Change, factor: Any) -> Change:
    """``factor * change``; factor: a number, or one for each layer ``[L]`` of a stacked weight."""

    def by(value: Any) -> Any:
        factors = jnp.asarray(factor, value.dtype)
        return value * factors.reshape(*factors.shape, *(1,) * (value.ndim - factors.ndim))

    if isinstance(change, Whole):
        return Whole(by(change.value))
    if isinstance(change, Thin):
        return Thin(change.a, by(change.b))
    return Parts(change.at, by(change.values), change.layout)


def grouped(directions: Sequence[Direction], weights: Mapping[str, Any]) -> list[Group]:
    """``(which, directions)`` of one form, whose leaves can be stacked; most often there is one group.

    Of one form are those whose weights move in the same way (whole, parts of one layout, one rank). A path that one of
    them lacks stays where it is there, and parts that are fewer are padded.
    """
    groups: list[tuple[list[int], dict[str, Any]]] = []
    for i, direction in enumerate(directions):
        for members, form in groups:
            if all(_fits(change, form.get(path)) for path, change in direction.items()):
                members.append(i)
                form.update({p: _larger(c, form.get(p)) for p, c in direction.items()})
                break
        else:
            groups.append(([i], dict(direction)))
    out = []
    for members, form in groups:
        full = [{p: _as(directions[i].get(p), form[p], weights[p].shape) for p in form} for i in members]
        out.append((tuple(members), full))
    return out


def _fits(change: Change, form: Change | None) -> bool:
    if form is None:
        return True
    if isinstance(change, Parts) and isinstance(form, Parts):
        return change.layout == form.layout and change.at.ndim == form.at.ndim
    return _described(change) == _described(form)


def _described(change: Change) -> Any:
    leaves, structure = jax.tree.flatten(change)
    return structure, [(x.shape, x.dtype) for x in leaves]


def _larger(change: Change, form: Change | None) -> Change:
    if form is None or (isinstance(change, Parts) and _slots(change) > _slots(form)):
        return change
    return form


def _as(change: Change | None, form: Change, shape: tuple[int, ...]) -> Change:
    if change is None:
        return scaled(form, 0)
    return padded(change, _slots(form), shape) if isinstance(change, Parts) else change


def _axes(layout: sparse.Layout) -> tuple[int, int]:
    """The axis over the selected parts of a matrix, of ``at`` and of the values."""
    if isinstance(layout, sparse.Slices):
        return -1, -2 if layout.axis == slices.ROWS else -1
    return -2, -3 if isinstance(layout, sparse.Blocks) else -1


def _slots(change: Any) -> int:
    return change.at.shape[_axes(change.layout)[0]]


def padded(change: Parts, most: int, shape: tuple[int, ...]) -> Parts:
    """The same with ``most`` parts for each matrix, the new ones past the end of the weight, where they are not read."""
    layout, more = change.layout, most - _slots(change)
    if not more:
        return change
    if isinstance(layout, sparse.Slices):
        extent = shape[layout.axis]
    else:
        extent = shape[-2] // (layout.rows if isinstance(layout, sparse.Blocks) else 1)
    place, slot = _axes(layout)
    widths = [(0, 0)] * change.at.ndim
    widths[place] = (0, more)
    at = jnp.pad(change.at, widths)
    beyond = extent + jnp.arange(most, dtype=at.dtype)
    new = jnp.arange(most) >= most - more
    first = at if place == -1 else at[..., 0]
    first = jnp.where(new, beyond, first)
    at = first if place == -1 else at.at[..., 0].set(first)
    widths = [(0, 0)] * change.values.ndim
    widths[slot] = (0, more)
    return dataclasses.replace(change, at=at, values=jnp.pad(change.values, widths))
