"""The transformer block that encoders, vision towers and encoder-decoders share, and how their parameters are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import tree
from jft.kernels.attention import Mask
from jft.models import core
from jft.models.core import Params, Scope

Array = jax.Array
Norm = Callable[[Array, Params], Array]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter before it is drawn: its shape, and ``constant`` everywhere or normal with deviation ``std``."""

    shape: tuple[int, ...]
    std: float = 0.0
    constant: float = 0.0


Leaves = Iterator[tuple[str, Leaf]]


def draw(leaves: Mapping[str, Leaf], key: jax.Array, dtype: Any) -> dict:
    """Parameters in ``dtype``: each leaf drawn in float32 from a key of its own path, so in any order, on any mesh."""

    def array(path: str, leaf: Leaf) -> Array:
        if leaf.std == 0.0:
            return jnp.full(leaf.shape, leaf.constant, dtype)
        # Drawn in float32 whatever ``dtype`` is, so that bfloat16 parameters are the float32 ones rounded.
        return (leaf.std * jax.random.normal(tree.key_for(key, path), leaf.shape, jnp.float32)).astype(dtype)

    return tree.unflatten({path: array(path, leaf) for path, leaf in leaves.items()})


def linear(prefix: str, rows: int, columns: int, *, layers: int = 0, bias: bool = True, std: float = 0.0) -> Leaves:
    """``w[in, out]`` (stacked if ``layers``) with deviation ``std``, by default ``1/sqrt(in)``; ``b`` zero."""
    lead = (layers,) if layers else ()
    yield f"{prefix}/w", Leaf((*lead, rows, columns), std or rows**-0.5)
    if bias:
        yield f"{prefix}/b", Leaf((*lead, columns))


def norm(prefix: str, width: int, *, layers: int = 0, bias: bool = True) -> Leaves:
    """``scale`` one and ``bias`` zero."""
    lead = (layers,) if layers else ()
    yield f"{prefix}/scale", Leaf((*lead, width), constant=1.0)
    if bias:
        yield f"{prefix}/bias", Leaf((*lead, width))


def table(prefix: str, rows: int, width: int, std: float = 0.02) -> Leaves:
    """An embedding table."""
    yield f"{prefix}/table", Leaf((rows, width), std)


def layer_leaves(prefix: str, layers: int, width: int, hidden: int, *, qkv_bias: bool = True) -> Leaves:
    """A stack of blocks: attention, an MLP without gate, two layer norms."""
    for name in ("q", "k", "v", "o"):
        # ``qkv_bias`` of a ViT is about q, k and v: the output projection always has a bias.
        yield from linear(f"{prefix}/attn/{name}", width, width, layers=layers, bias=qkv_bias or name == "o")
    yield from linear(f"{prefix}/mlp/up", width, hidden, layers=layers)
    yield from linear(f"{prefix}/mlp/down", hidden, width, layers=layers)
    yield from norm(f"{prefix}/attn_norm", width, layers=layers)
    yield from norm(f"{prefix}/mlp_norm", width, layers=layers)


def attend(
    scope: Scope,
    name: str,
    x: Array,
    params: Params,
    mask: Mask | None,
    *,
    heads: int,
    scale: float | None = None,
    bias: Array | None = None,
    source: Array | None = None,
) -> Array:
    """Multi-head attention of ``x[B, T, D]`` over ``source[B, S, D]`` (itself by default), projected back to D.

    ``scale`` defaults to ``1/sqrt(K)``; mask, bias: see :func:`jft.kernels.attention.attention`.
    """
    source = x if source is None else source

    def project(part: str, h: Array) -> Array:
        y = scope.dot(f"{name}/{part}", h, params[part])
        return y.reshape(*y.shape[:-1], heads, -1)

    q, k, v = project("q", x), project("k", source), project("v", source)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = scope.attention(q, k, v, mask, scale=scale, bias=bias)
    return scope.dot(f"{name}/o", out.reshape(*out.shape[:-2], -1), params["o"])


def mlp(scope: Scope, name: str, x: Array, params: Params, activation: str) -> Array:
    """``down(act(up(x)))``; with a gate, ``down(act(gate(x)) * up(x))``."""
    act = core.ACTIVATIONS[activation]
    up = scope.dot(f"{name}/up", x, params["up"])
    # By the parameters: the families that share this block differ in it, and their configs have no common field.
    gate = scope.dot(f"{name}/gate", x, params["gate"]) if "gate" in params else None
    inner = core.recomputed(act)(up) if gate is None else core.gated(act, gate, up)
    return scope.dot(f"{name}/down", inner, params["down"])


def add(scope: Scope, name: str, h: Array, block: Callable[[Array], Array], normed: Norm, scales: Params, post: bool):
    """The residual step: ``h + block(norm(h))``, or ``norm(h + block(h))`` where the norm comes after (``post``)."""
    if post:
        # The site is what the block adds, before the norm of the sum, so that it means the same in both orders.
        return normed(h + scope.site(f"{name}/out", block(h)), scales)
    return h + scope.site(f"{name}/out", block(normed(h, scales)))


def stack(
    scope: Scope,
    prefix: str,
    h: Array,
    params: Params,
    mask: Mask | None,
    *,
    heads: int,
    activation: str,
    eps: float,
    post: bool = False,
) -> Array:
    """``h[B, T, D]`` through stacked layer-norm blocks: pre-norm, or ``post``-norm as BERT."""

    def normed(x: Array, scales: Params) -> Array:
        return core.layer_norm(x, scales, eps)

    def layer(scope: Scope, h: Array, p: Params, _: Any) -> Array:
        h = scope.site(f"{prefix}/in", h)
        attn, ffn = f"{prefix}/attn", f"{prefix}/mlp"
        h = add(
            scope,
            attn,
            h,
            lambda x: attend(scope, attn, x, p["attn"], mask, heads=heads),
            normed,
            p["attn_norm"],
            post,
        )
        return add(scope, ffn, h, lambda x: mlp(scope, ffn, x, p["mlp"], activation), normed, p["mlp_norm"], post)

    return scope.layers(prefix, layer, h, params)


def check_sizes(config: Any, **positive: int) -> None:
    """Check of a config: ``ValueError`` for a width that the heads do not divide, an unknown activation, a size below one."""
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{type(config).__name__}: {name} is {value}; it must be at least 1")
    if config.width % config.heads:
        raise ValueError(f"{type(config).__name__}: width {config.width} is not a multiple of heads {config.heads}")
    if config.activation not in core.ACTIVATIONS:
        known = ", ".join(core.ACTIVATIONS)
        raise ValueError(f"{type(config).__name__}: activation {config.activation!r} is unknown; choose from {known}")


def finish(scope: Scope, outputs: Any) -> Any:
    """The result of ``forward``: the outputs, with hooks also what they read."""
    return outputs if scope.hooks is None else (outputs, scope.reads)


def check_length(length: int, limit: int, plain: bool) -> None:
    """Check of a row: ``ValueError`` where it is longer than the position table, unless positions restart inside it."""
    # With segments or positions the largest position is a traced value, which cannot be compared here.
    if plain and length > limit:
        raise ValueError(f"a sequence of {length} tokens is longer than the model's {limit} positions; truncate it")
