"""n of every m entries: the encoding, the layout, and the preset against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta
from jft.delta import NM, Changed, Selected
from jft.delta.n_m import NMLayout
from jft.dot import dot
from jft.presets.n_m import Groups
from jft.select import scores
from tests.methods import decoder

AXES = {"rows": -2, "columns": -1}

MUTATIONS = (
    ("jft/presets/n_m.py", "score if largest else -score", "-score if largest else score"),
    ("jft/presets/n_m.py", "jnp.argsort(~groups, axis=slot", "jnp.argsort(groups, axis=slot"),
    ("jft/presets/n_m.py", 'last = jnp.swapaxes(groups, -1, -2) if self.axis == "rows" else groups', "last = groups"),
    (
        "jft/delta/n_m.py",
        "along = index[group] * self.m + index[offset]",
        "along = index[group] + index[offset] * self.m",
    ),
)


def chosen(w, n, m, axis):
    """Bool like ``w``: the n largest of every m along an axis, group by group."""
    mask = np.zeros(w.shape, bool)
    moved, marked = (np.moveaxis(x, axis, -1) for x in (np.abs(w), mask))
    for where in np.ndindex(*moved.shape[:-1]):
        for start in range(0, moved.shape[-1], m):
            best = np.argsort(-moved[where][start : start + m], kind="stable")[:n]
            marked[where][start + best] = True
    return mask


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)])
def test_preset(n, m, axis):
    """The selected set and three steps of Adam, and a task vector of the selected entries alone."""
    params = decoder.parameters()

    def masks(step, weights):
        inside = {p: w for p, w in decoder.wide(params).items() if p.startswith("layers/") and p.endswith("/w")}
        return {p: chosen(w, n, m, AXES[axis]) for p, w in inside.items()}

    method = jft.method("n_m", n=n, m=m, axis=axis, score=scores.Magnitude())
    run = decoder.check(method, masks, params, decoder.batches(3))
    for path, change in run.task_vector.items():
        assert isinstance(change, NM) and (change.m, change.axis) == (m, AXES[axis])
        assert change.values.size == np.prod(change.shape) * n // m and change.offsets.dtype == jnp.int8
        assert run.state.trained[path].shape == change.values.shape


@pytest.mark.parametrize("axis", AXES)
def test_layout(axis):
    """Reading, writing, and the derivative of a live weight, at the selected entries alone."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(3, 8, 12)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    mask = chosen(w, 2, 4, AXES[axis])
    layout, unit = NMLayout(2, 4, AXES[axis]), Groups(2, 4, axis)
    at = unit.locate(jnp.asarray(mask), 1)
    np.testing.assert_array_equal(unit.mask_of(at, w.shape, 1), mask)
    values = layout.gather(jnp.asarray(w), at)
    np.testing.assert_array_equal(np.sort(np.ravel(values)), np.sort(w[mask]))
    np.testing.assert_array_equal(layout.put(jnp.zeros(w.shape), at, values), np.where(mask, w, 0))

    def loss(v):
        live = Changed(jnp.asarray(w), Selected(at, v, layout, w.shape[1:]), held=True)
        return jnp.sum(jnp.sin(jax.lax.scan(lambda _, w: (None, dot(x, w)), None, live)[1]))

    g = layout.put(jnp.zeros(w.shape), at, jax.jit(jax.grad(loss))(values))
    dense = np.einsum("ni,lno->lio", x.astype(np.float64), np.cos(x.astype(np.float64) @ w))
    np.testing.assert_allclose(g, np.where(mask, dense, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", AXES)
def test_encoding(axis, tmp_path):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(2, 8, 12)).astype(np.float32)
    mask = chosen(w, 2, 4, AXES[axis])
    at = Groups(2, 4, axis).locate(jnp.asarray(mask), 1)
    one = NMLayout(2, 4, AXES[axis]).encode(np.asarray(at), NMLayout(2, 4, AXES[axis]).gather(w, at), w.shape)
    np.testing.assert_array_equal(one.dense(), np.where(mask, w, 0))
    np.testing.assert_array_equal(delta.Entries.of(one).dense(), one.dense())
    assert one.nbytes == mask.sum() * 5 and one.nnz == mask.sum()
    np.testing.assert_allclose((one + 2 * one).dense(), 3 * np.where(mask, w, 0), rtol=1e-6)
    np.testing.assert_allclose(one.dot(delta.Dense(jnp.asarray(w))), np.sum(w.astype(np.float64)[mask] ** 2), rtol=1e-5)
    delta.TaskVector({"w": one}).save(tmp_path / "x.safetensors")
    back = jft.TaskVector.load(tmp_path / "x.safetensors").deltas["w"]
    assert isinstance(back, NM) and back.axis == AXES[axis]
    np.testing.assert_array_equal(back.dense(), one.dense())


def test_what_is_refused():
    for make, message in [
        (lambda: Groups(5, 4), "n from 1 to m"),
        (lambda: Groups(2, 4, "diagonal"), "rows or columns"),
        (lambda: NM(jnp.zeros((2, 1, 3), jnp.int8), jnp.zeros((2, 1, 3)), (7, 3), 4), "no groups of 4"),
        (lambda: NM(jnp.full((2, 1, 3), 4, jnp.int8), jnp.zeros((2, 1, 3)), (8, 3), 4), "from 0 to 3"),
        (lambda: NM(jnp.zeros((2, 2, 3), jnp.int8), jnp.zeros((2, 2, 3)), (8, 3), 4), "distinct in each group"),
        (lambda: decoder.run(jft.method("n_m", m=5), 1, decoder.parameters(), decoder.batches(1)), "groups of 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
