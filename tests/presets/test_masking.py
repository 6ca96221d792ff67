"""Masking: where scores start, the mask and its straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.methods.masks import Masked
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/methods/masks.py", "/ self.sparsity - self._low", "/ self.sparsity"),
    ("jft/methods/masks.py", "return 2e-2 if self.low is None", "return 1e-2 if self.low is None"),
    ("jft/methods/masks.py", "else trained >= self.threshold", "else trained > self.threshold"),
    ("jft/methods/masks.py", "self.threshold if self.margin is None", "self.threshold / 2 if self.margin is None"),
    ("jft/presets/masking.py", "    threshold: float = 1e-2,", "    threshold: float = 5e-3,"),
    ("jft/presets/masking.py", '= "uniform",\n    low', '= "two_point",\n    low'),
    ("jft/presets/masking.py", "    sparsity: float = 0.05,", "    sparsity: float = 0.1,"),
)
KEY = jax.random.key(1)
HOW = Masked(sparsity=0.2, threshold=0.01, start="two_point")


def by_hand(s):
    """Mask, weight and straight-through gradient of the paper, float64."""
    mask = (s >= 0.01).astype(np.float64)
    return mask, leaf.W * mask, leaf.loss_and_grad(leaf.W * mask)[1] * leaf.W


def test_forward_gradients_and_steps():
    kept, scores = HOW.init(KEY, leaf.w32())
    scores = leaf.moved(scores, by=0.01).at[0, 0, 0].set(np.float32(0.01))
    exact = leaf.wide(scores)
    exact[0, 0, 0] = 0.01  # a score at the threshold keeps its weight
    mask, weight, gradient = by_hand(exact)
    np.testing.assert_array_equal(leaf.bound(HOW, kept, scores), weight.astype(np.float32))
    leaf.check_gradient(HOW, kept, scores, gradient)
    moved = leaf.moved(scores, by=0.01)
    leaf.check_steps(HOW, kept, moved, lambda s, _: by_hand(s)[2], rate=1e-3)
    leaf.check_transforms(HOW, kept, scores)
    encoded = HOW.encode(leaf.w32(), kept, scores)
    np.testing.assert_array_equal(encoded.mask, mask)
    assert encoded.nbytes == leaf.L * leaf.I * 1 + 4


def test_scores_start_as_in_the_released_code():
    """maskers.py with controlled_init=None, threshold 1e-2 and init_scale 2e-2: U(-0.02, 0.58) for 5 % masked."""
    how = jft.method("masking").train
    _, scores = how.init(KEY, np.ones((4, 50, 50), np.float32))
    scores = np.sort(np.asarray(scores, np.float64), axis=None)
    quantiles = np.linspace(-0.02, (0.02 + 0.01) / 0.05 - 0.02, scores.size)
    assert quantiles[-1] == pytest.approx(0.58)
    np.testing.assert_allclose(scores, quantiles, atol=0.6 * 0.02)
    assert abs((scores < 0.01).mean() - 0.05) < 0.007
    two = jft.method("masking", start="two_point").train.init(KEY, np.ones((4, 50, 50), np.float32))[1]
    np.testing.assert_allclose(np.unique(two), [0, 0.02], atol=1e-8)
    assert abs((np.asarray(two) < 0.01).mean() - 0.05) < 0.007
    near = Masked(start="two_point", threshold=0.01, margin=0.002).init(KEY, leaf.w32())[1]
    np.testing.assert_allclose(np.unique(near), [0.008, 0.012], rtol=1e-6)


def test_it_learns_and_decay_leaves_the_scores_alone():
    learning.check(jft.method("masking", start="two_point"), 1e-3, learning.LINEAR, at_base=False)
    assert learning.moved_by_decay(jft.method("masking")) == dict.fromkeys(learning.LINEAR, False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jft.method("masking", sparsity=1.0), "fraction masked at the start"),
        (lambda: jft.method("masking", sparsity=0.0), "sparsity=0 has no uniform start.*two_point"),
        (lambda: jft.method("masking", start="magnitude"), "start 'magnitude' is unknown"),
        (lambda: jft.method("masking", margin=0.01), "margin=0.01 does nothing with start='uniform'"),
        (lambda: jft.method("masking", start="two_point", low=0.1), "low=0.1 does nothing with start='two_point'"),
        (lambda: jft.method("masking", start="two_point", margin=0.0), "must be above 0"),
        (lambda: jft.method("masking", low=-0.01), "low is -0.01"),
        (lambda: leaf.change(Masked(), jnp.ones((2, 2)), jnp.ones((2, 2))), "no base to stay near"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
