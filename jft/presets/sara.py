"""SaRA: the smallest entries, kept near low rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, tree
from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.penalties import Nuclear
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import Renewal, Schedule, Standing
from jft.methods.select import Select
from jft.select import budget, scores

Array = jax.Array
THRESHOLD, SIDE = 2e-3, 64  # of the released script and optimizer


@dataclasses.dataclass(frozen=True)
class NuclearOfOne:
    """``weight * ||P * M||_*`` of one matrix a step, drawn evenly: P its values, M 1 where they train.

    Matrices are those whose shorter side is longer than ``above``, of each layer and expert by itself. The derivative is
    ``weight * U V^T`` of the singular vectors of P * M, at what trains.
    """

    weight: float
    above: int = SIDE
    random: ClassVar[bool] = True  # it is given a key

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any], key: Array | None) -> Array:
        if key is None:
            raise ValueError("the nuclear norm of one random matrix needs the step's key")
        # One branch for each leaf: their shapes differ, and lax.switch runs the drawn one alone.
        branches: list[Callable[[Array], Array]] = []
        counts: list[int] = []
        for path in plan.selects:
            shape = kept[path]["w"].shape
            outer = tree.lead(path, len(shape), plan.structured)
            if len(shape) - outer == 2 and min(shape[-2:]) > self.above:
                branches.append(functools.partial(_nuclear, plan.leaves[path].layout, kept[path], trained[path], outer))
                counts.append(math.prod(shape[:outer]))
        if not branches:
            raise ValueError(
                f"nuclear={self.weight}: no matrix that trains has a shorter side above {self.above}; lower `above`, or "
                "leave the norm out by nuclear=0"
            )
        ends = np.cumsum(counts)
        # Over matrices, not leaves, so that a deep stack is not drawn as seldom as a single matrix.
        drawn = jax.random.randint(key, (), 0, ends[-1])
        # side=right: ``ends`` are exclusive, and a draw equal to one belongs to the next leaf.
        which = jnp.searchsorted(jnp.asarray(ends), drawn, side="right")
        return self.weight * jax.lax.switch(which, branches, drawn - jnp.asarray(ends - counts)[which])


def _nuclear(layout: delta.Layout, kept: Mapping[str, Array], values: Array, outer: int, index: Array) -> Array:
    """The sum of singular values of what trains of one of the stacked matrices, with zeros elsewhere."""
    one = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(-1, *x.shape[outer:]), index, keepdims=False)
    matrix = delta.Selected(one(kept["at"]), one(values), layout, kept["w"].shape[outer:]).whole(jnp.float32)
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False))


@dataclasses.dataclass(frozen=True)
class StillSmall(Schedule):
    """Part-way, only entries go on that are still smaller than ``threshold``; the others keep their value.

    at: after which share of the run, in (0, 1). threshold: None for no larger than the largest of them was in the base, the
    threshold by which the smallest were chosen. restart: whether the optimizer begins anew there.
    """

    at: float = 0.5
    threshold: float | None = None
    restart: bool = True
    aged = False

    def __post_init__(self) -> None:
        if not 0 < self.at < 1:
            raise ValueError(f"a selection anew after a share {self.at} of the run; it lies between 0 and 1")

    def due(self, step: int, steps: int) -> bool:
        # Not before the first update, when every entry still is where it started.
        return step == max(1, round(self.at * steps))

    def renew(self, standing: Standing) -> Renewal:
        plan, kept, trained = standing.plan, standing.kept, standing.trained
        largest = None if self.threshold is not None else jax.jit(functools.partial(_largest, plan))(kept, trained)
        chosen = {}
        for path in plan.selects:
            # One program for each leaf, as each has its own count of entries.
            mask = jax.jit(functools.partial(self._mask, plan.leaves[path]))(kept[path], trained[path], largest)
            unit = plan.granularity(path, mask.shape)
            chosen[path] = unit.locate(mask, standing.calibration.lead(path), standing.grids.get(path, (1, 1)))
        return Renewal(chosen, restart=self.restart)

    def _mask(self, how: Any, kept: Any, values: Array, largest: Any) -> Array:
        small = jnp.abs(values) <= largest if self.threshold is None else jnp.abs(values) < self.threshold
        return how.spread(kept, small.astype(jnp.float32), jnp.zeros(kept["w"].shape, jnp.float32)) > 0


def _largest(plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array:
    """The largest magnitude in the base of all entries that train."""
    moved = plan.change(kept, trained)
    # initial=0: a weight without selected entries has an empty array, of which there is no maximum.
    first = (jnp.max(jnp.abs(trained[p] - moved[p]), initial=0) for p in plan.selects)
    return functools.reduce(jnp.maximum, first)


CARD = Card(
    formula=(
        "The entries |p| < theta of all parameters train, with the loss + lambda ||P * M||_* of one matrix drawn at each "
        "step, P its values and M its mask, whose derivative is lambda U V^T; after half of the run those of them with |p| < "
        "theta still train, the others keep their value, and Adam starts anew"
    ),
    follows=(
        "Paper: the smallest entries, a nuclear norm, entries chosen anew part-way. Code: every number, all parameters, the "
        "norm of the values rather than of their change, one matrix a step of those with min(I, O) > 64, Adam anew."
    ),
    code="sjtuplayer/SaRA@ea21192477eb07f11f0fa202108e8c07873d91b9, optim/adamw.py, optim/adamw2.py, finetune.sh",
    departs=(
        "In optim/adamw.py, the default, the norm's gradient goes to tensors that no update reads, so that it has no effect; "
        "in optim/adamw2.py it has, and Adam's moments go on part-way (restart=False). The code loses the update at which it "
        "chooses anew. Its learning rate, 1e-3 exp(-350 theta), is the run's own here. Where it finds no matrix for the norm "
        "it fails, and so does this."
    ),
    defaults={
        "threshold": ("2e-3 for Stable Diffusion 1.5", 2e-3),
        "density": ("0.1 to 0.2", "-"),
        "nuclear": ("-", 5e-4),
        "again": (0.5, "2500 of 5005 steps"),
        "above": ("-", 64),
        "restart": ("-", "True; adamw2.py False"),
    },
    check="masks, the norm of the matrix that was drawn, its derivative and runs across the restart against float64 NumPy",
)


@register("sara", paper="Hu et al. 2024, arXiv:2409.06633", card=CARD)
def sara(
    threshold: float | None = None,
    density: float | None = None,
    nuclear: float = 5e-4,
    norm: Literal["values", "change"] = "values",
    above: int | None = None,
    again: float = 0.5,
    restart: bool = True,
) -> Method:
    """Train the smallest entries of all weights, kept near low rank by a nuclear norm; part-way, those that are still small.

    threshold: all entries smaller than it train; default 2e-3. density: the fraction that is smallest (the paper: 0.1 to 0.2),
    in place of a threshold. nuclear: weight of the norm; 0 for none. norm: of the ``values`` that train, zero elsewhere, of one
    matrix drawn at each step among those whose shorter side is longer than ``above`` (default 64); its cost is that matrix's
    SVD. Or the sum over all matrices of the norm of the ``change``, which keeps what is learnt near low rank, for an
    eigendecomposition of every matrix's shorter side in every step. again: after which share of the run only the entries go
    on that are still smaller than the threshold (with a density, no larger than the largest was), the others keeping their
    value; 0 for never. restart: whether the optimizer starts anew there.
    """
    if density is not None and threshold is not None:
        raise ValueError(f"sara takes one of density ({density}) and threshold ({threshold}); leave the other out")
    if norm not in ("values", "change"):
        raise ValueError(f"norm {norm!r} is unknown; it is of the values or of the change")
    if above is not None and (norm == "change" or not nuclear):
        raise ValueError(
            f"above={above} says which matrices' values have a norm; leave it out with {norm=} and {nuclear=}"
        )
    if not nuclear and norm == "change":
        raise ValueError("norm='change' says of what the nuclear norm is, and nuclear=0 leaves it out; leave out one")
    if not again and not restart:
        raise ValueError("restart=False is for entries chosen anew part-way, and again=0 chooses none; leave out one")
    # None by default, so that a density can be told from a threshold that was set.
    theta = None if density is not None else THRESHOLD if threshold is None else threshold
    limit = budget.Globally(density=density) if theta is None else budget.Beyond(theta)
    select = Select(score=scores.Magnitude(), budget=limit, largest=False)
    penalty = Nuclear(nuclear) if norm == "change" else NuclearOfOne(nuclear, SIDE if above is None else above)
    schedule = StillSmall(again, theta, restart) if again else None
    return Method(select, InPlace(), penalties=(penalty,) if nuclear else (), schedule=schedule)
