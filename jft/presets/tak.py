"""TAK: linearized fine-tuning that leaves other tasks' outputs alone, by the curvature of their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.card import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.tangent.curvature import Curvature, merged
from jft.tree import Patterns, patterns

CARD = Card(
    formula="loss + weight * sum over matrices tr(D^T A D B), A = sum n_t A_t / sum n_t, B = sum B_t over the other tasks t",
    follows="code: one merged pair of factors, bias as the last row of D; merge=False: every task's own, by n_t / sum n_t",
    code="aimagelab/mammoth@9285e06, models/tak.py:begin_task, penalty_weight; models/tak_utils/fisher_kfac.py",
    departs=(
        "Norms, class embeddings and the last projection have no penalty of their own (code: a full Gram of the gradient at 10 "
        "weight, the projection at 0.1 weight) and train freely; exclude them where they should not. From the first step on "
        "(code: from the second)."
    ),
    check="value and gradient against explicit Kronecker products in float64 NumPy; exact for one linear layer",
    defaults={"weight": ("-", 500), "merge": ("both", True)},
)


@dataclasses.dataclass(frozen=True)
class Drift:
    """``weight * tau^T G tau``, G of other tasks (:class:`jft.tangent.curvature.Curvature`).

    merge: one pair of factors for all tasks, of constant size; else the mean over all their examples. Stacks cut into layers
    that train and layers that do not are refused.
    """

    weight: float
    curvatures: tuple[Curvature, ...]
    merge: bool = True

    def fitted(self, params: Any, model: Any) -> Drift:
        """Merged, and verified where ``params`` are arrays rather than shapes."""
        if not self.curvatures:
            raise ValueError("no curvature of another task; give curvature=, the files that Curvature.save wrote")
        arrays = all(hasattr(x, "__array__") and not isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
        for curvature in self.curvatures if arrays else ():
            curvature.verify(params)
        if not self.merge or len(self.curvatures) == 1:
            return self
        return dataclasses.replace(self, curvatures=(merged(self.curvatures),))

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> jax.Array:
        changes = {p: _change(p, plan.leaves[p].tangent(kept[p], plan.values(trained, p))) for p in trained}
        total = sum(c.examples for c in self.curvatures)
        parts = (c.examples / total * c(changes) for c in self.curvatures)
        return self.weight * sum(parts, jnp.float32(0))


def _change(path: str, tangent: Any) -> jax.Array:
    if not isinstance(tangent, delta.Changed):
        raise ValueError(f"{path} trains some of its layers, whose change is no one array: select whole stacks")
    return tangent.delta.whole(jnp.float32)


@register("tak", paper="Porrello et al. 2026, arXiv:2602.17385", card=CARD)
def tak(curvature: Patterns = (), weight: float = 500.0, merge: bool = True) -> Method:
    """Train the linearized model where moving costs ``weight * tau^T G tau``, G the Jacobian's Gram on other tasks' data.

    curvature: files of the other tasks' :class:`~jft.tangent.curvature.Curvature`, one or several, of this base. No data of
    other tasks is needed. merge: keep one pair of factors whatever the number of tasks.
    """
    loaded = tuple(Curvature.load(path) for path in patterns(curvature))
    return Method(Select(), InPlace(), penalties=(Drift(weight, loaded, merge),), forward="linearized")
