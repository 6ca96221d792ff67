"""Models of other frameworks: same outputs, and every parametrisation of a plan works on them."""

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jft
from jft import tree
from jft.models import Model, VisionConfig, adapters
from jft.models.core import is_jft_model, model_of
from jft.train.step import apply_of

BATCH = {"x": np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)}
X = lambda batch: (batch["x"],)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.drop(jax.nn.relu(self.norm(self.layers[0](x)))))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


def build_nnx():
    module = Nnx(nnx.Rngs(0))
    module.eval()
    return *adapters.from_nnx(module, X), module(BATCH["x"])


def build_linen():
    variables = Linen().init(jax.random.key(0), BATCH["x"], deterministic=True)
    expected = Linen().apply(variables, BATCH["x"], deterministic=True)
    return *adapters.from_linen(Linen(), variables, X, deterministic=True), expected


def build_equinox():
    module = equinox.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    return *adapters.from_equinox(module, X), jax.vmap(module)(BATCH["x"])


def build_function():
    def mlp(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    key = jax.random.key(0)
    params = [jax.random.normal(key, (4, 8)), jax.random.normal(key, (8, 3))]
    return *adapters.from_function(mlp, params, X), mlp(params, BATCH["x"])


BUILDERS = {"nnx": build_nnx, "linen": build_linen, "equinox": build_equinox, "function": build_function}


@pytest.mark.parametrize("framework", BUILDERS)
def test_outputs_are_the_modules_own(framework):
    apply, params, expected = BUILDERS[framework]()
    np.testing.assert_allclose(jax.jit(apply)(params, BATCH), expected, rtol=1e-6, atol=1e-6)
    assert hash(apply) == hash(apply)


@pytest.mark.parametrize("framework", BUILDERS)
@pytest.mark.parametrize(
    "options", [{"name": "full"}, {"name": "lora", "rank": 2}, {"name": "pattern", "include": "1"}]
)
def test_plans_train_them(framework, options):
    """Gradient steps on what a plan trains lower the loss, and the merged parameters keep the module's containers."""
    apply, params, _ = BUILDERS[framework]()
    plan = jft.method(**options).plan(params)
    kept, trained = plan.init(jax.random.key(1), params)

    def loss(t):
        return jnp.mean(jnp.square(apply(plan.bind(kept, t), BATCH) - 1.0))

    @jax.jit
    def step(t):
        value, gradient = jax.value_and_grad(loss)(t)
        return value, jax.tree.map(lambda x, g: x - 0.05 * g, t, gradient)

    losses = []
    for _ in range(21):
        value, trained = step(trained)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    merged = plan.merged(params, kept, trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    bound = jax.jit(lambda t: apply(plan.bind(kept, t), BATCH))(trained)
    np.testing.assert_allclose(jax.jit(apply)(merged, BATCH), bound, rtol=1e-5, atol=1e-5)
    changed = {p for p, x in tree.flatten(merged).items() if not np.array_equal(x, tree.flatten(params)[p])}
    assert changed == set(trained)


@pytest.mark.parametrize("framework", BUILDERS)
@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 2}])
def test_finetune_from_the_module_to_its_task_vector(framework, method):
    apply, params, _ = BUILDERS[framework]()
    batch = BATCH | {"labels": np.arange(6, dtype=np.int32) % 3}
    options = {"optimizer": {"lr": 3e-2}, "log": {"every": 1, "progress": False}}
    run = jft.finetune(apply, params, [batch], steps=12, method=method, **options)
    losses = [row["loss"] for row in run.metrics]
    assert losses[-1] < 0.95 * losses[0]
    applied = jft.apply(params, run.task_vector)
    assert jax.tree.structure(applied) == jax.tree.structure(run.params) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), applied, run.params)
    assert set(run.task_vector.paths) == set(run.plan.leaves)
    assert all(float(delta.norm()) > 0 for _, delta in run.task_vector.items())
    outputs = jax.jit(apply)
    np.testing.assert_allclose(outputs(applied, batch), outputs(run.params, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["full", {"name": "pattern", "include": "weight"}])
def test_a_module_in_bfloat16_sees_its_weights_in_bfloat16(method):
    """Masters are float32; a convolution would refuse them beside bfloat16 activations."""

    class Convolution(equinox.Module):
        conv: equinox.nn.Conv1d

        def __call__(self, x):
            return self.conv(x[None].astype(jnp.bfloat16)).mean(-1)

    conv = equinox.nn.Conv1d(1, 3, 2, key=jax.random.key(0), dtype=jnp.bfloat16)
    apply, params = adapters.from_equinox(Convolution(conv), X)
    batch = BATCH | {"labels": np.arange(6, dtype=np.int32) % 3}
    run = jft.finetune(apply, params, [batch], steps=2, method=method, log={"progress": False})
    assert {x.dtype for x in jax.tree.leaves(run.state.trained)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(run.params)} == {np.dtype(jnp.bfloat16)}


def test_a_step_is_not_reused_for_other_statistics():
    """Two checkpoints of one linen module differ in what is held beside the parameters: each is run with its own."""
    variables = Linen().init(jax.random.key(0), BATCH["x"], deterministic=True)
    moved = variables | {"batch_stats": jax.tree.map(lambda x: x + 5.0, variables["batch_stats"])}
    batch = BATCH | {"labels": np.arange(6, dtype=np.int32) % 3}
    log = {"every": 1, "progress": False}
    for held in (variables, moved):
        apply, params = adapters.from_linen(Linen(), held, X, deterministic=True)
        loss = -jnp.mean(jax.nn.log_softmax(apply(params, batch))[jnp.arange(6), batch["labels"]])
        assert jft.finetune(apply, params, [batch], steps=1, log=log).metrics[0]["loss"] == pytest.approx(float(loss))
        assert jft.train.evaluate(apply, params, [batch], "classification")["loss"] == pytest.approx(float(loss))
    same = [adapters.from_linen(Linen(), held, X, deterministic=True)[0] for held in (variables, variables, moved)]
    assert same[0] == same[1] != same[2]
    assert hash(same[0]) == hash(same[1])


def test_linen_variables_without_params_are_refused():
    with pytest.raises(ValueError, match="no 'params' collection"):
        adapters.from_linen(Linen(), {"batch_stats": {}}, X)


def test_jfts_own_models_are_told_from_other_functions():
    model = Model(VisionConfig(image=4, patch=2, channels=1, width=8, layers=1, heads=2, hidden=16))
    assert is_jft_model(model) and not is_jft_model(None)
    for apply in (model.apply, apply_of(model), apply_of(model, jft.parallel.make_mesh({"data": -1}))):
        assert is_jft_model(model_of(apply)) and not is_jft_model(apply)
    for build in BUILDERS.values():
        apply = build()[0]
        assert (
            not is_jft_model(apply)
            and not is_jft_model(model_of(apply))
            and not is_jft_model(model_of(apply_of(apply)))
        )
