"""Decoding with a cache of keys and values: the layers are those of training, run in a scope that remembers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft.kernels.attention import Mask, softmax
from jft.models.core import Execution, Model, Params, Runs, Scope, rows_over_devices
from jft.models.decoder import DecoderConfig
from jft.models.rope import Rope
from jft.models.split import cut, length

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, of G heads each.

    k, v: for each stack of n layers an array ``[n, B, G, S, K]``, with room for S tokens of a row; for a layer apart one
    ``[B, G, S, K]``, as XLA's CPU backend copies what it updates in one shape and reads in another. segments int32
    ``[B, S]``: 1 for a token, 0 for padding and what is not there yet. filled int32 ``[]``: columns with a token or padding,
    the same in all rows, which are padded on the left, so that a step writes one column.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    segments: Array
    filled: Array


# What a layer computes from one input, as its parts are called: the first is asked for first.
FUSED = {"attn": ("q", "k", "v"), "mlp": ("up", "gate")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fused:
    """Matrices ``[D, N]`` side by side, which one product takes; widths: their columns. They stand in place of the first."""

    w: Array
    widths: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """A matrix of a :class:`Fused` product: the one of number ``index``."""

    index: int = dataclasses.field(metadata={"static": True})


def fused(params: Params) -> Params:
    """``params`` of :func:`layer_stacks` in which queries, keys and values, and gate and up, are one product each.

    A processor takes them sooner as one: a step of few rows reads weights, and begins products, more than it computes. Where
    one of them has a form of its own (a change beside it), they stay as they are.
    """
    return {**params, "layers": tuple(map(_fused, params["layers"]))}


def _fused(layer: Params) -> Params:
    layer = dict(layer)
    for block, names in FUSED.items():
        parts = [layer[block].get(name) for name in names]
        if all(part is not None and isinstance(part["w"], jax.Array) for part in parts) and _equal(
            part.keys() for part in parts
        ):
            joined = {key: jnp.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}
            first = joined | {"w": Fused(joined["w"], tuple(part["w"].shape[-1] for part in parts))}
            rest = {name: {"w": Part(i)} for i, name in enumerate(names[1:], 1)}
            layer[block] = {**layer[block], names[0]: first, **rest}
    return layer


def _equal(values: Iterable[Any]) -> bool:
    first, *others = values
    return all(other == first for other in others)


def has_cache(model: Any, size: int) -> bool:
    """Whether rows of ``size`` tokens of this model can be continued from a cache.

    Not with memory layers, and not where rotary frequencies change with the length of a row (``dynamic`` and ``longrope``
    beyond the length of pretraining): keys in a cache would have turned by those of a shorter one.
    """
    config = getattr(model, "config", None)
    return isinstance(config, DecoderConfig) and not config.memory and not _frequencies_change(config, size)


def _frequencies_change(config: DecoderConfig, size: int) -> bool:
    def changes(rope: Rope | None) -> bool:
        if rope is None or rope.kind not in ("dynamic", "longrope"):
            return False
        original = rope.original_positions if rope.kind == "longrope" else None
        return size > (original or config.max_positions)

    return changes(config.rope) or changes(config.local_rope)


def layer_stacks(params: Params, each: bool) -> dict[str, Any]:
    """``params`` with a tuple of stacks under ``layers``, as :func:`decode` takes it.

    each: every layer apart. XLA's CPU backend copies a layer's weights out of a stack whenever a loop reads them, which
    costs as much as the product with one row; elsewhere a scan over the whole stack compiles sooner and copies nothing.
    """
    layers = params["layers"]
    runs = [x for x in jax.tree.leaves(layers, is_leaf=_is_runs) if _is_runs(x)]
    sizes = (1,) * length(layers) if each else runs[0].sizes if runs else (length(layers),)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [cut(layers, start, start + n) for start, n in zip(starts, sizes, strict=True)]
    whole = lambda x: x.parts[0] if _is_runs(x) else x
    return {**params, "layers": tuple(jax.tree.map(whole, piece, is_leaf=_is_runs) for piece in pieces)}


def _is_runs(x: Any) -> bool:
    return isinstance(x, Runs)


def prefill(
    model: Model, params: Params, tokens: Array, segments: Array, size: int, each: bool = False
) -> tuple[Array, Cache]:
    """Logits ``[B, V]`` after the last column of ``tokens [B, T]``, and a cache of ``size`` columns that holds them.

    segments ``[B, T]``: 0 where a row is padded, on its left. each: the cache is for params with every layer apart.
    """
    config: DecoderConfig = model.config
    B, T = tokens.shape
    # As a scan in any case: many rows make little of a copy, and every length of prompts is compiled.
    params = layer_stacks(params, each=False)
    stacks = [length(stack) for stack in params["layers"]]
    empty = tuple(
        _spread(jnp.zeros((n, B, config.kv_heads, size, config.head_size), model.execution.dtype)) for n in stacks
    )
    cache = Cache(empty, empty, jnp.pad(segments, ((0, 0), (0, size - T))), jnp.zeros((), jnp.int32))
    logits, cache = _run(model, params, {"tokens": tokens, "segments": segments}, cache, T)
    return logits, _layers_apart(cache) if each else cache


def _layers_apart(cache: Cache) -> Cache:
    apart = lambda stacks: tuple(stack[i] for stack in stacks for i in range(stack.shape[0]))
    return dataclasses.replace(cache, k=apart(cache.k), v=apart(cache.v))


def decode(model: Model, params: Params, token: Array, cache: Cache) -> tuple[Array, Cache]:
    """Logits ``[B, V]`` after one more ``token [B]`` of each row, and the cache with it. params: by :func:`layer_stacks`."""
    positions = jnp.sum(cache.segments > 0, axis=1, keepdims=True, dtype=jnp.int32)
    here = jnp.ones_like(positions)
    segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, here, cache.filled, axis=1)
    batch = {"tokens": token[:, None], "segments": here, "positions": positions}
    return _run(model, params, batch, dataclasses.replace(cache, segments=segments), 1)


def _run(model: Model, params: Params, batch: dict[str, Array], cache: Cache, columns: int) -> tuple[Array, Cache]:
    scope = _CachedScope(model.execution, cache)
    h = model.config.hidden_states(scope, params, batch)
    logits = model.config.logits(scope, params, rows_over_devices(h[:, -1:]))[:, 0]
    return logits, dataclasses.replace(scope.cache, filled=cache.filled + columns)


def _spread(cache: Array) -> Array:
    """An empty cache ``[n, B, G, S, K]``, its rows and heads over the devices of the mesh in whose context it is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
    heads = mesh.shape.get("tensor", 1)
    if not rows and heads == 1:
        return cache
    spec = PartitionSpec(None, rows or None, "tensor" if heads > 1 and cache.shape[2] % heads == 0 else None)
    return jax.lax.with_sharding_constraint(cache, spec)


class _CachedScope(Scope):
    """The scope of all layers: hands each its part of the cache, and keeps what they make of it."""

    def __init__(self, execution: Execution, cache: Cache):
        super().__init__(execution)
        self.cache = cache

    def layers(
        self, prefix: str, body: Callable[[Scope, Array, Params, Any], Array], h: Array, params: Params, xs: Any = None
    ) -> Array:
        def step(carry: tuple[Array, Array, Array], sliced: Any) -> tuple[tuple[Array, Array, Array], None]:
            h, k, v = carry
            layer, layer_params, layer_xs = sliced
            scope = _LayerScope(self.execution, self.cache, k, v, layer)
            return (body(scope, h, layer_params, layer_xs), scope.k, scope.v), None

        keys: list[Array] = []
        values: list[Array] = []
        first = 0
        for stack, k, v in zip(params, self.cache.k, self.cache.v, strict=True):
            count = k.shape[0] if k.ndim == 5 else 1
            sliced = (jnp.arange(count), stack, cut(xs, first, first + count))
            if count == 1:
                # Without a loop, whose body would get its weights as copies.
                layer = 0 if k.ndim == 5 else None
                (h, k, v), _ = step((h, k, v), (layer, *jax.tree.map(lambda x: x[0], sliced[1:])))
            else:
                # In the carry, which loops update in place; as outputs every layer's whole cache would be copied.
                (h, k, v), _ = jax.lax.scan(step, (h, k, v), sliced)
            keys, values, first = [*keys, k], [*values, v], first + count
        self.cache = dataclasses.replace(self.cache, k=tuple(keys), v=tuple(values))
        return h


class _LayerScope(Scope):
    """The scope of one layer: its attention writes its keys and values into the cache, and reads all that are there."""

    def __init__(self, execution: Execution, cache: Cache, k: Array, v: Array, layer: Array | int | None):
        super().__init__(execution)
        self.segments, self.filled, self.k, self.v, self.layer = cache.segments, cache.filled, k, v, layer
        self._parts: list[Array] = []

    def dot(self, name: str, x: Array, params: Params, key: str = "w") -> Array:
        w = params[key]
        if isinstance(w, Part):
            return self._parts[w.index]
        if not isinstance(w, Fused):
            return super().dot(name, x, params, key)
        y = super().dot(name, x, {**params, key: w.w}, key)
        self._parts = jnp.split(y, list(itertools.accumulate(w.widths[:-1])), axis=-1)
        return self._parts[0]

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Mask | None,
        *,
        scale: float | Array,
        softcap: float | None = None,
        bias: Array | None = None,
    ) -> Array:
        self.k, self.v = self._put(self.k, k), self._put(self.v, v)
        if q.shape[1] > 1:
            # A whole prompt, before which the cache is empty: it sees itself alone.
            return super().attention(q, k, v, mask, scale=scale, softcap=softcap, bias=bias)
        keys, values = self._of_layer(self.k), self._of_layer(self.v)
        return _attend(q, keys, values, self._visible(mask), scale, softcap)

    def _put(self, cache: Array, new: Array) -> Array:
        new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
        if self.layer is None:
            return jax.lax.dynamic_update_slice(cache, new, (0, 0, self.filled, 0))
        return jax.lax.dynamic_update_slice(cache, new[None], (self.layer, 0, 0, self.filled, 0))

    def _of_layer(self, cache: Array) -> Array:
        return cache if self.layer is None else jax.lax.dynamic_index_in_dim(cache, self.layer, keepdims=False)

    def _visible(self, mask: Mask | None) -> Array:
        """Which columns the newest one sees, bool ``[B, S]``."""
        distance = self.filled - jnp.arange(self.segments.shape[1])
        visible = distance >= 0
        if mask is not None and mask.window is not None:
            visible &= distance < mask.window
        return visible & (self.segments > 0)


def _attend(q: Array, k: Array, v: Array, visible: Array, scale: float | Array, softcap: float | None) -> Array:
    """Attention of one query ``q [B, 1, H, K]`` to k and v ``[B, G, S, K]``: as :func:`jft.kernels.attention.attention`."""
    B, _, H, K = q.shape
    G = k.shape[1]
    precise = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bgrk,bgsk->bgrs", q.reshape(B, G, H // G, K), k, preferred_element_type=precise) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(precise).min))
    out = jnp.einsum("bgrs,bgsk->bgrk", weights.astype(v.dtype), v, preferred_element_type=precise)
    return out.reshape(B, 1, H, K).astype(v.dtype)
