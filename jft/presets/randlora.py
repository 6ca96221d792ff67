"""RandLoRA: a change of full rank from random matrices, of which only diagonal scales train."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft import delta
from jft.delta.changed import COLUMNS, ROWS
from jft.methods import Card, Method, Select, register
from jft.methods.parametrise import Additive

Array = jax.Array


def _along(shape: tuple[int, ...]) -> int:
    """The shorter axis of a matrix ``[..., I, O]``, the rows' where they are equal."""
    return ROWS if shape[-2] <= shape[-1] else COLUMNS


@dataclasses.dataclass(frozen=True)
class _Gamma(delta.Leaf):
    """The scales ``[..., N, min(I, O)]`` along the shorter axis of the weight, whichever that is."""

    def sharding(self, spec: PartitionSpec, weight: Any, ndim: int) -> PartitionSpec:
        return delta.Leaf((..., None, _along(weight.shape))).sharding(spec, weight, ndim)


@dataclasses.dataclass(frozen=True)
class RandLoRA(Additive):
    """``w + s * sum over n of B_n diag(lam_n) A diag(gamma_n)``, A and B_n random and fixed, transposed where I <= O.

    For ``w[*lead, I, O]`` with D the longer and d the shorter of I and O: A ``[r, d]`` is one for all n, B_n ``[D, r]`` are
    N = ceil(d / r), so that the rank is full; uniform, of variance 1 (:class:`jft.delta.RandomBases`). lam ``[*lead, N, r]``
    starts at zero, gamma ``[*lead, N, d]`` at ``1 / d``. s is ``alpha / r``, with ``by_bases`` over sqrt(N). Kept
    ``{"w", "key"}``, a key for each matrix; trained ``{"gamma", "lam"}``. lead: leading axes of the weight; None: those
    beyond a matrix.
    """

    rank: int
    alpha: float
    by_bases: bool = False
    lead: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; random bases have one of at least 1")

    def count(self, shape: tuple[int, ...]) -> int:
        """N, of a weight of ``shape``."""
        # Rounded up, so that the sum reaches full rank.
        return -(-min(shape[-2:]) // self.rank)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        bases = delta.RandomBases.leaves
        # Where lam is zero the weight is the base, whatever gamma is.
        return {"w": delta.Leaf(), "key": bases["key"]}, {
            "gamma": _Gamma(bases["gamma"].axes, matrices=None, origin=None),
            "lam": bases["lam"],
        }

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        *lead, rows, columns = w.shape if w.ndim > 1 else (0, *w.shape)
        if w.ndim < 2 or self.lead not in (None, len(lead)):
            raise ValueError(
                f"a weight of shape {w.shape} holds no matrices, which random bases are made for; select matrices "
                "(linear_only, or select.include)"
            )
        n, along = self.count(w.shape), min(rows, columns)
        # Raw words, not a typed key: they are saved with the task vector and sliced with the layers.
        words = jax.random.bits(key, (*lead, 2), jnp.uint32)
        trained = {
            # Not zero, as lam is: with both at zero neither would have a gradient.
            "gamma": jnp.full((*lead, n, along), 1 / along, jnp.float32),
            "lam": jnp.zeros((*lead, n, self.rank), jnp.float32),
        }
        return {"w": w, "key": words}, trained

    def weight(self, kept: Any) -> Array:
        return kept["w"]

    def change(self, kept: Any, trained: Any) -> delta.Change:
        shape = kept["w"].shape
        scale = self.alpha / self.rank / (math.sqrt(self.count(shape)) if self.by_bases else 1.0)
        return delta.RandomBases(kept["key"], trained["gamma"], scale * trained["lam"], max(shape[-2:]), _along(shape))


CARD = Card(
    formula="W = W0 + s sum_n B_n diag(lam_n) A diag(gamma_n), n = 1..N = ceil(d / r), for W0 of D x d with D >= d (else "
    "transposed); A [r, d] and B_n [D, r] fixed, uniform with variance 1; lam = 0 and gamma = 1 / d at the start, both train",
    follows="the form and N are the paper's; bases, start, s = alpha / r and alpha = 20 r those of peft (huggingface/peft "
    "0.21, tuners/randlora), which the authors wrote and their README recommends; the authors' repository has s = alpha / r "
    "for images and alpha / (r sqrt(N)) with alpha = 2 r for language (by_bases)",
    check="value, gradients and three steps of Adam in float64 NumPy with bases from a Threefry-2x32 of the test's own; "
    "outputs and gradients of peft's layer with its bases in place of ours",
    code="PaulAlbert31/RandLoRA@4ac565e, commonsense_reasoning/peft/src/peft/tuners/randlora and "
    "vision_language/src/rand_lora.py",
    departs="every matrix has bases of its own, drawn where they are used (peft: corners of one stored pair for all): the same "
    "in distribution, of variance 1 exactly and not up to the 0.5% of a sample; each use draws as many random numbers as the "
    "weight has entries, forwards and again on the way back. No ternary bases, which save nothing here, no dropout, no DoRA",
    defaults={"rank": (32, 32), "alpha": ("-", "2 r or 20 r"), "by_bases": ("-", "language yes, images and peft no")},
)


@register("randlora", paper="Albert et al. 2025, arXiv:2502.00987", card=CARD)
def randlora(rank: int = 32, alpha: float | None = None, by_bases: bool = False) -> Method:
    """Train diagonal scales of fixed random matrices whose sum changes every matrix inside the layers at full rank.

    rank: r of each of the ``N = ceil(d / r)`` random products of a matrix ``[D, d]``, of which ``N (d + r)`` scales train:
    a lower rank trains more. alpha: the scale is ``alpha / rank``; default ``alpha = 20 rank``. by_bases: the scale is
    divided by sqrt(N) besides. The task vector holds the scales and a key of 8 bytes for each matrix, from which the random
    matrices are drawn again, in the step as well: they are never stored.
    """
    return Method(Select(linear_only=True), RandLoRA(rank, float(20 * rank if alpha is None else alpha), by_bases))
