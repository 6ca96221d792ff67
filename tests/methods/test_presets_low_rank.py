"""A low-rank change and selected entries that train together, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta, tree
from jft.dot import dot, transpose
from jft.methods import LowRank, Method, Select
from jft.parallel import make_mesh
from jft.select import budget, granularity, scores
from tests.methods import stack
from tests.methods.low_rank import ALPHA, LINEAR, RANK, Both, W, check, factors
from tests.methods.stack import DATA
from tests.train import tools


def test_a_low_rank_change_beside_any_selection_by_hand():
    select = Select(linear_only=True, score=scores.Magnitude(), budget=budget.PerMatrix(count=5))
    masks = stack.largest_of_each({p: np.abs(W[p]) for p in LINEAR}, 5)
    expected = Both(factors())
    for batch in DATA[:2]:
        expected.step(batch, masks)
    check(stack.run(Method(select, LowRank(RANK, ALPHA)), 2), expected, masks)


UNITS = {"blocks": granularity.Block(2, 2), "rows": granularity.Row(), "columns": granularity.Column()}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_other_units_beside_a_low_rank_change(unit):
    select = Select(linear_only=True, score=scores.Magnitude(), granularity=unit, budget=budget.PerMatrix(count=2))
    finished = stack.run(Method(select, LowRank(RANK, ALPHA)), 2)
    masks = stack.masks(finished)
    expected = Both(factors())
    for batch in DATA[:2]:
        expected.step(batch, masks)
    stack.check(finished, expected.whole)


def test_tied_heads_pass_a_selection_beside_a_low_rank_change_through():
    """The transposed weight of an output head that is the embedding table."""
    from jft.delta import Changed, LowRank, SliceLayout
    from tests.methods import selections

    r = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(r.normal(size=shape), jnp.float32)
    w, a, b, x, at = draw(7, 4), draw(7, 2), draw(2, 4), draw(3, 4), jnp.asarray([[1, 5]])
    layout = SliceLayout(-2)
    inside = selections.weight(layout, w, at, layout.gather(w, at))
    found = dot(x, transpose(Changed(inside, LowRank(a, 0.5 * b))))
    np.testing.assert_allclose(found, x @ (w + 0.5 * a @ b).T, rtol=1e-5, atol=1e-5)


def test_a_selection_beside_a_low_rank_change_that_would_settle_is_refused():
    from jft.methods.schedules import Refresh

    select = Select(linear_only=True, score=scores.Magnitude(), budget=budget.PerMatrix(count=5))
    with pytest.raises(ValueError, match="cannot change what it selects"):
        stack.run(Method(select, LowRank(RANK, ALPHA), schedule=Refresh(1)), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"name": "rosa", "rank": 2, "density": 0.2, "warmup": 1},
        {"name": "rosa", "rank": 2, "density": 0.2, "warmup": 1, "restart": False},
        {"name": "dsee", "rank": 2, "count": 6, "filter_rank": 2, "keep": 0.5, "exact": True, "include": ""},
        "spider",
        {"name": "gmt", "density": 0.3},
        {"name": "sara", "density": 0.2, "above": 0},
        {"name": "spiel_ag", "density": 0.3, "every": 3, "batches": 1},
    ],
    ids=lambda m: m if isinstance(m, str) else m["name"],
)
def test_on_a_mesh_as_on_one_device(method):
    one, many = (stack.run(method, 2, mesh=m) for m in (None, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})))
    for path, w in tree.flatten(one.params).items():
        np.testing.assert_allclose(tree.flatten(many.params)[path], w, atol=1e-5, err_msg=path)
    alone, sharded = stack.masks(one), stack.masks(many)
    for path, mask in alone.items():
        np.testing.assert_array_equal(sharded[path], mask, err_msg=path)


@pytest.mark.parametrize("name", ["rosa", "dsee", "spider", "super_tuning"])
def test_any_function_of_plain_arrays(name):
    options = {
        "rosa": {"rank": 2, "density": 0.2, "warmup": 1},
        "dsee": {"rank": 2, "count": 6, "filter_rank": 2, "include": ""},
    }
    data = tools.batches()
    finished = jft.finetune(
        tools.apply, tools.parameters(), data, steps=3, method={"name": name, **options.get(name, {})},
        optimizer=stack.ADAM, log={"progress": False},
    )  # fmt: skip
    structured = tree.flatten(delta.apply(tools.parameters(), finished.task_vector))
    for path, w in tree.flatten(finished.params).items():
        np.testing.assert_allclose(structured[path], w, atol=1e-6)
    assert finished.metrics[-1]["loss"] < jnp.inf
