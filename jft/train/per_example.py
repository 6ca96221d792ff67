"""Sums over examples of powers of their own gradients, exact.

Of a product ``y = x w`` an example's gradient is ``x_b^T dy_b``, so one backward pass over the batch suffices: where it
would add them up over the batch, it adds up their powers (:class:`Powers`), and no more than one layer's are ever held.
All other weights get a gradient for each example by ``vmap``, a few examples at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jft import parallel, tree
from jft.dot import dot
from jft.models.core import Hooks, is_jft_model
from jft.train import feed

if TYPE_CHECKING:
    from jft.train.calibration import Setting

Array = jax.Array
Weights = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Each:
    """A power of the gradient of each example. whole: of the sum over its tokens, not their mean."""

    sampled: bool
    power: int
    whole: bool

    def loss(self, objective: Any, key: Array, outputs: Any, example: Any) -> Array:
        """The loss of a batch of one row, whose targets may be drawn by ``key``."""
        if self.sampled:
            value: Array = objective.sampled_loss(key, outputs, example)[0]
        else:
            value = objective.loss(outputs, example)[0]
        if self.whole:
            return value
        # An example in which nothing counts is left out later; its gradient must be finite until then.
        weight = objective.weight(example)
        return value / jnp.where(weight > 0, weight, 1.0)

    def measure(self, g: Array) -> Array:
        return jnp.square(g) if self.power == 2 else jnp.abs(g)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Powers:
    """The weight ``w[I, O]`` of a product with ``x[B, ..., I]``, whose "gradient" is ``sum over b of |x_b^T dy_b|^power``."""

    w: Array
    how: Each = dataclasses.field(metadata={"static": True})
    mesh: Any = dataclasses.field(metadata={"static": True})

    # The model multiplies through `jft.dot`, so a weight of this class replaces the backward pass without changing the model.
    def __jft_dot__(self, x: Array) -> Array:
        return _dot(self.how, self.mesh, x, self.w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
# custom_vjp gives the cotangent of `w` another meaning; autodiff only asks that its shape and dtype be those of w.
def _dot(how: Each, mesh: Any, x: Array, w: Array) -> Array:
    return dot(x, w)


def _forward(how: Each, mesh: Any, x: Array, w: Array) -> tuple[Array, Any]:
    return dot(x, w), (x, w)


def _backward(how: Each, mesh: Any, saved: Any, dy: Array) -> tuple[Array, Array]:
    x, w = saved
    # Activations keep their true gradient, or layers below would get a wrong one.
    dx = jax.vjp(lambda x: dot(x, w), x)[1](dy)[0]
    # All axes between rows and features are tokens, over which an example's gradient sums.
    rows, inner = (z.reshape(z.shape[0], -1, z.shape[-1]) for z in (x, dy))
    # gcd: a batch that does not divide over the mesh goes through in smaller parts.
    together = math.gcd(len(rows), parallel.batch_shards(mesh))

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        # float32 before squaring: the square of a bfloat16 gradient would lose most of its bits.
        g = jnp.einsum("bti,bto->bio", *part, preferred_element_type=jnp.float32)
        return total + how.measure(g), None

    # One example on each device at a time, and nothing crosses devices until all are added.
    total = jnp.zeros((together, *w.shape), jnp.float32)
    if mesh is not None and together > 1:
        total = jax.lax.with_sharding_constraint(
            total, NamedSharding(mesh, PartitionSpec(*parallel.batch_sharding(mesh).spec))
        )
    total = jax.lax.scan(add, total, parallel.microbatches((rows, inner), len(rows) // together, mesh))[0]
    return dx, jnp.sum(total, axis=0).astype(w.dtype)


_dot.defvjp(_forward, _backward)


def tapped(model: Any, setting: Setting, rest: Weights, chosen: Weights, batch: Any) -> tuple[str, ...]:
    """The candidates whose gradients of single examples one backward pass gives: matrices of products that keep rows apart.

    Experts do not: they read the tokens of all rows in one axis.
    """
    if not is_jft_model(model):
        return ()

    def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
        return dot(x, w), x

    # The hook gives the input of each product, whose shape says whether rows are still apart.
    hooks = Hooks(product=product)
    # Shapes alone; nothing is computed.
    reads = jax.eval_shape(lambda: model.apply(setting.tree(rest, chosen), batch, hooks=hooks)[1])
    size, taps = feed.rows(batch), []
    for path, w in chosen.items():
        x, lead = reads.get(path.removesuffix("/w")), tree.lead(path, w.ndim, True)
        matrices = path.endswith("/w") and "/experts/" not in path and w.ndim - lead == 2
        # The lead axis L is the scan's: what it reads has one entry for each layer.
        if matrices and x is not None and x.ndim - lead in (2, 3) and x.shape[lead] == size:
            taps.append(path)
    return tuple(taps)


def squares(
    setting: Setting, how: Each, taps: tuple[str, ...], total: Weights, seen: Array, rest: Weights, chosen: Weights,
    batch: Any, limit: Array, key: Array,
) -> tuple[Weights, Array]:  # fmt: skip
    """``total`` with those of the examples of ``batch`` added, of the ones that count up to ``limit`` in all.

    seen: how many were before. taps: candidates that :func:`tapped` gave. Returns how many are seen now, as well.
    """
    rows = _Rows(batch)
    weights = rows.map(lambda example: setting.objective.weight(example))
    # By a mask, not by cutting the batch: its shape must stay that of the compiled program.
    mask = (weights > 0) & (seen + jnp.cumsum(weights > 0, dtype=jnp.int32) <= limit)
    products = {p: w for p, w in chosen.items() if p in taps}
    others = {p: w for p, w in chosen.items() if p not in taps}
    # Indices go along, so that a row draws the same noise in whatever part it comes.
    each = (batch, mask, jnp.arange(rows.size))
    out: Weights = {}
    if products:
        held = {**rest, **tree.cast(others, setting.dtype)}
        one = functools.partial(_in_one_pass, setting, how, products, held, key)
        out |= _over_parts(setting, one, {p: total[p] for p in products}, each, setting.accumulate)
    if others:
        held = {**rest, **tree.cast(products, setting.dtype)}
        one = functools.partial(_one_by_one, setting, how, others, held, key, rows)
        # At most `chunk` at a time, in parts of one size.
        parts = rows.size // math.gcd(rows.size, setting.chunk)
        out |= _over_parts(setting, one, {p: total[p] for p in others}, each, parts)
    return out, seen + jnp.sum(mask, dtype=jnp.int32)


def _over_parts(setting: Setting, one: Callable[..., Weights], total: Weights, each: Any, parts: int) -> Weights:
    """``total`` plus ``one(batch, mask, index)`` of each of so many parts of the batch."""

    def add(total: Weights, part: Any) -> tuple[Weights, None]:
        return setting.laid({p: total[p] + g for p, g in one(*part).items()}), None

    if parts == 1:
        return add(total, each)[0]
    return jax.lax.scan(add, total, parallel.microbatches(each, parts, setting.mesh))[0]


class _Rows:
    """A batch as its examples. What is a scalar in it belongs to each."""

    def __init__(self, batch: Any):
        self.batch, self.size = batch, feed.rows(batch)
        self.axes = jax.tree.map(lambda x: 0 if x.ndim else None, batch)
        # Of the batch: under vmap an example's array and a scalar both may have no axis.
        self._ranks = jax.tree.map(lambda x: x.ndim, batch)

    def single(self, example: Any) -> Any:
        """An example, without the batch axis, as a batch of one row."""
        return jax.tree.map(lambda x, n: x[None] if n else x, example, self._ranks)

    def map(self, function: Callable[..., Any], *values: Any) -> Any:
        """``function(example as a batch of one row, *value)`` of every example."""
        one = lambda example, *rest: function(self.single(example), *rest)
        return jax.vmap(one, in_axes=(self.axes, *(0,) * len(values)))(self.batch, *values)


def _in_one_pass(
    setting: Setting, how: Each, chosen: Weights, rest: Weights, key: Array, batch: Any, mask: Array, index: Array
) -> Weights:
    rows = _Rows(batch)

    def loss(chosen: Weights) -> Array:
        flat = {**rest, **{p: Powers(w, how, setting.mesh) for p, w in chosen.items()}}
        outputs = setting.apply(jax.tree.unflatten(setting.structure, [flat[p] for p in setting.order]), batch)

        def one(example: Any, outputs: Any, index: Array) -> Array:
            single = jax.tree.map(lambda x: x[None], outputs)
            return how.loss(setting.objective, jax.random.fold_in(key, index), single, example)

        # Examples that do not count get a zero cotangent, hence zero powers.
        return jnp.sum(jnp.where(mask, rows.map(one, outputs, index), 0.0))

    # In float32, not the run's dtype: sums of powers come back in the dtype of the weight. The product casts it.
    return jax.grad(loss)({p: w.astype(jnp.float32) for p, w in chosen.items()})


def _one_by_one(
    setting: Setting, how: Each, chosen: Weights, rest: Weights, key: Array, rows: _Rows, batch: Any, mask: Array,
    index: Array,
) -> Weights:  # fmt: skip
    def one(example: Any, mask: Array, index: Array) -> Weights:
        example = rows.single(example)

        def loss(chosen: Weights) -> Array:
            outputs = setting.apply(setting.tree(rest, chosen), example)
            return how.loss(setting.objective, jax.random.fold_in(key, index), outputs, example)

        gradients = jax.grad(loss)(chosen)
        # After the power, so that a NaN in the gradient of an example that does not count is dropped too.
        return {p: jnp.where(mask, how.measure(g.astype(jnp.float32)), 0.0) for p, g in gradients.items()}

    # Of a few examples at a time: each has a gradient of its own, as large as these candidates together.
    powers = jax.vmap(one, in_axes=(rows.axes, 0, 0))(batch, mask, index)
    return {p: jnp.sum(g, axis=0) for p, g in powers.items()}
