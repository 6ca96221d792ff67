"""Points of several coefficients and options: grids, random draws, coordinate descent, and the task vector of the best."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jft.delta import TaskVector, apply
from jft.delta import manifest as manifests
from jft.merge import learned
from jft.merge.rule import Vectors, listed
from jft.merge.search import Point, Row, Search, best_of, key_of, rank, search

Axes = Mapping[str, Iterable[Any]]


def product(axes: Axes) -> list[dict[str, Any]]:
    """All points of a grid, by name: the last axis runs fastest.

    >>> product({"density": (0.1, 0.2), "scale": (0.5, 1.0)})[1]
    {'density': 0.1, 'scale': 1.0}

    Raises ``ValueError`` where there are no axes, or one has no values.
    """
    values = _listed(axes)
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def draws(axes: Axes, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` distinct points of a grid, drawn at random, the same ones for the same seed: all equally likely.

    Of many coefficients that do not all matter, as many draws find better ones than a grid (Bergstra and Bengio 2012). Axes
    may be as fine as one likes: the product is not listed. Raises ``ValueError`` where the grid has fewer points.
    """
    values = _listed(axes)
    size = math.prod(map(len, values.values()))
    if not 1 <= count <= size:
        raise ValueError(f"count is {count}; the grid has {size} points")
    generator = random.Random(seed)
    # A dict, as an ordered set; numbers of any size, which random.sample does not take.
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[generator.randrange(size)] = None
    points = []
    for number in drawn:
        point = {}
        for name, options in values.items():
            number, i = divmod(number, len(options))
            point[name] = options[i]
        points.append(point)
    return points


def coordinate_search(
    score: Callable[[dict[str, Any]], float | Mapping[str, Any]],
    axes: Axes,
    start: Mapping[str, Any] | None = None,
    rounds: int = 10,
) -> Search:
    """Coordinate descent: along one axis after the other, the best of its values, until a round changes nothing.

    score, ties and constraint are those of :func:`jft.merge.search`. start: a point; None is the first value of each axis.
    rounds: how many there are at most. No point is scored twice. At most ``1 + rounds * sum(len(axis) - 1)`` points are,
    where a grid has their product; the result is a point that no change of one coordinate improves, the best one where the
    score is a sum over the axes. Where nothing is feasible along an axis the point stays. Raises ``ValueError`` as
    :func:`product` does, and for a start that lacks an axis or has another.
    """
    values = _listed(axes)
    point = {name: options[0] for name, options in values.items()} if start is None else dict(start)
    if set(point) != set(values):
        raise ValueError(f"start must have the axes {', '.join(values)}, not {', '.join(point)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    rows: dict[Any, Row] = {}

    def row(point: dict[str, Any]) -> Row:
        key = key_of(point)
        if key not in rows:
            # One point at a time through `search`, which checks it.
            rows[key] = search(score, [point]).table[0]
        return rows[key]

    for _ in range(rounds):
        before = point
        for name, options in values.items():
            # The point itself first: of equal ones the first is taken, so that the descent ends.
            line = [row(point), *(row({**point, name: value}) for value in options)]
            point = max(line, key=rank)["coefficient"]
        if key_of(point) == key_of(before):
            break
    return best_of(list(rows.values()))


def tune(
    merge: Callable[[Any, Sequence[TaskVector]], TaskVector],
    vectors: Vectors,
    points: Iterable[Point] | Axes,
    measure: Callable[[Any], float | Mapping[str, Any]],
    *,
    base: Any,
    data: str,
    start: Mapping[str, Any] | None = None,
    rounds: int = 10,
    allow_test: bool = False,
    check: bool = True,
) -> tuple[TaskVector, Search]:
    """The merged task vector whose coefficients and options have the highest score on ``data``, and the search.

    merge: ``merge(point, vectors) -> task vector``, as ``lambda point, taus: ties(taus, **point)``. points: a list (of
    :func:`product`, :func:`draws`, or numbers), of which all are tried; or axes ``{name: values}``, along which
    :func:`coordinate_search` goes from ``start`` for ``rounds``. measure: parameters -> a number or row, as
    :func:`jft.merge.search` takes them: :func:`jft.merge.addition_measure`, :func:`jft.merge.negation_measure` (then
    ``merge`` gives the negated vector). One set of merged parameters exists at a time, and one merged vector.

    data: a name for what ``measure`` looks at; the manifest has it, with the best point and the table. A name that says it
    is test data is refused without ``allow_test``. Where no point is feasible the vector changes nothing. check: verify that
    ``base`` is the base of the vectors. Raises ``ValueError`` as :func:`jft.merge.search` does.
    """
    learned.check_data(data, allow_test)
    taus = listed(vectors)
    if check:
        for tau in taus:
            manifests.verify(tau.manifest, base)
    score = lambda point: measure(apply(base, merge(point, taus), check=False))
    if isinstance(points, Mapping):
        result = coordinate_search(score, points, start, rounds)
    else:
        result = search(score, points)
    note = {"data": data, "best": result.best, "feasible": result.feasible, "table": result.table}
    # JSON has no scalars of arrays.
    note = jax.tree.map(lambda x: x.item() if hasattr(x, "item") else x, note)
    best = (
        merge(result.best, taus)
        if result.feasible
        else TaskVector({}, manifests.derive([t.manifest for t in taus], "merge"))
    )
    return TaskVector(best.deltas, best.manifest | {"search": note}), result


def _listed(axes: Axes) -> dict[str, list[Any]]:
    values = {name: list(options) for name, options in axes.items()}
    if not values:
        raise ValueError("there are no axes")
    for name, options in values.items():
        if not options:
            raise ValueError(f"axis {name!r} has no values")
        if len({key_of(x) for x in options}) != len(options):
            raise ValueError(f"the values of axis {name!r} must be distinct, not {options}")
    return values
