"""A sweep over coefficients is the table of separate evaluations, for one pass forward and one for each direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jft
from jft import delta, parallel, tangent, tree
from jft.tangent import subspace
from jft.tangent.sweep import stackable
from tests.tangent import dense, models
from tests.tangent.dense import TOLERANCES, close

MUTATIONS = (
    ("jft/tangent/sweep.py", "(y.astype(precise) + step)", "(y.astype(precise) - step)"),
    ("jft/tangent/sweep.py", 'value if name == "weight" else value / weight', "value"),
    ("jft/tangent/sweep.py", "totals.get(name, 0.0) + np.asarray(value, np.float64)", "np.asarray(value, np.float64)"),
    ("jft/tangent/sweep.py", "np.argsort(~moves", "np.argsort(moves"),
    ("jft/tangent/sweep.py", "x[np.argsort(order)]", "x[np.asarray(order)]"),
    ("jft/tangent/sweep.py", "(np.arange(depth) < end)", "(np.arange(depth) <= end)"),
    ("jft/tangent/sweep.py", "[1.0] * len(taus)", "[0.5] * len(taus)"),
    ("jft/tangent/sweep.py", "cut[name] = {p: rest.pop(p) for", "cut[name] = {p: rest[p] for"),
)


def score(outputs, batch):
    """Sums that depend on every output, over examples of weight 1 and 2."""
    leaves = jax.tree.leaves(
        {k: v for k, v in outputs.items() if k != "logit_scale"} if isinstance(outputs, dict) else outputs
    )
    w = 1.0 + jnp.arange(len(leaves[0]))
    each = lambda fn: sum(jnp.sum(fn(x).reshape(len(x), -1), axis=1) for x in leaves)
    return {"weight": jnp.sum(w), "sine": jnp.sum(w * each(jnp.sin)), "square": jnp.sum(w * each(jnp.square))}


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate(apply, until, params, tau, batch):
    return score(jft.linearize(apply, params, until)(tau, batch), batch)


def apart(f_lin, taus, batches, points):
    """The same table by one evaluation of f_lin for each point, ``taus`` being ``{path: array}``."""
    taus = jax.device_get(taus)
    table = {"weight": [], "sine": [], "square": []}
    for alpha in points:
        tau = {p: sum(a * t[p] for a, t in zip(alpha, taus, strict=True)) for p in taus[0]}
        sums = [evaluate(f_lin.function, f_lin.until, f_lin.params, tau, batch) for batch in batches]
        total = {k: sum(float(s[k]) for s in sums) for k in table}
        for k, v in total.items():
            table[k].append(v if k == "weight" else v / total["weight"])
    return table


def same(table, expected, tolerance=1e-5):
    assert set(table) == set(expected)
    for name, values in table.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected[name], rtol=tolerance, atol=tolerance)


def densely(params, seed, scale=0.1):
    return tree.flatten(models.draw(params, seed, scale))


@pytest.mark.parametrize("name", models.NAMES)
def test_table_is_that_of_separate_evaluations(name):
    """Task vectors of every encoding, in two batches."""
    model, params, batch = models.model(name)
    f_lin = jft.linearize(model.apply, params)
    taus = [dense.mixed(name, seed) for seed in range(2)]
    batches = [batch, jax.tree.map(lambda x: x[::-1], batch)]
    points = [[0, 0], [1, 0], [0.3, -0.7]]
    table = tangent.sweep(f_lin, taus, batches, score, points)
    same(table, apart(f_lin, [dense.whole(tau) for tau in taus], batches, points))


def test_21_coefficients_of_8_task_vectors():
    model, params, batch = models.model("vision")
    f_lin = jft.linearize(model.apply, params)
    taus = {f"task{t}": models.draw(params, t) for t in range(8)}
    points = np.concatenate([np.linspace(0, 1, 21)[:, None] * np.eye(8)[t] for t in range(8)])
    table = tangent.sweep(f_lin, taus, [batch], score, points)
    assert table["sine"].shape == (168,)
    same(table, apart(f_lin, [tree.flatten(t) for t in taus.values()], [batch], points))
    for at_once in (1, 3):
        same(
            tangent.sweep(f_lin, taus, [batch], score, points[::20], at_once=at_once),
            {k: v[::20] for k, v in table.items()},
        )


def test_points_along_few_of_many_directions():
    """At most two of five move at once: the sums skip the others, whichever they are, and points that do not move."""
    model, params, batch = models.model("vision")
    f_lin = jft.linearize(model.apply, params)
    taus = [models.draw(params, t) for t in range(5)]
    points = np.array([[0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0], [0.3, 0, 0, 0, -0.7], [0, 0.2, 0, 0.4, 0]])
    table = tangent.sweep(f_lin, taus, [batch], score, points)
    same(table, apart(f_lin, [tree.flatten(t) for t in taus], [batch], points))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tangents_equal_the_dense_jacobian(dtype):
    with jax.enable_x64(True):
        model, params, batch = models.model("vision", jnp.dtype(dtype))
        f_lin = jft.linearize(model.apply, params)
        taus = [densely(params, seed) for seed in range(3)]
        f0, moved = tangent.tangents(f_lin, taus, batch)
        close(dense.pick(f0, batch), dense.reference("vision")[0], dtype)
        for t, tau in enumerate(taus):
            close(dense.pick(moved[t], batch), dense.moved("vision", tau), dtype)


def test_up_to_the_features():
    """Values at the site are added; the head is evaluated for every point."""
    model, params, batch = models.model("clip_classifier")
    f_lin = jft.linearize(model.apply, params, until="features")
    taus = [{p: x for p, x in densely(params, s, 0.3).items() if p.startswith("vision")} for s in range(2)]
    points = [[0.5, 0.5], [1, -1]]
    table = tangent.sweep(f_lin, taus, [batch], score, points)
    same(table, apart(f_lin, taus, [batch], points))
    linear = tangent.sweep(jft.linearize(model.apply, params), taus, [batch], score, points)
    assert np.abs(linear["sine"] - table["sine"]).max() > 1e-3


def test_one_coefficient_for_all_is_one_direction():
    model, params, batch = models.model("decoder")
    f_lin = jft.linearize(model.apply, params)
    taus = [dense.mixed("decoder", seed) for seed in range(2)]
    whole = [dense.whole(tau) for tau in taus]
    expected = apart(f_lin, whole, [batch], [[0.2, 0.2], [0.9, 0.9]])
    same(tangent.sweep(f_lin, taus, [batch], score, [0.2, 0.9]), expected)
    same(tangent.sweep(f_lin, whole, [batch], score, [0.2, 0.9]), expected)


def test_coefficients_of_layers_and_of_groups_of_paths():
    model, params, batch = models.model("clip")
    f_lin = jft.linearize(model.apply, params)
    taus = [densely(params, seed) for seed in range(2)]
    arrays = jax.device_get(taus)
    parts = tangent.by_layers(f_lin, taus[0])
    assert list(parts) == ["text/layers/0", "vision/layers/0", "rest"]
    rng = np.random.default_rng(0)

    def cut(alpha, groups):
        """``[{path: alpha_group * tau}]`` summed over the tasks."""
        return {p: sum(a[groups(p)] * t[p] for a, t in zip(alpha, arrays, strict=True)) for p in taus[0]}

    stack = lambda p: 0 if p.startswith("text/layers/") else 1 if p.startswith("vision/layers/") else 2
    named = lambda p: 0 if "attn" in p else 1 if "mlp" in p else 2
    by_paths = lambda tau: tangent.by_paths(f_lin, tau, {"attention": "attn", "mlp": ["mlp", "attn/q"]})
    assert list(by_paths(taus[0])) == ["attention", "mlp", "rest"]
    for split, groups in ((lambda tau: tangent.by_layers(f_lin, tau), stack), (by_paths, named)):
        grid = rng.normal(size=(2, 2, 3))
        table = tangent.sweep(f_lin, taus, [batch], score, grid, split=split)
        for i, alpha in enumerate(grid):
            expected = apart(f_lin, [cut(alpha, groups)], [batch], [[1.0]])
            same({k: v[i : i + 1] for k, v in table.items()}, expected, 3e-5)


def test_layers_of_every_encoding_sum_to_the_whole():
    model, params, batch = models.model("encoder")
    f_lin = jft.linearize(model.apply, params)
    tau = dense.mixed("encoder", 0)
    expected = jax.jit(f_lin.parts)(tau, batch)[1]
    for every, names in ((1, ["layers/0", "layers/1", "rest"]), (2, ["layers/0-1", "rest"])):
        parts = tangent.by_layers(f_lin, tau, every)
        assert list(parts) == names
        _, moved = tangent.tangents(f_lin, parts, batch)
        np.testing.assert_allclose(np.sum(moved, 0), expected, atol=2e-5)
    with pytest.raises(ValueError, match="matches no weight"):
        tangent.by_paths(f_lin, tau, {"all": "atn"})


@settings(max_examples=4, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_sparse_directions_of_different_sizes_go_together(counts, seed):
    """Entries, blocks, rows and columns, more in one than in another, and paths that one lacks: still one pass."""
    model, params, batch = models.model("decoder")
    flat, rng = tree.flatten(params), np.random.default_rng(seed)

    def tau(count):
        q, up, down, o = (f"layers/{name}/w" for name in ("attn/q", "mlp/up", "mlp/down", "attn/o"))
        x = {p: rng.standard_normal(flat[p].shape).astype(np.float32) for p in (q, up, down, o)}
        at = np.divmod(np.arange(count, dtype=np.int32), np.int32(x[q].shape[-1]))
        blocks = np.argwhere((np.arange(3) < count % 3) & np.ones((2, 2, 1), bool)).astype(np.int32)
        cut = x[up].reshape(2, 2, 4, 3, 4).swapaxes(2, 3)
        columns = np.concatenate(x[o].swapaxes(-1, -2))
        some = lambda n: np.arange(n, dtype=np.int32)
        deltas = {
            q: delta.Entries(*at, x[q].ravel()[:count], x[q].shape),
            up: delta.Blocks(blocks, cut[tuple(blocks.T)], x[up].shape),
            o: delta.Slices(some(count % 4), columns[: count % 4], x[o].shape, -1),
        }
        if count % 2:
            deltas[down] = delta.Slices(some(count % 5), np.concatenate(x[down])[: count % 5], x[down].shape, -2)
        return jax.device_put(delta.TaskVector(deltas))

    f_lin = jft.linearize(model.apply, params)
    parts = jax.jit(f_lin.parts)
    taus = [tau(count) for count in counts]
    groups = stackable([f_lin.direction(t) for t in taus])
    assert [members for members, _ in groups] == [tuple(range(len(taus)))]
    _, moved = tangent.tangents(f_lin, taus, batch)
    for one, found in zip(taus, np.asarray(moved), strict=True):
        np.testing.assert_allclose(found, parts(dense.whole(one), batch)[1], atol=2e-5)


def test_directions_of_two_forms_keep_their_order():
    model, params, batch = models.model("vision")
    f_lin = jft.linearize(model.apply, params)
    whole = [densely(params, seed) for seed in range(4)]
    factors = lambda x: delta.LowRank(x[..., :1], x[..., :1, :])
    narrow = [delta.TaskVector({p: factors(x) for p, x in w.items() if p.endswith("mlp/up/w")}) for w in whole]
    # Whole, narrow, narrow, whole: the passes give 0, 3, 1, 2, a permutation that is not its own inverse.
    taus = [whole[0], narrow[1], narrow[2], whole[3]]
    assert [members for members, _ in stackable([f_lin.direction(t) for t in taus])] == [(0, 3), (1, 2)]
    _, moved = tangent.tangents(f_lin, taus, batch)
    for tau, found in zip([whole[0], dense.whole(narrow[1]), dense.whole(narrow[2]), whole[3]], moved, strict=True):
        np.testing.assert_allclose(found, jax.jvp(lambda t: f_lin(t, batch), (tau,), (tau,))[1], atol=2e-5)


@pytest.mark.parametrize("kind", ["whole", "low rank", "columns"])
def test_products_are_those_of_one_pass_and_the_directions(kind):
    """Counted in the traced program: 1 + 2 T forward passes with whole weights; 1 + T and what tau holds, else."""
    model, params, batch = models.model("decoder")
    f_lin = jft.linearize(model.apply, params)

    def tau(seed):
        whole = {p: np.asarray(x) for p, x in densely(params, seed).items() if p.endswith("/w") and "layers" in p}
        if kind == "whole":
            return densely(params, seed)
        if kind == "low rank":
            return delta.TaskVector({p: delta.LowRank(x[..., :1], x[..., :1, :]) for p, x in whole.items()})
        column = lambda x: delta.Slices(np.zeros(1, np.int32), x[:1, :, 0], x.shape, -1)
        return delta.TaskVector({p: column(x) for p, x in whole.items()})

    def products(run, *args):
        return subspace._products(jax.make_jaxpr(run)(*args).jaxpr)

    directions = [f_lin.direction(tau(seed)) for seed in range(3)]
    forward = products(lambda b: model.apply(params, b), batch)
    found = products(lambda d, b: tangent.tangents(f_lin, d, b, at_once=3), directions, batch)
    # Attention's products are of two factors that both move.
    assert found <= {"whole": 1 + 2 * 3, "low rank": 1 + 3 * 1.6, "columns": 1 + 3 * 1.6}[kind] * forward
    each = products(lambda d, b: f_lin(d, b), directions[0], batch)
    assert found <= 0.9 * 3 * each


def test_weights_and_batches_over_devices():
    model, params, _ = models.model("decoder")
    batch = {"tokens": np.tile(models.TOKENS, (4, 1))}
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    spread = jax.device_put(params, parallel.shardings(params, mesh))
    taus = [models.draw(params, seed) for seed in range(2)]
    points = [[0.5, 0.5], [1, -1]]
    expected = tangent.sweep(jft.linearize(model.apply, params), taus, [batch], score, points)
    f_lin = jft.linearize(model.apply, spread)
    same(tangent.sweep(f_lin, taus, [parallel.put_batch(batch, mesh)], score, points), expected)


def test_sweeps_that_cannot_be_are_refused():
    model, params, batch = models.model("vision")
    f_lin = jft.linearize(model.apply, params)
    tau = dense.mixed("vision", 0)
    by_layers = lambda t: tangent.by_layers(f_lin, t)
    for (taus, batches, how, grid, split), told in (
        (([], [batch], score, [1.0], None), "at least one task vector"),
        ((tau, [batch], score, [1.0], None), "list of one"),
        (([tau], [], score, [1.0], None), "no batches"),
        (([tau], [batch], score, [[1.0, 2.0]], None), r"with 1 tasks, not \[1, 2\]"),
        (([tau], [batch], score, [[np.nan]], None), "finite"),
        (([tau], [batch], score, np.ones((1, 1, 2)), by_layers), "2 coefficients for each task, but the groups are"),
        (([tau], [batch], lambda o, b: {"loss": jnp.sum(o)}, [[1.0]], None), "must return 'weight'"),
        (([tau], [batch], lambda o, b: {"weight": jnp.sum(o) * 0}, [[1.0]], None), "nothing in the batches counts"),
    ):
        with pytest.raises(ValueError, match=told):
            tangent.sweep(f_lin, taus, batches, how, grid, split=split)


def test_a_plain_function_with_outputs_that_do_not_move():
    params = {"w": jnp.ones((3, 2)), "steps": jnp.asarray(3)}
    f_lin = jft.linearize(lambda p, x: {"y": jnp.tanh(x @ p["w"]), "n": p["steps"]}, params)
    x = jnp.asarray([[0.1, 0.2, 0.3]])
    taus = [{"w": jnp.full((3, 2), c)} for c in (0.1, 0.2)]
    f0, moved = tangent.tangents(f_lin, taus, x)
    at = tangent.combined(f0, moved, jnp.asarray([1.0, -1.0]))
    assert at["n"] == 3
    np.testing.assert_allclose(at["y"], f_lin({"w": jnp.full((3, 2), -0.1)}, x)["y"], rtol=1e-6)
