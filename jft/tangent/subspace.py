"""`Space`: the weights that move, and in which form; the outputs of a model as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta, tree
from jft.tangent.linearization import Linearized
from jft.tangent.linearization import outputs as model_outputs

Array = jax.Array
Select = Callable[[Any, Any], Array]
Point = dict[str, Array]
Space = dict[str, delta.Change]


def space(f_lin: Linearized, moving: Any = None) -> Space:
    """The weights that move, ``{path: change}``; a pytree, of which only the form is used.

    moving: None, all floating-point weights; regular expressions of paths; or a task vector (or what else
    :func:`jft.linearize` takes), whose encodings say it: selected entries, blocks and slices move and nothing else does,
    and of a low-rank ``a b`` it is ``b``, as in LoRA with a frozen ``a``. Raises ``ValueError`` where nothing moves.
    """
    flat = tree.flatten(f_lin.params)
    if moving is None or isinstance(moving, str | list | tuple):
        paths = list(flat) if moving is None else tree.matching(flat, moving, "moving")
        # Integers have no derivative.
        weights: Space = {p: delta.Dense(flat[p]) for p in paths if jnp.issubdtype(flat[p].dtype, jnp.inexact)}
    else:
        weights = f_lin.direction(moving)
    if not weights:
        raise ValueError(f"moving={moving!r}: no weight moves; there is no tangent space")
    return weights


def origin(moving: Space) -> Point:
    """The origin of the space, zeros: the point at which outputs are differentiated."""
    return {path: jnp.zeros_like(change.direction) for path, change in moving.items()}


def outputs(f_lin: Linearized, moving: Space, batch: Any, select: Select | None = None) -> Callable[[Point], Array]:
    """``point -> f [N, C]``: ``select(outputs, batch)`` of each example in one axis, or all outputs."""

    def function(point: Point) -> Any:
        tangents = f_lin.tangents({path: change.along(point[path]) for path, change in moving.items()})
        return model_outputs(f_lin.function, f_lin.build(tangents), batch, f_lin.until)

    def selected(point: Point) -> Array:
        out = function(point)
        out = out if select is None else select(out, batch)
        if not hasattr(out, "ndim") or not out.ndim or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                f"outputs must be one floating-point array with a row for each example, not {jax.tree.structure(out)}; "
                "select=lambda outputs, batch: ... chooses one"
            )
        return out.reshape(out.shape[0], -1)

    return selected


def encode(f_lin: Linearized, moving: Space, values: Mapping[str, Array]) -> dict[str, delta.Encoding]:
    """The changes of the moving weights, each in the encoding of its space."""
    flat = tree.flatten(f_lin.params)
    out: dict[str, delta.Encoding] = {}
    for path, change in moving.items():
        encoded = change.along(values[path])
        if isinstance(encoded, delta.Selected):
            indices, host_values = jax.device_get((encoded.at, encoded.values))
            encoded = encoded.layout.encode(indices, host_values, tuple(flat[path].shape))
        out[path] = encoded
    return out


def sizes(moving: Space) -> dict[str, Any]:
    """The arrays of the numbers that move, by path: only their shapes and dtypes count."""
    return {path: change.direction for path, change in moving.items()}


def to_float32(values: Any) -> Any:
    """Arrays in float32, wider ones as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), values)


def like(values: Any, point: Point) -> Any:
    """``values`` in the dtypes of ``point``, as ``jax.jvp`` wants its tangents."""
    return jax.tree.map(lambda v, p: v.astype(p.dtype), values, point)


def rows(batch: Any) -> int:
    """Examples in a batch. Raises ``ValueError`` where its arrays do not all have one row for each."""
    sizes: set[Any] = {x.shape[0] if getattr(x, "ndim", 0) else None for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"every array of a batch must have one row for each example; they have {sorted(map(str, sizes))}"
        )
    return int(sizes.pop())


def row(batch: Any, i: Any) -> Any:
    """Example ``i`` as a batch of one."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), i, 1), batch)


def products(f_lin: Linearized, moving: Space, batch: Any, select: Select | None = None) -> int:
    """Multiply-adds of the matrix products of a forward pass, loops counted in full; nothing runs."""
    point = origin(moving)
    closed = jax.make_jaxpr(lambda point: outputs(f_lin, moving, batch, select)(point))(point)
    return _products(closed.jaxpr)


def _products(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = 1
            for axis in contracted:
                depth *= left[axis]
            total += depth * tree.size(equation.outvars[0].aval)
        # The body of a scan is written once and runs ``length`` times.
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            # A closed jaxpr holds the one with the equations.
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeats * _products(inner)
    return total
