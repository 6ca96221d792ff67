"""Attention, and the rule of which keys a query sees: all scores at once, or block by block in memory linear in tokens.

The second is flash attention (Dao et al. 2022, arXiv:2205.14135) in plain JAX, with derivatives in both modes: scores exist
for one block of queries and one of keys at a time. Fused kernels have a rule for reverse mode and refuse ``jax.jvp``. Here
the rule is that of forward mode, linear in the tangents: with ``p_ij = exp(s_ij - lse_i)``,

    do_i = sum_j p_ij (ds_ij v_j + dv_j) - (sum_j p_ij ds_ij) o_i,    dlse_i = sum_j p_ij ds_ij,

block by block, and JAX transposes it. For that it keeps the arguments, ``o`` and ``lse`` alone: every block is under
``jax.checkpoint``, so p is computed again from them. The transpose costs what flash attention's backward pass does, five
products a block. Second derivatives are right too.

Blocks whose positions cannot see each other (the future, what is out of a window) are skipped by ``lax.cond``: half the work of
a causal mask. Under a ``vmap`` over windows both branches run, and nothing is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The rule by which query t sees key s: both of one segment, and, if causal or with a window, by their positions.

    q_segments int ``[B, T]``, k_segments int ``[B, S]``, B possibly 1 for equal rows; segment 0 is padding, and is
    seen by nobody. Positions count tokens of the row, from 0. causal: ``s <= t``. window: ``|t - s| < window``, an int or a
    traced scalar, so that layers of a scan may differ. segmented: False where all tokens are of segment 1, which a kernel
    need not be told.
    """

    q_segments: Array
    k_segments: Array
    window: Array | int | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    segmented: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def within(cls, segments: Array, **rules: Any) -> Mask:
        """The mask of tokens ``segments[B, T]`` that see each other."""
        return cls(segments, segments, **rules)

    def dense(self) -> Array:
        """Bool ``[B, T, S]``."""
        return self.block(0, 0, self.q_segments.shape[-1], self.k_segments.shape[-1])

    def block(self, row: Array | int, column: Array | int, rows: int, columns: int) -> Array:
        """Bool ``[B, rows, columns]``: the queries from ``row`` on, the keys from ``column`` on."""
        q = jax.lax.dynamic_slice_in_dim(self.q_segments, row, rows, axis=-1)[..., :, None]
        k = jax.lax.dynamic_slice_in_dim(self.k_segments, column, columns, axis=-1)[..., None, :]
        distance = (row + jnp.arange(rows))[:, None] - (column + jnp.arange(columns))
        visible = (q == k) & (k > 0)
        if self.causal:
            visible &= distance >= 0
        if self.window is not None:
            visible &= jnp.abs(distance) < self.window
        return visible

    def padded(self, rows: int, columns: int) -> Mask:
        """The same for ``rows`` queries and ``columns`` keys, the new ones being padding."""

        def pad(segments: Array, size: int) -> Array:
            return jnp.pad(segments, ((0, 0), (0, size - segments.shape[-1])))

        q_segments, k_segments = pad(self.q_segments, rows), pad(self.k_segments, columns)
        return dataclasses.replace(self, q_segments=q_segments, k_segments=k_segments, segmented=True)

    def reaches(self, row: Array | int, column: Array | int, rows: int, columns: int) -> Array | bool:
        """Whether a pair of this block has positions that see each other; segments aside."""
        reached: Array | bool = True
        if self.causal:
            reached = column < row + rows
        if self.window is not None:
            gap = jnp.maximum(row - (column + columns - 1), column - (row + rows - 1))
            reached &= gap < self.window
        return reached


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    scale: float | Array,
    softcap: float | None = None,
    bias: Array | None = None,
    block: int | None = None,
) -> Array:
    """``softmax(scale * q k^T + bias) v`` with grouped queries: all scores at once, or ``block`` queries and keys at a time.

    q ``[B, T, H, K]``, k and v ``[B, S, G, K]`` with H a multiple of G; mask None: every query sees every key; bias
    ``[H, T, S]`` or None. Scores and softmax are float32 or wider; ``softcap`` c replaces a score s by ``c tanh(s / c)``.
    A query that sees nothing (padding) gets the mean of all values: finite, and read by nobody. Returns ``[B, T, H, K]``.
    """
    if block is not None:
        return blockwise_attention(q, k, v, mask, scale=scale, softcap=softcap, bias=bias, block=block)
    B, T, H, K = q.shape
    G = k.shape[2]
    precise = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btghk,bsgk->bghts", q, k, preferred_element_type=precise) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(precise).reshape(1, G, H // G, *bias.shape[1:])
    if mask is not None:
        # Finite: rows that see nothing, as padding, would be NaN with -inf.
        scores = jnp.where(mask.dense()[:, None, None], scores, jnp.finfo(precise).min)
    weights = softmax(scores)
    # Rounded to the dtype of v before the product, as transformers does.
    out = jnp.einsum("bghts,bsgk->btghk", weights.astype(v.dtype), v, preferred_element_type=precise)
    return out.reshape(B, T, H, K).astype(v.dtype)


@jax.custom_jvp
def softmax(s: Array) -> Array:
    """``exp(s - max) / sum`` over the last axis, keeping its own value alone for the backward pass."""
    e = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    p = softmax(*primals)
    weighted = p * tangents[0]
    return p, weighted - p * jnp.sum(weighted, axis=-1, keepdims=True)


class Terms(NamedTuple):
    """Terms of the scores besides q and k: ``scale []``, and ``bias [H, T, S]`` or None."""

    scale: Array
    bias: Array | None


def blockwise_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    scale: float | Array,
    softcap: float | None = None,
    bias: Array | None = None,
    block: int,
) -> Array:
    """``softmax(scale * q k^T + bias) v`` with grouped queries; no array of T x S elements exists.

    q ``[B, T, H, K]``, k and v ``[B, S, G, K]`` with H a multiple of G; ``bias [H, T, S]`` or None is what its name says and
    as large. block: queries and keys of one block, at most; T and S need not divide by it. Scores and sums are float32 or
    wider. ``softcap`` c replaces a score s by ``c tanh(s / c)``. A query that sees nothing gets the mean of all values.
    Returns ``[B, T, H, K]`` in the dtype of v.
    """
    terms = Terms(jnp.asarray(scale, jnp.promote_types(q.dtype, jnp.float32)), bias)
    o, lse = sums(softcap, block, q, k, v, terms, mask)
    if mask is not None:
        # As plain attention, where equal scores give equal weights.
        mean = jnp.mean(v, axis=1, keepdims=True, dtype=lse.dtype)
        o = jnp.where(_has_keys(lse)[..., None], o, jnp.repeat(mean, q.shape[2] // k.shape[2], axis=2))
    return o.astype(v.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def sums(
    softcap: float | None, block: int, q: Array, k: Array, v: Array, terms: Terms, mask: Mask | None
) -> tuple[Array, Array]:
    """``o [B, T, H, K]`` and ``lse [B, T, H]``, float32 or wider: see :func:`attention`.

    A query that sees nothing has o zero and the lowest finite number as lse. Derivatives take differences from o: rounded to
    bfloat16 it would make their errors several times larger.
    """
    grid = _Grid.of(block, q, k, mask)
    score = grid.score(softcap)
    precise = terms.scale.dtype
    lowest = jnp.finfo(precise).min

    def row(q: Array, row_start: Array, biases: Array | None, keys: Any) -> tuple[Array, Array]:
        def add(carry: Any, column: Any) -> Any:
            maximum, total, acc = carry
            (k, v), column_start, bias = column
            s = score(q, k, terms.scale, bias, row_start, column_start)
            # A running maximum, to which the earlier sums are rescaled: no exponential overflows.
            new = jnp.maximum(maximum, jnp.max(s, axis=-1))
            p, rescale = jnp.exp(s - new[..., None]), jnp.exp(maximum - new)
            return new, total * rescale + jnp.sum(p, axis=-1), acc * rescale[..., None] + _weigh(p, v)

        shape = q.shape[:-1]
        start = jnp.full(shape, lowest), jnp.zeros(shape, precise), jnp.zeros((*shape, v.shape[-1]), precise)
        maximum, total, acc = grid.over_keys(add, start, keys, row_start, biases)
        has_keys = maximum > lowest
        o = jnp.where(has_keys[..., None], acc / total[..., None], 0)
        return o, jnp.where(has_keys, maximum + jnp.log(total), lowest)

    o, lse = grid.over_queries(row, grid.rows(q), (grid.columns(k), grid.columns(v)), grid.pairs(terms.bias))
    return grid.whole(o), grid.whole(lse[..., None])[..., 0]


# symbolic_zeros: an argument that does not move costs no product.
@functools.partial(sums.defjvp, symbolic_zeros=True)
def _sums_jvp(softcap: float | None, block: int, primals: Any, tangents: Any) -> Any:
    o, lse = sums(softcap, block, *primals)
    nonzero = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        (*tangents[:3], *tangents[3]),
        is_leaf=lambda t: t is None or isinstance(t, SymbolicZero),
    )
    return (o, lse), jax.checkpoint(functools.partial(_sums_tangent, softcap, block))(*primals, o, lse, nonzero)


def _sums_tangent(
    softcap: float | None,
    block: int,
    q: Array,
    k: Array,
    v: Array,
    terms: Terms,
    mask: Mask | None,
    o: Array,
    lse: Array,
    tangents: tuple[Array | None, ...],
) -> tuple[Array, Array]:
    """``(do, dlse)``, linear in ``tangents`` (dq, dk, dv, dscale, dbias), each of which is None where it is zero."""
    grid = _Grid.of(block, q, k, mask)
    score = grid.score(softcap)
    dq, dk, dv, dscale, dbias = tangents
    # exp(s - 0) is 0 at the lowest s, so that a query without keys has weights of zero.
    lse = jnp.where(_has_keys(lse), lse, 0)

    def row(queries: Any, row_start: Array, biases: Any, keys: Any) -> tuple[Array, Array]:
        q, dq, o, lse = queries

        def add(carry: Any, column: Any) -> Any:
            do, dlse = carry
            (k, v, dk, dv), column_start, (bias, dbias) = column
            score_primals = {"q": q, "k": k, "scale": terms.scale, "bias": bias}
            score_tangents = {
                name: move
                for name, move in zip(score_primals, (dq, dk, dscale, dbias), strict=True)
                if move is not None
            }

            def scores(values: dict[str, Array]) -> Array:
                return score(**{**score_primals, **values}, row_start=row_start, column_start=column_start)

            s, ds = jax.jvp(scores, ({name: score_primals[name] for name in score_tangents},), (score_tangents,))
            p = jnp.exp(s - lse)
            if dv is not None:
                do = do + _weigh(p, dv)
            if score_tangents:
                do, dlse = do + _weigh(p * ds, v), dlse + jnp.sum(p * ds, axis=-1)
            return do, dlse

        shape = lse.shape[:-1]
        start = jnp.zeros((*shape, v.shape[-1]), lse.dtype), jnp.zeros(shape, lse.dtype)
        do, dlse = grid.over_keys(add, start, keys, row_start, biases)
        return do - dlse[..., None] * o, dlse

    # lse with one axis more: ``rows`` takes [B, T, H, K].
    queries = grid.rows(q), grid.rows(dq), grid.rows(o), grid.rows(lse[..., None])
    keys = grid.columns(k), grid.columns(v), grid.columns(dk), grid.columns(dv)
    biases = grid.pairs(terms.bias), grid.pairs(dbias)
    do, dlse = grid.over_queries(row, queries, keys, biases)
    return grid.whole(do).astype(o.dtype), grid.whole(dlse[..., None])[..., 0]


def _has_keys(lse: Array) -> Array:
    return lse > jnp.finfo(lse.dtype).min


def _weigh(p: Array, v: Array) -> Array:
    """``p[B, G, R, t, s] v[B, G, s, K]``, of which p is rounded to the dtype of v."""
    return jnp.einsum("bgrts,bgsk->bgrtk", p.astype(v.dtype), v, preferred_element_type=p.dtype)


def _checkpointed(step: Callable) -> Callable:
    """``step`` of a scan, of which nothing is kept but its arguments.

    Neither for a transpose, nor because it is the same in every layer: a scan over layers computes once what does not
    depend on the layer, of an attention the masks of all blocks, and would hold them all.
    """
    return jax.checkpoint(step, prevent_cse=False)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Queries and keys cut into blocks of even size, the last one padded."""

    groups: int
    queries: int
    keys: int
    t: int
    s: int
    mask: Mask | None

    @classmethod
    def of(cls, block: int, q: Array, k: Array, mask: Mask | None) -> _Grid:
        T, S = q.shape[1], k.shape[1]
        # As many blocks as there must be, of even size: less padding than full blocks and a rest.
        t, s = (-(-n // -(-n // block)) for n in (T, S))
        # Without a mask the keys of the padding would count.
        if mask is None and S % s:
            mask = Mask(jnp.ones((1, T), jnp.int32), jnp.ones((1, S), jnp.int32))
        return cls(k.shape[2], T, S, t, s, mask and mask.padded(-(-T // t) * t, -(-S // s) * s))

    def rows(self, x: Array | None) -> Array | None:
        """``[B, T, H, K]`` as blocks ``[n, B, G, R, t, K]``."""
        if x is None:
            return None
        x = _padded(x, 1, self.t)
        B, T, H, K = x.shape
        return x.reshape(B, T // self.t, self.t, self.groups, H // self.groups, K).transpose(1, 0, 3, 4, 2, 5)

    def columns(self, x: Array | None) -> Array | None:
        """``[B, S, G, K]`` as blocks ``[m, B, G, s, K]``."""
        if x is None:
            return None
        x = _padded(x, 1, self.s)
        B, S, G, K = x.shape
        return x.reshape(B, S // self.s, self.s, G, K).transpose(1, 0, 3, 2, 4)

    def pairs(self, x: Array | None) -> Array | None:
        """``[H, T, S]`` as blocks ``[n, m, G, R, t, s]``."""
        if x is None:
            return None
        x = _padded(_padded(x, 1, self.t), 2, self.s)
        H, T, S = x.shape
        x = x.reshape(self.groups, H // self.groups, T // self.t, self.t, S // self.s, self.s)
        return x.transpose(2, 4, 0, 1, 3, 5)

    def whole(self, x: Array) -> Array:
        """The inverse of :meth:`rows`."""
        n, B, G, R, t, K = x.shape
        return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * t, G * R, K)[:, : self.queries]

    def score(self, softcap: float | None) -> Callable[..., Array]:
        """``(q, k, scale, bias, row_start, column_start) -> s[B, G, R, t, s]``; a hidden key has the lowest finite score."""

        def score(q: Array, k: Array, scale: Array, bias: Array | None, row_start: Array, column_start: Array) -> Array:
            s = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=scale.dtype) * scale
            if softcap is not None:
                s = softcap * jnp.tanh(s / softcap)
            if bias is not None:
                s = s + bias.astype(s.dtype)
            if self.mask is None:
                return s
            visible = self.mask.block(row_start, column_start, self.t, self.s)
            return jnp.where(visible[:, None, None], s, jnp.finfo(s.dtype).min)

        return score

    def over_keys(self, add: Callable, start: Any, keys: Any, row_start: Array, biases: Any) -> Any:
        """``add(carry, (keys, column_start, bias))`` over the blocks of keys that queries at ``row_start`` reach."""
        column_starts, keys = keys

        def step(carry: Any, column: Any) -> tuple[Any, None]:
            reached = True if self.mask is None else self.mask.reaches(row_start, column[1], self.t, self.s)
            # Known while tracing: the program needs no branch.
            if reached is True:
                return add(carry, column), None
            return jax.lax.cond(reached, add, lambda carry, _: carry, carry, column), None

        return jax.lax.scan(_checkpointed(step), start, (keys, column_starts, biases))[0]

    def over_queries(self, row: Callable, queries: Any, keys: Any, biases: Any) -> Any:
        """``row(queries, row_start, biases, keys)`` for every block of queries, stacked."""
        n, m = (jax.tree.leaves(x)[0].shape[0] for x in (queries, keys))
        keys = jnp.arange(m) * self.s, keys
        return jax.lax.map(_checkpointed(lambda xs: row(*xs, keys)), (queries, jnp.arange(n) * self.t, biases))


def _padded(x: Array, axis: int, block: int) -> Array:
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
