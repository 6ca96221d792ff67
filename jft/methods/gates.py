"""Gated weights: a change that a learned gate lets through, or channels of the base that a learned gate closes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta
from jft.delta.changed import COLUMNS, ROWS
from jft.dot import dot, grouped_dot, take, transpose
from jft.methods.formed import bound, keys, leading, straight_through
from jft.methods.parametrise import Parametrisation, moved_from

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
    The code has an optimizer of its own for alpha, at 0.1 beside 1e-5: here ``alpha_rate`` is that ratio.

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
            u = jnp.clip(jax.random.uniform(key, alpha.shape, alpha.dtype), 1e-4, 1 - 1e-4)
            alpha = alpha + jnp.log(u) - jnp.log1p(-u)
        return jnp.clip(jax.nn.sigmoid(alpha) * (self.upper - self.lower) + self.lower, 0, 1)

    def form(self, parts: tuple[Array, dict[str, Array], Array | None]) -> Array:
        """``w + z * d`` in float32, for one weight without leading axes."""
        w, trained, key = parts
        own, shared = (None, None) if key is None else jax.random.split(key)
        z = self.gate(trained["alpha"], own)
        if self.group:
            z = z * self.gate(trained["group"], shared)
        return w.astype(z.dtype) + z * trained["delta"]

    def bind(self, kept: Array, trained: dict[str, Array], structured: bool, key: Array | None = None) -> Any:
        lead = leading(kept, self.lead)
        return bound(self, (kept, trained, keys(key, kept.shape[:lead])), kept, lead, structured)

    def moved(self, trained: dict[str, Array]) -> Array:
        """``z * d`` in evaluation, float32: what the weight gains."""
        z = self.gate(trained["alpha"])
        if self.group:
            z = z * _spread(self.gate(trained["group"]), z.ndim)
        return z * trained["delta"]

    def encode(self, base: Array | None, kept: Array, trained: dict[str, Array]) -> delta.Encoding:
        change = self.moved(trained)
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
        return self.weight * jnp.sum(likely * _spread(shared, likely.ndim))

    def tangent(self, kept: Array, trained: dict[str, Array], key: Array | None = None) -> delta.Changed:
        return moved_from(kept, self.bind(kept, trained, False, key))

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        """Gates are not what decays or stays near the base."""
        gate = delta.Leaf(decays=False, origin=None, rate=self.alpha_rate)
        trained = {"delta": delta.Leaf(), "alpha": gate}
        return delta.Leaf(), trained | ({"group": dataclasses.replace(gate, matrices=None)} if self.group else {})


def _spread(x: Array, ndim: int) -> Array:
    """``x`` [*lead] with axes of length 1 up to ``ndim``."""
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


@dataclasses.dataclass(frozen=True)
class Taps(Parametrisation):
    """``w + 1[s >= threshold] * d`` with one score s for each weight matrix; straight through, ``dL/ds = sum(dL/dw * d)``.

    Task Adaptive Parameter Sharing, Wallingford et al. 2022, arXiv:2203.16708. A *layer* of the paper is one convolution or
    linear map, in its text as in the released code (53 in a ResNet-50): so each matrix of each transformer layer has its
    score. ``init_score`` and ``threshold`` are the code's: every layer starts active. What makes layers inactive is
    :class:`jft.methods.penalties.SharedLayers`, over all of them; the code adds it after some epochs, jft from the start.

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
        active = np.asarray(self.active(trained))
        values = jnp.where(_spread(jnp.asarray(active), kept.ndim), trained["delta"], 0)
        if not active.ndim:
            return delta.Dense(values)
        index = np.flatnonzero(active.reshape(active.shape[0], -1).any(axis=1))
        return delta.Rows(jnp.asarray(index, jnp.int32), values[index], kept.shape)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return delta.Leaf(), {"delta": delta.Leaf(), "score": delta.Leaf(origin=None, matrices=None)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedWeight:
    """The structured weight ``diag(rows) @ w @ diag(columns)``, never formed: the gates multiply what goes in and out.

    w ``[..., I, O]``, itself possibly structured; rows ``[..., I]`` and columns ``[..., O]``, either may be None (all open).
    """

    w: Any
    rows: Array | None
    columns: Array | None

    def __jft_dot__(self, x: Array) -> Array:
        return self._times(dot(self._times(x, self.rows), self.w), self.columns)

    def __jft_grouped_dot__(self, x: Array, sizes: Array) -> Array:
        expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
        rows, columns = (None if gates is None else gates[expert] for gates in (self.rows, self.columns))
        return self._times(grouped_dot(self._times(x, rows), self.w, sizes), columns)

    def __jft_take__(self, ids: Array) -> Array:
        taken = take(self.w, ids, jnp.float32)
        taken = taken if self.rows is None else taken * self.rows[ids][..., None]
        return self._times(taken, self.columns)

    def __jft_transpose__(self) -> GatedWeight:
        return GatedWeight(transpose(self.w), self.columns, self.rows)

    @staticmethod
    def _times(x: Array, gates: Array | None) -> Array:
        return x if gates is None else x * gates.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Gates(Parametrisation):
    """``diag(z_in) @ w @ diag(z_out)``: stochastic gates on the input and output channels of frozen weights.

    FineGates, Svirsky, Refael and Lindenbaum 2024, arXiv:2412.12951, with the gates of Yamada et al. 2020,
    arXiv:1810.04247: ``z = clip(mu + eps, 0, 1)``, ``eps ~ N(0, noise^2)`` in training (``noise`` defaults to ``sigma``), eps 0
    in evaluation. Penalty: ``weight * sum Phi(mu / sigma)``, the expected number of open gates. Gates start open, ``mu =
    start``, so that training starts at the base.

    The authors' code of 2026 has another form: ``mu = tanh(t) + 1/2`` of a trained t near 1 (``squash=True``, ``noise=0.1``,
    ``sigma=0.5``), and instead of the sum the distance of each matrix's mean open fraction, of rows and of columns, from a
    target: ``weight * mean |mean Phi - open|`` for each matrix (``open=0.8``). It also gates biases, with the columns; here
    a bias is a weight of its own and stays. A matrix whose gates are 0 does nothing there, but keeps its shape.

    Kept: w. Trained, float32: ``rows`` [*lead, I] and ``columns`` [*lead, O], whichever are asked for.
    """

    rows: bool = True
    columns: bool = True
    weight: float = 1e-3
    sigma: float = 0.5
    noise: float | None = None
    start: float = 1.0
    squash: bool = False
    open: float | None = None
    random = True
    exact = True

    def __post_init__(self) -> None:
        """Refuse gates on nothing, and widths that are none."""
        if not (self.rows or self.columns):
            raise ValueError("gates need a side: rows=True (input channels), columns=True (output channels), or both")
        if self.sigma <= 0 or (self.noise is not None and self.noise < 0):
            raise ValueError(f"sigma must be above 0 and noise at least 0; got {self.sigma} and {self.noise}")

    def init(
        self, key: Array, w: Array, at: Array | None = None, base: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        if w.ndim < 2:
            raise ValueError(f"gates on channels need a matrix, not a weight of shape {w.shape}; narrow select.include")
        *lead, inputs, outputs = w.shape
        sizes = {"rows": inputs if self.rows else 0, "columns": outputs if self.columns else 0}
        return w, {name: jnp.full((*lead, n), self.start, jnp.float32) for name, n in sizes.items() if n}

    def mean(self, t: Array) -> Array:
        """mu of the trained values."""
        return jnp.tanh(t) + 0.5 if self.squash else t

    def gate(self, t: Array, key: Array | None = None) -> Array:
        """z in [0, 1], drawn with a key."""
        mu = self.mean(t)
        if key is not None:
            mu = mu + (self.sigma if self.noise is None else self.noise) * jax.random.normal(key, t.shape, t.dtype)
        return jnp.clip(mu, 0, 1)

    def gates(self, trained: dict[str, Array], key: Array | None = None) -> dict[str, Array]:
        """z of both sides."""
        each = [None] * 2 if key is None else list(jax.random.split(key))
        return {name: self.gate(t, k) for (name, t), k in zip(sorted(trained.items()), each, strict=False)}

    def bind(self, kept: Array, trained: dict[str, Array], structured: bool, key: Array | None = None) -> Any:
        z = self.gates(trained, key)
        if structured:
            return GatedWeight(kept, z.get("rows"), z.get("columns"))
        return (kept.astype(jnp.float32) * self.product(z)).astype(kept.dtype)

    @staticmethod
    def product(z: dict[str, Array]) -> Array:
        """What each entry of the weight is multiplied by, ``[*lead, I or 1, O or 1]``."""
        return math.prod(z[name][..., :, None] if name == "rows" else z[name][..., None, :] for name in z)  # type: ignore[return-value]

    def encode(self, base: Array | None, kept: Array, trained: dict[str, Array]) -> delta.Encoding:
        return delta.Gate(self.product(self.gates(trained)), tuple(kept.shape))

    def penalty(self, kept: Array, trained: dict[str, Array]) -> Array:
        """``weight`` times the expected number of open gates, or their distance from the target."""
        likely = {name: jax.scipy.stats.norm.cdf(self.mean(t) / self.sigma) for name, t in trained.items()}
        if self.open is None:
            return self.weight * sum((jnp.sum(p) for p in likely.values()), jnp.float32(0))
        away = [jnp.abs(jnp.mean(p, axis=-1) - self.open) for p in likely.values()]
        return self.weight * jnp.sum(sum(away)) / len(away)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        """How far the gates' parameters have moved from where they started is their distance from the base."""
        side = {"rows": (..., ROWS), "columns": (..., COLUMNS)}
        trained = {name: delta.Leaf(axes, matrices=None, origin=self.start) for name, axes in side.items()}
        return delta.Leaf(), {name: leaf for name, leaf in trained.items() if getattr(self, name)}
