"""Products whose gradient goes to chosen experts only, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import Changed, ExpertLayout, Selected, experts
from jft.dot import dot, grouped_dot
from jft.models import Model
from jft.models.core import ACTIVATIONS, Execution, Hooks, Runs, Scope
from jft.models.decoder import DecoderConfig
from jft.models.moe import Experts, moe, route

E, I, O, N = 6, 5, 7, 11  # noqa: E741
AT = np.array([1, 4, 5], np.int32)
PADDED = np.array([0, 3, 6, 7], np.int32)
LAYOUT = ExpertLayout()
RNG = np.random.default_rng(0)
W, X, G = RNG.standard_normal((E, I, O)), RNG.standard_normal((N, I)), RNG.standard_normal((E, N, O))


def live(w, at, values):
    """A weight that holds ``values`` at experts ``at`` already: the product reads ``w`` alone."""
    return Changed(w, Selected(at, values, LAYOUT, w.shape[-3:]), held=True)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


def f32(*arrays):
    return [np.asarray(a, np.float32) for a in arrays]


def test_gather_and_put_with_leading_axes_and_padding():
    w = RNG.standard_normal((2, E, I, O)).astype(np.float32)
    at = np.stack([PADDED, np.array([2, 3, 4, 5], np.int32)])
    values = LAYOUT.gather(w, at)
    assert values.shape == (2, 4, I, O)
    np.testing.assert_array_equal(values[0, :2], w[0, [0, 3]])
    assert not values[0, 2:].any()
    np.testing.assert_array_equal(values[1], w[1, 2:])
    new = LAYOUT.put(jnp.asarray(w, jnp.bfloat16), at, jnp.ones_like(values))
    assert new.dtype == jnp.bfloat16
    expected = w.astype(jnp.bfloat16)
    expected[0, [0, 3]] = expected[1, 2:] = 1
    np.testing.assert_array_equal(new, expected)


def mask_of(chosen):
    mask = np.zeros((len(chosen), E), bool)
    for row, layer in zip(mask, chosen, strict=True):
        row[layer] = True
    return mask


def test_locate():
    at = experts.locate(mask_of([[5, 1], [], [2, 0, 3]]))
    np.testing.assert_array_equal(at, [[1, 5, 8], [6, 7, 8], [0, 2, 3]])
    np.testing.assert_array_equal(experts.locate(mask_of([[4, 0]])[0]), [0, 4])
    with pytest.raises(ValueError, match="no expert"):
        experts.locate(mask_of([[], []]))


@pytest.mark.parametrize("at", [AT, PADDED])
@pytest.mark.parametrize("shared", [True, False])
def test_dot(at, shared):
    """The value reads w alone; the derivative is that of w with the chosen experts free."""
    x = X if shared else RNG.standard_normal((E, N, I))
    w, x, g = f32(W, x, G)
    tangent = RNG.standard_normal((len(at), I, O))

    @jax.jit
    def every(x, g, tangent):
        values = LAYOUT.gather(w, at)
        y, back = jax.vjp(lambda x, v: live(w, at, v).__jft_expert_dot__(x), x, 100 + values)
        return y, back(g), jax.jvp(lambda v: live(w, at, v).__jft_expert_dot__(x), (values,), (tangent,))[1]

    y, (dx, dv), dy = every(x, g, *f32(tangent))
    x64, real = np.broadcast_to(np.asarray(x, np.float64), (E, N, I)), at[at < E]
    close(y, np.einsum("eni,eio->eno", x64, W))
    each = np.einsum("eno,eio->eni", G, W)
    close(dx, each.sum(0) if shared else each, 1e-4)
    close(np.asarray(dv)[: len(real)], np.einsum("eni,eno->eio", x64, G)[real], 1e-4)
    assert not np.asarray(dv)[len(real) :].any()
    expected = np.zeros((E, N, O))
    expected[real] = np.einsum("eni,eio->eno", x64[real], tangent[: len(real)])
    close(dy, expected, 1e-4)


@pytest.mark.parametrize("at", [AT, PADDED])
def test_grouped_dot(at):
    sizes = np.array([2, 0, 4, 1, 3, 1], np.int32)
    w, x, g = f32(W, X, G[0])

    @jax.jit
    def every(x, g):
        y, back = jax.vjp(lambda x, v: grouped_dot(x, live(w, at, v), sizes), x, LAYOUT.gather(w, at))
        return y, back(g)

    y, (dx, dv) = every(x, g)
    which = np.repeat(np.arange(E), sizes)
    close(y, np.einsum("ni,nio->no", X, W[which]))
    close(dx, np.einsum("no,nio->ni", G[0], W[which]), 1e-4)
    expected = np.zeros(dv.shape)
    for n, expert in enumerate(which):
        for j in np.flatnonzero(at == expert):
            expected[j] += np.outer(X[n], G[0][n])
    close(dv, expected, 1e-4)


def products(jaxpr):
    """Multiply-adds of every matrix product in a jaxpr, inner ones included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            total += products(inner) if hasattr(inner, "eqns") else 0
    return total


def test_the_gradient_costs_the_chosen_experts():
    """The backward pass to the values multiplies e matrices of E, and none for x where x is not differentiated."""
    w, x, g = f32(W, X, G)
    _, back = jax.vjp(lambda v: live(w, AT, v).__jft_expert_dot__(x), LAYOUT.gather(w, AT))
    assert products(jax.make_jaxpr(back)(g).jaxpr) == len(AT) * N * I * O
    _, back = jax.vjp(lambda x, v: live(w, AT, v).__jft_expert_dot__(x), x, LAYOUT.gather(w, AT))
    assert products(jax.make_jaxpr(back)(g).jaxpr) == (E + len(AT)) * N * I * O


@pytest.mark.parametrize("at", [AT, PADDED])
def test_a_shared_base_with_a_change_beside_it(at):
    """What members of a fleet compute: the base's product and that with the change of the chosen experts."""
    w, x = f32(W, X)
    (values,) = f32(RNG.standard_normal((len(at), I, O)))
    changed = W.copy()
    changed[at[at < E]] = values[: (at < E).sum()]
    weight = jax.jit(lambda w: Changed(w, Selected(at, values - LAYOUT.gather(w, at), LAYOUT, w.shape)))(w)
    close(
        jax.jit(lambda weight, x: weight.__jft_expert_dot__(x))(weight, x), np.einsum("ni,eio->eno", X, changed), 1e-4
    )
    sizes = np.array([2, 0, 4, 1, 3, 1], np.int32)
    expected = np.einsum("ni,nio->no", X, changed[np.repeat(np.arange(E), sizes)])
    close(jax.jit(lambda weight, x: weight.__jft_grouped_dot__(x, sizes))(weight, x), expected, 1e-4)


def model_of(execution):
    config = DecoderConfig(
        vocab=17, width=8, layers=2, heads=2, hidden=8, experts=Experts(E, 2, 6), init_std=0.4, norm_eps=1e-6
    )
    return Model(config, Execution(experts=execution))


CHOSEN = [[0, 3], [1, 2, 5]]
TOKENS = np.random.default_rng(1).integers(0, 17, (2, 6))


@functools.cache
def dense_gradient():
    """``(params, loss, gradient)`` of every expert."""
    model = model_of("dense")
    params = model.init(jax.random.key(0))
    return params, *jax.device_get(jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(params))


def loss(model, params):
    return jnp.mean(jnp.square(model.apply(params, TOKENS)))


def bound(params, values):
    at = experts.locate(mask_of(CHOSEN))
    layers, mlp = params["layers"], params["layers"]["mlp"]
    chosen = {n: {"w": live(p["w"], at, values[n])} for n, p in mlp["experts"].items()}
    return {**params, "layers": {**layers, "mlp": {**mlp, "experts": chosen}}}


@pytest.mark.parametrize("execution", ["dense", "ragged"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_in_a_model_values_get_the_dense_gradient_of_their_experts(execution, remat):
    params, dense_loss, dense = dense_gradient()
    model = model_of(execution).with_(remat=remat)
    at = experts.locate(mask_of(CHOSEN))

    @jax.jit
    def gathered(params):
        return {n: LAYOUT.gather(p["w"], at) for n, p in params["layers"]["mlp"]["experts"].items()}

    value, sparse = jax.jit(jax.value_and_grad(lambda v: loss(model, bound(params, v))))(gathered(params))
    expected = gathered(dense)
    for name, g in sparse.items():
        close(g, np.asarray(expected[name]), 1e-5)
        assert np.abs(g).sum() > 0
    close(value, dense_loss, 1e-6)


def test_layers_cut_into_runs_choose_their_own():
    params, _, dense = dense_gradient()
    w = params["layers"]["mlp"]["experts"]["up"]["w"]
    at = np.array([[4]])

    def loss_of(v):
        parts = Runs((w[:1], live(w[1:], at, v)), (1, 1))
        layers = jax.tree.map(lambda x: Runs((x[:1], x[1:]), (1, 1)), params["layers"])
        layers["mlp"]["experts"]["up"]["w"] = parts
        return loss(model_of("dense"), {**params, "layers": layers})

    found = np.asarray(jax.jit(jax.grad(loss_of))(np.asarray(w)[1:, 4:5]))
    close(found[0, 0], dense["layers"]["mlp"]["experts"]["up"]["w"][1, 4])


@pytest.mark.parametrize("normalise", [True, False])
def test_route(normalise):
    logits = np.round(RNG.standard_normal((4, E)), 1)
    logits[0] = 0
    weights, chosen = route(jnp.asarray(logits, jnp.float32), Experts(E, 2, 3, normalise))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")[:, :2]
    expected = np.take_along_axis(p, order, -1)
    np.testing.assert_array_equal(chosen, order)
    close(weights, expected / expected.sum(-1, keepdims=True) if normalise else expected)


def test_hooks_see_whole_products():
    """A product hook gets every expert's product of the structured weight, as of an array."""
    spec, rng = Experts(E, 2, O), np.random.default_rng(3)
    make = lambda *shape: np.float32(rng.standard_normal(shape))
    params = {"router": {"w": make(I, E)}, "experts": {n: {"w": make(E, I, O)} for n in ("gate", "up")}}
    params["experts"]["down"] = {"w": make(E, O, I)}
    h = make(1, 4, I)
    run = lambda scope, params: jax.jit(lambda p: moe(scope, "mlp", h, p, spec, ACTIVATIONS["silu"]))(params)
    plain = run(Scope(Execution()), params)
    params["experts"] = {n: {"w": live(p["w"], AT, p["w"][AT])} for n, p in params["experts"].items()}
    scope = Scope(Execution(), Hooks(product=lambda name, x, w, state: ((y := dot(x, w)), y.shape)))
    close(run(scope, params), np.asarray(plain))
    assert scope.reads["mlp/experts/up"] == (E, 4, O) and scope.reads["mlp/router"] == (1, 4, E)
