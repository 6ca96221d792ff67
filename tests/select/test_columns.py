"""Budgets per column of a matrix, against a stable sort of every column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jft.parallel import make_mesh
from jft.select import PerColumn, choose
from jft.select.columns import top_of_columns

SHAPES = {"layers/up/w": (3, 8, 4), "layers/experts/up/w": (3, 2, 5, 6), "head/w": (7, 3)}
LEADS = {"layers/up/w": 1, "layers/experts/up/w": 2, "head/w": 0}


def sorted_columns(score, count, largest):
    """count: of each matrix, by its index in the leading axes."""
    mask = np.zeros(score.shape, bool)
    for index in np.ndindex(score.shape[:-2]):
        for column in range(score.shape[-1]):
            one = score[index][:, column]
            order = np.argsort(-one if largest else one, kind="stable")
            mask[index][order[: count(index)], column] = True
    return mask


def scores():
    rng = np.random.default_rng(0)
    return {p: rng.integers(0, 5, s).astype(np.float32) for p, s in SHAPES.items()}  # with ties


@pytest.mark.parametrize("mesh", [False, True])
def test_the_best_of_every_column(mesh):
    values = scores()
    given = {p: jnp.asarray(x) for p, x in values.items()}
    if mesh:
        split = NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), P(None, "fsdp", "tensor"))
        given["layers/up/w"] = jax.device_put(given["layers/up/w"], split)
    for budget, largest, count in (
        (PerColumn(count=2), True, lambda rows: 2),
        (PerColumn(density=0.5), False, lambda rows: rows // 2),
        (PerColumn(density=0.01), True, lambda rows: 1),
    ):
        found = choose(given, dict.fromkeys(values, 1), LEADS, budget, largest)
        for p, x in values.items():
            np.testing.assert_array_equal(found[p], sorted_columns(x, lambda _, n=count(x.shape[-2]): n, largest))
            assert found[p].sharding.is_equivalent_to(given[p].sharding, x.ndim)
            assert budget.share(x.shape) == np.asarray(found[p]).sum() // np.prod(x.shape[:-2], dtype=int)


def test_a_count_for_each_matrix():
    x = scores()["layers/up/w"]
    found = top_of_columns(jnp.asarray(x), np.asarray([1, 8, 3]))
    np.testing.assert_array_equal(found, sorted_columns(x, lambda index: (1, 8, 3)[index[0]], True))


def test_what_is_refused():
    one = {"layers/up/b": jnp.zeros((3, 4))}
    for make, message in (
        (lambda: choose(one, {"layers/up/b": 1}, {"layers/up/b": 1}, PerColumn(count=1)), "holds no matrices"),
        (
            lambda: choose({"w": jnp.zeros((3, 4))}, {"w": 1}, {"w": 0}, PerColumn(count=4)),
            "budget is 4 units of each column",
        ),
        (lambda: PerColumn(parameters=3), "takes exactly one of density, count"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
