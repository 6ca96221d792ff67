"""TAPS: task adaptive parameter sharing, a score of each matrix that decides whether it is the task's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, tree
from jft.methods.card import Card
from jft.methods.parametrise import Parametrisation
from jft.methods.penalties import absolute
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.reparametrised import append_axes, bound, leading, straight_through
from jft.methods.select import Select

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Taps(Parametrisation):
    """``w + 1[s >= threshold] * d`` with one score s for each weight matrix; straight through, ``dL/ds = sum(dL/dw * d)``.

    Task Adaptive Parameter Sharing, Wallingford et al. 2022, arXiv:2203.16708. A *layer* of the paper is one convolution or
    linear map, in its text as in the released code (53 in a ResNet-50): so each matrix of each transformer layer has its
    score. ``init_score`` and ``threshold`` are the code's: every layer starts active. What makes layers inactive is
    :class:`SharedLayers`, over all of them; the code adds it after two epochs, jft from the start. Scores do not decay.

    Kept: w. Trained, float32: ``delta`` d like w (starts at 0), ``score`` [*lead]. The result holds d of active layers.
    """

    threshold: float = 0.1
    init_score: float = 0.15
    lead: int | None = None
    exact = True

    def init(
        self, key: Array, w: Array, at: Array | None = None, base: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        score = jnp.full(w.shape[: leading(w, self.lead)], self.init_score, jnp.float32)
        return w, {"delta": jnp.zeros(w.shape, jnp.float32), "score": score}

    def active(self, trained: dict[str, Array]) -> Array:
        """bool [*lead]: which layers are the task's own."""
        return trained["score"] >= self.threshold

    def form(self, parts: tuple[Array, dict[str, Array]]) -> Array:
        """The weight of one layer in float32."""
        w, trained = parts
        gate = straight_through(self.active(trained).astype(trained["delta"].dtype), trained["score"])
        return w.astype(gate.dtype) + gate * trained["delta"]

    def bind(self, kept: Array, trained: dict[str, Array], structured: bool, key: Array | None = None) -> Any:
        return bound(self, (kept, trained), kept, leading(kept, self.lead), structured)

    def encode(self, base: Array | None, kept: Array, trained: dict[str, Array]) -> delta.Encoding:
        # On the host: how many layers the change stores depends on the values.
        active = np.asarray(self.active(trained))
        values = jnp.where(append_axes(jnp.asarray(active), kept.ndim), trained["delta"], 0)
        if not active.ndim:
            return delta.Dense(values)
        # A layer of experts is stored if any of its matrices is active; the others in it are zero.
        index = np.flatnonzero(active.reshape(active.shape[0], -1).any(axis=1))
        return delta.Rows(jnp.asarray(index, jnp.int32), values[index], kept.shape)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return delta.Leaf(), {"delta": delta.Leaf(), "score": delta.Leaf(decays=False, origin=None, matrices=None)}


@dataclasses.dataclass(frozen=True)
class SharedLayers:
    """``weight / n * sum |s|`` over the n scores of all :class:`Taps` layers: few become the task's own.

    Wallingford et al. 2022, arXiv:2203.16708 (their lambda is ``weight``; the code divides by 52 whatever n is).
    """

    weight: float

    def __call__(self, plan: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Array:
        scores = [t["score"] for t in trained.values() if isinstance(t, Mapping) and "score" in t]
        if not scores:
            raise ValueError("no layer here has a score; the penalty goes with train=Taps()")
        return self.weight / tree.count(scores) * sum(map(absolute, scores), jnp.float32(0))


CARD = Card(
    formula="w_l + 1[s_l >= 0.1] d_l with d_l from 0, s_l from 0.15, straight through; loss + weight / L * sum_l |s_l|",
    follows="paper; code: threshold, start of the scores, weight",
    check="forward, gradients, three steps, penalty, float64 NumPy; decay alone moves d and no score",
    code="MattWallingford/TAPS@87e91888, models/taps_net.py, train_sequential.py",
    departs=(
        "The penalty acts from the start (code: after warmup_epochs=2 of 30) and is divided by L (code: by 52 whatever L). The "
        "code's one SGD would decay scores too; its decay is 0 by default."
    ),
    defaults={"weight": ("swept", 1.0), "threshold": ("-", 0.1), "init_score": ("-", 0.15)},
)


@register("taps", paper="Wallingford et al. 2022, arXiv:2203.16708", card=CARD)
def taps(
    weight: float = 1.0,
    threshold: float = 0.1,
    init_score: float = 0.15,
) -> Method:
    """Train a change of every matrix inside the layers, and a score of each that decides whether it is used.

    weight: lambda of ``lambda / L sum |s|``: the larger, the fewer layers become the task's own (the paper sweeps it). A layer
    is one matrix, as in the paper. threshold and init_score are those of its code.
    """
    train = Taps(threshold, init_score)
    select = Select(linear_only=True)
    return Method(select, train, penalties=(SharedLayers(weight),))
