"""`Sampling`: how the next token is drawn from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The next token: the most probable one at ``temperature`` 0, else a draw from ``softmax(logits / temperature)``.

    Of the tokens only those take part, in this order, that are among the ``top_k`` most probable (0: all); whose more
    probable ones sum to less than ``top_p`` (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); and that have at
    least ``min_p`` of the probability of the most probable one (Nguyen et al. 2024, arXiv:2407.01082).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """``ValueError`` for values out of range, and for filters where nothing is drawn."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0 (0: the most probable token)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1: all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 (all tokens) to 1")
        if not self.temperature and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0):
            raise ValueError("top_k, top_p and min_p choose among tokens to draw; set temperature above 0 as well")

    def draw(self, logits: Array, keys: Array) -> Array:
        """Tokens int32 ``[B]`` for ``logits [B, V]``, each row by a key of its own."""
        if not self.temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, self.filtered(logits)).astype(jnp.int32)

    def filtered(self, logits: Array) -> Array:
        """``logits / temperature`` in float32, minus infinity where a token does not take part."""
        logits = logits.astype(jnp.float32) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            p = jax.nn.softmax(ordered, axis=-1)
            # What stands before a token counts, so that the most probable one always takes part.
            takes_part = jnp.cumsum(p, axis=-1) - p < self.top_p
            least = jnp.min(jnp.where(takes_part, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.min_p > 0:
            least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits
