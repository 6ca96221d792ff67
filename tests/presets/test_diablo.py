"""Block-diagonal changes against the dense matrix they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.delta import Changed, LowRank
from jft.dot import grouped_dot, take, transpose
from jft.models import core
from jft.presets.diablo import BlockDiagonal
from tests.methods import leaf, learning

MUTATIONS = (
    ("jft/presets/diablo.py", "def diablo(blocks: int = 64)", "def diablo(blocks: int = 32)"),
    (
        "jft/presets/diablo.py",
        "rows // self.blocks, columns // self.blocks)",
        "columns // self.blocks, rows // self.blocks)",
    ),
    ("jft/presets/diablo.py", "jnp.zeros(shape, jnp.float32)", "jnp.ones(shape, jnp.float32)"),
    ("jft/presets/diablo.py", "Select(linear_only=True)", "Select()"),
)
KEY = jax.random.key(2)
HOW = BlockDiagonal(2)
HEIGHT, WIDTH = leaf.I // 2, leaf.O // 2


def blocks_of(matrix):
    return np.stack([matrix[:, i * HEIGHT : (i + 1) * HEIGHT, i * WIDTH : (i + 1) * WIDTH] for i in range(2)], axis=1)


def dense(blocks):
    out = np.zeros((leaf.L, leaf.I, leaf.O))
    for i in range(2):
        out[:, i * HEIGHT : (i + 1) * HEIGHT, i * WIDTH : (i + 1) * WIDTH] = blocks[:, i]
    return out


def by_hand(blocks, _=None):
    return blocks_of(leaf.loss_and_grad(leaf.W + dense(blocks))[1])


def test_forward_gradients_and_steps():
    kept, trained = HOW.init(KEY, leaf.w32())
    assert trained.shape == (leaf.L, 2, HEIGHT, WIDTH) and not trained.any()
    np.testing.assert_array_equal(HOW.bind(kept, trained, False), leaf.w32())
    trained = leaf.moved(trained)
    leaf.close(HOW.bind(kept, trained, False), leaf.W + dense(leaf.wide(trained)))
    leaf.check_gradient(HOW, kept, trained, by_hand(leaf.wide(trained)))
    leaf.check_steps(HOW, kept, trained, by_hand)
    leaf.check_transforms(HOW, kept, trained)


def test_encoded_are_the_blocks_alone():
    kept, trained = HOW.init(KEY, leaf.w32())
    trained = leaf.moved(trained)
    encoded = HOW.encode(leaf.w32(), kept, trained)
    np.testing.assert_array_equal(encoded.dense(), np.float32(dense(np.asarray(trained))))
    assert encoded.nbytes < 0.7 * 4 * leaf.W.size


def test_tables_transposes_experts_and_a_low_rank_change_beside():
    w = jax.random.normal(KEY, (3, 8, 6))
    kept, trained = HOW.init(KEY, w)
    trained = leaf.moved(trained)
    structured, plain = HOW.bind(kept, trained, True), HOW.bind(kept, trained, False)
    x, sizes, ids = jax.random.normal(KEY, (7, 8)), jnp.asarray([2, 0, 5]), jnp.asarray([[7, 0], [3, 3]])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    close(grouped_dot(x, structured, sizes), grouped_dot(x, plain, sizes))
    one, flat = jax.tree.map(lambda a: a[1], structured), plain[1]
    close(take(one, ids, jnp.float32), flat[ids])
    close(core.dot(jnp.ones((2, 6)), transpose(one)), jnp.ones((2, 6)) @ flat.T)
    a, b = jax.random.normal(KEY, (8, 2)), jax.random.normal(KEY, (2, 6))
    close(core.dot(x, Changed(one, LowRank(a, 0.5 * b))), x @ (flat + 0.5 * a @ b))


def test_matrices_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divides its rows and its columns"):
        BlockDiagonal(5).init(KEY, leaf.w32())


def test_it_learns_and_has_64_blocks_by_default():
    """Gurses et al. 2025 have 64 and 128 blocks, their code 64 (train.py)."""
    assert jft.method("diablo").train == BlockDiagonal(64)
    learning.check(jft.method("diablo", blocks=4), 1e-2, learning.LINEAR)
