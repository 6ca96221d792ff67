"""Parts of weights in place: the gradient is that of the dense weight, gathered, and so is everything that follows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft import delta, tree
from jft.delta import BlockLayout, EntryLayout, SliceLayout
from jft.delta.changed import ROWS
from jft.dot import take, transpose
from jft.methods import InPlace, InPlaceSelected, Method, Plan, Select
from jft.models import core
from tests.methods import selections, toy

UP, DOWN = "layers/up/w", "layers/down/w"
each_layout = pytest.mark.parametrize("layout", selections.LAYOUTS.values(), ids=selections.LAYOUTS)


@functools.cache
def setting(layout, live=True, **execution):
    """A plan that trains parts of two stacked weights, what it keeps and trains, and the masks of those parts."""
    model = toy.model().with_(**execution)
    params = model.init(jax.random.key(0))
    shapes = tree.flatten(params)
    found = {p: selections.draw(layout, shapes[p].shape, 0.3, seed) for seed, p in enumerate((UP, DOWN))}
    leaves = {p: InPlaceSelected(layout, live) for p in found}
    method = Method(Select(), InPlace())
    plan = Plan(method, leaves, tuple(shapes), jax.tree.structure(params), structured=True)
    kept, trained = jax.jit(plan.init)(jax.random.key(1), params, {p: at for p, (at, _) in found.items()})
    return model, params, plan, kept, trained, {p: mask for p, (_, mask) in found.items()}


def drawn(values, seed):
    """Normal numbers of the shapes of ``values``, by path."""
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=x.shape).astype(np.float32) for p, x in values.items()}


@functools.partial(jax.jit, static_argnums=0)
def output(model, params):
    return model.apply(params, toy.batch())


def loss(model, params):
    return jnp.sum(jnp.square(output(model, params)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(model, plan, kept, trained):
    return jax.grad(lambda t: loss(model, plan.bind(kept, t)))(trained)


@functools.partial(jax.jit, static_argnums=0)
def dense_gradient(model, params):
    return jax.grad(loss, argnums=1)(model, params)


@functools.partial(jax.jit, static_argnums=0)
def gathered(plan, kept, dense):
    return {p: plan.leaves[p].layout.gather(dense[p], kept[p]["at"]) for p in plan.leaves}


@each_layout
@pytest.mark.parametrize("execution", [{}, {"remat": "full"}, {"remat": "dots", "unroll": 0}])
def test_the_gradient_is_the_dense_one_gathered(layout, execution):
    model, params, plan, kept, trained, _ = setting(layout, **execution)
    dense = tree.flatten(dense_gradient(model, params))
    found = gradient(model, plan, kept, trained)
    for path, want in gathered(plan, kept, dense).items():
        assert found[path].shape == trained[path].shape
        np.testing.assert_allclose(found[path], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@each_layout
def test_a_plain_function_gets_the_same_gradient(layout):
    model, _, plan, kept, trained, _ = setting(layout)
    plain = dataclasses.replace(plan, structured=False)
    for a, b in zip(*(jax.tree.leaves(gradient(model, p, kept, trained)) for p in (plan, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@each_layout
@pytest.mark.parametrize("live", [True, False])
def test_forward_tangents_are_those_of_the_dense_weight(layout, live):
    model, _, plan, kept, trained, _ = setting(layout, live)
    moved = drawn(trained, 3)
    params = {p: (k["w"] if p in plan.leaves else k) for p, k in kept.items()}

    @jax.jit
    def sparse(trained, moved):
        return jax.jvp(lambda t: output(model, plan.bind(kept, t)), (trained,), (moved,))

    @jax.jit
    def dense(params, moved):
        put = {p: plan.leaves[p].layout.put(jnp.zeros_like(kept[p]["w"]), kept[p]["at"], moved[p]) for p in moved}
        zeros = {p: put.get(p, jnp.zeros_like(w)) for p, w in params.items()}
        return jax.jvp(lambda flat: output(model, tree.unflatten(flat)), (params,), (zeros,))

    (y, dy), (want, dwant) = sparse(trained, moved), dense(params, moved)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dy, dwant, rtol=1e-4, atol=1e-5)


@each_layout
def test_vmap_over_members_that_share_the_base(layout):
    model, _, plan, kept, trained, _ = setting(layout, live=False)
    many = jax.tree.map(lambda x: np.stack([x, np.asarray(x) + 0.1, np.asarray(x) - 0.2], dtype=np.float32), trained)
    alone = [gradient(model, plan, kept, jax.tree.map(lambda x, i=i: x[i], many)) for i in range(3)]
    together = jax.jit(jax.vmap(lambda t: gradient(model, plan, kept, t)))(many)
    for path in trained:
        want = np.stack([g[path] for g in alone])
        np.testing.assert_allclose(together[path], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@each_layout
def test_live_and_shared_weights_compute_the_same(layout):
    model, _, plan, kept, trained, _ = setting(layout)
    shared = dataclasses.replace(plan, leaves={p: dataclasses.replace(h, live=False) for p, h in plan.leaves.items()})
    moved = jax.tree.map(lambda x, d: np.asarray(x) + np.float32(0.1) * d, trained, drawn(trained, 5))
    live = jax.jit(plan.commit)(kept, moved)
    outputs = [jax.jit(lambda k, p=p: output(model, p.bind(k, moved)))(k) for p, k in ((plan, live), (shared, kept))]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        *(jax.tree.leaves(gradient(model, p, k, moved)) for p, k in ((plan, live), (shared, kept))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.optimized
@each_layout
def test_adamw_on_gathered_values_is_masked_dense_adamw_bit_for_bit(layout):
    _, params, plan, kept, trained, masks = setting(layout)
    flat = tree.flatten(params)
    dense = {p: flat[p] for p in plan.leaves}
    rule = optax.adamw(1e-2, weight_decay=0.0)
    update = jax.jit(lambda g, s, w: (lambda u, s: (optax.apply_updates(w, u), s))(*rule.update(g, s, w)))
    sparse_state, dense_state = jax.jit(rule.init)(trained), jax.jit(rule.init)(dense)
    for n in range(3):
        g = drawn(dense, n)
        trained, sparse_state = update(gathered(plan, kept, g), sparse_state, trained)
        masked = {p: np.where(masks[p], x, np.float32(0)) for p, x in g.items()}
        dense, dense_state = update(masked, dense_state, dense)
    now = jax.jit(plan.commit)(kept, trained)
    for path in dense:
        np.testing.assert_array_equal(now[path]["w"], dense[path])
        outside = ~masks[path]
        np.testing.assert_array_equal(np.asarray(now[path]["w"])[outside], np.asarray(flat[path])[outside])


@each_layout
def test_the_task_vector_has_exactly_the_selected_support(layout):
    _, params, plan, kept, trained, masks = setting(layout)
    moved = jax.tree.map(lambda x: np.asarray(x) + np.float32(1), trained)
    kept = jax.jit(plan.commit)(kept, moved)
    flat = tree.flatten(params)
    results = jax.jit(lambda changes: {p: (x.dense(), x.apply_to(flat[p])) for p, x in changes.items()})
    changes = plan.encode(params, kept, moved)
    for path, (change, w) in results(changes).items():
        assert not isinstance(changes[path], delta.Dense)
        np.testing.assert_allclose(change, masks[path], atol=1e-6)
        np.testing.assert_allclose(w, kept[path]["w"], atol=1e-6)


@each_layout
def test_cells_select_the_same(layout):
    """A selection cut into 2 x 2 cells is the uncut one: same gradient, same weight after an update."""
    shape = (16, 8)
    rng = np.random.default_rng(0)
    chosen = rng.random((3, *selections.units(layout, shape))) < 0.4
    w = jnp.asarray(rng.normal(size=(3, *shape)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(5, shape[0])).astype(np.float32))

    @jax.jit
    def results(at):
        values = layout.gather(w, at)
        g = jax.grad(lambda v: jnp.sum(jnp.sin(core.dot(x, selections.weight(layout, w[0], at[0], v)))))(values[0])
        return layout.put(w, at, values * 2), layout.put(jnp.zeros_like(w[0]), at[0], g)

    one, four = (results(selections.locate(layout, chosen, grid)) for grid in ((1, 1), (2, 2)))
    np.testing.assert_array_equal(one[0], four[0])
    np.testing.assert_allclose(one[1], four[1], rtol=1e-5, atol=1e-6)


@each_layout
def test_transposed_weights_and_lookups(layout):
    """A table that is also the output head: both uses, and the gradient through both."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(16, 8)).astype(np.float32))
    at, _ = selections.draw(layout, table.shape, 0.4)
    at, ids = jnp.asarray(at), jnp.asarray([3, 3, 0, 15, 7])

    def both(w):
        h = take(w, ids, jnp.float32)
        return jnp.sum(jnp.sin(core.dot(h, transpose(w))))

    @jax.jit
    def dense():
        value, gradient = jax.value_and_grad(both)(table)
        return value, layout.gather(gradient, at), layout.gather(table, at)

    @jax.jit
    def selected(values, origin):
        return jax.value_and_grad(lambda v: both(selections.weight(layout, table, at, v, origin)))(values)

    value, want, values = dense()
    for origin in (None, values):
        found, got = selected(values, origin)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_rows_keep_only_their_part_of_the_activations():
    """What the backward pass of ``tanh(x @ a) @ w`` keeps for w's gradient is the selected columns of its input."""
    layout, n = SliceLayout(ROWS), 4096
    w = jnp.zeros((256, 64))
    at = jnp.arange(8, dtype=jnp.int32)[None]

    def apply(values, x):
        return core.dot(x, selections.weight(layout, w, at, values))

    _, pull = jax.vjp(lambda v: apply(v, jnp.ones((n, 256))), layout.gather(w, at))
    held = [x for x in jax.tree.leaves(pull) if hasattr(x, "shape") and x.ndim == 2 and x.shape[0] == n]
    assert {x.shape for x in held} == {(n, 8)}


@pytest.mark.optimized
def test_the_backward_of_blocks_has_no_dense_gradient():
    layout = BlockLayout(32, 32)
    w = jnp.zeros((512, 384))
    at = jnp.asarray([[[[0, 1], [3, 3], [15, 11]]]], jnp.int32)
    values = layout.gather(w, at)

    def f(v, x):
        return jnp.sum(jnp.sin(core.dot(x, selections.weight(layout, w, at, v))))

    compiled = jax.jit(jax.grad(f)).lower(values, jnp.ones((256, 512))).compile()
    assert "f32[512,384]{1,0} dot" not in compiled.as_text()
    dense = 2 * 256 * 512 * 384
    assert compiled.cost_analysis()["flops"] < dense * (1 + 4 * 3 / (16 * 12)) + 20 * 256 * 384


def test_a_tap_leaves_the_weight_as_it_is():
    w, at = jnp.arange(6.0).reshape(2, 3), jnp.asarray([[[[0, 1]]]], jnp.int32)
    y, pull = jax.vjp(lambda v: selections.weight(EntryLayout(), w, at, v).plain(), jnp.full((1, 1, 1), 99.0))
    np.testing.assert_array_equal(y, w)
    np.testing.assert_array_equal(pull(w)[0], [[[1.0]]])


def test_mixed_precision_keeps_masters_and_bf16_weights_together():
    model, params, plan, *_ = setting(EntryLayout(), dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    at = {p: selections.draw(EntryLayout(), tree.flatten(params)[p].shape, 0.3)[0] for p in plan.leaves}
    kept, trained = jax.jit(plan.init)(jax.random.key(1), params, at)
    assert {x.dtype for x in trained.values()} == {jnp.dtype("float32")}
    g = jax.jit(jax.grad(lambda t: loss(model, plan.bind(kept, t, jnp.bfloat16)).astype(jnp.float32)))(trained)
    assert {x.dtype for x in g.values()} == {jnp.dtype("float32")}
    kept = jax.jit(plan.commit)(kept, jax.tree.map(lambda x: np.asarray(x) + np.float32(1e-4), trained))
    assert {kept[p]["w"].dtype for p in at} == {jnp.dtype("bfloat16")}
