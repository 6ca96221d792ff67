"""TAPS: one score for each matrix, against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from jft.presets.taps import Taps
from tests.methods import leaf

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
