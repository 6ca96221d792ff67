"""A classification head on any backbone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jft.models import blocks, core
from jft.models.core import Execution, Hooks, Params, Scope, inputs

Array = jax.Array
POOLS = ("cls", "mean", "last", "pooler", "embedding")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """``backbone`` with a linear layer over its pooled hidden states: logits ``[B, classes]``.

    The backbone's parameters keep their paths; ``classifier/{w,b}`` are added to them, so a task vector of the backbone
    applies to both. pool: ``cls`` the first token; ``last`` the last token that is not padding; ``mean`` of all tokens
    that are not padding (of the patches, for images); ``pooler`` tanh of a dense layer on the first token;
    ``embedding`` CLIP's normalised image embedding. dense: an activation puts ``classifier/dense`` and it before the
    linear layer, as RoBERTa (tanh) and DistilBERT (relu) have; ``none``. ``auto`` for either is what the family's own
    sequence classification does. One sequence to a row: rows are not packed.
    """

    backbone: Any
    classes: int
    pool: str = "auto"
    dense: str = "auto"

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"a classifier needs at least 1 class, not {self.classes}")
        # A decoder has no defaults: its last token is the one that has seen the whole sequence.
        defaults = getattr(self.backbone, "head_defaults", lambda: ("last", "none"))()
        for field, default in zip(("pool", "dense"), defaults, strict=True):
            if getattr(self, field) in ("auto", None):
                # Resolved here, so that 'auto' and the same choice by name are equal configs and compile one program.
                object.__setattr__(self, field, default)
        self._check(embedding=defaults[0] == "embedding")

    def _check(self, embedding: bool) -> None:
        family = self.family
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is unknown; choose from auto, {', '.join(POOLS)}")
        if embedding != (self.pool == "embedding"):
            raise ValueError(f"pool {self.pool!r} does not go with {family!r}; use pool='auto'")
        if self.pool == "pooler" and not getattr(self.backbone, "pooler", False):
            raise ValueError(f"this {family!r} model has no pooler; pool 'cls' or 'mean' instead")
        if self.dense != "none" and self.dense not in core.ACTIVATIONS:
            raise ValueError(f"dense {self.dense!r} is unknown; choose from auto, none, {', '.join(core.ACTIVATIONS)}")

    @property
    def longest(self) -> int | None:
        """Tokens of a sequence that the backbone has positions for; None where it sets no end, or reads none."""
        return getattr(self.backbone, "longest", None)

    @property
    def family(self) -> str:
        """That of the backbone."""
        return self.backbone.family

    @property
    def width(self) -> int:
        """Size of the pooled features."""
        return self.backbone.projection if self.pool == "embedding" else self.backbone.width

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """The backbone's parameters, as it draws them from the same key, and ``classifier/w`` from ``N(0, 0.02^2)``."""
        leaves = dict(blocks.linear("classifier", self.width, self.classes, std=0.02))
        if self.dense != "none":
            leaves |= dict(blocks.linear("classifier/dense", self.width, self.width))
        # From one key: a draw depends on its path alone, so the backbone is that of the bare model.
        return {**self.backbone.init(key, dtype), **blocks.draw(leaves, key, dtype)}

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Logits ``[B, classes]``; with hooks, also what they read."""
        scope = Scope(execution, hooks)
        h = self.pooled(scope, params, batch)
        # CLIP's features are those before they are normalised, and have this name there.
        h = h if self.pool == "embedding" else scope.site("features", h)
        if self.dense != "none":
            h = scope.dot("classifier/dense", h, params["classifier"]["dense"])
            h = core.ACTIVATIONS[self.dense](h)
        return blocks.finish(scope, scope.dot("classifier", h, params["classifier"]))

    def pooled(self, scope: Scope, params: Params, batch: Any) -> Array:
        """The input of the head: ``[B, D]`` (``[B, P]`` for CLIP)."""
        if self.pool == "embedding":
            return self.backbone.image_embedding(scope, params, batch)
        h = self.backbone.hidden_states(scope, params, batch)
        if self.pool == "cls":
            return h[:, 0]
        if self.pool == "pooler":
            return jnp.tanh(scope.dot("pooler", h[:, 0], params["pooler"]))
        real = self._real(batch, h)
        if self.pool == "last":
            # The largest index, not the count: padding may be on the left.
            last = jnp.max(jnp.where(real, jnp.arange(h.shape[1]), 0), axis=1)
            return jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]
        # Float32: bfloat16 counts exactly up to 256 tokens only.
        weights = real.astype(jnp.promote_types(h.dtype, jnp.float32))[..., None]
        # At least 1: a row of padding alone would divide by zero.
        return (jnp.sum(h * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)).astype(h.dtype)

    def _real(self, batch: Any, h: Array) -> Array:
        """Bool ``[B, T]``: tokens that are not padding; for images, the patches."""
        if hasattr(self.backbone, "image"):
            return jnp.broadcast_to(jnp.arange(h.shape[1]) > 0, h.shape[:2])
        return jnp.broadcast_to(inputs(batch).segments > 0, h.shape[:2])
