"""tau-Jp: the penalty on J tau against a dense Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.presets.tau_jp import JacobianProduct
from tests.tangent.curved import assert_pulled_after_a_step, data, dense, planned, train, wide

MUTATIONS = (
    ("jft/presets/tau_jp.py", "self.weight / len(self.tasks)", "self.weight"),
    ("jft/presets/tau_jp.py", 'squares if self.form == "squared"', 'squares if self.form == "norm"'),
    ("jft/presets/tau_jp.py", "jnp.sqrt(jnp.where(x > 0, x, 1.0))", "jnp.sqrt(x)"),
)


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_jacobian_product(form):
    stacks = tuple({"x": data(s)[0]["x"][None]} for s in (0, 5))
    plan, kept, tau = planned(JacobianProduct(2.0, stacks, form))
    parts = []
    for s in (0, 5):
        J = {p: j[:4] for p, j in dense(s).items()}
        moved = sum(np.einsum("nck,k->nc", j.reshape(*j.shape[:2], -1), wide(tau[p]).ravel()) for p, j in J.items())
        squares = (moved**2).sum(1)
        parts.append((squares if form == "squared" else np.sqrt(squares)).mean())
    run = jax.value_and_grad(lambda t: plan.penalty(kept, t, jax.random.key(1)))
    value, gradient = run(tau)
    np.testing.assert_allclose(value, 2 * np.mean(parts), rtol=1e-4)
    # Homogeneous of degree 2 or 1: Euler's identity.
    along = sum((wide(gradient[p]) * wide(tau[p])).sum() for p in tau)
    np.testing.assert_allclose(along, (2 if form == "squared" else 1) * value, rtol=1e-4)
    still = run(jax.tree.map(jnp.zeros_like, tau))[1]
    assert not any(np.any(x) for x in jax.tree.leaves(still))


def test_a_run_feels_it(tmp_path):
    """Two steps differ from those without a penalty: at the first, at the base, nothing is pulled."""
    np.savez(tmp_path / "d.npz", x=np.stack([b["x"] for b in data(5)]))
    method = jft.method("tau_jp", data=str(tmp_path / "d.npz"), weight=0.5)
    assert_pulled_after_a_step(method)
    with pytest.raises(ValueError, match="give data="):
        train("tau_jp", 1)
    with pytest.raises(ValueError, match="form is 'cube'"):
        jft.method("tau_jp", form="cube")
