"""Every forward pass with every family of parametrisations on every architecture: it runs, or is refused by name."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.methods.select import expected
from jft.train import step
from jft.train.objectives import objective
from jft.train.optimizers import Optimizer
from jft.tree import lead
from tests.tangent.architectures import ARCHITECTURES, FAMILIES, FORWARDS, in_float64, refused

MIXTURES = ("dense experts", "ragged experts")
# Each architecture and each family once, by either forward pass in turn, compiled and run; all others are traced alone.
RUNS = [
    (name, family, FORWARDS[i % 2])
    for i, (name, family) in enumerate(zip([*ARCHITECTURES, "decoder"], FAMILIES, strict=True))
]


def plan_of(name, family, forward):
    one = ARCHITECTURES[name]
    return jft.method(**FAMILIES[family], forward=forward).plan(one.params, one.model)


@functools.cache
def selection(name, family):
    """The shapes of what is selected."""
    return expected(plan_of(name, family, "standard"), tree.flatten(ARCHITECTURES[name].params), {})


def traced(name, family, forward):
    """The shapes of a step's gradient."""
    one, plan = ARCHITECTURES[name], plan_of(name, family, forward)
    recipe = step.Recipe(
        step.apply_of(one.model),
        plan,
        objective(one.objective),
        Optimizer(),
        dtype=step.dtype_of(one.model, one.params),
    )
    chosen = selection(name, family)

    def gradient(params, chosen, batch, key):
        kept, trained = plan.init(key, params, chosen)
        return step.gradients(recipe, kept, trained, batch, key=key if plan.random else None)[0], trained

    return jax.eval_shape(gradient, one.params, chosen, one.batch, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_of_every_combination(name):
    """The gradient of what trains, traced: whatever cannot be combined fails there, or is refused by name before."""
    for family, forward in itertools.product(FAMILIES, FORWARDS):
        message = refused(name, family, forward)
        if message:
            with pytest.raises(ValueError, match=message):
                traced(name, family, forward)
            continue
        gradient, trained = traced(name, family, forward)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, trained), (family, forward)


@pytest.mark.parametrize(("name", "family", "forward"), RUNS)
def test_one_step(name, family, forward):
    one, message = ARCHITECTURES[name], refused(name, family, forward)
    train = functools.partial(
        jft.finetune, one.model, one.params, [one.batch], steps=1, method={**FAMILIES[family], "forward": forward},
        optimizer={"name": "sgd", "lr": 1e-2}, objective=one.objective, log={"progress": False},
    )  # fmt: skip
    if message:
        with pytest.raises(ValueError, match=message):
            train()
        return
    run = train()
    assert np.isfinite(run.metrics[-1]["loss"]) and len(run.task_vector.deltas) == len(run.plan.leaves)
    assert run.task_vector.manifest["method"].get("forward", "standard") == forward


def test_every_architecture_and_family_is_run():
    assert {n for n, _, _ in RUNS} == set(ARCHITECTURES) and {f for _, f, _ in RUNS} == set(FAMILIES)


def outputs_of(name):
    """``weights -> outputs`` of the plain model in float64, the base and a cotangent for the outputs."""
    model, params = in_float64(name)
    batch = ARCHITECTURES[name].batch
    weights = np.random.default_rng(3).standard_normal((*batch["tokens"].shape, 11))
    return lambda p: model.apply(p, batch), params, weights


@functools.cache
def pushed(name):
    """Jitted ``tau -> (f(theta0), J tau)``."""
    outputs, params, _ = outputs_of(name)
    return jax.jit(lambda tau: jax.jvp(outputs, (params,), (tau,)))


@functools.cache
def pulled(name):
    """``J^T weights``, of all weights."""
    outputs, params, weights = outputs_of(name)
    return jax.jit(lambda p: jax.vjp(outputs, p)[1](weights)[0])(params)


def drawn(rng, plan, path, shape):
    """Where a third of the parts of each matrix are, drawn at random."""
    unit, outer = plan.granularity(path, shape), lead(path, len(shape), True)
    units = unit.units(shape, outer)
    order = rng.random((*units[:outer], int(np.prod(units[outer:])))).argsort(-1).argsort(-1)
    return unit.locate(jnp.asarray((order < -(-order.shape[-1] // 3)).reshape(units)), outer)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gates"])
def test_mixtures_equal_the_derivative_in_float64(name, family):
    """Outputs, and the gradient in what trains, some way from the start: f(theta0) + J tau by ``jax.jvp`` of all weights."""
    with jax.enable_x64(True):
        model, params = in_float64(name)
        one = jft.method(**FAMILIES[family], forward="linearized")
        plan, batch = one.plan(params, model), ARCHITECTURES[name].batch
        rng = np.random.default_rng(2)
        chosen = {p: drawn(rng, plan, p, tree.flatten(params)[p].shape) for p in plan.selects}
        kept, trained = plan.init(jax.random.key(0), params, chosen)
        trained = jax.tree.map(lambda x: np.asarray(x, np.float64) + 0.3 * rng.standard_normal(x.shape), trained)
        weights = outputs_of(name)[2]

        @jax.jit
        def found(trained, back):
            f, pull = jax.vjp(lambda t: plan.outputs(model.apply, kept, t, batch), trained)
            tuned, pull_merged = jax.vjp(lambda t: plan.merged(params, kept, t), trained)
            return f, pull(weights)[0], tuned, pull_merged(back)[0]

        outputs, gradient, tuned, expected = found(trained, pulled(name))
        tau = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), tuned, params)
        f0, moved = map(np.asarray, pushed(name)(tau))
        assert np.abs(moved).max() > 1e-2
        np.testing.assert_allclose(outputs, f0 + moved, rtol=0, atol=1e-9 * np.abs(f0 + moved).max())
        if family == "masks":  # whose derivative is passed straight through a step
            return
        for path, x in tree.flatten(expected).items():
            scale = max(1e-3, np.abs(np.asarray(x)).max())
            np.testing.assert_allclose(tree.flatten(gradient)[path], x, rtol=0, atol=1e-9 * scale, err_msg=path)
