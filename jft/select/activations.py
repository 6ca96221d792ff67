"""Scores of activations, not of weights: inputs of products, experts, attention heads, layers.

All read through :class:`jft.models.core.Hooks`, so they need one of jft's models. Rows and tokens that are padding do not
count. Names are those of products: ``layers/attn/o`` for the parameter ``layers/attn/o/w``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft.dot import dot
from jft.models.core import Hooks, inputs, is_jft_model
from jft.models.moe import route
from jft.select.calibration import Calibration

Array = jax.Array


def rows(batch: Any) -> Array:
    """Weight of each row, float32 ``[B]``: 1, or 0 where ``valid`` is false."""
    valid = batch.get("valid") if isinstance(batch, Mapping) else None
    # Batches may carry scalars, which have no rows.
    size = next(x.shape[0] for x in jax.tree.leaves(batch) if x.ndim)
    return jnp.ones(size, jnp.float32) if valid is None else valid.astype(jnp.float32)


def real(name: str, shape: tuple[int, ...], batch: Any) -> Array:
    """1 where a value under ``name`` with leading axes ``shape`` is of a token that is not padding; broadcasts to it.

    shape: ``[B, T]``, ``[B]`` of pooled values, or ``[N]`` and ``[E, N]``, N = B T, of what experts read.
    """
    counts = rows(batch)
    if shape == counts.shape:
        return counts
    # Keys and values of cross attention are of the source, whose padding counts there.
    decodes = name.startswith("decoder/") and not name.endswith(("cross/k", "cross/v"))
    prefix = "decoder_" if decodes else ""
    fields = batch if isinstance(batch, Mapping) else {"tokens": batch}
    # Images have no padding inside a row.
    if name.startswith("vision/") or prefix + "tokens" not in fields:
        return jnp.broadcast_to(counts[:, None], shape)
    tokens = inputs(fields, prefix)
    keep = (tokens.segments > 0).astype(jnp.float32) * jnp.ones(tokens.tokens.shape, jnp.float32) * counts[:, None]
    # Experts read tokens in one axis, and `[E, N]` the same ones for every expert.
    return keep if shape == keep.shape else jnp.broadcast_to(keep.reshape(-1), shape)


def fingerprint(batch: Any) -> Array:
    """A number that batches differ in, so that each has noise of its own."""
    leaves = [x for x in jax.tree.leaves(batch) if x.ndim]
    # The bits of floats: a cast to integers would make all images between 0 and 1 the same.
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) if x.dtype.itemsize == 4 else x for x in leaves]
    return sum((jnp.sum(b.astype(jnp.uint32)) for b in bits), jnp.uint32(0))


def hookable(calibration: Calibration) -> Any:
    """The model of a calibration, which has to be one of those that take hooks."""
    if not is_jft_model(calibration.model):
        raise ValueError("this score reads inside the model by hooks, which only jft's own models have")
    return calibration.model


# A value rather than a closure: `sums` compiles one program for equal ones.
@dataclasses.dataclass(frozen=True)
class _SquaredInputs:
    """Sums over tokens of the squared inputs of products ``names``: ``[L, I]``, of experts ``[L, E, I]``."""

    model: Any
    names: frozenset[str]

    def __call__(self, params: Any, batch: Any) -> Any:
        def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            if name not in self.names:
                return dot(x, w), None
            squares = jnp.square(x.astype(jnp.float32)) * real(name, x.shape[:-1], batch)[..., None]
            # [E, N, I]: each expert's sum apart.
            first = 1 if "/experts/" in name and x.ndim == 3 else 0
            return dot(x, w), jnp.sum(squares, axis=tuple(range(first, x.ndim - 1)))

        # Only the reads: XLA drops what only the outputs need.
        return self.model.apply(params, batch, Hooks(product=product))[1]


def squared_inputs(calibration: Calibration, names: Any, batches: int) -> dict[str, Array]:
    """``{name: sum over real tokens of x^2}`` of the inputs x of products: ``[..., I]``, led as the weight is.

    An expert's tokens are those sent to it. Raises ``ValueError`` for a name that is no product of the model.
    """
    # Hashable, as part of a program's static arguments.
    names = frozenset(names)
    squares = calibration.sums(_SquaredInputs(hookable(calibration), names), batches)
    missing = sorted(names - set(squares))
    if missing:
        raise ValueError(
            f"{missing[0]!r} is no product of the model, so it has no inputs; choose weights that end in /w"
        )
    return squares


@dataclasses.dataclass(frozen=True)
class _Routing:
    """Sums over tokens of the share that each expert gets of them."""

    model: Any
    experts: Any
    gate: bool

    def __call__(self, params: Any, batch: Any) -> Any:
        def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            y = dot(x, w)
            if not name.endswith("/router"):
                return y, None
            # Computed once more from the logits: hooks see products, not decisions.
            gates, expert_ids = route(y, self.experts)
            share = gates if self.gate else jnp.full(gates.shape, 1 / self.experts.per_token)
            load = jax.nn.one_hot(expert_ids, self.experts.count, dtype=jnp.float32) * share[..., None]
            keep = real(name, y.shape[:-1], batch)
            return y, jnp.sum(jnp.sum(load, axis=-2) * keep[..., None], axis=tuple(range(y.ndim - 1)))

        return self.model.apply(params, batch, Hooks(product=product))[1]


def experts(calibration: Calibration, batches: int, kind: Literal["token", "gate"] = "token") -> dict[str, Array]:
    """How much the data uses each routed expert: ``{"layers/mlp/router": [L, E]}``, each layer's sum 1.

    ``token``: the share of tokens sent to it, count / k; ``gate``: its mean gate value, zero where not chosen; both over
    all real tokens (ESFT, Wang et al. 2024, arXiv:2407.01906, who average over samples of one length). Their script
    divides by sums over layers instead of experts; this does not.
    """
    # A classifier holds the decoder as its `backbone`.
    config = getattr(hookable(calibration).config, "backbone", calibration.model.config)
    mixture = getattr(config, "experts", None)
    if mixture is None:
        raise ValueError(f"this {config.family!r} model has no experts to score")
    if kind not in ("token", "gate"):
        raise ValueError(f"kind is {kind!r}; choose one of token, gate")
    loads = calibration.sums(_Routing(calibration.model, mixture, kind == "gate"), batches)
    # Shares of a layer: the sum over experts is the number of tokens, or of their gate values.
    return {name: x / jnp.sum(x, axis=-1, keepdims=True) for name, x in loads.items()}


def until(scores: Any, p: float) -> np.ndarray:
    """Bool mask like ``scores[..., E]``: of each row the largest, until their sum reaches the share ``p`` of the row's.

    At least one; none that scores 0; ties go to the lower index. Scores are non-negative, p in (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p is {p}; it is a share of the total, above 0 and at most 1")
    # float64 on the host: sums of many small shares decide where to stop.
    scores = np.asarray(scores, np.float64)
    if (scores < 0).any() or not (total := scores.sum(-1, keepdims=True)).all():
        raise ValueError("scores that are cumulated are not negative, and not all zero in a row")
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    before = np.concatenate([np.zeros_like(total), np.cumsum(ranked, axis=-1)[..., :-1]], axis=-1)
    # Rounding must not add one more where the sum already is the share p.
    reached = (before < p * total * (1 - 1e-12)) & (ranked > 0)
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, reached, axis=-1)
    return mask


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """Residual values of each row, ``[L, B, D]``, and the target ``[B]``; then sums of their moments about ``means``."""

    model: Any
    target: Callable[[Any, Any], Array]
    site: str
    last: bool

    def __call__(self, params: Any, batch: Any, means: Any = None) -> Any:
        def value(name: str, h: Array, state: Any) -> tuple[Array, Any]:
            if name != self.site:
                return h, None
            keep = real(name, h.shape[:-1], batch)
            # One-hot at the last real token; rows without any have keep 0 everywhere.
            if self.last:
                keep = keep * (
                    jnp.arange(h.shape[1]) == jnp.max(jnp.where(keep > 0, jnp.arange(h.shape[1]), 0), 1)[:, None]
                )
            total = jnp.einsum("btd,bt->bd", h.astype(jnp.float32), keep)
            # Rows of padding alone divide by 1, and their weight is 0.
            return h, total / jnp.maximum(jnp.sum(keep, axis=1), 1.0)[:, None]

        outputs, reads = self.model.apply(params, batch, Hooks(value=value))
        if self.site not in reads:
            raise ValueError(f"the model has no site {self.site!r}")
        h, y, w = reads[self.site], self.target(outputs, batch).astype(jnp.float32), rows(batch)
        if means is None:
            return jnp.einsum("lbd,b->ld", h, w), jnp.sum(w * y), jnp.sum(w)
        # About the means, in a second pass: E[x^2] - E[x]^2 cancels in float32.
        h, y = h - means[0][:, None], y - means[1]
        return jnp.einsum("lbd,b->ld", h * h, w), jnp.einsum("lbd,b->ld", h, w * y), jnp.sum(w * y * y)


def correlation(
    calibration: Calibration,
    target: Callable[[Any, Any], Array],
    batches: int,
    site: str = "layers/in",
    pool: Literal["mean", "last"] = "mean",
) -> Array:
    """How each layer's residual values go with a number known of each example: float32 ``[L]`` in [0, 1].

    The root mean square, over the D features of ``site``, of their Pearson correlation with ``target(outputs, batch)
    [B]`` (say, the prior log-probability of the answer, from the batch), over the rows of ``batches``. pool: a row's
    value is the mean over its real tokens, or that of the last one. A feature that never varies counts 0. It stands for
    the layer localisation that picks what to fine-tune in Zhang et al. 2025, arXiv:2504.12585, whose own statistic the
    abstract does not give.
    """
    if pool not in ("mean", "last"):
        raise ValueError(f"pool is {pool!r}; choose one of mean, last")
    compute = _Pooled(hookable(calibration), target, site, pool == "last")
    h, y, count = calibration.sums(compute, batches)
    squares, products, square = calibration.sums(compute, batches, (h / count, y / count))
    if float(square) <= 0:
        raise ValueError("the target is the same for all examples, so nothing correlates with it")
    # Rounding leaves a little variance in features that are constant.
    varies = squares > 1e-12 * jnp.max(squares)
    r2 = jnp.where(varies, products**2 / jnp.where(varies, squares * square, 1.0), 0.0)
    return jnp.sqrt(jnp.mean(r2, axis=-1))
