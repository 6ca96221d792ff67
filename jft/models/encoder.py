"""Bidirectional text encoders: BERT, RoBERTa, DistilBERT."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jft.dot import take
from jft.kernels.attention import Mask
from jft.models import blocks, core
from jft.models.core import Execution, Hooks, Params, Scope, inputs

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A post-norm transformer encoder (Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692).

    ``forward`` maps tokens ``[B, T]`` (and ``segments``, ``positions``, ``token_types``) to hidden states ``[B, T, D]``.
    Tokens see only their own segment. ``position_offset`` is the table's row of position 0 (RoBERTa: padding id + 1), so
    ``positions - position_offset`` tokens fit. ``types`` 0: no token-type embeddings (DistilBERT). ``pooler``: a dense
    layer with tanh over the first token, read by classifiers only.
    """

    family: str = "bert"
    vocab: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    position_offset: int = 0
    types: int = 2
    activation: str = "gelu"
    eps: float = 1e-12
    pooler: bool = True

    # What transformers' classifiers have between the first token and the logits; BERT has its pooler there.
    DENSE: ClassVar[dict[str, str]] = {"roberta": "tanh", "distilbert": "relu"}

    def __post_init__(self) -> None:
        blocks.check_sizes(
            self, vocab=self.vocab, layers=self.layers, heads=self.heads, tokens=self.positions - self.position_offset
        )

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """Random parameters: matrices ``N(0, 1/in)``, tables ``N(0, 0.02^2)``, norms one, biases zero."""
        return blocks.draw(dict(self._leaves()), key, dtype)

    def _leaves(self) -> blocks.Leaves:
        yield from blocks.table("embed", self.vocab, self.width)
        yield from blocks.table("positions", self.positions, self.width)
        if self.types:
            yield from blocks.table("types", self.types, self.width)
        yield from blocks.norm("embed_norm", self.width)
        yield from blocks.layer_leaves("layers", self.layers, self.width, self.hidden)
        if self.pooler:
            yield from blocks.linear("pooler", self.width, self.width)

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Last hidden states ``[B, T, D]``; with hooks, also what they read."""
        scope = Scope(execution, hooks)
        return blocks.finish(scope, self.outputs(scope, params, batch))

    def outputs(self, scope: Scope, params: Params, batch: Any) -> Array:
        """Last hidden states ``[B, T, D]``, in the scope of a caller."""
        return self.hidden_states(scope, params, batch)

    @property
    def longest(self) -> int:
        """Tokens of a sequence that have a position."""
        return self.positions - self.position_offset

    def hidden_states(self, scope: Scope, params: Params, batch: Any) -> Array:
        """Last hidden states ``[B, T, D]``. Raises ValueError for a batch that does not fit the model."""
        text = inputs(batch)
        blocks.check_length(text.tokens.shape[1], self.longest, text.plain)
        dtype = scope.execution.dtype
        h = take(params["embed"]["table"], text.tokens, dtype)
        h = h + take(params["positions"]["table"], text.positions + self.position_offset, dtype)
        h = h + self._types(params, batch, text.tokens, dtype)
        h = scope.site("embed", core.layer_norm(h, params["embed_norm"], self.eps))
        h = blocks.stack(
            scope,
            "layers",
            h,
            params["layers"],
            Mask.within(text.segments, segmented=not text.plain),
            heads=self.heads,
            activation=self.activation,
            eps=self.eps,
            post=True,
        )
        return scope.site("final", h)

    def _types(self, params: Params, batch: Any, tokens: Array, dtype: Any) -> Array | float:
        types = batch.get("token_types") if hasattr(batch, "keys") else None
        if not self.types:
            if types is not None:
                raise ValueError(f"{self.family} has no token types; take 'token_types' out of the batch")
            return 0.0
        # Without token types all are 0, as in transformers.
        return take(params["types"]["table"], jnp.zeros_like(tokens) if types is None else types, dtype)

    def head_defaults(self) -> tuple[str, str]:
        """Pooling and dense layer of a classifier, as the family's own sequence classification has them."""
        dense = self.DENSE.get(self.family, "none")
        return ("pooler" if self.pooler and dense == "none" else "cls"), dense
