"""`Model`: an architecture's configuration bound to its pure functions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jft import tree
from jft.models.core import Execution, Hooks, Params, Scope


class Architecture(Protocol):
    """What a family (decoder, encoder, vision, clip, seq2seq) supplies: pure functions of its frozen config."""

    def init(self, key: jax.Array, dtype: Any) -> dict: ...

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Model:
    """A pure function of a parameter pytree: ``model.apply(params, batch) -> outputs``.

    config: the architecture's frozen, hashable description, which is also its code (:class:`Architecture`).
    execution: how it runs (activation dtype, remat, unrolling); ``model.with_(remat="full")`` changes it.
    A model is hashable, so jitted functions that close over equal models are compiled once.
    """

    config: Any
    execution: Execution = Execution()

    def with_(self, **execution: Any) -> Model:
        """The same model run another way: any field of :class:`Execution`."""
        return dataclasses.replace(self, execution=dataclasses.replace(self.execution, **execution))

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """Random parameters in ``dtype``, drawn per path, so that any device mesh gives the same ones."""
        return self.config.init(key, dtype)

    def abstract(self, dtype: Any = jnp.float32) -> dict:
        """Shapes and dtypes of the parameters; nothing is allocated."""
        return jax.eval_shape(functools.partial(self.config.init, dtype=dtype), jax.random.key(0))

    def apply(self, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Outputs for a batch: an array ``tokens[B, T]`` or a dict (see the architecture's ``forward``).

        With ``hooks``, ``(outputs, reads)``.
        """
        return self.config.forward(self.execution, params, batch, hooks)

    @property
    def product_head(self) -> str | None:
        """The site behind which the model is one product with its head's weights, :meth:`head`; None where it is more."""
        return getattr(self.config, "product_head", None)

    def head(self, params: Params, h: jax.Array) -> jax.Array:
        """Outputs from the value at the site :attr:`product_head`."""
        return self.config.logits(Scope(self.execution), params, h)

    def linear_paths(self, params: Params | None = None) -> tuple[str, ...]:
        """Paths of the weight matrices inside the layers: what LoRA and sparse methods target by default."""
        flat = tree.flatten(params if params is not None else self.abstract())
        return tuple(p for p in flat if p.endswith("/w") and tree.stack_of(p) is not None and "router" not in p)
