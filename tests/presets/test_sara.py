"""SaRA against its released optimizer's rule in float64 NumPy."""

import inspect

import jax
import numpy as np
import pytest

import jft
from jft.methods.penalties import Nuclear
from jft.presets import sara as module
from jft.presets.sara import NuclearOfOne, sara
from tests.methods import stack
from tests.methods.stack import DATA, DOWN, HEAD, SHAPES, UP

W = stack.wide(stack.parameters())
THETA, WEIGHT, STEPS = 0.15, 0.02, 4
MUTATIONS = (
    ("jft/presets/sara.py", "THRESHOLD, SIDE = 2e-3, 64", "THRESHOLD, SIDE = 1e-3, 64"),
    ("jft/presets/sara.py", "nuclear: float = 5e-4,", "nuclear: float = 1e-4,"),
    ("jft/presets/sara.py", "restart: bool = True,\n) -> Method", "restart: bool = False,\n) -> Method"),
    ("jft/presets/sara.py", "Select(score=", "Select(linear_only=True, score="),
    ("jft/presets/sara.py", "return self.weight * jax.lax.switch", "return -self.weight * jax.lax.switch"),
    ("jft/presets/sara.py", "drawn - jnp.asarray(ends - counts)[which]", "drawn"),
    ("jft/presets/sara.py", "jnp.abs(values) < self.threshold", "jnp.abs(values) < 2 * self.threshold"),
    ("jft/presets/sara.py", "min(shape[-2:]) > self.above", "max(shape[-2:]) > self.above"),
    ("jft/methods/penalties.py", "plan.structured) == 2:", "plan.structured) >= 1:"),
    ("jft/train/reselection.py", "if not found.restart:", "if True:"),
)


def matrices(masks, w):
    """P * M of every matrix by itself, by path and layer."""
    out = {(p, i): w[p][i] * masks[p][i] for p in (UP, DOWN) for i in range(stack.LAYERS)}
    return {**out, (HEAD, None): w[HEAD] * masks[HEAD]}


def drawn(masks, w, norm):
    """The one matrix whose nuclear norm this is, and the derivative of that norm."""
    found = [at for at, x in matrices(masks, w).items() if abs(np.linalg.svd(x, compute_uv=False).sum() - norm) < 1e-5]
    assert len(found) == 1, found
    (path, layer), out = found[0], np.zeros(SHAPES[found[0][0]])
    u, _, v = np.linalg.svd(matrices(masks, w)[path, layer], full_matrices=False)
    out[... if layer is None else layer] = u @ v
    return path, layer, out


def followed(norms, restart, again=STEPS // 2):
    """Weights, selections and the matrices drawn, of steps whose nuclear norms were these."""
    adam, w, seen = stack.Adam(), W, []
    selections = [{p: np.abs(x) < THETA for p, x in W.items()}]
    for n, norm in enumerate(norms):
        if n == again:
            selections.append({p: m & (np.abs(w[p]) < THETA) for p, m in selections[0].items()})
            adam = stack.Adam() if restart else adam
        path, layer, derivative = drawn(selections[-1], w, norm)
        seen.append((path, layer))
        g = stack.gradient(w, DATA[n % len(DATA)])
        w = adam.step(w, {p: x + (WEIGHT * derivative if p == path else 0) for p, x in g.items()}, selections[-1])
    return w, selections, seen


@pytest.mark.parametrize("restart", [True, False])
def test_small_entries_train_while_they_are_small(restart):
    method = {"name": "sara", "threshold": THETA, "nuclear": WEIGHT, "above": 0, "restart": restart}
    finished = stack.run(method, STEPS, log={"progress": False, "every": 1})
    norms = [row["penalty"] / WEIGHT for row in finished.metrics if row["split"] == "train"]
    assert len(norms) == STEPS
    expected, selections, seen = followed(norms, restart)
    assert len(set(seen)) > 1
    for path, mask in stack.masks(finished).items():
        np.testing.assert_array_equal(mask, selections[-1][path], err_msg=path)
    stack.check(finished, expected, {p: m for p, m in selections[0].items() if m.any()})
    assert sum(m.sum() for m in selections[0].values()) > sum(m.sum() for m in selections[1].values()) > 0


def test_every_large_matrix_is_drawn_alike():
    """One draw in four for each matrix with a shorter side above 3, which leaves out the head's; of the change, all at once."""
    method = jft.method("sara", threshold=THETA, above=3)
    plan = method.plan(stack.parameters(), stack.MODEL)
    masks = {p: np.abs(x) < THETA for p, x in W.items()}
    lead = lambda p: len(SHAPES[p]) - (1 if p == stack.BIAS else 2)
    chosen = {p: plan.granularity(p, SHAPES[p]).locate(jax.numpy.asarray(m), lead(p)) for p, m in masks.items()}
    kept, trained = plan.init(jax.random.key(0), stack.parameters(), chosen)
    steps = {p: np.arange(x.size, dtype=np.float32).reshape(x.shape) % 3 for p, x in trained.items()}
    moved = {p: x + np.float32(0.01) * (1 + steps[p]) for p, x in trained.items()}
    dense = lambda p: plan.leaves[p].spread(kept[p], moved[p] - trained[p], np.zeros(SHAPES[p], np.float32))
    change = {p: np.asarray(dense(p)) for p in trained}
    of_change = sum(np.linalg.svd(x, compute_uv=False).sum() for p, x in change.items() if p != stack.BIAS)
    np.testing.assert_allclose(Nuclear(1.0)(plan.anchored(), kept, moved), of_change, rtol=1e-3)
    norm = jax.jit(jax.vmap(lambda key: NuclearOfOne(1.0, 3)(plan, kept, trained, key)))
    found = np.asarray(norm(jax.random.split(jax.random.key(1), 400)))
    sizes = {at: np.linalg.svd(x, compute_uv=False).sum() for at, x in matrices(masks, W).items() if at[0] != HEAD}
    counts = {at: int((np.abs(found - s) < 1e-4).sum()) for at, s in sizes.items()}
    assert sum(counts.values()) == 400 and all(70 < n < 130 for n in counts.values()), counts


def test_by_density_the_smallest_of_all_weights_train_while_no_larger_than_the_largest_was():
    finished = stack.run({"name": "sara", "density": 0.2, "nuclear": 0}, 2)
    sizes = {p: -np.abs(W[p]) for p in SHAPES}
    masks = stack.largest_of_all(sizes, int(0.2 * sum(s.size for s in sizes.values())))
    theta, w = max(np.abs(W[p][m]).max() for p, m in masks.items()), stack.follow(W, masks, 1)
    still = {p: m & (np.abs(w[p]) <= theta) for p, m in masks.items()}
    assert sum(m.sum() for m in masks.values()) > sum(m.sum() for m in still.values())
    for path, mask in stack.masks(finished).items():
        np.testing.assert_array_equal(mask, still[path], err_msg=path)


def test_defaults_are_those_of_the_released_script():
    """finetune.sh: threshold 2e-3, lambda_rank 0.0005, progressive_iter 2500 of 5005 steps; adamw.py: min(shape) > 64."""
    defaults = {p.name: p.default for p in inspect.signature(sara).parameters.values()}
    assert defaults == {
        "threshold": None, "density": None, "nuclear": 5e-4, "norm": "values", "above": None, "again": 0.5, "restart": True,
    }  # fmt: skip
    method = jft.method("sara")
    assert (method.select.budget.threshold, method.select.largest, method.select.linear_only) == (2e-3, False, False)
    assert method.penalties == (NuclearOfOne(5e-4, 64),) and method.schedule == module.StillSmall(0.5, 2e-3, True)
    assert [n for n in range(100) if method.schedule.due(n, 100)] == [50]
    change = jft.method("sara", norm="change", density=0.1)
    assert change.penalties == (jft.methods.Nuclear(5e-4),) and change.schedule.threshold is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1, "threshold": 0.1}, r"one of density \(0.1\) and threshold \(0.1\)"),
        ({"norm": "all"}, "norm 'all' is unknown"),
        ({"norm": "change", "above": 3}, "above=3 says which matrices' values have a norm"),
        ({"nuclear": 0, "above": 3}, "above=3 says which matrices' values have a norm"),
        ({"nuclear": 0, "norm": "change"}, "nuclear=0 leaves it out"),
        ({"again": 0, "restart": False}, "again=0 chooses none"),
        ({"again": 1.5}, "a share 1.5 of the run"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jft.method("sara", **options)


def test_a_norm_of_no_matrix_is_refused():
    with pytest.raises(ValueError, match="no matrix that trains has a shorter side above 64; lower `above`"):
        stack.run({"name": "sara", "threshold": THETA}, 1)
