"""Fewer tokens as a vision transformer goes on: those the class token attends to stay, the others become one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jft.models import blocks, core
from jft.models.core import Model, Params, Scope
from jft.models.split import collect, cut, length, stack_scope

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TokenSelection:
    """After each of ``layers``, the share ``keep`` of the patches with the most attention from the class token stays.

    keep: one share for all layers or one for each, in (0, 1); of n patches ``ceil(keep n)`` stay, in their order. The
    others are merged into one token behind them, their mean weighted by that attention (averaged over heads); a later
    layer treats it as any patch. Without ``merge`` they are dropped. Counts depend on shapes alone.

    This is the token half of TR-PTS (Luo et al. 2025, arXiv:2507.22872), whose code is not released; where its text leaves
    the rule open, that of EViT (Liang et al. 2022, arXiv:2202.07800), which selects between a layer's attention and its
    MLP and does not divide the merged token by the sum of its weights.
    """

    layers: tuple[int, ...]
    keep: float | tuple[float, ...] = 0.7
    merge: bool = True

    def __post_init__(self) -> None:
        """``ValueError`` for shares that keep nothing or everything, and layers out of order."""
        layers = tuple(self.layers)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"tokens are selected after layers {layers}; name at least one, ascending, counted from 0")
        shares = (self.keep,) * len(layers) if isinstance(self.keep, int | float) else tuple(self.keep)
        if len(shares) != len(layers) or not all(0 < share < 1 for share in shares):
            raise ValueError(
                f"keep is {self.keep}; give one share between 0 and 1, or one for each of {len(layers)} layers"
            )
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "keep", shares)


def with_selection(model: Model, selection: TokenSelection | None) -> Model:
    """The model with (or without) token selection in its vision transformer: bare, in a classifier, or CLIP's tower.

    Its parameters are the same. Raises ValueError for a model that reads no images.
    """
    return dataclasses.replace(model, config=_replaced(model.config, selection))


def _replaced(config: Any, selection: TokenSelection | None) -> Any:
    if hasattr(config, "selection"):
        return dataclasses.replace(config, selection=selection)
    for inner in ("backbone", "vision"):
        if hasattr(config, inner):
            return dataclasses.replace(config, **{inner: _replaced(getattr(config, inner), selection)})
    raise ValueError(f"tokens are selected in vision transformers; a {type(config).__name__} has none")


def select(h: Array, cls_attention: Array, keep: float, merge: bool) -> Array:
    """``h[B, 1 + n, D]`` with fewer patches: the class token, ``ceil(keep n)`` patches, one merged from the others.

    cls_attention float ``[B, 1 + n]``: attention weights of the class token; of equal values the earlier patch stays.
    """
    weights = cls_attention[:, 1:]
    count = math.ceil(keep * weights.shape[1])
    if count >= weights.shape[1]:
        return h
    # top_k rather than argsort: of equal values it puts the earlier first.
    order = jax.lax.top_k(weights, weights.shape[1])[1]
    take = lambda x, index: jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
    # Sorted again: patches keep their order in the image.
    tokens = [h[:, :1], take(h[:, 1:], jnp.sort(order[:, :count], axis=1))]
    if merge:
        others = order[:, count:]
        share = take(weights, others)
        # All weights may underflow: the merged token is then 0, not NaN.
        share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), jnp.finfo(share.dtype).tiny)
        merged = jnp.einsum("bn,bnd->bd", share, take(h[:, 1:], others).astype(share.dtype))
        tokens.append(merged[:, None].astype(h.dtype))
    return jnp.concatenate(tokens, axis=1)


def stack(scope: Scope, prefix: str, h: Array, params: Params, selection: TokenSelection, **options: Any) -> Array:
    """``h[B, 1 + n, D]`` through stacked pre-norm blocks, with fewer tokens after each selecting layer.

    options: heads, activation and eps of :func:`jft.models.blocks.stack`, which runs the layers between. Every layer that
    selects is a scan of its own.
    """
    depth = length(params)
    pieces: list[Scope] = []
    start = 0

    def run(stop: int, h: Array) -> Array:
        if start == stop:
            return h
        pieces.append(stack_scope(scope, prefix, start, stop))
        return blocks.stack(pieces[-1], prefix, h, cut(params, start, stop), None, **options)

    for layer, keep in zip(selection.layers, selection.keep, strict=True):  # type: ignore[arg-type]
        h = run(layer, h)
        pieces.append(stack_scope(scope, prefix, layer, layer + 1))
        h, cls_attention = _selecting_layer(pieces[-1], prefix, h, cut(params, layer, layer + 1), **options)
        h = select(h, cls_attention, keep, selection.merge)
        start = layer + 1
    h = run(depth, h)
    collect(scope, pieces)
    return h


def _selecting_layer(
    scope: Scope, prefix: str, h: Array, params: Params, *, heads: int, activation: str, eps: float
) -> tuple[Array, Array]:
    """One layer, and the attention weights of its class token, ``[B, 1 + n]`` float32: the mean over heads."""
    precise = jnp.promote_types(h.dtype, jnp.float32)
    normed = lambda x, scales: core.layer_norm(x, scales, eps)

    def layer(scope: Scope, carry: Any, p: Params, _: Any) -> Any:
        h = scope.site(f"{prefix}/in", carry[0])
        y, cls_attention = _attend(scope, f"{prefix}/attn", normed(h, p["attn_norm"]), p["attn"], heads)
        h = h + scope.site(f"{prefix}/attn/out", y)
        mlp = lambda x: blocks.mlp(scope, f"{prefix}/mlp", x, p["mlp"], activation)
        return blocks.add(scope, f"{prefix}/mlp", h, mlp, normed, p["mlp_norm"], False), cls_attention

    # The weights leave the scan in its carry: ``layers`` returns nothing else.
    carry: Any = (h, jnp.zeros(h.shape[:2], precise))
    h, cls_attention = scope.layers(prefix, layer, carry, params)
    return h, cls_attention


def _attend(scope: Scope, name: str, x: Array, params: Params, heads: int) -> tuple[Array, Array]:
    q, k, v = (
        scope.dot(f"{name}/{part}", x, params[part]).reshape(*x.shape[:2], heads, -1) for part in ("q", "k", "v")
    )
    scale = q.shape[-1] ** -0.5
    out = scope.attention(q, k, v, None, scale=scale)
    precise = jnp.promote_types(x.dtype, jnp.float32)
    # The class token's scores once more: ``attention`` may run in blocks and does not return them.
    scores = jnp.einsum("bhk,bshk->bhs", q[:, 0], k, preferred_element_type=precise) * scale
    cls_attention = jnp.mean(jax.nn.softmax(scores, axis=-1), axis=1)
    return scope.dot(f"{name}/o", out.reshape(*x.shape[:2], -1), params["o"]), cls_attention
