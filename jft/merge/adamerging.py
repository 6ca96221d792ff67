"""AdaMerging: one coefficient for each task, or for each task and tensor, learned from the entropy of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jft.delta import TaskVector
from jft.merge import learned
from jft.merge.registry import check_choices, preset_options
from jft.merge.rule import Vectors, listed
from jft.merge.ties import ties_split

Array = jax.Array
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"clamp": (0.0, 1.0), "steps": 500},
    "fusionbench": {"clamp": (), "steps": 1000},
}


def adamerging(
    vectors: Vectors,
    *,
    base: Any,
    objective: learned.Objective,
    batches: Iterable[Any],
    data: str,
    by: Literal["layer", "task"] = "layer",
    init: float = 0.3,
    clamp: tuple[float, ...] | None = None,
    density: float | None = None,
    learning_rate: float = 1e-3,
    steps: int | None = None,
    preset: Literal["paper", "fusionbench"] = "paper",
    scale: Any = 1.0,
) -> TaskVector:
    """``sum_i c_i tau_i`` with the coefficients that Adam finds for ``objective`` on unlabelled data (arXiv:2310.02575).

    objective: ``objective(params, batch)``, of the paper :func:`jft.merge.entropy` of one function per task. by: a
    coefficient for every ``task``, or for every task and tensor, ``layer`` (a "layer" of the paper is a tensor; one of a
    stack of layers or experts is a tensor). clamp: the bounds of a coefficient where it is used: [0, 1] in the paper's code,
    ``()`` for none, as in FusionBench's configuration. steps: 500 in the paper, 1000 in FusionBench (None of either: that of
    the preset); Adam with betas 0.9 and 0.999 in both. density: AdaMerging++, of vectors that :func:`ties_split` has made
    (0.2 in the paper); None: of the vectors as they are.

    data: a name for what ``batches`` hold, written into the manifest with the coefficients. The paper learns on the test
    inputs themselves; that is for the caller to choose, and to say. Yang et al. 2024; code EnnengYang/AdaMerging. Raises
    ``ValueError`` as :func:`jft.merge.learned.learn` does, and for options it does not know.
    """
    learned.check_data(data)
    check_choices(adamerging, by=by)
    given = {name: value for name, value in {"clamp": clamp, "steps": steps}.items() if value is not None}
    options = preset_options("adamerging", PRESETS, preset, given)
    bounds = _bounds(options["clamp"])
    taus = listed(vectors) if density is None else ties_split(vectors, density=density)
    shapes = learned.shapes_of(taus)
    stacks = {path: learned.stack_of(path, shape) if by == "layer" else () for path, shape in shapes.items()}
    start = {path: jnp.full((len(taus), *stack), init, jnp.float32) for path, stack in stacks.items()}
    # One array for all paths where tasks have one coefficient.
    values = start if by == "layer" else jnp.full(len(taus), init, jnp.float32)

    def change(values: Any, taus: Sequence[TaskVector]) -> learned.Deltas:
        coefficients = values if by == "layer" else dict.fromkeys(shapes, values)
        return {path: weighted(taus, path, jnp.clip(c, *bounds) if bounds else c) for path, c in coefficients.items()}

    how = {"base": base, "objective": objective, "batches": batches, "steps": options["steps"]}
    solution = learned.learn(change, values, taus, optimizer=optax.adam(learning_rate), **how)
    clipped = jax.tree.map(lambda c: jnp.clip(c, *bounds) if bounds else c, solution.values)
    note = {
        "preset": preset,
        "by": by,
        "clamp": list(bounds),
        "density": density,
        "coefficients": learned.described(clipped),
    }
    deltas = jax.jit(change)(solution.values, taus)
    return learned.result(taus, deltas, solution, base=base, rule="adamerging", data=data, scale=scale, **note)


def weighted(taus: Sequence[TaskVector], path: str, coefficients: Array) -> Array:
    """``sum_i c_i tau_i`` of a path, with coefficients ``[N]`` or ``[N, *stack]``."""
    deltas = learned.dense(taus, path)
    return jnp.sum(learned.over(coefficients, deltas) * deltas, axis=0)


def _bounds(clamp: Any) -> tuple[float, ...]:
    bounds = tuple(float(x) for x in clamp)
    if len(bounds) not in (0, 2) or (bounds and not bounds[0] < bounds[1]):
        raise ValueError(f"clamp is {clamp!r}; give a lower and an upper bound, or () for none")
    return bounds
