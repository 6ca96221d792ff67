"""`sweep`: a whole grid of coefficients of task vectors for one tangent pass each, since f_lin is linear in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, tree
from jft.compiled import program_cache
from jft.tangent.linearization import Direction, Linearized, pair

Array = jax.Array
Score = Callable[[Any, Any], Mapping[str, Any]]
Taus = Mapping[str, Any] | Sequence[Any]

# Outputs of as many points lie in memory at once as fit into this: more would leave the caches.
_POINTS_BYTES = 2**22
# Directions that a processor takes through the model together, for the same reason: two of eight are 1.1 to 1.6x as fast.
_IN_CACHES = 2


def sweep(
    f_lin: Linearized,
    taus: Taus,
    batches: Iterable[Any],
    score: Score,
    coefficients: Any,
    split: Callable[[Any], Mapping[str, Direction]] | None = None,
    at_once: int | None = None,
) -> dict[str, np.ndarray]:
    """Scores of ``f(theta0) + sum_t alpha_t J tau_t`` for every row ``alpha`` of a grid, float64 ``{name: mean [P]}``.

    taus: T task vectors (or what else :func:`jft.linearize` takes), a sequence or by name. coefficients: ``[P]``, one for
    all of them; ``[P, T]``, one for each; ``[P, T, G]``, one for each and each of the G groups that ``split(tau)`` cuts it
    into, in its order: see :func:`by_layers`, :func:`by_paths`. score: ``(outputs, batch) -> {"weight": w, name: sum,
    ...}``, traced by JAX; every name is summed over the batches on the host in float64 and divided by the weights.
    ``table["weight"]`` are these.

    Cost for each batch, in forward passes: one for ``f(theta0)``, and for each direction two with whole weights (``dx w``
    and ``x tau``), or one and the products of what a sparse or low-rank tau holds. There are T directions, one for
    ``[P]``, T G for ``[P, T, G]``. A grid point adds outputs, of as many directions as the point that moves along most
    (all, where that is more than half), and scores them. Where f_lin is linear ``until`` a site, the values there are added
    and what follows is evaluated for each point. Memory: at_once directions go through the model together, each with
    activations of its own, and ``f(theta0)`` again with each such part. By default that is two on processors, for their
    caches, and all of them elsewhere.

    Raises ``ValueError`` for coefficients that do not fit, no batches, and a score without weight.
    Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827.
    """
    totals: dict[str, np.ndarray] = {}
    for sums in readings(f_lin, taus, batches, score, coefficients, split, at_once):
        if "weight" not in sums:
            raise ValueError(f"the score must return 'weight', what its sums are over; it has {', '.join(sums)}")
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    if not totals:
        raise ValueError("the sweep was given no batches")
    weight = totals["weight"]
    if not weight.all():
        raise ValueError("nothing in the batches counts: the weights of the score sum to zero")
    return {name: value if name == "weight" else value / weight for name, value in totals.items()}


def readings(
    f_lin: Linearized,
    taus: Taus,
    batches: Iterable[Any],
    read: Callable[[Any, Any], Any],
    coefficients: Any,
    split: Callable[[Any], Mapping[str, Direction]] | None = None,
    at_once: int | None = None,
) -> Iterator[Any]:
    """For each batch, ``read(outputs, batch)`` at every point of a grid: arrays ``[P, ...]`` on the host.

    What :func:`sweep` sums. read is traced by JAX; arguments, cost and errors are those of :func:`sweep`.
    """
    directions, columns = _directions(f_lin, listed(taus), np.asarray(coefficients, np.float64), split)
    program = _read(f_lin.function, f_lin.until, read, at_once)
    points = _compact(columns)
    for batch in batches:
        yield jax.device_get(program(f_lin.params, directions, points, batch))


def tangents(f_lin: Linearized, taus: Taus, batch: Any, at_once: int | None = None) -> tuple[Any, Any]:
    """``(f(theta0), [J tau_1, ..., J tau_T])``: outputs (or values at ``until``), and their derivatives, axis T first.

    The passes share that of ``f(theta0)``; cost and at_once as in :func:`sweep`. Under ``jit``, give directions
    (:meth:`Linearized.direction`).
    """
    directions = [f_lin.direction(tau) for tau in listed(taus)]
    return _passes(f_lin.function, f_lin.until, at_once)(f_lin.params, directions, batch)


def combined(outputs: Any, moved: Any, alpha: Array) -> Any:
    """``outputs + sum_t alpha_t moved_t``, added in float32 (float64 where the outputs are) and given in their dtype."""

    def one(y: Array, dy: Array) -> Array:
        if not jnp.issubdtype(y.dtype, jnp.inexact):
            return y
        precise = jnp.promote_types(y.dtype, jnp.float32)
        step = jnp.tensordot(alpha.astype(precise), dy.astype(precise), 1, precision=jax.lax.Precision.HIGHEST)
        return (y.astype(precise) + step).astype(y.dtype)

    return jax.tree.map(one, outputs, moved)


def by_layers(f_lin: Linearized, tau: Any, every: int = 1) -> dict[str, Direction]:
    """``tau`` cut into runs of ``every`` layers, which sum to it: ``{"layers/0": direction, ..., "rest": direction}``.

    A stack of layers is what stands under ``layers/`` (``vision/layers/``, ...), stacked; ``rest`` is what stands in none.
    Every tau of a model is cut into the same groups. Each is a pass of its own: a pass is not cheaper for having zeros.
    """
    direction, shapes = f_lin.direction(tau), tree.flatten(f_lin.params)
    groups: dict[str, Direction] = {}
    for stack, depth in tree.stacks(shapes).items():
        for start in range(0, depth, every):
            end = min(start + every, depth)
            in_run = (np.arange(depth) >= start) & (np.arange(depth) < end)
            name = f"{stack}/{start}" if end - start == 1 else f"{stack}/{start}-{end - 1}"
            groups[name] = {p: _scaled(c, in_run) for p, c in direction.items() if tree.stack_of(p) == stack}
    groups["rest"] = {p: c for p, c in direction.items() if tree.stack_of(p) is None}
    return groups


def by_paths(f_lin: Linearized, tau: Any, groups: Mapping[str, str | Iterable[str]]) -> dict[str, Direction]:
    """``tau`` cut by path, which sums to it: ``{name: direction}`` of the paths that match a group's regular expressions.

    A path goes into the first group that it matches, and into ``rest`` where it matches none. Raises ``ValueError`` for a
    pattern that matches no weight of the model.
    """
    direction, paths = f_lin.direction(tau), list(tree.flatten(f_lin.params))
    cut: dict[str, Direction] = {}
    rest: dict[str, delta.Change] = dict(direction)
    for name, patterns in groups.items():
        of_group = set(tree.matching(paths, patterns, f"group {name!r}"))
        cut[name] = {p: rest.pop(p) for p in list(rest) if p in of_group}
    return {**cut, "rest": rest}


def listed(taus: Taus) -> list[Any]:
    """The task vectors, in order. Raises ``ValueError`` where there are none, or one stands alone."""
    if isinstance(taus, delta.TaskVector):
        raise ValueError("a sweep takes a list of task vectors, not one; [tau] is a list of one")
    vectors = list(taus.values() if isinstance(taus, Mapping) else taus)
    if not vectors:
        raise ValueError("a sweep needs at least one task vector")
    return vectors


def _directions(
    f_lin: Linearized, taus: list[Any], grid: np.ndarray, split: Callable | None
) -> tuple[list[Direction], np.ndarray]:
    """The directions of the tangent passes, and the coefficients ``[P, directions]``."""
    expected = "[points, tasks]" if split is None else "[points, tasks, groups]"
    if not grid.size or not np.isfinite(grid).all():
        raise ValueError(f"coefficients must be finite numbers, at least one, not {grid.tolist()}")
    if grid.ndim == 1:
        # One coefficient for all of them: their sum is one direction, and one pass.
        if all(isinstance(tau, delta.TaskVector) for tau in taus):
            return [f_lin.direction(delta.TaskVector.combine(taus, [1.0] * len(taus)))], grid[:, None]
        return [f_lin.direction(tau) for tau in taus], np.repeat(grid[:, None], len(taus), 1)
    if grid.ndim != (2 if split is None else 3) or grid.shape[1] != len(taus):
        raise ValueError(f"coefficients must be [points] or {expected}, with {len(taus)} tasks, not {list(grid.shape)}")
    if split is None:
        return [f_lin.direction(tau) for tau in taus], grid
    parts = [split(tau) for tau in taus]
    for names in (list(p) for p in parts):
        if names != list(parts[0]) or len(names) != grid.shape[2]:
            raise ValueError(f"{grid.shape[2]} coefficients for each task, but the groups are {', '.join(names)}")
    return [f_lin.direction(part) for cut in parts for part in cut.values()], grid.reshape(len(grid), -1)


def through(f_lin: Linearized, directions: list[Direction], batch: Any, at_once: int | None) -> tuple[Any, Any]:
    """:func:`tangents`, traced."""

    def one(direction: Direction) -> tuple[Any, Any]:
        outputs, derivatives = pair(f_lin.function, f_lin.build, f_lin.tangents(direction), batch, f_lin.until)
        zeros_for_float0 = lambda y, dy: jnp.zeros_like(y) if dy.dtype == jax.dtypes.float0 else dy
        return outputs, jax.tree.map(zeros_for_float0, outputs, derivatives)

    groups = stackable(directions)
    passes = []
    for _, members in groups:
        step = at_once or (_IN_CACHES if jax.default_backend() == "cpu" else len(members))
        for start in range(0, len(members), step):
            part = jax.tree.map(lambda *x: jnp.stack(x), *members[start : start + step])
            passes.append(jax.vmap(one, out_axes=(None, 0))(part))
    derivatives = jax.tree.map(lambda *x: jnp.concatenate(x), *(derivatives for _, derivatives in passes))
    order = [i for members, _ in groups for i in members]
    # Groups put directions of one form together: back into the order of the caller.
    if order != sorted(order):
        derivatives = jax.tree.map(lambda x: x[np.argsort(order)], derivatives)
    return passes[0][0], derivatives


def stackable(directions: Sequence[Direction]) -> list[tuple[tuple[int, ...], list[Direction]]]:
    """``(numbers, directions)`` of one form, whose leaves can be stacked; most often there is one group.

    Of one form are those whose weights move in the same way (whole, parts of one layout, one rank). A path that one of
    them lacks stays where it is there, and parts that are fewer are padded.
    """
    groups: list[tuple[list[int], dict[str, delta.Change]]] = []
    for i, direction in enumerate(directions):
        for members, form in groups:
            if all(_fits(change, form.get(path)) for path, change in direction.items()):
                members.append(i)
                form.update({p: _larger(c, form.get(p)) for p, c in direction.items()})
                break
        else:
            groups.append(([i], dict(direction)))
    return [
        (tuple(members), [{p: _of_form(directions[i].get(p), form[p]) for p in form} for i in members])
        for members, form in groups
    ]


def _fits(change: delta.Change, form: delta.Change | None) -> bool:
    if form is None:
        return True
    if isinstance(change, delta.Selected) and isinstance(form, delta.Selected):
        return (change.layout, change.shape, change.at.ndim) == (form.layout, form.shape, form.at.ndim)
    # By form alone: values are other ones, and may be traced.
    one, other = (jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x) for x in (change, form))
    return jax.tree.flatten(one) == jax.tree.flatten(other)


def _larger(change: delta.Change, form: delta.Change | None) -> delta.Change:
    if form is None or (isinstance(change, delta.Selected) and change.slots > form.slots):  # type: ignore[attr-defined]
        return change
    return form


def _of_form(change: delta.Change | None, form: delta.Change) -> delta.Change:
    if change is None:
        return _scaled(form, 0)
    return change.padded(form.slots) if isinstance(change, delta.Selected) else change  # type: ignore[attr-defined]


def _scaled(change: delta.Change, factor: Any) -> delta.Change:
    """``factor * change``; factor: a number, or one for each layer ``[L]`` of a stacked weight."""
    value = change.direction
    factors = jnp.asarray(factor, value.dtype)
    return change.along(value * factors.reshape(*factors.shape, *(1,) * (value.ndim - factors.ndim)))


def _compact(columns: np.ndarray) -> tuple[Array, Array | None]:
    """Coefficients ``[P, K]`` and the directions they are of, ``[P, K]``, where no point moves along more than K of them.

    The directions are None where more than half would be left: then all are there, in their order.
    """
    moves = columns != 0
    # At least one column, also where no point moves: the shapes need it.
    most = max(1, int(moves.sum(axis=1).max(initial=0)))
    if 2 * most > columns.shape[1]:
        return jnp.asarray(columns), None
    # Stable: what moves a point stays in order; the zeros that may follow add nothing.
    indices = np.argsort(~moves, axis=1, kind="stable")[:, :most]
    return jnp.asarray(np.take_along_axis(columns, indices, axis=1)), jnp.asarray(indices, jnp.int32)


@program_cache
def _passes(apply: Callable, until: str | None, at_once: int | None) -> Callable:
    """Jitted ``(params, directions, batch) -> (f(theta0), tangents)``."""

    def run(params: Any, directions: list[Direction], batch: Any) -> tuple[Any, Any]:
        return through(Linearized(apply, params, until), directions, batch, at_once)

    return jax.jit(run)


@program_cache
def _read(apply: Callable, until: str | None, read: Callable, at_once: int | None) -> Callable:
    """Jitted ``(params, directions, points, batch) -> arrays [P, ...]``, for :func:`_compact` points."""

    def run(params: Any, directions: list[Direction], points: tuple[Array, Array | None], batch: Any) -> Any:
        f_lin = Linearized(apply, params, until)
        outputs, derivatives = through(f_lin, directions, batch, at_once)

        def point(point_of: tuple[Array, Array | None]) -> Any:
            alpha, indices = point_of
            selected = derivatives if indices is None else jax.tree.map(lambda dy: dy[indices], derivatives)
            return read(f_lin.land(combined(outputs, selected, alpha), batch), batch)

        points_at_once = max(1, min(len(points[0]), _POINTS_BYTES // max(1, tree.nbytes(outputs))))
        return jax.lax.map(point, points, batch_size=points_at_once)

    return jax.jit(run)
