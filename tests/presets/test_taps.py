"""TAPS: one score for each matrix, against its formula, and the penalty that makes layers inactive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.presets.taps import SharedLayers, Taps
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/taps.py", "delta.Leaf(decays=False, origin=None", "delta.Leaf(origin=None"),
    ("jft/presets/taps.py", 'trained["score"] >= self.threshold', 'trained["score"] > self.threshold'),
    ("jft/presets/taps.py", "self.weight / tree.count(scores) *", "self.weight *"),
    ("jft/presets/taps.py", "    weight: float = 1.0,\n", "    weight: float = 0.5,\n"),
    ("jft/presets/taps.py", "    init_score: float = 0.15,\n) -> Method", "    init_score: float = 0.2,\n) -> Method"),
)
KEY = jax.random.key(4)


def taps(how, trained, _=None):
    active = (trained["score"] >= how.threshold).astype(np.float64)[:, None, None]
    dw = leaf.loss_and_grad(leaf.W + active * trained["delta"])[1]
    return {"delta": active * dw, "score": (dw * trained["delta"]).sum((1, 2))}


def test_taps():
    how = Taps()
    kept, trained = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(how.bind(kept, trained, False), leaf.w32())
    assert trained["score"].shape == (leaf.L,) and how.active(trained).all()
    trained = leaf.moved(trained) | {"score": jnp.asarray([0.2, 0.05, 0.1])}
    leaf.check_gradient(how, kept, trained, taps(how, leaf.wide(trained)))
    leaf.check_steps(how, kept, trained, lambda t, _: taps(how, t), rate=1e-3)
    leaf.check_transforms(how, kept, trained)
    encoded = how.encode(leaf.w32(), kept, trained)
    np.testing.assert_array_equal(encoded.indices, [0, 2])
    np.testing.assert_allclose(leaf.w32() + encoded.dense(), how.bind(kept, trained, False), atol=1e-6)


def test_the_penalty_is_the_mean_size_of_the_scores_times_its_weight():
    """The released code: lam=1, scores from 0.15, a threshold of 0.1 that counts as active (options.py, taps_net.py)."""
    method = jft.method("taps")
    assert method.train == Taps(0.1, 0.15) and method.penalties == (SharedLayers(1.0),)
    scores = {"x": {"score": np.float32([0.15, -0.4])}, "y": {"score": np.float32([0.0])}, "z": np.ones(3, np.float32)}
    value, gradient = jax.value_and_grad(lambda t: SharedLayers(0.9)(None, None, t))(scores)
    np.testing.assert_allclose(value, 0.9 * (0.15 + 0.4) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient["x"]["score"], [0.3, -0.3], rtol=1e-6)
    with pytest.raises(ValueError, match="goes with train=Taps"):
        SharedLayers(1.0)(None, None, {"x": np.ones(2)})


def test_it_learns_and_decay_leaves_the_scores_alone():
    learning.check(jft.method("taps", weight=0.01), 1e-2, learning.LINEAR)
    moved = learning.moved_by_decay(jft.method("taps"))
    assert moved == {p: {"delta": True, "score": False} for p in learning.LINEAR}
