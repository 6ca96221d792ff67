"""f_lin, its gradients and its training against a dense float64 Jacobian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import jft
from jft import delta, tree
from tests.tangent import models
from tests.tangent.dense import mixed, whole

DTYPES = {"float64": 1e-9, "float32": 1e-4}


def flat(outputs):
    return ravel_pytree(outputs)[0]


def vector(outputs):
    """As ``flat``, in NumPy."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(outputs)])


@functools.cache
def jacobian(name):
    """``(f(theta0), J)`` in float64, in NumPy, J ``[outputs, parameters]`` by reverse mode."""
    with jax.enable_x64(True):
        model, params, batch = models.model(name, jnp.float64)
        _, back = ravel_pytree(params)
        outputs = lambda v: flat(model.apply(back(v), batch))
        return jax.device_get(jax.jit(lambda v: (outputs(v), jax.jacrev(outputs)(v)))(vector(params)))


@pytest.fixture(params=models.NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_equal_the_dense_jacobian(name, dtype):
    with jax.enable_x64(True):
        f0, J = jacobian(name)
        model, params, batch = models.model(name, jnp.dtype(dtype))
        tau = models.draw(params, 0)
        f_lin = jft.linearize(model.apply, params)

        def loss(tau):
            y = flat(jax.tree.map(jnp.sin, f_lin(tau, batch)))
            return jnp.sum(y * jnp.cos(jnp.arange(y.size))), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(tau)
        expected = f0 + J @ vector(tau).astype(np.float64)
        weights = np.cos(np.arange(f0.size))
        pulled = J.T @ (np.cos(expected) * weights)
        tolerance = DTYPES[dtype]
        np.testing.assert_allclose(y, np.sin(expected), atol=tolerance * max(1, np.abs(expected).max()))
        np.testing.assert_allclose(vector(gradient), pulled, atol=tolerance * np.abs(pulled).max())


def test_every_encoding_moves_as_its_dense_form(name):
    model, params, batch = models.model(name)
    tau = mixed(name, 0)
    f_lin = jft.linearize(model.apply, params)
    direction = f_lin.direction(tau)
    kinds = {type(c).__name__ for c in direction.values()}
    assert kinds == {"Dense", "Selected", "LowRank"}, kinds
    under_jit = jax.jit(f_lin)
    expected = vector(under_jit(whole(tau), batch))
    np.testing.assert_allclose(vector(f_lin(tau, batch)), expected, atol=2e-5)
    # Under jit: prepared, or as it is (indices cannot be looked at, so it is taken whole).
    for given_tau in (direction, tau):
        np.testing.assert_allclose(vector(under_jit(given_tau, batch)), expected, atol=2e-5)


@functools.cache
def compiled(name):
    """``(f(theta0), f_lin, its parts under jit)``."""
    model, params, batch = models.model(name)
    f_lin = jft.linearize(model.apply, params)
    return vector(jax.jit(model.apply)(params, batch)), f_lin, jax.jit(lambda direction: f_lin.parts(direction, batch))


@settings(max_examples=8, deadline=None)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), which=st.sampled_from(models.NAMES))
def test_outputs_are_linear_in_tau(a, b, which):
    expected, f_lin, parts = compiled(which)
    one, two = mixed(which, 1), mixed(which, 2)
    f0, moved = parts(f_lin.direction(a * one + b * two))
    apart = a * vector(parts(f_lin.direction(one))[1]) + b * vector(parts(f_lin.direction(two))[1])
    scale = max(1.0, np.abs(apart).max())
    np.testing.assert_allclose(vector(moved), apart, atol=3e-5 * scale)
    np.testing.assert_allclose(vector(f0), expected, atol=1e-6)


def test_a_plain_function_is_linearized_too():
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "steps": jnp.asarray(3)}
    f_lin = jft.linearize(lambda p, x: {"y": jnp.tanh(x @ p["w"] + p["b"]), "n": p["steps"]}, params)
    x = jnp.asarray([[0.1, 0.2, 0.3]])
    out = f_lin({"w": 0.1 * jnp.ones((3, 2))}, x)
    z = 0.6
    np.testing.assert_allclose(out["y"], np.tanh(z) + (1 - np.tanh(z) ** 2) * 0.06, rtol=1e-6)
    assert out["n"] == 3
    low = {"w": delta.LowRank(jnp.ones((3, 1)), 0.1 * jnp.ones((1, 2)))}
    np.testing.assert_allclose(f_lin(low, x)["y"], out["y"], rtol=1e-6)


def test_encoder_only_is_linear_up_to_the_features():
    model, params, batch = models.model("clip_classifier")
    f_lin = jft.linearize(model.apply, params, until="features")
    encoder = {p: x for p, x in tree.flatten(models.draw(params, 3)).items() if p.startswith("vision")}
    f0, moved = f_lin.parts(encoder, batch)
    # The reference: the tower by itself, then the head as CLIP has it.
    config = model.config.backbone
    from jft.models.core import Scope

    def features(vision):
        scope = Scope(model.execution)
        h = config.vision.hidden_states(scope, vision["vision"], batch, "vision/")[:, 0]
        return h @ vision["vision_projection"]["w"]

    own = {k: params[k] for k in ("vision", "vision_projection")}
    direction = tree.like(own, {p: encoder.get(p, jnp.zeros_like(x)) for p, x in tree.flatten(own).items()})
    expected = jax.jvp(features, (own,), (direction,))
    np.testing.assert_allclose(f0, expected[0], atol=1e-5)
    np.testing.assert_allclose(moved, expected[1], atol=1e-5)
    z = expected[0] + expected[1]
    logits = z / jnp.linalg.norm(z, axis=-1, keepdims=True) @ params["classifier"]["w"] + params["classifier"]["b"]
    np.testing.assert_allclose(f_lin(encoder, batch), logits, atol=1e-5)
    whole = jft.linearize(model.apply, params)(encoder, batch)
    assert float(jnp.abs(whole - logits).max()) > 1e-3


def test_wrong_uses_are_told():
    model, params, batch = models.model("decoder")
    f_lin = jft.linearize(model.apply, params)
    with pytest.raises(ValueError, match=r"'layers/attn/kk/w'.*did you mean 'layers/attn/k/w'"):
        f_lin({"layers/attn/kk/w": jnp.zeros(3)}, batch)
    with pytest.raises(ValueError, match=r"embed/table of shape \(3,\)"):
        f_lin({"embed/table": jnp.zeros(3)}, batch)
    with pytest.raises(ValueError, match=r"no site 'feature' outside its layers; it has: embed, final"):
        jft.linearize(model.apply, params, until="feature")(models.draw(params, 0), batch)
    with pytest.raises(ValueError, match="takes no hooks"):
        jft.linearize(lambda p, b: model.apply(p, b), params, until="final")(models.draw(params, 0), batch)
    with pytest.raises(ValueError, match="forward 'linear' is unknown"):
        jft.method("full", forward="linear")
    with pytest.raises(ValueError, match="add forward='linearized'"):
        jft.method("full", until="features")
    with pytest.raises(ValueError, match="would move the base"):
        jft.method("spiel_ag", forward="linearized")
    with pytest.raises(ValueError, match="keeps no base"):
        jft.method("dsee", keep=0.5, forward="linearized").plan(params, model)


METHODS = {
    "full": jft.method("linearized"),
    "attention": jft.method("linearized", include="attn"),
    "last": jft.method("last_k_layers", k=1, forward="linearized"),
    "blocks": jft.method("block_sparse", density=0.3, block=(4, 4), score="random", forward="linearized"),
    "entries": jft.method("super_tuning", sparsity=0.8, forward="linearized"),
    "rows": jft.method("s2ft", o=0.5, down=0.3, forward="linearized"),
    "lora": jft.method("lora", rank=2, forward="linearized"),
    "l_lora": jft.method("l_lora", rank=2),
    "rosa": jft.method("rosa", rank=2, density=0.1, warmup=1, low_rank_rate=1.0, forward="linearized"),
    "masking": jft.method("masking", forward="linearized"),
}


def trained(method, model, params, batch, steps=3):
    data = [{"tokens": batch["tokens"]}] * 8
    return jft.finetune(
        model, params, data, method=method, optimizer=optax.sgd(0.05), steps=steps, log={"progress": False}
    )


@pytest.mark.parametrize("which", METHODS)
def test_training_follows_the_gradient_at_the_base(which):
    """Steps of plain SGD on what trains, each with ``J^T dL/df`` of the dense Jacobian at theta0 in float64."""
    model, params, batch = models.model("decoder")
    f0, J = jacobian("decoder")
    run = trained(METHODS[which], model, params, batch)
    kept, how = run._kept, run.plan
    f_lin = jft.linearize(model.apply, params)
    outputs = vector(jax.jit(f_lin)(f_lin.direction(run.task_vector), batch)).astype(np.float64)
    change = delta_vector(run.task_vector, params)
    np.testing.assert_allclose(outputs, f0 + J @ change, rtol=1e-5, atol=1e-4)
    # What the loop computed with, on the same batch: the same outputs, and J^T of the loss's gradient in what trains.
    weights = np.cos(np.arange(f0.size))

    def loss(trained):
        seen = flat(how.outputs(model.apply, kept, trained, batch))
        return jnp.sum(seen * weights), seen

    def of_trained(trained):
        return flat(jax.tree.map(jnp.subtract, how.merged(params, kept, trained), params))

    got, seen = jax.jit(jax.grad(loss, has_aux=True))(run.state.trained)
    np.testing.assert_allclose(seen, outputs, rtol=1e-5, atol=1e-4)
    if which != "masking":  # whose derivative is passed straight through a step
        pulled = jnp.asarray(J.T @ weights, jnp.float32)
        pull = jax.jit(lambda trained: jax.vjp(of_trained, trained)[1](pulled)[0])(run.state.trained)
        for path, g in tree.flatten(got).items():
            expected = np.asarray(tree.flatten(pull)[path])
            np.testing.assert_allclose(g, expected, atol=1e-4 * max(1e-3, np.abs(expected).max()), err_msg=path)


@jax.jit
def change_of(tau, params):
    whole = {p: tau[p].resolve(w).dense() if p in tau else jnp.zeros_like(w) for p, w in tree.flatten(params).items()}
    return flat(tree.like(params, whole))


def delta_vector(tau, params):
    return np.asarray(change_of(tau, params), np.float64)


def test_sgd_on_the_full_change_equals_numpy():
    model, params, batch = models.model("decoder")
    f0, J = jacobian("decoder")
    shape = (*batch["tokens"].shape, 11)
    targets = np.eye(11)[batch["tokens"][:, 1:]]
    tau = np.zeros(J.shape[1])
    losses = []
    for _ in range(3):
        logits = (f0 + J @ tau).reshape(shape)[:, :-1]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        losses.append(-np.mean(np.log((p * targets).sum(-1))))
        pull = np.zeros(shape)
        pull[:, :-1] = (p - targets) / targets[..., 0].size
        tau -= 0.05 * (J.T @ pull.ravel())
    run = trained(METHODS["full"], model, params, batch)
    np.testing.assert_allclose(delta_vector(run.task_vector, params), tau, atol=1e-5)
    np.testing.assert_allclose(run.metrics[-1]["loss"], np.mean(losses), rtol=1e-5)


def test_scan_remat_accumulation_and_devices_change_nothing():
    model, params, batch = models.model("decoder")
    tokens = np.tile(batch["tokens"], (4, 1))
    found = []
    for m, options in (
        (model, {}),
        (model.with_(unroll=0), {}),
        (model.with_(remat="full"), {}),
        (model.with_(remat="dots"), {"accumulate": 2}),
        (model, {"mesh": jft.parallel.make_mesh({"fsdp": 4, "tensor": 2})}),
    ):
        run = jft.finetune(
            m, params, [{"tokens": tokens}] * 3, method=METHODS["blocks"], optimizer=optax.sgd(0.05), steps=2,
            log={"progress": False}, **options,
        )  # fmt: skip
        found.append(delta_vector(run.task_vector, params))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-6)


def test_evaluation_is_linearized():
    model, params, batch = models.model("decoder")
    run = jft.finetune(
        model, params, [batch] * 4, method=METHODS["full"], optimizer=optax.sgd(0.5), steps=3, eval_data=[batch],
        log={"progress": False},
    )  # fmt: skip
    logits = jax.jit(jft.linearize(model.apply, params))(run.task_vector, batch)[:, :-1]
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean()
    np.testing.assert_allclose(run.evaluation["loss"], expected, rtol=1e-5)
