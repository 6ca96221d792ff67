"""The members' axis: what members have of their own is stacked in a leading axis, what they share is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def join(each: Sequence[Any], like: Any) -> Any:
    """Equal trees of all members as one: stacked where ``like`` has an axis more, else the first member's."""
    return jax.tree.map(lambda to, *x: stack(x) if to.ndim > np.ndim(x[0]) else x[0], like, *each)


def stack(arrays: Sequence[Any]) -> Any:
    """Arrays of all members as one; on the host where they are all there, which compiles nothing."""
    if all(isinstance(x, np.ndarray) or x.is_fully_addressable for x in arrays):
        return np.stack([np.asarray(x) for x in arrays])
    return jnp.stack(arrays)


def take(value: Any, i: int) -> Any:
    """The part of member ``i``: the inverse of :func:`stack`."""

    def part(x: Any) -> Any:
        if isinstance(x, np.ndarray) or x.is_fully_addressable:
            return jnp.asarray(np.asarray(x)[i])
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    return jax.tree.map(part, value)


def depends(fn: Callable, args: Sequence[Any], flags: Sequence[Any]) -> Any:
    """A flag for every result of ``fn(*args)``: whether it depends on an argument whose flag is set."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    reached = {v for v, flag in zip(jaxpr.invars, jax.tree.leaves(tuple(flags)), strict=True) if flag}
    for equation in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    found = [not hasattr(v, "val") and v in reached for v in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def over_members(fn: Callable, flags: Sequence[Any], members: int, together: int) -> Callable:
    """``fn`` for every member, results stacked. flags: for each argument a tree (or prefix) of whether members differ in it.

    together: members computed at once; the others follow.
    """
    if together >= members:
        return jax.vmap(fn, in_axes=tuple(jax.tree.map(lambda differs: 0 if differs else None, f) for f in flags))

    def one_after_another(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        full = jax.tree.leaves(jax.tree.broadcast(tuple(flags), args))
        stacked = [x for x, differs in zip(leaves, full, strict=True) if differs]

        def one(stacked: list) -> Any:
            rest = iter(stacked)
            mixed = [next(rest) if differs else x for x, differs in zip(leaves, full, strict=True)]
            return fn(*jax.tree.unflatten(structure, mixed))

        return jax.lax.map(one, stacked, batch_size=together if together > 1 else None)

    return one_after_another
