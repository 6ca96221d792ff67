"""The compiled programs of generation: one that reads the prompts, and one loop that appends tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jft import tree
from jft.compiled import program_cache
from jft.generation.sampling import Sampling
from jft.models import decoding
from jft.models.core import on_mesh

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Rows under generation. new int32 ``[B, N]``: tokens appended so far, ``count`` of them in every row, padding after a
    row's end. done bool ``[B]``: rows that have ended. memory: what the model needs of the tokens before.
    """

    new: Array
    count: Array
    done: Array
    memory: Any


class Programs(NamedTuple):
    """``begin(params, tokens, lengths, done, eos, seed) -> State``, which has the first token; ``prepare(params)``, the
    parameters as ``extend(prepared, state, upto, eos, seed) -> State`` takes them, which appends until rows have ``upto`` new
    tokens or have all ended.
    """

    begin: Callable[..., State]
    prepare: Callable[[Any], Any]
    extend: Callable[..., State]


class _Cached(NamedTuple):
    """A decoder, by :mod:`jft.models.decoding`; its memory is the cache. each: layers are apart, as on CPUs."""

    model: Any
    each: bool

    def prepare(self, params: Any) -> Any:
        stacks = decoding.layer_stacks(params, self.each)
        return decoding.fused(tree.cast(stacks, self.model.execution.dtype)) if self.each else stacks

    def start(self, params: Any, tokens: Array, lengths: Array, room: int) -> tuple[Array, Any]:
        T = tokens.shape[1]
        segments = (jnp.arange(T) >= T - lengths[:, None]).astype(jnp.int32)
        return decoding.prefill(self.model, params, tokens, segments, T + room, self.each)

    def step(self, params: Any, token: Array, cache: Any) -> tuple[Array, Any]:
        return decoding.decode(self.model, params, token, cache)


class _Whole(NamedTuple):
    """Any causal ``apply(params, batch)``: reads all tokens at every step; its memory is the tokens and their number."""

    apply: Any

    def start(self, params: Any, tokens: Array, lengths: Array, room: int) -> tuple[Array, Any]:
        T = tokens.shape[1]
        # Padded on the right, where a causal model never looks, even one that knows of no segments.
        moved = (jnp.arange(T) + T - lengths[:, None]) % T
        tokens = jnp.pad(jnp.take_along_axis(tokens, moved, axis=1), ((0, 0), (0, room)))
        return self._logits(params, tokens, lengths), (tokens, lengths)

    def step(self, params: Any, token: Array, memory: Any) -> tuple[Array, Any]:
        tokens, lengths = memory
        tokens = tokens.at[jnp.arange(len(tokens)), lengths].set(token)
        return self._logits(params, tokens, lengths + 1), (tokens, lengths + 1)

    def _logits(self, params: Any, tokens: Array, lengths: Array) -> Array:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = (index < lengths[:, None]).astype(jnp.int32)
        logits = self.apply(params, {"tokens": tokens, "segments": segments, "positions": index})
        return jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]


@program_cache
def programs(model: Any, sampling: Sampling, room: int, cached: bool, pad: int, mesh: Any) -> Programs:
    """The programs for ``model`` (a jft model or ``apply``), for at most ``room`` new tokens; equal arguments share them."""
    each = jax.default_backend() == "cpu"
    if cached and each:
        # Products in bfloat16 convert the weights there each time: twice the time of float32, which is more precise too.
        model = model.with_(dtype=jnp.promote_types(model.execution.dtype, jnp.float32))
    runner: Any = _Cached(model, each) if cached else _Whole(getattr(model, "apply", model))
    # A program for all lengths: the number of steps, eos and the seed are arguments.
    begin = functools.partial(_begin, runner, sampling, room, pad, mesh)
    extend = functools.partial(_extend, runner, sampling, pad, mesh)
    # The cache is updated where it is.
    return Programs(jax.jit(begin), _prepare(runner), jax.jit(extend, donate_argnums=1))


@program_cache
def _prepare(runner: Any) -> Callable[[Any], Any]:
    if isinstance(runner, _Cached):
        # Elsewhere it copies nothing, and outside jit keeps the arrays as they are.
        return jax.jit(runner.prepare) if runner.each else runner.prepare
    return lambda params: params


def _begin(
    runner: Any, sampling: Sampling, room: int, pad: int, mesh: Any, params: Any, tokens: Array, lengths: Array,
    done: Array, eos: Array, seed: Array,
) -> State:  # fmt: skip
    with on_mesh(mesh):
        logits, memory = runner.start(params, tokens, lengths, room)
        new = jnp.full((len(tokens), room), pad, jnp.int32)
        return _append(sampling, pad, State(new, jnp.zeros((), jnp.int32), done, memory), logits, eos, seed)


def _extend(
    runner: Any,
    sampling: Sampling,
    pad: int,
    mesh: Any,
    params: Any,
    state: State,
    upto: Array,
    eos: Array,
    seed: Array,
) -> State:
    def goes_on(state: State) -> Array:
        return (state.count < upto) & ~jnp.all(state.done)

    def step(state: State) -> State:
        last = jax.lax.dynamic_index_in_dim(state.new, state.count - 1, axis=1, keepdims=False)
        logits, memory = runner.step(params, last, state.memory)
        return _append(sampling, pad, dataclasses.replace(state, memory=memory), logits, eos, seed)

    with on_mesh(mesh):
        return jax.lax.while_loop(goes_on, step, state)


def _append(sampling: Sampling, pad: int, state: State, logits: Array, eos: Array, seed: Array) -> State:
    # A key for each row and step: a draw does not depend on what else is in the batch.
    key = jax.random.fold_in(jax.random.key(seed), state.count)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    token = jnp.where(state.done, pad, sampling.draw(logits, keys))
    return State(
        jax.lax.dynamic_update_slice_in_dim(state.new, token[:, None], state.count, axis=1),
        state.count + 1,
        state.done | jnp.any(token[:, None] == eos, axis=1),
        state.memory,
    )
