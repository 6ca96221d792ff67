"""Products with selected blocks: every form against float64, all derivatives, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jft.kernels import blocks_tpu
from jft.kernels.blocks import block_sddmm, block_spmm
from jft.kernels.blocks_forms import sddmm, spmm

T, D, F, B = 150, 256, 512, 128
BLOCKS = np.array([[1, 3], [0, 0], [1, 0], [0, 2], [0, 3]], np.int32)  # not sorted
FORMS = ("xla", "interpret")

MUTATIONS = (
    ("jft/kernels/blocks_tpu.py", "order, starts, _reads(starts)", "order, starts, 0 * _reads(starts)"),
    ("jft/kernels/blocks_tpu.py", "valid = (i < end) & (row[here] < limit)", "valid = i < end"),
    ("jft/kernels/blocks_tpu.py", "jnp.clip(column[here] * c - p * width", "jnp.clip(column[here] * c"),
    ("jft/kernels/blocks_tpu.py", "o.at[order[first + i]], sent", "o.at[first + i], sent"),
    (
        "jft/kernels/blocks_tpu.py",
        "jnp.where(valid, column[here] * c, columns)",
        "jnp.where(valid, column[here] * c, 0)",
    ),
    ("jft/kernels/blocks_tpu.py", "sums[i] = stage[0].astype(jnp.float32)", "sums[i] = jnp.zeros_like(sums[i])"),
    (
        "jft/kernels/blocks_tpu.py",
        "jnp.pad(a, ((0, missing), (0, 0)))",
        "jnp.pad(a, ((missing, 0), (0, 0)), mode='edge')",
    ),
    ("jft/kernels/blocks_forms.py", "(at[..., 0] < inside[0]) & (at[..., 1] < inside[1])", "at[..., 0] < inside[0]"),
    ("jft/kernels/blocks_forms.py", "sums = jnp.promote_types(a.dtype, jnp.float32)", "sums = a.dtype"),
    ("jft/kernels/blocks.py", "jnp.swapaxes(at, 0, 1)[..., ::-1]", "jnp.swapaxes(at, 0, 1)"),
    ("jft/kernels/blocks.py", "parts += [] if type(ddy) is ad.Zero", "parts += [] if type(dx) is not ad.Zero"),
    ("jft/kernels/blocks.py", "rows = jnp.moveaxis(x, dims[0], 1)", "rows = jnp.moveaxis(x, dims[0], 0)"),
)


def drawn(dtype, tokens=T, blocks=BLOCKS):
    """x, dy (of a mean far from zero), values; exact in float32."""
    rng = np.random.default_rng(0)
    shapes = (tokens, D), (tokens, F), (len(blocks), B, B)
    x, dy, values = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    return x, (dy.astype(np.float32) + 3).astype(x.dtype), values


def cut(x, index):
    return np.asarray(x, np.float64)[:, index * B : index * B + B]


def reference(x, dy, blocks=BLOCKS):
    """``x[:, rows]^T dy[:, columns]`` in float64, and the same of absolute values, to which rounding is relative."""
    pairs = [(cut(x, i), cut(dy, j)) for i, j in blocks]
    empty = np.zeros((0, B, B))
    return np.array([a.T @ b for a, b in pairs] or empty), np.array([abs(a).T @ abs(b) for a, b in pairs] or empty)


def dense(values, blocks=BLOCKS):
    w = np.zeros((D, F))
    for (i, j), v in zip(blocks, values, strict=True):
        w[i * B : i * B + B, j * B : j * B + B] = v
    return w


def within(out, expected, size, tokens):
    """The componentwise bound of a float32 sum of ``tokens`` exact products, and of one rounding to the dtype."""
    out = np.asarray(out)
    bound = 4 * np.sqrt(max(tokens, 1)) * 2.0**-24 * size
    if out.dtype != np.float32:
        bound = bound + 2.0**-8 * abs(expected)
    assert (abs(out.astype(np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("dtype", "out"), [("float32", None), ("bfloat16", None), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_sddmm_is_the_sampled_product(implementation, dtype, out):
    x, dy, _ = drawn(dtype)
    g = block_sddmm(x, dy, BLOCKS, block=(B, B), out_dtype=out, implementation=implementation)
    assert g.dtype == jnp.dtype(out or "float32") and g.shape == (len(BLOCKS), B, B)
    within(g, *reference(x, dy), T)


@pytest.mark.parametrize("implementation", FORMS)
def test_sddmm_adds_to_what_was_there(implementation):
    x, dy, acc = drawn("float32")
    g = block_sddmm(x, dy, BLOCKS, block=(B, B), acc=jnp.asarray(acc), implementation=implementation)
    expected, size = reference(x, dy)
    within(g, expected + acc, size + abs(acc), T)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spmm_is_the_product_with_the_blocks_alone(implementation, dtype):
    x, _, values = drawn(dtype)
    y = block_spmm(x, BLOCKS, values, F, implementation=implementation)
    w = dense(values)
    assert y.dtype == x.dtype
    within(y, x.astype(np.float64) @ w, abs(x.astype(np.float64)) @ abs(w), D)
    # Columns without a block are zero, not what was in memory.
    assert not np.asarray(y)[:, B : 2 * B].any()


PADDED = np.array(
    [[1, 1], [2, 5], [0, 3], [2, 0], [0, 4], [1, 2]], np.int32
)  # past the end in the row, or in the column
PRESENT = np.array([True, False, True, False, False, True])


@pytest.mark.parametrize("implementation", FORMS)
def test_padding_adds_nothing(implementation):
    x, dy, values = drawn("float32", blocks=PADDED)
    cells = PADDED[None, None]
    # Under jit blocks cannot be looked at; what padding has for values is of no account.
    poisoned = np.where(PRESENT[:, None, None], values, 7)[None, None]
    g = jax.jit(functools.partial(sddmm, block=(B, B), dtype=jnp.float32, implementation=implementation))(x, dy, cells)
    y = jax.jit(functools.partial(spmm, columns=F, implementation=implementation))(x, cells, poisoned)
    within(g[0, 0][PRESENT], *reference(x, dy, PADDED[PRESENT]), T)
    assert not np.asarray(g[0, 0][~PRESENT]).any()
    w = dense(values[PRESENT], PADDED[PRESENT])
    within(y, x.astype(np.float64) @ w, abs(x) @ abs(w), D)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("tokens", "count"), [(0, 5), (5, 0), (1, 5)])
def test_no_blocks_and_few_tokens(implementation, tokens, count):
    blocks = BLOCKS[:count]
    x, dy, values = drawn("float32", tokens, blocks)
    # The kernel refuses nothing to do; by itself the choice falls on XLA's form.
    chosen = implementation if tokens and count else None
    g = block_sddmm(x, dy, blocks, block=(B, B), implementation=chosen)
    y = block_spmm(x, blocks, values, F, implementation=chosen)
    within(g, *reference(x, dy, blocks), tokens)
    w = dense(values, blocks)
    within(y, x.astype(np.float64) @ w, abs(x) @ abs(w), D)


@pytest.mark.parametrize(
    ("panels", "groups", "unroll"), [(1, 1, 2), (2, 1, 8), (1, 3, 2), (4, 2, 2), (4, 5, 1), (2, 8, 2)]
)
@pytest.mark.parametrize("with_acc", [False, True])
def test_groups_and_panels_of_the_tpu_kernel(panels, groups, unroll, with_acc):
    blocks = np.concatenate([BLOCKS, PADDED[:3]])
    x, dy, acc = drawn("float32", blocks=blocks)
    config = blocks_tpu.Config(56, panels, groups, unroll)
    start = jnp.asarray(acc) if with_acc else None
    row, column = jnp.asarray(blocks.T)
    g = blocks_tpu.sddmm(x, dy, row, column, block=(B, B), acc=start, config=config, interpret=True)
    present = blocks[:, 0] < D // B
    expected, size = np.zeros(acc.shape), np.zeros(acc.shape)
    expected[present], size[present] = reference(x, dy, blocks[present])
    within(g, expected + with_acc * acc, size + abs(acc), T)


def test_memory_that_starts_as_nan_is_never_read():
    blocks = np.concatenate([BLOCKS[:3], PADDED[1:2]])
    x, dy, values = drawn("float32", 24, blocks)
    row, column = jnp.asarray(blocks.T)
    simulated = pltpu.InterpretParams(uninitialized_memory="nan")
    config = blocks_tpu.Config(8, 2, 2, 2)
    g = blocks_tpu.sddmm(x, dy, row, column, block=(B, B), config=config, interpret=simulated)
    within(g[:3], *reference(x, dy, BLOCKS[:3]), 24)
    assert not np.asarray(g[3]).any()
    y = blocks_tpu.spmm(x, row, column, values, columns=F, interpret=simulated)
    w = dense(values[:3], BLOCKS[:3])
    within(y, x.astype(np.float64) @ w, abs(x) @ abs(w), D)


def test_tiles_fit_and_stream_x_once_where_they_can():
    for outputs, n in [(4096, 104), (4096, 256), (14336, 358)]:
        config = blocks_tpu.heuristic(8192, 4096, outputs, n, (B, B), 2)
        assert config.groups == 1 and config.tile >= 512
    crowded = blocks_tpu.heuristic(4096, 8192, 28672, 1434, (B, B), 2)
    assert crowded.groups == 2 and crowded.vmem(8192, 28672, 1434, (B, B), 2, 4) <= blocks_tpu.vmem()


# Derivatives, against those of the dense product. Small blocks: XLA's form, whose rules are those of every form.

SMALL = np.array([[0, 1], [3, 0], [2, 2], [1, 1]], np.int32)


def small(x, values):
    return block_spmm(x, SMALL, values, 12)


def small_dense(x, values):
    w = jnp.zeros((16, 12), values.dtype)
    for n, (i, j) in enumerate(SMALL):
        w = w.at[i * 4 : i * 4 + 4, j * 4 : j * 4 + 4].set(values[n])
    return x @ w


def total(product, x, values):
    return jnp.sum(jnp.sin(product(x, values)) * jnp.arange(12.0))


def second_order(product, x, values):
    """Derivatives as linearized steps and curvature take them."""
    f = functools.partial(total, product)
    both = (0, 1)
    moved = lambda x, values: jax.jvp(f, (x, values), (jnp.cos(x), jnp.sin(values)))[1]
    back = lambda x, values: jax.jvp(jax.grad(f, both), (x, values), (jnp.cos(x), jnp.sin(values)))[1]
    again = lambda x, values: jnp.sum(jax.grad(f, 1)(x, values) ** 2) + jnp.sum(jax.grad(f)(x, values) ** 2)
    return moved(x, values), jax.grad(moved, both)(x, values), back(x, values), jax.grad(again, both)(x, values)


def in_layers(product, x, values):
    """Through a scan over layers with checkpoints."""

    def layer(x, values):
        return jnp.concatenate([jnp.sin(product(x, values)), x[:, :4]], axis=1), None

    def loss(values):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, values)[0])

    stack = jnp.stack([values, -values, values * values])
    return jax.grad(loss)(stack), jax.jvp(loss, (stack,), (jnp.cos(stack),))


def over_members(product, x, values):
    """Under vmap over x, over values, and over both, of values and gradients."""
    f = functools.partial(total, product)
    xs, vs = jnp.stack([x, 2 * x, -x]), jnp.stack([values, values**2, -values])
    gradient = jax.grad(f, (0, 1))
    return (
        jax.vmap(product, (0, None))(xs, values),
        jax.vmap(product, (None, 0))(x, vs),
        jax.vmap(gradient, (0, None))(xs, values),
        jax.vmap(gradient)(xs, vs),
        jax.vmap(lambda v: jax.jvp(functools.partial(product, x), (v,), (v,)))(vs),
    )


@pytest.mark.parametrize("derivatives", [second_order, in_layers, over_members])
def test_every_derivative_is_that_of_the_dense_product(derivatives):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x, values = jnp.asarray(rng.standard_normal((6, 16))), jnp.asarray(rng.standard_normal((4, 4, 4)))
        out, expected = (jax.jit(functools.partial(derivatives, p))(x, values) for p in (small, small_dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), out, expected)


def test_the_sampled_product_has_derivatives_too():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, dy, acc = (jnp.asarray(rng.standard_normal(s)) for s in ((6, 16), (6, 12), (4, 4, 4)))

        def sampled(x, dy, acc):
            return block_sddmm(x, dy, SMALL, block=(4, 4), acc=acc)

        def whole(x, dy, acc):
            w = (x.T @ dy).reshape(4, 4, 3, 4)
            return acc + w[SMALL[:, 0], :, SMALL[:, 1]]

        def every(f, *point):
            g = lambda *point: jnp.sum(jnp.sin(f(*point)))
            moves = tuple(map(jnp.cos, point))
            return (
                f(*point),
                jax.grad(g, (0, 1, 2))(*point),
                jax.jvp(f, point, moves),
                jax.vmap(f)(*(jnp.stack([a, -a]) for a in point)),
            )

        out, expected = (jax.jit(functools.partial(every, f))(x, dy, acc) for f in (sampled, whole))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": np.array([[0, 1], [2, 0]], np.int32)}, r"block \(2, 0\) is outside a weight of 2 x 4 blocks"),
        ({"blocks": np.array([[0, -1]], np.int32)}, r"block \(0, -1\) is outside"),
        ({"blocks": np.array([[0, 1], [1, 1], [0, 1]], np.int32)}, r"block \(0, 1\) occurs 2 times"),
        ({"blocks": np.array([[0.0, 1.0]])}, r"must be int32\[n, 2\]"),
        ({"block": (96, 128)}, "blocks of 96 x 128 do not divide a weight of shape .256, 512."),
        ({"dy": np.zeros((T, F), np.float16)}, "of one dtype"),
        ({"acc": np.zeros((4, B, B), np.float32)}, r"acc has the shape of the result, \(5, 128, 128\)"),
        ({"block": (64, 64), "implementation": "interpret"}, "does not take blocks of 64 x 64"),
        ({"implementation": "pallas"}, "there is no Pallas kernel for this platform"),
    ],
)
def test_wrong_input_is_refused_by_name(change, message):
    x, dy, _ = drawn("float32")
    given = {"x": x, "dy": dy, "blocks": BLOCKS, "block": (B, B), **change}
    with pytest.raises(ValueError, match=message):
        block_sddmm(given.pop("x"), given.pop("dy"), given.pop("blocks"), **given)
