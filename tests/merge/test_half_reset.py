"""Half of what a run changed, set back: which half, and in which encoding the rest stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import delta, tree
from jft.merge.half_reset import half_reset
from jft.select.halves import halves
from tests.methods import decoder


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


def entry_by_entry(change):
    """A change as all of its entries."""
    rows, columns = np.divmod(np.arange(np.prod(change.shape), dtype=np.int32), change.shape[-1])
    values = np.asarray(change.value).ravel()
    return delta.Entries(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(values), change.shape)


def test_half_reset_keeps_one_half_and_sets_the_other_back(params):
    tuned = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + np.float32(1)), params)
    tau = delta.TaskVector.between(params, tuned)
    flat = tree.flatten(params)
    shapes = {p: x.shape for p, x in tau.items()}
    assert shapes.keys() == flat.keys()
    once = half_reset(tau, draw=5)
    changes = decoder.dense(once.deltas)
    drawn = halves(shapes, 5)
    for path, w in flat.items():
        change = np.asarray(changes.get(path, np.zeros(w.shape)))
        layers = drawn.get(path, range(len(w)))
        expected = np.isin(np.arange(len(w)), list(layers)).reshape(-1, *(1,) * (w.ndim - 1)) * np.ones(w.shape)
        np.testing.assert_allclose(change, expected, atol=1e-5)
    sparse = delta.TaskVector({p: entry_by_entry(x) for p, x in tau.items()}, tau.manifest)
    again = half_reset(sparse, draw=5)
    assert all(isinstance(x, delta.Entries) for x in again.deltas.values())
    back = decoder.dense(again.deltas)
    assert all(np.array_equal(back[p], changes[p]) for p in once)
    assert drawn.keys() == {p for p in flat if p.startswith("layers/")}
