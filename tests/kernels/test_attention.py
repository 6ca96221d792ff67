"""Blockwise attention against the plain one: values, both derivatives, and what they keep in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.kernels import attention as blockwise
from jft.kernels.attention import Mask, attention
from jft.models.core import Execution

B, T, H, G, K, BLOCK = 2, 21, 4, 2, 5, 8
PLAIN, BLOCKS = Execution(), Execution(attention="blockwise", attention_block=BLOCK)
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 7, [0] * 4 + [1] * 12 + [0] * 5], np.int32)
SOURCE = np.array([[1] * 3 + [2] * 10, [1] * 6 + [0] * 7], np.int32)  # no key for queries of segment 3
ALONE = np.ones((1, T), np.int32)
WINDOW = np.int32(6)

# name: mask, keys, key-value heads, softcap, whether with a bias
CASES = {
    "bidirectional": (None, T, G, None, False),
    "causal": (Mask.within(ALONE, causal=True), T, G, None, False),
    "causal packed": (Mask.within(SEGMENTS, causal=True), T, 1, 1.5, False),
    "window": (Mask.within(SEGMENTS, causal=True, window=3), T, G, None, False),
    "traced window": (Mask.within(ALONE, window=WINDOW), T, H, 2.0, False),
    "segments and bias": (Mask.within(SEGMENTS), T, H, None, True),
    "all terms": (Mask.within(ALONE, causal=True, window=WINDOW), T, G, 1.5, True),
    "cross": (Mask(SEGMENTS, SOURCE), 13, H, None, False),
    "cross, keys without end": (None, 13, G, None, True),
    "shorter than a block": (Mask.within(SEGMENTS[:, 2:7], causal=True), 5, G, None, False),
}


def drawn(keys, groups, dtype, queries=T):
    rng = np.random.default_rng(0)
    shapes = (B, queries, H, K), (B, keys, groups, K), (B, keys, groups, K), (H, queries, keys), ()
    draw = lambda: tuple(np.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return jax.device_put((draw(), draw(), np.asarray(rng.standard_normal((B, queries, H, K)), dtype)))


def derivatives(execution, mask, softcap, biased, point, move, pull):
    """Value, tangent, cotangents, and the gradient of a function of the tangent in the direction: as a linearized step has."""

    def of(q, k, v, bias, scale):
        bias = bias if biased else None
        return attention(q, k, v, mask, scale=0.5 + scale**2, softcap=softcap, bias=bias, block=execution.block)

    def step(move):
        return jnp.sum(jnp.sin(sum(jax.jvp(of, point, move))))

    @jax.jit
    def every(point, move, pull):
        value, moved = jax.jvp(of, point, move)
        return value, moved, jax.vjp(of, *point)[1](pull), jax.grad(step)(move)

    return every(point, move, pull)


def close(found, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance
        ),
        found,
        expected,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
def test_equals_plain_attention(case, dtype, tolerance):
    mask, keys, groups, softcap, biased = CASES[case]
    with jax.enable_x64(dtype == "float64"):
        given = drawn(keys, groups, dtype, T if mask is None else mask.q_segments.shape[1])
        found, expected = (derivatives(e, mask, softcap, biased, *given) for e in (BLOCKS, PLAIN))
        assert found[0].dtype == dtype
        close(found, expected, tolerance)


def test_a_query_that_sees_nothing_gets_the_mean_of_all_values():
    point, _, pull = drawn(T, G, "float32")
    q, k, v = point[:3]
    mask = Mask.within(SEGMENTS, causal=True)
    for execution in (PLAIN, BLOCKS):
        of = functools.partial(attention, mask=mask, scale=1.0, block=execution.block)
        out, pulled = jax.jit(lambda *x, of=of: (of(*x), jax.vjp(of, *x)[1](pull)))(q, k, v)
        padding = np.asarray(out)[SEGMENTS == 0]
        expected = np.repeat(np.mean(v, axis=1), H // G, axis=1)[1]
        np.testing.assert_allclose(padding, np.broadcast_to(expected, padding.shape), atol=1e-6)
        assert all(np.isfinite(x).all() for x in pulled)
    terms = blockwise.Terms(np.float32(1), None)
    o, lse = jax.jit(lambda q, k, v: blockwise.sums(None, BLOCK, q, k, v, terms, mask))(q, k, v)
    assert not np.asarray(o)[SEGMENTS == 0].any()
    assert np.all(np.asarray(lse)[SEGMENTS == 0] == np.finfo(np.float32).min)


@pytest.mark.parametrize("moving", ["q", "v", "bias", "scale"])
def test_what_does_not_move_costs_nothing_and_changes_nothing(moving):
    point, move, _ = drawn(T, G, "float32")
    names = ("q", "k", "v", "bias", "scale")
    at = names.index(moving)
    mask = Mask.within(SEGMENTS, causal=True)

    def of(execution, x):
        q, k, v, bias, scale = (x if i == at else y for i, y in enumerate(point))
        return attention(q, k, v, mask, scale=scale, bias=bias, block=execution.block)

    def tangent(execution):
        return lambda x, dx: jax.jvp(functools.partial(of, execution), (x,), (dx,))[1]

    found, expected = (jax.jit(tangent(e))(point[at], move[at]) for e in (BLOCKS, PLAIN))
    close(found, expected, 2e-5)
    products = str(jax.make_jaxpr(tangent(BLOCKS))(point[at], move[at])).count("dot_general")
    assert products == 2 + {"q": 3, "v": 2, "bias": 2, "scale": 2}[moving]


def test_under_vmap_remat_and_scan():
    point, move, _ = drawn(T, G, "float32")
    segments = np.stack([SEGMENTS, np.broadcast_to(ALONE, SEGMENTS.shape)])
    windows = np.array([3, 2**30, 4], np.int32)
    many = [np.stack([x, 0.5 * x, -x]) for x in jax.device_get(point[:3])]
    directions = [np.stack([x, x, 2 * x]) for x in jax.device_get(move[:3])]

    def layers(execution, segments, q, k, v):
        @jax.checkpoint
        def layer(h, xs):
            q, k, v, window = xs
            mask = Mask.within(segments, causal=True, window=window)
            return h + attention(q + h, k, v, mask, scale=0.4, block=execution.block), None

        return jax.lax.scan(layer, jnp.zeros_like(q[0]), (q, k, v, windows))[0]

    def outputs(execution, *x):
        return jax.vmap(lambda segments: layers(execution, segments, *x))(segments)

    def step(execution, point, move):
        out, moved = jax.jvp(functools.partial(outputs, execution), tuple(point), tuple(move))
        return jnp.sum(jnp.sin(out + moved))

    def both(execution):
        ordinary = jax.grad(lambda x: jnp.sum(jnp.sin(outputs(execution, *x))))
        linearized = jax.grad(functools.partial(step, execution), argnums=1)
        return jax.jit(lambda x, dx: (ordinary(x), linearized(x, dx)))(many, directions)

    close(both(BLOCKS), both(PLAIN), 2e-5)


def test_second_derivatives():
    with jax.enable_x64(True):
        point, move, _ = drawn(T, G, "float64")
        mask = Mask.within(SEGMENTS, causal=True)

        def curvature(execution):
            of = lambda q: jnp.sum(jnp.sin(attention(q, *point[1:3], mask, scale=0.4, block=execution.block)))
            return jax.jit(lambda q, dq: jax.jvp(jax.grad(of), (q,), (dq,))[1])(point[0], move[0])

        close(curvature(BLOCKS), curvature(PLAIN), 1e-12)


def test_bfloat16():
    mask = Mask.within(SEGMENTS, causal=True)
    low = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), drawn(T, G, "float32"))
    exact = derivatives(PLAIN, mask, None, False, *jax.tree.map(lambda x: x.astype(np.float32), low))
    found = derivatives(BLOCKS, mask, None, False, *low)
    assert found[0].dtype == jnp.bfloat16
    for i, tolerance in enumerate((0.01, 0.01, 0.01, 0.05)):  # value, tangent, cotangents, gradient in the direction
        for x, y in zip(jax.tree.leaves(found[i]), jax.tree.leaves(exact[i]), strict=True):
            assert np.linalg.norm(np.asarray(x, np.float32) - y) <= tolerance * np.linalg.norm(y)


def temporaries(length, mask, execution):
    """Bytes that an ordinary and a linearized step of two layers take besides arguments and results, compiled, not run."""
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

    def of(q, k, v):
        layer = lambda h, share: (attention(q + h, k, share * v, mask, scale=0.3, block=execution.block), None)
        return jax.lax.scan(layer, jnp.zeros_like(q), jnp.ones(2))[0]

    def linearized(point, move):
        return jnp.sum(jnp.sin(sum(jax.jvp(of, point, move))))

    ordinary = jax.grad(lambda point: jnp.sum(jnp.sin(of(*point))))
    compiled = jax.jit(ordinary).lower((x,) * 3), jax.jit(jax.grad(linearized, 1)).lower((x,) * 3, (x,) * 3)
    return [c.compile().memory_analysis().temp_size_in_bytes for c in compiled]


@pytest.mark.optimized
def test_memory_is_linear_in_the_number_of_tokens():
    rules = lambda n: Mask.within(jnp.ones((1, n), jnp.int32), causal=True)
    execution = Execution(attention="blockwise", attention_block=64)
    short, long = (temporaries(n, rules(n), execution) for n in (1024, 4096))
    for few, many in zip(short, long, strict=True):
        assert many <= 4.2 * few
    plain = temporaries(4096, rules(4096), PLAIN)
    for blocks, whole in zip(long, plain, strict=True):
        assert blocks < 0.02 * whole


@pytest.mark.parametrize("mask", [Mask.within(SEGMENTS, causal=True, window=3), Mask(SEGMENTS, SOURCE, window=4)])
def test_blocks_of_a_mask(mask):
    dense = np.asarray(mask.dense())
    places = np.arange(dense.shape[1])[:, None] - np.arange(dense.shape[2])
    expected = (mask.q_segments[:, :, None] == mask.k_segments[:, None]) & (mask.k_segments[:, None] > 0)
    expected &= (np.abs(places) < mask.window) & (places >= 0 if mask.causal else True)
    np.testing.assert_array_equal(dense, expected)
    padded = mask.padded(24, 24)
    for row in range(0, 24, 8):
        for column in range(0, 24, 8):
            block = np.asarray(padded.block(row, column, 8, 8))
            here = dense[:, row : row + 8, column : column + 8]
            np.testing.assert_array_equal(block[:, : here.shape[1], : here.shape[2]], here)
            assert block.sum() == here.sum()
            assert bool(padded.reaches(row, column, 8, 8)) >= bool(block.any())


def test_blocks_out_of_reach():
    causal, window = Mask.within(ALONE, causal=True), Mask.within(ALONE, window=3)
    assert not causal.reaches(0, 8, 8, 8) and causal.reaches(0, 7, 8, 8)
    assert not window.reaches(0, 10, 8, 8) and window.reaches(0, 9, 8, 8)
    assert not window.reaches(10, 0, 8, 8) and window.reaches(9, 0, 8, 8)
    assert Mask.within(ALONE).reaches(0, 8, 8, 8) is True
