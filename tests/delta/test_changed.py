"""A weight and a change of it, in every form and use, against float64 NumPy written from what each form is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import (
    BlockLayout,
    Changed,
    Dense,
    DiagonalBlocks,
    EntryLayout,
    ExpertLayout,
    LowRank,
    Selected,
    SliceLayout,
    changed,
)
from jft.dot import dot, expert_dot, grouped_dot, take, transpose

LAYERS, I, O, N = 3, 8, 6, 5  # noqa: E741
RNG = np.random.default_rng(0)
W, X, G = RNG.normal(size=(LAYERS, I, O)), RNG.normal(size=(N, I)), RNG.normal(size=(N, O))
IDS = np.array([[7, 0], [3, 3]])
# Parts of each layer, no two layers alike, by plain coordinates; the third layer has fewer of them.
ENTRIES = [[(0, 5), (2, 1), (7, 0)], [(1, 1), (1, 2), (6, 3)], [(4, 4)]]
BLOCKS = [[(0, 1), (1, 0)], [(0, 0), (1, 2)], [(1, 1)]]
ROWS = [[1, 4, 7], [0, 2, 3], [5]]
COLUMNS = [[0, 3], [1, 5], [2]]


def coordinates(parts, extent):
    """``at[L, n, axes]`` of lists of coordinates, padded past ``extent``."""
    most = max(map(len, parts))
    full = [[*layer, *(np.array(layer[0]) * 0 + extent + i for i in range(most - len(layer)))] for layer in parts]
    return np.asarray(full, np.int32)


def draw(*shape):
    return RNG.normal(size=shape)


FORMS = {
    "dense": (Dense, {"value": draw(LAYERS, I, O)}),
    "low rank": (LowRank, {"a": draw(LAYERS, I, 2), "b": draw(LAYERS, 2, O)}),
    "diagonal blocks": (DiagonalBlocks, {"blocks": draw(LAYERS, 2, I // 2, O // 2)}),
    "entries": (EntryLayout(), coordinates(ENTRIES, I)[:, None, None], {"values": draw(LAYERS, 1, 1, 3)}),
    "blocks": (BlockLayout(4, 2), coordinates(BLOCKS, 2)[:, None, None], {"values": draw(LAYERS, 1, 1, 2, 4, 2)}),
    "rows": (SliceLayout(-2), coordinates(ROWS, I)[:, None], {"values": draw(LAYERS, 1, 3, O)}),
    "columns": (SliceLayout(-1), coordinates(COLUMNS, O)[:, None], {"values": draw(LAYERS, I, 1, 2)}),
}
each_form = pytest.mark.parametrize("name", FORMS)


def form(name, factors):
    kind, *rest, _ = FORMS[name]
    return Selected(rest[0], factors["values"], kind, (I, O)) if rest else kind(**factors)


def reference(name, factors):
    """The change ``[L, I, O]``, float64."""
    out = np.zeros((LAYERS, I, O))
    if name == "dense":
        return factors["value"]
    if name == "low rank":
        return np.einsum("lir,lro->lio", factors["a"], factors["b"])
    if name == "diagonal blocks":
        out[:, :4, :3], out[:, 4:, 3:] = factors["blocks"][:, 0], factors["blocks"][:, 1]
        return out
    values = factors["values"]
    for layer in range(LAYERS):
        if name == "entries":
            for k, (i, o) in enumerate(ENTRIES[layer]):
                out[layer, i, o] = values[layer, 0, 0, k]
        if name == "blocks":
            for k, (i, o) in enumerate(BLOCKS[layer]):
                out[layer, 4 * i : 4 * i + 4, 2 * o : 2 * o + 2] = values[layer, 0, 0, k]
        if name == "rows":
            for k, i in enumerate(ROWS[layer]):
                out[layer, i] = values[layer, 0, k]
        if name == "columns":
            for k, o in enumerate(COLUMNS[layer]):
                out[layer, :, o] = values[layer, :, 0, k]
    return out


def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32), tree)


def close(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=2e-5 * max(1, np.abs(expected).max()))


SIZES = np.array([2, 0, 3], np.int32)
GROUP = np.repeat(np.arange(LAYERS), SIZES)
# Name: what is done with the weight of all layers, the same in float64, and what it is done to.
USES = {
    "scan": (
        lambda w, x: jax.lax.scan(jax.checkpoint(lambda _, w: (None, dot(x, w)), prevent_cse=False), None, w)[1],
        lambda w, x: x @ w,
        X,
    ),
    "transpose": (
        lambda w, x: jax.lax.scan(lambda _, w: (None, dot(x, transpose(w))), None, w)[1],
        lambda w, x: x @ np.swapaxes(w, 1, 2),
        G,
    ),
    "take": (
        lambda w, ids: jax.lax.scan(lambda _, w: (None, take(w, ids, jnp.float32)), None, w)[1],
        lambda w, ids: w[:, ids],
        IDS,
    ),
    "experts": (lambda w, x: expert_dot(x, w), lambda w, x: x @ w, X),
    "experts, rows of their own": (lambda w, x: expert_dot(x, w), lambda w, x: x @ w, draw(LAYERS, N, I)),
    "groups": (lambda w, x: grouped_dot(x, w, SIZES), lambda w, x: np.einsum("ni,nio->no", x, w[GROUP]), X),
    "plain": (lambda w, x: w.plain() * jnp.sum(x), lambda w, x: w * np.sum(x), X),
}


@pytest.mark.parametrize("use", USES)
@each_form
def test_values_and_derivatives(name, use):
    """Of ``w + delta``, and held: the value of ``w`` with the derivative of ``w + delta``; forwards and backwards."""
    run, by_hand, x = USES[use]
    factors = FORMS[name][-1]
    moves = {n: draw(*v.shape) for n, v in factors.items()}
    dw, dx = draw(*W.shape), draw(*x.shape) if x.dtype.kind == "f" else np.zeros(x.shape, jax.dtypes.float0)
    D = reference(name, factors)
    dD = sum(reference(name, {**factors, n: v}) for n, v in moves.items())
    for held in (False, True):

        @jax.jit
        def results(w, factors, x, dw, moves, dx, held=held):
            function = lambda w, factors, x: run(Changed(w, form(name, factors), held), x)
            y, dy = jax.jvp(function, (w, factors, x), (dw, moves, dx))
            floating = lambda w, factors: function(w, factors, x)
            pulled = jax.vjp(floating, w, factors)[1](dy)
            return y, dy, pulled

        y, dy, (of_w, of_factors) = results(*f32((W, factors, x, dw, moves)), f32(dx) if x.dtype.kind == "f" else dx)
        value = W if held else W + D
        close(y, by_hand(value, x))
        # With the change held, the input multiplies the weight alone: that is what it holds.
        expected = by_hand(dw + dD, x)
        if x.dtype.kind == "f":
            expected = expected + by_hand(value, dx)
        close(dy, expected)
        # <pull(dy), direction> = <dy, push(direction)>, for the weight and for every factor by itself.
        pushed = by_hand(dw, x)
        assert np.isclose(np.sum(of_w * dw), np.sum(expected * pushed), rtol=1e-3)
        for n, v in moves.items():
            pushed = by_hand(reference(name, {**factors, n: v}), x)
            assert np.isclose(np.sum(of_factors[n] * v), np.sum(expected * pushed), rtol=1e-3), n


@each_form
def test_many_changes_of_one_weight(name):
    """``vmap`` over changes of a shared weight is each of them by itself."""
    several = [{n: draw(*v.shape) for n, v in FORMS[name][-1].items()} for _ in range(2)]
    stacked = f32(jax.tree.map(lambda *x: np.stack(x), *several))
    w, x = f32((W, X))
    found = jax.jit(jax.vmap(lambda factors: expert_dot(x, Changed(w, form(name, factors)))))(stacked)
    for y, factors in zip(found, several, strict=True):
        close(y, X @ (W + reference(name, factors)))


@each_form
def test_a_change_of_a_change(name):
    """A low-rank change beside another form: the sum, each held or not."""
    a, b = draw(LAYERS, I, 2), draw(LAYERS, 2, O)
    factors = FORMS[name][-1]
    w, x, of, low = f32((W, X, factors, LowRank(a, b)))
    both = jax.jit(
        lambda w, of, low, held: expert_dot(x, Changed(Changed(w, form(name, of), held), low)), static_argnums=3
    )
    close(both(w, of, low, False), X @ (W + reference(name, factors) + a @ b))
    close(both(w, of, low, True), X @ (W + a @ b))


def test_experts():
    """Whole matrices of a stack of E: those that are named, in every product."""
    at, E = np.array([0, 2], np.int32), LAYERS
    values = draw(2, I, O)
    D = np.zeros((E, I, O))
    D[at] = values
    w, x, v = f32((W, X, values))
    weight = lambda v: Changed(w, Selected(at, v, ExpertLayout(), w.shape))
    for run, by_hand in (USES["experts"][:2], USES["groups"][:2], USES["plain"][:2]):
        close(jax.jit(lambda v, run=run: run(weight(v), x))(v), by_hand(W + D, X))


def test_the_forward_pass_of_a_held_change_multiplies_with_the_weight_alone():
    w, x = f32((W[0], X))
    for name in FORMS:
        delta = jax.tree.map(lambda a: a[0], form(name, f32(FORMS[name][-1])))
        jaxpr = str(
            jax.make_jaxpr(lambda w, d, x: dot(x, Changed(w, d, held=True)))(w, delta, x)
            .jaxpr.eqns[0]
            .params["call_jaxpr"]
        )
        assert jaxpr.count("dot_general") == 1 and "scatter" not in jaxpr and "gather" not in jaxpr


def test_directions_are_the_last_factor_of_every_change():
    """What a linearized model is differentiated along: also of a change of a change, at the base."""
    w, a, b, blocks = f32((W, draw(LAYERS, I, 2), draw(LAYERS, 2, O), draw(LAYERS, 2, I // 2, O // 2)))
    inner = Changed(w, DiagonalBlocks(blocks), held=True)
    point, direction, build = changed.directions({"one": Changed(inner, LowRank(a, b), held=True), "two": w})
    assert [x.shape for x in direction] == [blocks.shape, b.shape] and not any(x.any() for x in point)
    x = f32(X)
    y, dy = jax.jit(lambda p, d: jax.jvp(lambda p: expert_dot(x, build(p)["one"]), (p,), (d,)))(point, direction)
    close(y, X @ W)
    dense = reference("diagonal blocks", {"blocks": np.asarray(blocks, np.float64)}) + np.asarray(a @ b, np.float64)
    close(dy, X @ dense)
    assert changed.base(build(direction)["one"]) is w


@functools.cache
def bfloat16():
    return jnp.asarray(W[0], jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)


@each_form
def test_activations_keep_their_dtype(name):
    w, x = bfloat16()
    delta = jax.tree.map(lambda a: a[0], form(name, f32(FORMS[name][-1])))
    for held in (False, True):
        weight = Changed(w, delta, held)
        exact = W[0] + (0 if held else reference(name, FORMS[name][-1])[0])
        for y, expected in ((dot(x, weight), X @ exact), (take(weight, IDS, jnp.bfloat16), exact[IDS])):
            assert y.dtype == jnp.bfloat16
            np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.1, atol=0.2)
        assert weight.plain().dtype == jnp.bfloat16
