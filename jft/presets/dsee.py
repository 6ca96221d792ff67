"""DSEE: a low-rank change, the entries that low rank fits worst, and a base that may be pruned."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jft import delta, tree
from jft.compiled import program_cache
from jft.methods.card import Card
from jft.methods.low_rank import LowRank, WithLowRank
from jft.methods.parametrise import Composed, InPlace, Parametrisation
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, scores
from jft.select.budget import Globally
from jft.select.calibration import Calibration
from jft.select.threshold import top, top_each
from jft.tree import Patterns, patterns

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pruned(Composed):
    """``m * w + S``: of each matrix the fraction ``keep`` of entries that is largest in size stays, and selected entries train.

    They train from ``m * w``, so one that is pruned away starts at zero. Kept and trained are those of ``first``; the change
    is a bit mask and what the selected entries moved. Magnitude pruning as in DSEE (Chen et al. 2021, arXiv:2111.00160).
    """

    keep: float
    first: Parametrisation = InPlace()

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        # The budget knows which fractions are valid; ask it once, early.
        self._count((1, 1))

    def _count(self, matrix: tuple[int, ...]) -> int:
        return Globally(density=self.keep, round="nearest").units(math.prod(matrix), 1, "a matrix")

    def mask(self, w: Array) -> Array:
        """bool like ``w``: what stays of the base."""
        return top_each(jnp.abs(w.astype(jnp.float32)), self._count(w.shape[-2:]), w.ndim - 2)

    def _left(self, w: Array, base: Array) -> Array:
        """What stays of ``w``: what the mask of the base leaves, and what has trained since."""
        # A run that goes on has trained entries where the mask is False: they differ from the base.
        return jnp.where(self.mask(base) | (w != base), w, jnp.zeros((), w.dtype))

    def fitted(self, *, linearized: bool = False, **told: Any) -> Pruned:
        if linearized:
            raise ValueError(
                "Pruned keeps no base to linearize the model at: the mask is part of its change; use forward='standard'"
            )
        return super().fitted(**told)

    def leaves(self, at: Any = None) -> tuple[Any, Any]:
        return self.first.leaves(at)

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        base = w if base is None else base
        return self.first.init(key, self._left(w, base), at, self._left(base, base))

    def bind(self, kept: Any, trained: Any, structured: bool, key: Array | None = None) -> Any:
        return self.first.bind(kept, trained, structured, key)

    def encode(self, base: Array | None, kept: Any, trained: Any) -> delta.Encoding:
        if base is None:
            return self.first.encode(None, kept, trained)
        return delta.BitMask.of(self.mask(base)) + self.first.encode(self._left(base, base), kept, trained)

    def spread(self, kept: Any, values: Any, fill: Array) -> Array:
        return self.first.spread(kept, values, fill)

    def collect(self, kept: Any, dense: Array) -> Any:
        return self.first.collect(kept, dense)


@dataclasses.dataclass(frozen=True)
class Gaussian(LowRank):
    """:class:`LowRank` whose ``a`` is drawn with the deviation 0.02 of BERT's weights, as the authors' code does."""

    def init(self, key: Array, w: Array, at: Array | None = None, base: Array | None = None) -> tuple[Any, Any]:
        kept, trained = super().init(key, w)
        return kept, {**trained, "a": 0.02 * jax.random.normal(key, trained["a"].shape, jnp.float32)}


@dataclasses.dataclass(frozen=True)
class GreBsmo:
    """``|S|`` of ``W = U V + S + E``: U V of growing rank, S what it leaves above ``threshold``, as the authors' code has it.

    V starts as a random row. Each of ``steps`` times: twice ``U = qr((W - S) V^T)``, ``V = U^T (W - S)``, ``S = W - U V``
    without entries below the threshold (S is zero before the first); then V gains the first ``growth`` rows of R, ``E = Q R``.
    The rank is thus ``1 + growth * (steps - 1)`` at the end, 496, or that of W. W is ``[O, I]``, as torch holds it. Raises
    ``ValueError`` where fewer than ``count`` entries of a matrix are left. Zhou and Tao 2013, PMLR 31, in Chen et al. 2021.
    """

    count: int
    steps: int = 100
    growth: int = 5
    threshold: float = 0.01

    def __call__(self, calibration: Calibration) -> scores.Scores:
        out = {}
        for path in calibration.paths:
            w = calibration.params[path]
            key = tree.key_for(calibration.key, f"GreBsmo of {path}")
            out[path], least = _decomposed(self, getattr(w, "sharding", None))(w, key)
            if int(least) < self.count:
                raise ValueError(
                    f"GreBsmo leaves {int(least)} entries of a matrix of {path} above {self.threshold:g}, fewer than count="
                    f"{self.count}: its low-rank part fits the matrix; filter_rank= takes the SVD of that rank instead"
                )
        return out


@program_cache
def _decomposed(how: GreBsmo, sharding: Any) -> Callable[[Array, Array], tuple[Array, Array]]:
    def run(w: Array, key: Array) -> tuple[Array, Array]:
        # ``[O, I]``: the decomposition is not symmetric, and the authors' code runs on torch's layout.
        stacked = jnp.swapaxes(w.astype(jnp.float32), -1, -2).reshape(-1, w.shape[-1], w.shape[-2])
        each = (stacked, jnp.arange(len(stacked)))
        # One matrix after the other: factors of one only are held.
        sparse = jax.lax.map(lambda x: jnp.abs(_sparse_part(how, x[0], jax.random.fold_in(key, x[1]))), each)
        least = jnp.min(jnp.sum(sparse > 0, axis=(1, 2)))
        return jnp.swapaxes(sparse, -1, -2).reshape(w.shape), least

    return jax.jit(run, out_shardings=(sharding, None))


def _sparse_part(how: GreBsmo, w: Array, key: Array) -> Array:
    """S of one matrix ``[O, I]``. V has room for its last rank: rows that are not there yet are zero."""
    # A fixed size, since shapes inside the loop cannot grow with the rank.
    size = min(1 + how.growth * (how.steps - 1), *w.shape)
    start = jnp.zeros((size + how.growth, w.shape[1]), jnp.float32)
    start = start.at[0].set(jax.random.normal(key, (w.shape[1],), jnp.float32))

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, s = carry[0][:size], jnp.zeros_like(w)
        active = jnp.arange(size) < 1 + how.growth * i
        for _ in range(2):
            # QR gives orthonormal columns for the zero rows of V too; they are not part of the subspace yet.
            u = jnp.where(active, jnp.linalg.qr((w - s) @ v.T)[0], 0.0)
            v = u.T @ (w - s)
            left = w - u @ v
            s = jnp.where(jnp.abs(left) < how.threshold, 0.0, left)
        rest = left - s
        # The first rows of R need the first columns of E alone.
        rows = jnp.linalg.qr(rest[:, : how.growth])[0].T @ rest
        grown = jnp.concatenate([v, jnp.zeros_like(rows)])
        # At full rank the new rows go behind ``size`` and the next step cuts them off.
        return jax.lax.dynamic_update_slice(grown, rows, (jnp.minimum(1 + how.growth * i, size), 0)), s

    # TPUs and GPUs would multiply in fewer bits, which moves entries across the threshold.
    with jax.default_matmul_precision("float32"):
        return jax.lax.fori_loop(0, how.steps, step, (start, jnp.zeros_like(w)))[1]


def prune(model: Any, params: Any, tuned: delta.TaskVector, keep: float) -> Any:
    """``M * W + U V + S``: the model tuned by :func:`dsee`, with its frozen matrices pruned by the size of the tuned ones.

    M keeps the fraction ``keep`` of all entries of matrices inside the layers together, the largest ``|W + U V + S|``; the
    change ``tuned`` from ``params`` stays as it is. What is tuned again from here is the second run of the paper.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it is the fraction of entries that stays, above 0 and at most 1")
    flat = tree.flatten(params)
    # It broadcasts against weights that did not change.
    zero = jnp.float32(0)
    change = {p: tuned[p].resolve(w).dense() if p in tuned else zero for p, w in flat.items()}
    linear = model.linear_paths(params)
    count = sum(flat[p].size for p in linear)
    # As torch counts what is pruned: half goes to the even number.
    size = {p: jnp.abs(flat[p].astype(jnp.float32) + change[p]) for p in linear}
    masks = top(size, count - round((1 - keep) * count))
    pruned = {p: jnp.where(masks[p], w, 0) if p in masks else w for p, w in flat.items()}
    return tree.like(params, {p: (w.astype(jnp.float32) + change[p]).astype(w.dtype) for p, w in pruned.items()})


QUERIES_AND_VALUES = r"(^|/)attn/[qv]/w$"

CARD = Card(
    formula=(
        "M * W + (alpha / rank) (a b + S): a ~ N(0, 0.02^2), b = 0, S = 0 on the `count` largest |W - U V| of each matrix, "
        "U V the low-rank part of GreBsmo; M by global magnitude of the tuned weights"
    ),
    follows=(
        "the code; rank and count are the paper's (16, 64). S trains in the weight itself at alpha / rank times the learning "
        "rate, which under Adam is what a factor alpha / rank before S does"
    ),
    code="VITA-Group/DSEE@61844c3, non-GPT-2/examples/pytorch/text-classification/run_glue.py:196-505, run_glue_prune_tune.py",
    departs=(
        "GreBsmo depends on its random first row: of 64 entries of a 768 x 768 matrix (Gaussian, or of spectrum k^-1/2) two "
        "rows choose 14 alike; the SVD of rank 496 shares 10 to 21 with one of them, that of rank 16 none. prune() goes on "
        "from U V and S in the weight with new factors, the code with the same ones. keep < 1 prunes by the base's size, each "
        "matrix by itself, from the start: no rule of the paper. Heads are not pruned. The head trains by also='classifier'"
    ),
    check="GreBsmo, three Adam steps and the pruned weights against float64 NumPy",
    defaults={
        "rank": (16, 4),
        "count": (64, 128),
        "filter_rank": ("GreBsmo", "GreBsmo"),
        "keep": (1.0, 1.0),
        "alpha": ("-", 32),
        "include": ("q, v", "q, v"),
    },
)


@register("dsee", paper="Chen et al. 2021, arXiv:2111.00160", card=CARD)
def dsee(
    rank: int = 16,
    count: int = 64,
    filter_rank: int | None = None,
    keep: float = 1.0,
    alpha: float | None = 32.0,
    exact: bool = False,
    include: Patterns = (QUERIES_AND_VALUES,),
) -> Method:
    """Train a low-rank change of the attention's queries and values and, beside it, the entries that low rank fits worst.

    Those are the ``count`` largest of each matrix's residual ``|W - W_r|``. filter_rank: None for W_r by :class:`GreBsmo`,
    as the paper and its code; a number for the SVD of that rank, randomised unless ``exact``, which is cheaper and picks
    other entries. alpha: both parts count ``alpha / rank`` times; None for ``rank``. include: the matrices, part of the method;
    other patterns replace queries and values. The paper then prunes by the size of the tuned weights and tunes again:
    :func:`prune`. keep: or, in one run, the fraction of each frozen matrix that stays from the start, by the base's size; 1
    for all.
    """
    if exact and filter_rank is None:
        raise ValueError("exact=True asks for a full SVD, and filter_rank=None decomposes by GreBsmo; give filter_rank")
    residual = functools.partial(scores.LowRank, residual=True, exact=exact)
    select = Select(
        patterns(include),
        linear_only=True,
        score=GreBsmo(count) if filter_rank is None else residual(filter_rank),
        budget=budget.PerMatrix(count=count),
    )
    low_rank = Gaussian(rank, float(rank if alpha is None else alpha))
    # Under Adam a factor on the change acts as one on the learning rate, so S can train in the weight itself.
    entries = InPlace(rate=low_rank.scale)
    first = Pruned(keep, entries) if keep != 1 else entries
    return Method(select, WithLowRank(first, low_rank))
