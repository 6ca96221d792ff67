"""Many points of coefficients in one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jft import tree
from jft.compiled import program_cache
from jft.delta import TaskVector, apply

Merge = Callable[[Any, Any], TaskVector]
Sums = Callable[[Any, Any], Mapping[str, Any]]

# Parameters of as many points as fit into this lie in memory at once, on accelerators.
_POINTS_BYTES = 2**28


def evaluate_points(
    merge: Merge,
    vectors: Any,
    points: Any,
    evaluate: Sums,
    batches: Iterable[Any],
    *,
    base: Any,
    at_once: int | None = None,
) -> dict[str, np.ndarray]:
    """Scores of ``base + merge(point, vectors)`` at every point, float64 ``{name: mean [P]}``: a loop, compiled once.

    merge: ``merge(point, vectors) -> task vector``, traced; :func:`jft.merge.task_arithmetic` with ``weights=point``, most
    rules with traced weights, :func:`jft.merge.layerwise`. Rules that trim by whole model want vectors whose values are
    known: let ``merge`` close over them. points: an array ``[P, ...]``, or a pytree of them. evaluate: ``evaluate(params,
    batch) -> {"weight": w, name: sum, ...}``, traced; every name is summed over the batches on the host in float64 and
    divided by the weights. ``table["weight"]`` are these.

    at_once: of how many points the parameters are in memory together and go through the model by ``vmap``; the others
    wait (``lax.map``). None: as many as fit into 256 MiB; 1 on processors, where more are slower.
    :func:`jft.tangent.sweep` is far cheaper where the model is linear in its weights. Base and vectors are not verified,
    nor is anything chosen: give the rows to :func:`jft.merge.search`. Raises ``ValueError`` for no points, arrays that
    disagree on P, no batches, and no weight.
    """
    counts = {np.shape(x)[:1] for x in jax.tree.leaves(points)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(f"points are arrays with one first axis [P], not {jax.tree.map(np.shape, points)}")
    ((count,),) = counts
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else max(1, _POINTS_BYTES // max(1, tree.nbytes(base)))
    elif at_once < 1:
        raise ValueError(f"at_once must be at least 1, not {at_once}")
    program = _program(merge, evaluate, min(at_once, count))
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, value in jax.device_get(program(points, vectors, base, batch)).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    if not totals:
        raise ValueError("there were no batches")
    if "weight" not in totals:
        raise ValueError(f"evaluate must return 'weight', what its sums are over; it has {', '.join(totals)}")
    weight = totals["weight"]
    if not weight.all():
        raise ValueError("nothing in the batches counts: the weights sum to zero")
    return {name: value if name == "weight" else value / weight for name, value in totals.items()}


@program_cache
def _program(merge: Merge, evaluate: Sums, at_once: int) -> Callable[..., Any]:
    """Jitted ``(points, vectors, base, batch) -> {name: sums [P]}``."""

    def run(points: Any, vectors: Any, base: Any, batch: Any) -> Any:
        one = lambda point: evaluate(apply(base, merge(point, vectors), check=False), batch)
        return jax.lax.map(one, points, batch_size=at_once if at_once > 1 else None)

    return jax.jit(run)
