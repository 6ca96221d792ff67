"""Presets whose selection changes during a run, against their published rules in float64 NumPy; and taking them up again."""

import numpy as np
import pytest

from jft import tree
from tests.methods import stack
from tests.methods.stack import DATA, DOWN, UP

LINEAR = (UP, DOWN)
W = stack.wide(stack.parameters())
EVERY = 2


def low_rank(w, rank):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def principal(w, sign):
    scores = {p: sign * np.abs(low_rank(w[p], 2)) for p in LINEAR}
    return stack.largest_of_each(scores, stack.WIDTH + stack.HIDDEN)


def lift(steps, sign):
    """Weights after ``steps``, and the selections on the way, a new one every ``EVERY`` steps."""
    adam, w, selections = stack.Adam(), W, []
    for n in range(steps):
        if n % EVERY == 0:
            selections.append(principal(w, sign))
            adam.forget(selections[-1])
        w = adam.step(w, stack.gradient(w, DATA[n % len(DATA)]), selections[-1])
    return w, selections


def union(selections):
    return {p: np.logical_or.reduce([s[p] for s in selections]) for p in LINEAR}


@pytest.mark.parametrize("largest", [True, False])
def test_lift_selects_anew_from_the_weights_as_they_are(largest):
    method = {"name": "lift", "rank": 1, "filter_rank": 2, "every": EVERY, "largest": largest, "exact": True}
    for steps in (1, 3, 5):
        expected, selections = lift(steps, 1 if largest else -1)
        finished = stack.run(method, steps)
        for path, mask in stack.masks(finished).items():
            np.testing.assert_array_equal(mask, selections[-1][path], err_msg=path)
        stack.check(finished, expected, union(selections))
    assert any((selections[0][p] != selections[-1][p]).any() for p in LINEAR)


def test_lift_without_refreshes_keeps_its_first_selection():
    finished = stack.run({"name": "lift", "rank": 1, "filter_rank": 2, "exact": True}, 3)
    masks = principal(W, 1)
    stack.check(finished, stack.follow(W, masks, 3), masks)


def grown(gradients, kind):
    """What newcomers compete by, over these batches' gradients."""
    if kind == "gradient":
        return {p: np.abs(sum(g[p] for g in gradients)) for p in LINEAR}
    out = {}
    for p in LINEAR:
        row, column = np.zeros(W[p].shape[:2]), np.zeros((W[p].shape[0], W[p].shape[2]))
        for g in gradients:
            nu = np.minimum(row[:, :, None], column[:, None]) + g[p] ** 2
            row, column = nu.max(2), nu.max(1)
        out[p] = row[:, :, None] * column[:, None]
    return out


def spiel(masks, steps, kind, every=2, first=0.6, batches=3):
    """SpIEL: entries that moved least go back to the base, others take their place with moments from their gradients."""
    adam, w = stack.Adam(), W
    masks = {p: m.copy() for p, m in masks.items()}
    for n in range(steps):
        if n and n % every == 0:
            share = 1.0 if n == every else first * (1 - n / steps)
            gradients = [stack.gradient(w, DATA[(n + i) % len(DATA)]) for i in range(batches)]
            scores = grown(gradients, kind)
            w, new = dict(w), {}
            for p in LINEAR:
                new[p] = np.zeros_like(masks[p])
                for i, active in enumerate(masks[p]):
                    k = int(active.sum())
                    drop = int(share * k)
                    moved = np.where(active, np.abs(w[p][i] - W[p][i]), -np.inf)
                    score = scores[p][i]
                    if kind == "gradient":
                        score = np.where(stack.largest(np.abs(gradients[0][p][i]), k), score, -1)
                    come = stack.largest(np.where(active, -np.inf, score), drop)
                    new[p][i] = stack.largest(moved, k - drop) | come
                w[p] = np.where(new[p], w[p], W[p])
            adam.forget(new)
            if kind == "gradient":
                for p in LINEAR:
                    come = new[p] & ~masks[p]
                    mean = sum(g[p] for g in gradients) / batches
                    square = sum(g[p] ** 2 for g in gradients) / batches
                    adam.age[p][come] = batches
                    adam.mean[p][come] = ((1 - adam.b1**batches) * mean)[come]
                    adam.square[p][come] = ((1 - adam.b2**batches) * square)[come]
            masks = new
        w = adam.step(w, stack.gradient(w, DATA[n % len(DATA)]), masks)
    return w, masks


@pytest.mark.parametrize(("name", "kind"), [("spiel_ag", "gradient"), ("spiel_ma", "sm3")])
def test_spiel_drops_and_grows(name, kind):
    method = {"name": name, "density": 0.3, "every": 2, "first": 0.6, "batches": 3}
    start = stack.masks(stack.run(method, 1))
    for mask in start.values():
        assert (mask.sum((1, 2)) == int(0.3 * mask[0].size)).all()
    for steps in (3, 6):
        expected, masks = spiel(start, steps, kind)
        finished = stack.run(method, steps)
        for path, mask in stack.masks(finished).items():
            np.testing.assert_array_equal(mask, masks[path], err_msg=path)
        stack.check(finished, expected, masks)


def nuclear(w, masks, weight, eps=1e-8):
    out = {}
    for p, mask in masks.items():
        change = np.where(mask, w[p] - W[p], 0)
        u, s, v = np.linalg.svd(change, full_matrices=False)
        out[p] = weight * (u * (s / np.sqrt(s**2 + eps))[:, None]) @ v
    return out


def smallest(density):
    sizes = {p: -np.abs(W[p]) for p in tree.flatten(stack.parameters()) if p in LINEAR}
    return stack.largest_of_all(sizes, int(density * sum(s.size for s in sizes.values())))


def sara(masks, steps, weight, again):
    """SaRA: from ``again`` on, only entries go on that are still no larger than the largest was."""
    adam, w, selections = stack.Adam(), W, [masks]
    threshold = max(np.abs(W[p][m]).max() for p, m in masks.items())
    for n in range(steps):
        if n == again:
            selections.append({p: m & (np.abs(w[p]) <= threshold) for p, m in masks.items()})
            adam.forget(selections[-1])
        g, extra = stack.gradient(w, DATA[n]), nuclear(w, selections[-1], weight)
        w = adam.step(w, {p: x + extra.get(p, 0) for p, x in g.items()}, selections[-1])
    return w, selections


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_sara_trains_what_is_small_while_it_is(weight):
    method = {"name": "sara", "density": 0.2, "nuclear": weight, "again": 0.7}
    for steps in (1, 3):
        expected, selections = sara(smallest(0.2), steps, weight, again=2)
        finished = stack.run(method, steps)
        for path, mask in stack.masks(finished).items():
            np.testing.assert_array_equal(mask, selections[-1][path], err_msg=path)
        stack.check(finished, expected, selections[0])
    assert sum(m.sum() for m in selections[0].values()) > sum(m.sum() for m in selections[1].values()) > 0


def test_sara_by_a_threshold():
    finished = stack.run({"name": "sara", "density": None, "threshold": 0.1, "again": 0.0}, 1)
    for path, mask in stack.masks(finished).items():
        np.testing.assert_array_equal(mask, np.abs(W[path]) < 0.1)


class Ends(list):
    """Batches that cannot be read any more after so many."""

    def __init__(self, batches, after):
        super().__init__(batches)
        self.left = after

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return super().__getitem__(i)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("method", "reads"),
    [
        ({"name": "lift", "rank": 1, "filter_rank": 2, "every": 2}, 5),
        ({"name": "lift", "rank": 1, "filter_rank": 2, "every": 3}, 5),
        ({"name": "spiel_ag", "density": 0.3, "every": 2, "batches": 2}, 7),
        ({"name": "spiel_ma", "density": 0.3, "every": 3, "batches": 2}, 7),
        ({"name": "sara", "density": 0.2, "nuclear": 0.01, "again": 0.25}, 5),
    ],
)  # fmt: skip
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(method, reads, tmp_path):
    """Its newest checkpoint is that of step 4, where every second step selects anew."""
    with pytest.raises(OSError, match="disk"):
        stack.run(method, 8, data=Ends(DATA, reads), workdir=tmp_path, checkpoint=2)
    resumed = stack.run(method, 8, workdir=tmp_path, checkpoint=2)
    whole = stack.run(method, 8)
    assert resumed.metrics[0]["step"] > 4
    for path, w in tree.flatten(whole.params).items():
        np.testing.assert_array_equal(tree.flatten(resumed.params)[path], w, err_msg=path)
        if path in whole.task_vector:
            one, other = (np.asarray(r.task_vector[path].dense()) for r in (whole, resumed))
            np.testing.assert_array_equal(other, one, err_msg=path)


def test_a_run_asked_to_go_on_for_longer_is_the_longer_run(tmp_path):
    method = {"name": "lift", "rank": 1, "filter_rank": 2, "every": 2}
    for steps in (4, 8):
        resumed = stack.run(method, steps, workdir=tmp_path, checkpoint=2)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, stack.run(method, 8))), strict=True):
        np.testing.assert_array_equal(a, b)
