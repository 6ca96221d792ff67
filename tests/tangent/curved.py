"""A small model of two stacked layers, its data, changes and dense Jacobian, and curvature of it."""

import jax
import jax.numpy as jnp
import numpy as np

import jft
from jft import tree
from jft.methods import InPlace, Method, Select
from jft.select.grams import jacobian_factors
from jft.tangent.curvature import Curvature
from jft.train.calibration import RunCalibration
from tests.methods import toy

MODEL = toy.model(layers=2)
PARAMS = MODEL.init(jax.random.key(0))
MATRICES = ("layers/up/w", "layers/down/w", "head/w")


class Nothing:
    """An objective that nothing looks at."""

    splits = True

    def weight(self, batch, xp=jnp):
        return xp.float32(1)


def wide(x):
    return np.asarray(x, np.float64)


def data(seed, rows=4):
    return [{"x": np.random.default_rng([seed, i]).normal(size=(rows, 8)).astype(np.float32)} for i in range(2)]


def curvature(seed=0, draws=0, rows=4):
    calibration = RunCalibration(MODEL, PARAMS, MATRICES, Nothing(), data(seed, rows))
    return Curvature.of(jacobian_factors(calibration, 2, draws), PARAMS)


def taus(seed=1):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=x.shape).astype(np.float32) / 4 for p, x in tree.flatten(PARAMS).items()}


def dense(seed):
    """``{path: J [N, C, parameters of the path]}``, by reverse mode, examples of both batches."""
    x = np.concatenate([b["x"] for b in data(seed)])
    J = jax.jacrev(lambda p: MODEL.apply(p, {"x": x}))(PARAMS)
    return {p: wide(j) for p, j in tree.flatten(J).items()}


def explicit(curvature, tau):
    total = 0.0
    for path, factor in curvature.factors.items():
        A, B, w = (wide(x) for x in (factor["inputs"], factor["outputs"], tau[path]))
        b = wide(tau.get(path[:-1] + "b", np.zeros((*w.shape[:-2], w.shape[-1]))))
        I, O = w.shape[-2:]  # noqa: E741
        stacks = A.reshape(-1, I + 1, I + 1), B.reshape(-1, O, O), w.reshape(-1, I, O), b.reshape(-1, 1, O)
        for one_A, one_B, one_w, one_b in zip(*stacks, strict=True):
            d = np.concatenate([one_w, one_b]).ravel()
            total += d @ np.kron(one_A, one_B) @ d
    return total


def planned(*penalties):
    plan = Method(Select(), InPlace(), penalties=penalties, forward="linearized").plan(PARAMS, MODEL)
    kept, trained = plan.init(jax.random.key(0), PARAMS)
    return plan, kept, {p: jnp.asarray(taus()[p]) for p in trained}


def train(method, steps, params=PARAMS):
    """A run of the model on labelled data."""
    batches = [{**b, "labels": np.array([0, 1, 2, 3], np.int32)} for b in data(0)]
    return jft.finetune(
        MODEL, params, batches, steps=steps, method=method, optimizer={"lr": 1e-2}, log={"progress": False}
    )


def assert_pulled_after_a_step(method):
    """Runs equal those without the penalty after one step, at whose start nothing has moved, and differ after two."""
    for steps in (1, 2):
        ends = [train(m, steps).params for m in (method, "linearized")]
        same = jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.allclose(a, b, rtol=0, atol=1e-7)), *ends))
        assert all(same) == (steps == 1)
