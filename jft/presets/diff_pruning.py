"""Diff pruning: a change of every weight behind gates that a penalty closes, then cut down to its budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import delta, tree
from jft.methods.card import Card
from jft.methods.parametrise import InPlace, Parametrisation, moved_from
from jft.methods.plan import Method, Plan
from jft.methods.registry import register
from jft.methods.reparametrised import append_axes, bound, keys, leading
from jft.methods.schedules import Renewal, Schedule, Standing
from jft.methods.select import Select
from jft.select.budget import Everything
from jft.select.calibration import Calibration
from jft.select.granularity import Entry
from jft.select.scores import Magnitude
from jft.select.threshold import top
from jft.tree import HEADS

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HardConcrete(Parametrisation):
    """``w + z * d`` with stochastic gates z in [0, 1] that an expected-L0 penalty closes: diff pruning.

    Guo, Rush and Kim 2021, arXiv:2012.07463 (gates: Louizos, Welling and Kingma 2018, arXiv:1712.01312). For each entry
    ``z = clip(s (upper - lower) + lower, 0, 1)``, ``s = sigmoid(log(u / (1 - u)) + alpha)``, u uniform in [1e-4, 1 - 1e-4] in
    training; evaluation has ``s = sigmoid(alpha)``. With ``group``, each weight matrix or vector has one more gate that
    multiplies all of its own ("structured" diff pruning).

    Penalty: ``weight * sum over entries of P(open)`` with ``P(open) = sigmoid(alpha - log(-lower / upper))``, times the group's
    in the paper (``counted="product"``); the released code adds the two kinds up (``"sum"``), so a closed group saves nothing.
    The code has an optimizer of its own for alpha, at 0.1 beside 1e-5: here ``alpha_rate`` is that ratio. Its 0.1 stays while
    the other falls to 0 (a scheduler that is never stepped), and the gradients of d and of alpha are clipped apart; here one
    schedule and one clip go for both, so that under linear decay alpha moves by half as much.

    Kept: w. Trained, float32: ``delta`` d like w (starts at 0), ``alpha`` like w and ``group`` [*lead] (from ``init_alpha``).
    lead: leading axes of the weight; None: those beyond a matrix. :func:`project` picks what stays for good.
    """

    weight: float = 1.25e-7
    lower: float = -1.5
    upper: float = 1.5
    init_alpha: float = 5.0
    group: bool = True
    counted: Literal["product", "sum"] = "product"
    alpha_rate: float = 1e4
    lead: int | None = None
    random = True
    exact = True

    def __post_init__(self) -> None:
        """Refuse gates that cannot close or open."""
        if not self.lower < 0 or not self.upper > 1:
            raise ValueError(
                f"gates reach 0 and 1 only with lower < 0 and upper > 1, not {self.lower} and {self.upper}"
            )
        if self.counted not in ("product", "sum"):
            raise ValueError(f"counted {self.counted!r} is unknown; choose product or sum")

    def init(
        self, key: Array, w: Array, at: Array | None = None, base: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        trained = {"delta": jnp.zeros(w.shape, jnp.float32), "alpha": jnp.full(w.shape, self.init_alpha, jnp.float32)}
        if self.group:
            trained["group"] = jnp.full(w.shape[: leading(w, self.lead)], self.init_alpha, jnp.float32)
        return w, trained

    def gate(self, alpha: Array, key: Array | None = None) -> Array:
        """z of the gates ``alpha``, drawn with a key, at ``u = 1/2`` without."""
        if key is not None:
            # Away from 0 and 1, where the logit is infinite.
            u = jnp.clip(jax.random.uniform(key, alpha.shape, alpha.dtype), 1e-4, 1 - 1e-4)
            # log1p(-u) is exact where u is near 0.
            alpha = alpha + jnp.log(u) - jnp.log1p(-u)
        return jnp.clip(jax.nn.sigmoid(alpha) * (self.upper - self.lower) + self.lower, 0, 1)

    def form(self, parts: tuple[Array, dict[str, Array], Array | None]) -> Array:
        """``w + z * d`` in float32, for one weight without leading axes."""
        w, trained, key = parts
        # Independent noise: the group's gate is one draw for the whole matrix.
        entry_key, group_key = (None, None) if key is None else jax.random.split(key)
        z = self.gate(trained["alpha"], entry_key)
        if self.group:
            z = z * self.gate(trained["group"], group_key)
        return w.astype(z.dtype) + z * trained["delta"]

    def bind(self, kept: Array, trained: dict[str, Array], structured: bool, key: Array | None = None) -> Any:
        lead = leading(kept, self.lead)
        return bound(self, (kept, trained, keys(key, kept.shape[:lead])), kept, lead, structured)

    def moved(self, trained: dict[str, Array]) -> Array:
        """``z * d`` in evaluation, float32: what the weight gains."""
        z = self.gate(trained["alpha"])
        if self.group:
            z = z * append_axes(self.gate(trained["group"]), z.ndim)
        return z * trained["delta"]

    def encode(self, base: Array | None, kept: Array, trained: dict[str, Array]) -> delta.Encoding:
        change = self.moved(trained)
        # An entry takes 12 bytes (row, column, value); beyond a third of them the dense array is smaller.
        sparse = delta.Dense(change).nnz * 12 < change.nbytes
        return delta.Entries.from_dense(change) if sparse else delta.Dense(change)

    def penalty(self, kept: Array, trained: dict[str, Array]) -> Array:
        """``weight`` times the expected number of entries that change."""
        shift = math.log(-self.lower / self.upper)
        likely = jax.nn.sigmoid(trained["alpha"] - shift)
        if not self.group:
            return self.weight * jnp.sum(likely)
        shared = jax.nn.sigmoid(trained["group"] - shift)
        if self.counted == "sum":
            return self.weight * (jnp.sum(likely) + jnp.sum(shared))
        return self.weight * jnp.sum(likely * append_axes(shared, likely.ndim))

    def tangent(self, kept: Array, trained: dict[str, Array], key: Array | None = None) -> delta.Changed:
        return moved_from(kept, self.bind(kept, trained, False, key))

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        """Gates are not what decays or stays near the base."""
        gate = delta.Leaf(decays=False, origin=None, rate=self.alpha_rate)
        trained = {"delta": delta.Leaf(), "alpha": gate}
        return delta.Leaf(), trained | ({"group": dataclasses.replace(gate, matrices=None)} if self.group else {})


def project(plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any], density: float) -> dict[str, Array]:
    """Which entries stay: bool, like each weight, True for the largest ``|z * d|`` of all :class:`HardConcrete` weights.

    Exactly ``round(density * entries)`` of them over all those weights, ties by path and then by position: the magnitude
    projection of diff pruning (Guo et al. 2021, arXiv:2012.07463), whose released code searches a threshold by bisection
    and stops near the count. Raises ``ValueError`` where the plan has no such weight or density is not in (0, 1].
    """
    changes = moved(plan, trained)
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it is the fraction of entries that stay, above 0 and up to 1")
    # At least one, so that the second phase has something to train.
    return top({p: jnp.abs(x) for p, x in changes.items()}, max(1, round(density * tree.count(changes))))


def moved(plan: Any, trained: Mapping[str, Any]) -> dict[str, Array]:
    """``z * d`` in evaluation of every :class:`HardConcrete` weight, float32."""
    gated = {p: how for p, how in plan.leaves.items() if isinstance(how, HardConcrete)}
    if not gated:
        raise ValueError("no weight here has a gated change to project; this goes with train=HardConcrete()")
    return {p: how.moved(trained[p]) for p, how in gated.items()}


def projected(
    plan: Any, base: Mapping[str, Any], trained: Mapping[str, Any], support: Mapping[str, Array]
) -> dict[str, Array]:
    """Where the second phase starts: ``base + where(support, z * d, 0)`` by path, float32."""
    changes = moved(plan, trained)
    return {p: base[p].astype(jnp.float32) + jnp.where(support[p], x, 0) for p, x in changes.items()}


@dataclasses.dataclass(frozen=True)
class Projection(Schedule):
    """Two phases: gated changes train; after a share ``at`` of the steps :func:`project` cuts them down to ``density``.

    The entries that stay train on in place, from where they are, with new moments; all others are the base again.
    """

    density: float = 0.005
    at: float = 0.5
    reset = True

    def __post_init__(self) -> None:
        """Refuse what is no share or density."""
        if not (0 < self.at < 1 and 0 < self.density <= 1):
            raise ValueError(f"a projection to density {self.density} after a share {self.at} of the steps")

    def _boundary(self, steps: int) -> int:
        # Not before the first update: until then z * d is zero everywhere.
        return max(1, round(self.at * steps))

    def begin(self, plan: Plan, calibration: Calibration, grids: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
        return {}

    def due(self, step: int, steps: int) -> bool:
        return step == self._boundary(steps)

    def method_at(self, method: Method, step: int, steps: int) -> Method:
        if step < self._boundary(steps):
            return method
        # The score is never asked: the support is that of the projection.
        select = dataclasses.replace(method.select, score=Magnitude(), budget=Everything())
        return dataclasses.replace(method, select=select, train=InPlace())

    def renew(self, standing: Standing) -> Renewal:
        plan, kept, trained = standing.plan, standing.kept, standing.trained
        support = project(plan, kept, trained, self.density)
        weights = projected(plan, {p: kept[p] for p in support}, trained, support)
        entry, lead, cells = Entry(), standing.calibration.lead, standing.grids
        chosen = {p: entry.locate(mask, lead(p), cells.get(p, (1, 1))) for p, mask in support.items()}
        # The weights are passed on, since the second phase starts from z * d, which no parametrisation there can form.
        return Renewal(chosen, self.method_at(plan.method, standing.step, standing.steps), weights=weights)


CARD = Card(
    formula=(
        "w + z d, z = clip(s (u - l) + l, 0, 1), s = sigmoid(logit(U) + alpha), l = -1.5, u = 1.5, alpha from 5, times a gate "
        "of the whole matrix; loss + weight * sum P(z > 0), P = sigmoid(alpha - log(-l / u)) times the matrix's; then the "
        "largest 0.5 % of |z d| stay and train on"
    ),
    follows="paper: product of the two probabilities, exact count; code: constants, rates",
    check="gates, penalty, gradients, three steps and projection, float64 NumPy",
    code="dguo98/DiffPruning@085fa7d9, examples/run_glue_diffpruning.py",
    departs=(
        "Evaluation and projection have U = 1/2 (code: a fresh draw). The gates' rate follows the schedule (code: constant; "
        "half the movement under linear decay), and one clip goes for d and alpha (code: one each). The code bisects for the "
        "threshold and stops near the count."
    ),
    defaults={
        "weight": ("-", 1.25e-7),
        "group": (True, True),
        "counted": ("product", "sum"),
        "alpha_rate": ("0.1 / 1e-5", "0.1 / 1e-5"),
        "init_alpha": (5.0, 5.0),
        "density": (0.005, 0.005),
    },
)


@register("diff_pruning", paper="Guo, Rush and Kim 2021, arXiv:2012.07463", card=CARD)
def diff_pruning(
    weight: float = 1.25e-7,
    group: bool = True,
    counted: Literal["product", "sum"] = "product",
    alpha_rate: float = 1e4,
    init_alpha: float = 5.0,
    density: float = 0.005,
    project_at: float = 0.5,
) -> Method:
    """Train a change of every weight but the head's, and the gates that an expected-L0 penalty closes entry by entry.

    weight: of the expected number of changed entries. group: one gate more for each matrix and vector. counted: how the two
    kinds of gate enter the penalty, ``product`` as in the paper or ``sum`` as in its code. alpha_rate: learning rate of gates
    over that of the change (the paper: 0.1 over 1e-5). After a share ``project_at`` of the steps the change is cut down to
    the ``density`` of entries that are largest, and these train on with the support fixed; ``density=1`` never does that. A
    new head trains with ``also="^classifier/"``.
    """
    train = HardConcrete(weight, init_alpha=init_alpha, group=group, counted=counted, alpha_rate=alpha_rate)
    schedule = Projection(density, project_at) if density < 1 else None
    return Method(Select(exclude=HEADS), train, schedule=schedule)
