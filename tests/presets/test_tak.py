"""TAK: the penalty of other tasks' curvature against explicit Kronecker products."""

import jax
import numpy as np
import pytest

import jft
from jft.delta.manifest import BaseMismatch
from jft.presets.tak import Drift
from jft.tangent.curvature import merged
from tests.tangent.curved import (
    MODEL,
    PARAMS,
    assert_pulled_after_a_step,
    curvature,
    explicit,
    planned,
    train,
    wide,
)

MUTATIONS = (
    ("jft/presets/tak.py", "c.examples / total * c(changes)", "c(changes)"),
    ("jft/presets/tak.py", "curvature.verify(params)", "pass"),
    ("jft/presets/tak.py", "return self.weight * sum(parts", "return sum(parts"),
    ("jft/presets/tak.py", "curvatures=(merged(self.curvatures),)", "curvatures=self.curvatures[:1]"),
)


def test_penalty_value_and_gradient():
    exact = curvature()
    other = curvature(5, rows=2)
    plan, kept, tau = planned(Drift(3.0, (exact, other), merge=False))
    expected = lambda t: 3 * (8 * explicit(exact, t) + 4 * explicit(other, t)) / 12
    value, gradient = jax.value_and_grad(lambda t: plan.penalty(kept, t))(tau)
    np.testing.assert_allclose(value, expected(tau), rtol=1e-5)
    for path in ("layers/up/w", "layers/up/b", "head/w"):
        step = np.random.default_rng(3).normal(size=tau[path].shape)
        moved = [{**tau, path: wide(tau[path]) + s * step} for s in (0.5, -0.5)]
        np.testing.assert_allclose(
            (wide(gradient[path]) * step).sum(), expected(moved[0]) - expected(moved[1]), rtol=1e-3
        )
    plan, kept, tau = planned(Drift(3.0, (exact, other)))
    np.testing.assert_allclose(plan.penalty(kept, tau), 3 * explicit(merged([exact, other]), tau), rtol=1e-5)
    with pytest.raises(BaseMismatch):
        Drift(1.0, (exact,)).fitted(jax.tree.map(lambda x: x + 1, PARAMS), MODEL)


def test_a_run_feels_it(tmp_path):
    """Two steps differ from those without a penalty: at the first, at the base, nothing is pulled."""
    curvature().save(tmp_path / "c.safetensors")
    method = jft.method("tak", curvature=str(tmp_path / "c.safetensors"), weight=0.5)
    assert_pulled_after_a_step(method)
    with pytest.raises(BaseMismatch):
        train(method, 1, jax.tree.map(lambda x: x + 1, PARAMS))
    with pytest.raises(ValueError, match="give curvature="):
        train("tak", 1)
