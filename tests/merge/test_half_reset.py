"""Half of what a run changed, set back: which half, and in which encoding the rest stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import delta, tree
from jft.merge.half_reset import half_reset
from jft.select.halves import halves
from tests.methods import decoder

MUTATIONS = (
    ("jft/merge/half_reset.py", "layers = halves(shapes, draw)", "layers = halves(shapes, 0)"),
    ("jft/merge/half_reset.py", "return _in_layers(change, layers[path]) if", "return change if"),
    (
        "jft/merge/half_reset.py",
        "if path not in layers:\n            return change",
        "if path not in layers:\n            return None",
    ),
    ("jft/merge/half_reset.py", "// rows_per_layer, layers", "% rows_per_layer, layers"),
    ("jft/merge/half_reset.py", "change.shape[1:-1]", "change.shape[:-1]"),
    (
        "jft/merge/half_reset.py",
        "np.isin(np.asarray(change.indices), layers)",
        "~np.isin(np.asarray(change.indices), layers)",
    ),
    ("jft/merge/half_reset.py", "values=change.values[selected]", "values=change.values[: len(selected)]"),
    ("jft/merge/half_reset.py", "change.dense()[index]", "change.dense()[: len(layers)]"),
)


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


def entry_by_entry(change):
    """A change as all of its entries."""
    rows, columns = np.divmod(np.arange(np.prod(change.shape), dtype=np.int32), change.shape[-1])
    values = np.asarray(change.value).ravel()
    return delta.Entries(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(values), change.shape)


def test_half_reset_keeps_one_half_and_sets_the_other_back(params):
    rng = np.random.default_rng(0)
    step = jax.tree.map(lambda x: rng.uniform(1, 2, x.shape).astype(np.float32), params)
    tuned = jax.tree.map(lambda x, dx: jnp.asarray(np.asarray(x) + dx), params, step)
    tau = delta.TaskVector.between(params, tuned)
    flat, moved = tree.flatten(params), tree.flatten(step)
    shapes = {p: x.shape for p, x in tau.items()}
    assert shapes.keys() == flat.keys()
    once = half_reset(tau, draw=5)
    changes = decoder.dense(once.deltas)
    drawn = halves(shapes, 5)
    for path, w in flat.items():
        change = np.asarray(changes.get(path, np.zeros(w.shape)))
        layers = drawn.get(path, range(len(w)))
        expected = np.isin(np.arange(len(w)), list(layers)).reshape(-1, *(1,) * (w.ndim - 1)) * moved[path]
        np.testing.assert_allclose(change, expected, atol=1e-5)
    sparse = delta.TaskVector({p: entry_by_entry(x) for p, x in tau.items()}, tau.manifest)
    again = half_reset(sparse, draw=5)
    assert all(isinstance(x, delta.Entries) for x in again.deltas.values())
    back = decoder.dense(again.deltas)
    assert all(np.array_equal(back[p], changes[p]) for p in once)
    layers = {p: delta.Rows(jnp.arange(len(x)), jnp.asarray(x), x.shape) for p, x in moved.items() if p in drawn}
    by_layer = half_reset(delta.TaskVector(tau.deltas | layers, tau.manifest), draw=5)
    back = decoder.dense(by_layer.deltas)
    assert all(np.allclose(back[p], changes[p], atol=1e-5) for p in once)
    assert drawn.keys() == {p for p in flat if p.startswith("layers/")}
