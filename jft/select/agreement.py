"""Which units of a model its knowledge rests on: those that decide whether two noisy passes agree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jft.dot import dot
from jft.models.core import Hooks
from jft.select.activations import _hookable, real
from jft.select.probe import Probe

Array = jax.Array
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


def importance(probe: Probe, batches: int, rate: float = 0.1) -> dict[str, Array]:
    """Importance in [0, 1) of each layer's units to what the model knows: ``{"layers/attn/heads": [L, H], ...}``.

    Also ``layers/attn/kv_heads``, of a group of query heads the largest, ``layers/mlp/channels [L, F]`` and
    ``layers/mlp/outputs [L, D]``. Of the divergence ``KL(p || p')`` between the predictions of two passes with noise, a mean
    over real tokens, the gradient in a gate of 1 on each unit is averaged over ``batches``; its size is standardised over the
    units of a layer, z, and importance is ``|tanh z|`` (CoFiTune, Zhang et al. 2024, arXiv:2404.10306, and its code; as Ke
    et al. 2023, arXiv:2302.03241). Their noise is the model's dropout; here it is dropout at ``rate`` on the embeddings and
    on what each block adds to the residual stream.
    """
    model = _hookable(probe)
    config = getattr(model.config, "backbone", model.config)
    if not 0 < rate < 1:
        raise ValueError(f"dropout {rate} is not between 0 and 1")
    down, heads = probe.params.get("layers/mlp/down/w"), getattr(config, "heads", 0)
    if down is None or not heads:
        raise ValueError("importance of units is for models with one stack of layers of attention and a plain MLP")
    layers, channels, width = down.shape
    ones = lambda size: jnp.ones((layers, size), jnp.float32)
    gates = {"layers/attn/o": {"heads": ones(heads)}}
    gates["layers/mlp/down"] = {"channels": ones(channels), "outputs": ones(width)}
    compute = _Gradients(model, rate, layers, heads)
    found, count = probe.sums(compute, batches, jax.random.fold_in(probe.key, 1), gates)
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
