"""FineGates: stochastic gates on the channels of frozen matrices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta
from jft.delta.changed import COLUMNS, ROWS
from jft.dot import dot, grouped_dot, take, transpose
from jft.methods.card import Card
from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.parametrise import Parametrisation
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select

Array = jax.Array


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
        # total_repeat_length: under jit the number of rows must not depend on ``sizes``.
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
    a bias is a weight of its own and stays. A matrix whose gates are 0 does nothing there, but keeps its shape. Gates do not
    decay: decay alone would close them.

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
        # The mean over a matrix's channels first: the target is of each matrix, not of all together.
        away = [jnp.abs(jnp.mean(p, axis=-1) - self.open) for p in likely.values()]
        return self.weight * jnp.sum(sum(away)) / len(away)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        """How far the gates' parameters have moved from where they started is their distance from the base."""
        # Gates are sharded like the axis of the weight that they multiply; vectors are for no matrix optimizer.
        side = {"rows": (..., ROWS), "columns": (..., COLUMNS)}
        trained = {
            name: delta.Leaf(axes, decays=False, matrices=None, origin=self.start) for name, axes in side.items()
        }
        return delta.Leaf(), {name: leaf for name, leaf in trained.items() if getattr(self, name)}


CARD = Card(
    formula=(
        "diag(z_in) w diag(z_out), z = clip(mu + eps, 0, 1), eps ~ N(0, sigma^2) in training and 0 in evaluation, mu from 1; "
        "loss + weight * sum Phi(mu / sigma)"
    ),
    follows="paper; squash, noise=0.1 and open: the form of the code; code: gates do not decay",
    check="both forms with gradients, penalty and three steps, float64 NumPy; decay alone moves no gate",
    code="jsvir/FineGates@5ab6421b, model.py, finetune_glue.py",
    departs=(
        "The weight of the sum is not published (code: 50 times the mean distance from a target, another penalty). The code "
        "draws its t from N(1, 0.1^2), trains and gates biases, and has gates on its low-rank change too."
    ),
    defaults={
        "sigma": (0.5, 0.5),
        "noise": ("sigma", 0.1),
        "squash": (False, True),
        "open": (None, "1 - target_sparsity"),
    },
)


@register("finegates", paper="Svirsky, Refael and Lindenbaum 2024, arXiv:2412.12951", card=CARD)
def finegates(
    weight: float = 1e-3,
    rows: bool = True,
    columns: bool = True,
    sigma: float = 0.5,
    noise: float | None = None,
    squash: bool = False,
    open: float | None = None,
    rank: int = 0,
) -> Method:
    """Train stochastic gates on the input and output channels of frozen matrices; what closes is removed.

    weight: of the expected number of open gates, or with ``open`` of the distance from that open fraction. squash and open
    are the form of the authors' later code (``noise=0.1``): see :class:`Gates`. rank: of a low-rank change beside the gated
    weight, which the gates do not touch; 0 for none.
    """
    gates = Gates(rows, columns, weight, sigma, noise, squash=squash, open=open)
    train = WithLowRank(gates, LowRank(rank, float(rank))) if rank else gates
    return Method(Select(linear_only=True), train)
