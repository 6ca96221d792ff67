"""Mixout: training steps in which part of the weights is back at its pretrained value."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import delta
from jft.methods.card import Card
from jft.methods.parametrise import Parametrisation, master
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.reparametrised import bound, keys, leading
from jft.methods.select import Select
from jft.tree import HEADS

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Mixout(Parametrisation):
    """In training steps ``((1 - M) v + M w - p w) / (1 - p)`` of the base w and the trained v, M ~ Bernoulli(p); else v.

    Equal to ``w + (1 - M) (v - w) / (1 - p)``: inverted dropout on the change, whose expectation is v. Lee, Cho and Kang
    2020, arXiv:1909.11299, who use p of 0.7 to 0.9. unit: what one draw of M covers, ``neuron`` the weights that leave one
    input (a row of ``w[I, O]``), as in the paper's mixout and its code, or ``weight`` each alone, its mixconnect. Only the
    matrices of linear layers are mixed, as there: tables, patches (a convolution) and vectors train in place, which
    ``linear`` says of a weight. The code's gradient is ``(1 - M) g``; this one has the factor
    ``1 / (1 - p)`` that follows from the formula (Adam does not see the difference).

    Kept: w. Trained: float32 v like w.
    """

    p: float = 0.9
    unit: Literal["neuron", "weight"] = "neuron"
    lead: int | None = None
    linear: bool = True
    random = True
    # The difference v - w is small; in bfloat16 most of it would round away.
    exact = True

    def __post_init__(self) -> None:
        """Refuse what is no probability or no unit."""
        if not 0 <= self.p < 1:
            raise ValueError(f"p is {self.p}; the probability of mixing is from 0 up to below 1")
        if self.unit not in ("neuron", "weight"):
            raise ValueError(f"unit {self.unit!r} is unknown; choose neuron or weight")

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Array, Array]:
        return w, master(w)

    def form(self, parts: tuple[Array, Array, Array | None]) -> Array:
        """The mixed weight in float32, for one matrix or vector."""
        w, v, key = parts
        if key is None or v.ndim < 2:
            return v
        shape = (v.shape[0], 1) if self.unit == "neuron" else v.shape
        unmixed = jax.random.bernoulli(key, 1.0 - self.p, shape)
        base = w.astype(v.dtype)
        return base + jnp.where(unmixed, (v - base) / (1 - self.p), 0)

    def bind(self, kept: Array, trained: Array, structured: bool, key: Array | None = None) -> Any:
        # Without noise nothing is mixed, so the base need not be read at all.
        if key is None or not self.linear:
            return trained if structured else trained.astype(kept.dtype)
        lead = leading(kept, self.lead)
        parts = (kept, trained, keys(key, kept.shape[:lead]))
        return bound(self, parts, kept, lead, structured)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return delta.Leaf(), delta.Leaf(origin=lambda kept: kept)

    def encode(self, base: Array | None, kept: Array, trained: Array) -> delta.Encoding:
        return delta.Dense(trained.astype(jnp.float32) - kept.astype(jnp.float32))


CARD = Card(
    formula="((1 - M) v + M w - p w) / (1 - p) in training, M ~ Bernoulli(p) for each input of a linear layer; v in evaluation",
    follows="paper; code: one draw for all weights that leave an input, linear layers alone",
    check="forward, gradients and three steps, float64 NumPy; which weights of a decoder and a vision transformer are mixed",
    code="bloodwass/mixout@18f377d2, mixout/mixout.py, mixout/mixlinear.py",
    departs=(
        "The gradient has the factor 1 / (1 - p) of the formula, which the code leaves out: 10 times the code's at p = 0.9, "
        "the same under Adam."
    ),
    defaults={"p": ("0.7 to 0.9", 0.0), "unit": ("neuron", "neuron")},
)


@register("mixout", paper="Lee, Cho and Kang 2020, arXiv:1909.11299", card=CARD)
def mixout(
    p: float = 0.9,
    unit: Literal["neuron", "weight"] = "neuron",
) -> Method:
    """Train every weight but the head's, in steps that put part of each linear layer back to its pretrained values.

    Embedding and position tables, patches, norms and biases train in place. p: the probability of that. unit: whether all
    weights that leave a neuron go back together, or each by itself. A new head has no pretrained values; it trains with
    ``also="^classifier/"``.
    """
    return Method(Select(exclude=HEADS), Mixout(p, unit))
