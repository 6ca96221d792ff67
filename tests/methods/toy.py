"""The smallest model built as jft's own are: stacked layers, named products, a residual stream."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.models import Model
from jft.models.core import Scope, layer_norm


@dataclasses.dataclass(frozen=True)
class Toy:
    layers: int = 4
    width: int = 8
    out: int = 5
    family: str = "toy"

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def init(self, key, dtype=jnp.float32):
        shapes = {
            "layers/norm/scale": (self.layers, self.width),
            "layers/norm/bias": (self.layers, self.width),
            "layers/up/w": (self.layers, self.width, 2 * self.width),
            "layers/up/b": (self.layers, 2 * self.width),
            "layers/down/w": (self.layers, 2 * self.width, self.width),
            "head/w": (self.width, self.out),
        }
        draw = {p: jax.random.normal(tree.key_for(key, p), s, dtype) * s[-1] ** -0.5 for p, s in shapes.items()}
        return tree.unflatten(draw)

    def forward(self, execution, params, batch, hooks=None):
        scope = Scope(execution, hooks)

        def body(scope, h, p, _):
            h = scope.site("layers/in", h)
            x = layer_norm(h, p["norm"], 1e-5)
            return h + scope.dot("layers/down", jnp.tanh(scope.dot("layers/up", x, p["up"])), p["down"])

        h = scope.layers("layers", body, batch["x"].astype(execution.dtype), params["layers"])
        y = scope.dot("head", scope.site("final", h), params["head"])
        return y if hooks is None else (y, scope.reads)


def model(**kw):
    return Model(Toy(**kw))


def batch(rows=3, width=8):
    return {"x": np.random.default_rng(7).normal(size=(rows, width)).astype(np.float32)}


def shapes(**kw):
    """``{path: shape}`` of its parameters, which is all that a plan looks at."""
    return tree.flatten(jax.eval_shape(lambda: model(**kw).init(jax.random.key(0))))
