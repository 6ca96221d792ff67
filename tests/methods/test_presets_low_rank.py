"""A low-rank change and selected entries that train together, against float64 NumPy: RoSA, DSEE, Supra, by hand."""

import jax
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
from tests.methods.decoder import dense
from tests.methods.stack import DATA, DOWN, UP
from tests.train import tools

LINEAR = (UP, DOWN)
W = stack.wide(stack.parameters())
RANK, ALPHA = 2, 4.0
SCALE = ALPHA / RANK


def factors(beside=True):
    """Where a and b start; beside a selection from a key of their own."""
    out = {}
    for p in LINEAR:
        key = tree.key_for(jax.random.key(0), p)
        key = jax.random.split(key)[1] if beside else key
        limit = 1 / np.sqrt(W[p].shape[1])
        a = jax.random.uniform(key, (*W[p].shape[:2], RANK), jnp.float32, -limit, limit)
        out[p] = {"a": np.asarray(a, np.float64), "b": np.zeros((stack.LAYERS, RANK, W[p].shape[2]))}
    return out


class Both:
    """Sparse values and factors, each with Adam; ``rate`` is of the factors over that of the values."""

    def __init__(self, low_rank, rate=1.0, base=W):
        self.w, self.low_rank, self.rate = dict(base), low_rank, rate
        self.adam, self.moments, self.steps = stack.Adam(), {}, 0

    @property
    def whole(self):
        return {p: w + (SCALE * self.low_rank[p]["a"] @ self.low_rank[p]["b"] if p in LINEAR else 0)
                for p, w in self.w.items()}  # fmt: skip

    def step(self, batch, masks=None):
        g, self.steps = stack.gradient(self.whole, batch), self.steps + 1
        turned = lambda x: np.swapaxes(x, -1, -2)
        for p, f in self.low_rank.items():
            by_part = {"a": SCALE * g[p] @ turned(f["b"]), "b": SCALE * turned(f["a"]) @ g[p]}
            self.low_rank[p] = {part: self._adam((p, part), f[part], x) for part, x in by_part.items()}
        self.w = self.adam.step(self.w, g, masks or {})

    def _adam(self, name, value, g):
        m, v = self.moments.get(name, (0, 0))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        self.moments[name] = m, v
        ratio = m / (1 - 0.9**self.steps) / (np.sqrt(v / (1 - 0.999**self.steps)) + 1e-8)
        return value - stack.RATE * self.rate * ratio


def check(finished, expected, masks):
    stack.check(finished, expected.whole)
    for path, mask in stack.masks(finished).items():
        np.testing.assert_array_equal(mask, masks[path], err_msg=path)
    # Dense where the sum of the two would be larger.
    parts = {
        path: {type(part): part for part in finished.task_vector[path].parts}
        for path in LINEAR if not isinstance(finished.task_vector[path], delta.Dense)
    }  # fmt: skip
    for path, moved in dense({path: both[delta.Entries] for path, both in parts.items()}).items():
        np.testing.assert_array_equal(np.asarray(moved) != 0, masks[path], err_msg=path)
        assert parts[path][delta.LowRank].a.shape[-1] == RANK
    base = delta.apply(stack.parameters(), finished.task_vector)
    for a, b in zip(*(tree.flatten(x).values() for x in (base, finished.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def largest_gradients(whole, used, squared, density):
    each = [stack.gradient(whole, b) for b in used]
    power, after = (np.square, np.asarray) if squared else (np.asarray, np.abs)
    size = {p: after(np.mean([power(g[p]) for g in each], axis=0)) for p in LINEAR}
    return stack.largest_of_each(size, lambda n: int(density * n))


@pytest.mark.parametrize("squared", [False, True])
def test_rosa_from_a_warm_up_that_is_thrown_away(squared):
    method = {
        "name": "rosa", "rank": RANK, "alpha": ALPHA, "density": 0.2, "warmup": 2, "batches": 2, "squared": squared,
        "low_rank_rate": 3.0,
    }  # fmt: skip
    warm = Both(factors(beside=False), rate=3.0)
    for batch in DATA[:2]:
        warm.step(batch)
    masks = largest_gradients(warm.whole, DATA[:2], squared, 0.2)
    for steps in (1, 3):
        expected = Both(factors(), rate=3.0)
        for batch in DATA[:steps]:
            expected.step(batch, masks)
        check(stack.run(method, steps), expected, masks)


def rosa(steps, warmup):
    """Low rank alone, then entries beside it."""
    state, masks = Both(factors()), {p: np.zeros(W[p].shape, bool) for p in LINEAR}
    for n in range(steps):
        if n == warmup:
            masks = largest_gradients(state.whole, [DATA[n]], False, 0.2)
        state.step(DATA[n % len(DATA)], masks)
    return state, masks


def test_rosa_that_trains_on():
    method = {"name": "rosa", "rank": RANK, "alpha": ALPHA, "density": 0.2, "warmup": 2, "restart": False}
    for steps in (2, 4):
        expected, masks = rosa(steps, 2)
        check(stack.run(method, steps), expected, masks)
    assert masks[UP].any()


@pytest.mark.optimized
def test_rosa_that_trains_on_goes_on_after_an_interruption(tmp_path):
    method = {"name": "rosa", "rank": RANK, "density": 0.2, "warmup": 2, "restart": False}
    for steps in (2, 3, 4):
        resumed = stack.run(method, steps, workdir=tmp_path, checkpoint=1)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, stack.run(method, 4))), strict=True):
        np.testing.assert_array_equal(a, b)


def residual(rank):
    out = {}
    for p in LINEAR:
        u, s, v = np.linalg.svd(W[p], full_matrices=False)
        out[p] = np.abs(W[p] - (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :])
    return out


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_dsee(keep):
    method = {
        "name": "dsee", "rank": RANK, "alpha": ALPHA, "count": 6, "filter_rank": 3, "exact": True, "keep": keep,
    }  # fmt: skip
    masks = stack.largest_of_each(residual(3), 6)
    left = stack.largest_of_each({p: np.abs(W[p]) for p in LINEAR}, lambda n: int(keep * n + 0.5))
    base = W | {p: np.where(left[p], W[p], 0) for p in LINEAR}
    for steps in (1, 3):
        expected = Both(factors(), base=base)
        for batch in DATA[:steps]:
            expected.step(batch, masks)
        check(stack.run(method, steps), expected, masks)


@pytest.mark.optimized
def test_a_pruned_run_goes_on_after_an_interruption(tmp_path):
    method = {"name": "dsee", "rank": RANK, "count": 6, "filter_rank": 3, "keep": 0.5}
    for steps in (1, 3):
        resumed = stack.run(method, steps, workdir=tmp_path, checkpoint=1)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, stack.run(method, 3))), strict=True):
        np.testing.assert_array_equal(a, b)


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
        {"name": "dsee", "rank": 2, "count": 6, "filter_rank": 2, "keep": 0.5, "exact": True},
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
    options = {"rosa": {"rank": 2, "density": 0.2, "warmup": 1}, "dsee": {"rank": 2, "count": 6, "filter_rank": 2}}
    data = tools.batches()
    finished = jft.finetune(
        tools.apply, tools.parameters(), data, steps=3, method={"name": name, **options.get(name, {})},
        optimizer=stack.ADAM, log={"progress": False},
    )  # fmt: skip
    structured = tree.flatten(delta.apply(tools.parameters(), finished.task_vector))
    for path, w in tree.flatten(finished.params).items():
        np.testing.assert_allclose(structured[path], w, atol=1e-6)
    assert finished.metrics[-1]["loss"] < jnp.inf
