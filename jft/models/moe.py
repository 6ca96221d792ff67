"""Mixtures of experts: each token goes to its k best experts, none is dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jft.dot import PerExpert, grouped_dot, has_grouped_dot
from jft.models.core import Params, Scope, gated

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Experts:
    """E experts of hidden size F, of which each token uses the k with the largest router probability.

    normalise: the k probabilities are divided by their sum (Mixtral, Jiang et al. 2024, arXiv:2401.04088); otherwise they
    are used as they come out of the softmax over all E (OLMoE, Muennighoff et al. 2024, arXiv:2409.02060).
    """

    count: int
    per_token: int
    hidden: int
    normalise: bool = True

    def __post_init__(self) -> None:
        """``ValueError`` for more experts per token than there are."""
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"per_token is {self.per_token}; choose 1 to {self.count}, the number of experts")


def route(logits: Array, experts: Experts) -> tuple[Array, Array]:
    """Gate values ``[..., k]`` and experts ``[..., k]`` of each token, from router logits ``[..., E]``.

    The experts with the largest probability, best first (ties: the lower id), and their probabilities, float32, divided
    by their sum where ``experts.normalise``. A hook that reads the product ``layers/mlp/router`` gets the decisions of
    every layer by this function.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    weights, expert_ids = jax.lax.top_k(probabilities, experts.per_token)
    return (weights / jnp.sum(weights, axis=-1, keepdims=True) if experts.normalise else weights), expert_ids


def moe(scope: Scope, name: str, h: Array, params: Params, experts: Experts, act: Callable[[Array], Array]) -> Array:
    """``sum_e p_e * (act(h gate_e) * (h up_e)) down_e`` over each token's k experts; ``h[B, T, D]``.

    Params: ``router/w [D, E]`` and ``experts/{gate,up}/w [E, D, F]``, ``experts/down/w [E, F, D]``. Router probabilities
    are float32. :attr:`Execution.experts` says how the products run; both ways are exact and differentiable in both modes.
    """
    flat = h.reshape(-1, h.shape[-1])
    # On ``h``, not on its rows: hooks see the router's product with the axes B and T.
    logits = scope.dot(f"{name}/router", h, params["router"]).reshape(len(flat), experts.count)
    weights, expert_ids = route(logits, experts)
    has_product_hook = scope.hooks is not None and scope.hooks.product is not None
    grouped = all(has_grouped_dot(p["w"]) for p in params["experts"].values())
    if scope.execution.experts == "ragged" and grouped and not has_product_hook:
        out = _ragged(flat, weights, expert_ids, params["experts"], experts, act)
    else:
        out = _dense(scope, f"{name}/experts", flat, weights, expert_ids, params["experts"], experts, act)
    return out.reshape(h.shape)


def _dense(
    scope: Scope, name: str, x: Array, weights: Array, expert_ids: Array, params: Params, experts: Experts, act: Any
) -> Array:
    """Every expert on every token, combined with weights that are zero where the token was not sent."""
    assignment = jax.nn.one_hot(expert_ids, experts.count, dtype=weights.dtype)
    combine = jnp.einsum("nk,nke->en", weights, assignment)
    has_product_hook = scope.hooks is not None and scope.hooks.product is not None
    if has_product_hook:
        # Hooks see zeros for the tokens that an expert does not get, so that sums over rows are those of its own tokens.
        x = jnp.where(jnp.sum(assignment, axis=1).T[..., None] > 0, x, 0)

    def product(part: str, x: Array) -> Array:
        w = params[part]["w"]
        # With hooks ``x`` is [E, N, in], which a plain array multiplies as it is; hooks may look at its shape.
        whole = has_product_hook and not hasattr(w, "__jft_dot__")
        return scope.dot(f"{name}/{part}", x, {"w": w if whole else PerExpert(w)})

    hidden = gated(act, product("gate", x), product("up", x))
    out = product("down", hidden)
    return jnp.einsum("en,end->nd", combine, out.astype(combine.dtype)).astype(out.dtype)


def _ragged(x: Array, weights: Array, expert_ids: Array, params: Params, experts: Experts, act: Any) -> Array:
    """Tokens sorted by expert, one grouped product each; k rows per token instead of E."""
    k = experts.per_token
    # Stable: the tokens of an expert keep their order.
    order = jnp.argsort(expert_ids.reshape(-1), stable=True)
    sizes = jnp.bincount(expert_ids.reshape(-1), length=experts.count).astype(jnp.int32)
    rows = jnp.take(x, order // k, axis=0)
    hidden = gated(act, grouped_dot(rows, params["gate"]["w"], sizes), grouped_dot(rows, params["up"]["w"], sizes))
    out = grouped_dot(hidden, params["down"]["w"], sizes)
    out = out.astype(weights.dtype) * jnp.take(weights.reshape(-1), order)[:, None]
    # ``order // k`` is the token of a row, as each token has k of them; the sum is in float32.
    return jnp.zeros((len(x), out.shape[-1]), weights.dtype).at[order // k].add(out).astype(x.dtype)
