"""CoFiTune: modules in a range of layers, found by search, and a soft mask of the units that matter to the base."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.dot import dot
from jft.methods.layer_search import better, stacks
from jft.methods.parametrise import InPlace
from jft.methods.patterns import Patterns, patterns
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.methods.update_rules import Rule
from jft.models.core import Hooks
from jft.select.activations import hookable, real
from jft.select.calibration import Calibration
from jft.select.layers import Between, Choice, Table, table_of

Array = jax.Array
# The pattern of a weight in its layer, the unit whose importance scales it, and the axis of the unit, from the end.
UNITS = (
    (r"mlp/(?:up|gate)/(?:w|b)", "mlp/channels", -1),
    (r"mlp/down/(?:w|b)", "mlp/outputs", -1),
    (r"attn/q/(?:w|b)", "attn/heads", -1),
    (r"attn/(?:k|v)/(?:w|b)", "attn/kv_heads", -1),
    (r"attn/o/w", "attn/heads", -2),
)
SITES = ("embed", "layers/attn/out", "layers/mlp/out")


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Gradients in gates of 1 of the divergence between two passes with different noise, and 1, of one batch."""

    model: Any
    rate: float
    layers: int
    heads: int

    def __call__(self, params: Any, batch: Any, key: Array, gates: Any) -> Any:
        key = jax.random.fold_in(key, _fingerprint(batch))
        found = jax.grad(lambda gates: self._divergence(params, batch, key, gates))(gates)
        return found, jnp.float32(1)

    def _divergence(self, params: Any, batch: Any, key: Array, gates: Any) -> Array:
        one, other = (self._outputs(params, batch, k, gates) for k in jax.random.split(key))
        p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (one, other))
        keep = real("", p.shape[:-1], batch)
        each = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(each * keep) / jnp.maximum(jnp.sum(keep), 1.0)

    def _outputs(self, params: Any, batch: Any, key: Array, gates: Any) -> Array:
        def product(name: str, x: Array, w: Any, gate: Any) -> tuple[Array, Any]:
            if name == "layers/attn/o":
                heads = x.reshape(*x.shape[:-1], self.heads, -1) * gate["heads"][:, None].astype(x.dtype)
                return dot(heads.reshape(x.shape), w), None
            if name == "layers/mlp/down":
                y = dot(x * gate["channels"].astype(x.dtype), w)
                return y * gate["outputs"].astype(y.dtype), None
            return dot(x, w), None

        def value(name: str, h: Array, key: Any) -> tuple[Array, Any]:
            if name not in SITES:
                return h, None
            keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - self.rate, h.shape)
            return jnp.where(keep, h / (1 - self.rate), 0).astype(h.dtype), None

        keys = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(3)]
        layered = [jax.random.key_data(jax.random.split(jax.random.wrap_key_data(k), self.layers)) for k in keys[1:]]
        noise = dict(zip(SITES, [keys[0], *layered], strict=True))
        return self.model.apply(params, batch, Hooks(product, value, {**gates, **noise}))[0]


def _fingerprint(batch: Any) -> Array:
    """A number that batches differ in, so that each has noise of its own."""
    leaves = [x for x in jax.tree.leaves(batch) if x.ndim]
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) if x.dtype.itemsize == 4 else x for x in leaves]
    return sum((jnp.sum(b.astype(jnp.uint32)) for b in bits), jnp.uint32(0))


def importance(calibration: Calibration, batches: int, rate: float = 0.1) -> dict[str, Array]:
    """Importance in [0, 1) of each layer's units to what the model knows: ``{"layers/attn/heads": [L, H], ...}``.

    Also ``layers/attn/kv_heads``, of a group of query heads the largest, ``layers/mlp/channels [L, F]`` and
    ``layers/mlp/outputs [L, D]``. Of the divergence ``KL(p || p')`` between the predictions of two passes with noise, a mean
    over real tokens, the gradient in a gate of 1 on each unit is averaged over ``batches``; its size is standardised over the
    units of a layer, z, and importance is ``|tanh z|`` (CoFiTune, Zhang et al. 2024, arXiv:2404.10306, and its code; as Ke
    et al. 2023, arXiv:2302.03241). Their noise is the model's dropout; here it is dropout at ``rate`` on the embeddings and
    on what each block adds to the residual stream.
    """
    model = hookable(calibration)
    config = getattr(model.config, "backbone", model.config)
    if not 0 < rate < 1:
        raise ValueError(f"dropout {rate} is not between 0 and 1")
    down, heads = calibration.params.get("layers/mlp/down/w"), getattr(config, "heads", 0)
    if down is None or not heads:
        raise ValueError("importance of units is for models with one stack of layers of attention and a plain MLP")
    layers, channels, width = down.shape
    ones = lambda size: jnp.ones((layers, size), jnp.float32)
    gates = {"layers/attn/o": {"heads": ones(heads)}}
    gates["layers/mlp/down"] = {"channels": ones(channels), "outputs": ones(width)}
    compute = _Gradients(model, rate, layers, heads)
    found, count = calibration.sums(compute, batches, jax.random.fold_in(calibration.key, 1), gates)
    out = {
        "layers/attn/heads": _standard(found["layers/attn/o"]["heads"] / count),
        "layers/mlp/channels": _standard(found["layers/mlp/down"]["channels"] / count),
        "layers/mlp/outputs": _standard(found["layers/mlp/down"]["outputs"] / count),
    }
    groups = getattr(config, "kv_heads", heads)
    out["layers/attn/kv_heads"] = jnp.max(out["layers/attn/heads"].reshape(layers, groups, -1), axis=-1)
    return out


def _standard(gradient: Array) -> Array:
    size = jnp.abs(gradient)
    spread = jnp.std(size, axis=-1, keepdims=True)
    return jnp.abs(jnp.tanh((size - jnp.mean(size, axis=-1, keepdims=True)) / jnp.where(spread > 0, spread, 1.0)))


def _unit(path: str) -> tuple[str, int] | None:
    """The name of the unit that scales a weight, and its axis."""
    stack = tree.stack_of(path)
    if stack is None:
        return None
    inside = path.removeprefix(f"{stack}/")
    return next(((f"{stack}/{name}", axis) for pattern, name, axis in UNITS if re.fullmatch(pattern, inside)), None)


@dataclasses.dataclass(frozen=True)
class SoftMask(Rule):
    """Gradients times ``1 - importance`` of the unit they belong to (Zhang et al. 2024, arXiv:2404.10306).

    Columns of up and gate go by the MLP's channel, those of down by the output, columns of q, k, v and rows of o by the head
    (keys and values by the most important query head that reads them); whatever else trains is left alone. Importance:
    :func:`importance`, over ``batches`` with ``dropout``, once, at the base. Memory: ``1 -
    importance`` for each unit.
    """

    batches: int = 8
    dropout: float = 0.1

    def init(self, trained: Mapping[str, Any]) -> Any:
        """Ones."""
        found = {p: _unit(p) for p in trained}
        return {p: jax.tree.map(lambda x, u=u: _ones(x, u[1]), trained[p]) for p, u in found.items() if u}

    def measure(self, plan: Any, calibration: Calibration, memory: Any) -> Any:
        """What the base says of its units."""
        found = importance(calibration, self.batches, self.dropout)
        out = {}
        for path in memory:
            name, axis = _unit(path) or ("", -1)
            shape = calibration.params[path].shape
            units = found[name]
            scale = 1.0 - jnp.repeat(units, shape[axis] // units.shape[1], axis=1)
            dense = jnp.expand_dims(scale, -3 - axis) if len(shape) > 2 else scale
            out[path] = plan.leaves[path].collect(None, dense)
        return out

    def gradient(self, plan: Any, kept: Any, trained: Any, gradient: Any, memory: Any) -> tuple[Any, Any]:
        """The gradient, scaled."""
        scaled = {p: jax.tree.map(jnp.multiply, gradient[p], memory[p]) for p in memory}
        return {**gradient, **scaled}, memory


def _ones(x: Array, axis: int) -> Array:
    """Ones for each unit along ``axis`` of ``x[l, I, O]`` or ``[l, O]``."""
    if x.ndim == 2:
        return jnp.ones_like(x)
    return jnp.ones((x.shape[0], 1, x.shape[2]) if axis == -1 else (x.shape[0], x.shape[1], 1), x.dtype)


@dataclasses.dataclass(frozen=True)
class RangeSearch(Choice):
    """CoFiTune's coarse step: a search over ranges of layers and modules by what tuning them evaluates to.

    Level by level: the ranges that ``parts`` cut the depth into (halves, then quarters) are tried inside the range found
    before, all modules together; then, in that range, each group of ``modules``. Where nothing is better than what the
    level before found, that stays. Every candidate is trained from the base for ``steps``.
    """

    steps: int
    metric: str = "loss"
    parts: tuple[int, ...] = (2, 4)
    modules: tuple[tuple[str, ...], ...] = ()
    from_data = True

    def __call__(self, calibration: Calibration) -> Table:
        lengths = stacks(calibration)
        best = {s: list(range(n)) for s, n in lengths.items()}
        value = -np.inf
        for parts in self.parts:
            cuts = [{s: _part(n, i, parts) for s, n in lengths.items()} for i in range(parts)]
            inside = [c for c in cuts if all(set(c[s]) <= set(best[s]) for s in c)]
            found = [self._worth(calibration, table_of(calibration, c)) for c in inside]
            if found and max(found) > value:
                value, best = max(found), inside[int(np.argmax(found))]
        table = table_of(calibration, best)
        tables = [narrowed(table, group) for group in self.modules]
        found = [self._worth(calibration, t) for t in tables]
        return tables[int(np.argmax(found))] if found and max(found) > value else table

    def _worth(self, calibration: Calibration, table: Table) -> float:
        return better(self.metric, calibration.evaluate(calibration.tuned(self.steps, table=table)))


def _part(length: int, i: int, parts: int) -> list[int]:
    return list(range(length * i // parts, length * (i + 1) // parts))


def narrowed(table: Table, modules: Iterable[str]) -> Table:
    """The rows of a table whose path matches any of ``modules``."""
    found = {p: layers for p, layers in table.items() if any(re.search(m, p) for m in modules)}
    if not found:
        raise ValueError(f"no weight of the chosen layers matches {', '.join(modules)}")
    return found


@register("cofitune", paper="Zhang et al. 2024, arXiv:2404.10306")
def cofitune(
    depth: tuple[float, float] = (0.25, 0.5),
    modules: Patterns = (r"mlp/(up|down)/",),
    search: int = 0,
    metric: str = "loss",
    groups: Sequence[Sequence[str]] = ((r"attn/",), (r"mlp/up/",), (r"mlp/down/",), (r"mlp/(up|down)/",)),
    soft_mask: bool = True,
    batches: int = 8,
    dropout: float = 0.1,
) -> Method:
    """Train the MLP's up and down projections of the second quarter of the layers, gently where units matter to the base.

    depth, modules: what trains, by depth from 0 to 1 and by pattern; the defaults are the paper's example. search: steps
    for each candidate of a search instead, over halves, then quarters of the depth, then ``groups`` of modules, by evaluation
    on the run's ``eval_data`` (give it both the new skill and the old ones: the paper scores their sum). soft_mask: gradients
    are scaled by 1 minus the importance of their unit, found over ``batches`` of the training data (:class:`SoftMask`); the
    paper takes it from two passes with dropout. Models here have none, so its noise is put on the embeddings and on what
    each block adds.
    """
    rule = SoftMask(batches, dropout) if soft_mask else None
    if search:
        found = RangeSearch(search, metric, modules=tuple(map(tuple, groups)))
        return Method(Select((r"(attn|mlp)/(q|k|v|o|up|gate|down)/",), layers=found), InPlace(), rule=rule)
    return Method(Select(patterns(modules), layers=Between(*depth)), InPlace(), rule=rule)
