"""SpIEL in float64 NumPy, as its released trainer does it (AlanAnsell/peft, tuners/sft/trainer.py), on the small stack."""

import numpy as np

from tests.methods import stack
from tests.methods.stack import DATA, DOWN, UP

LINEAR = (UP, DOWN)
EVERY, BATCHES, FIRST, STEPS = 3, 2, 1.0, 8
DENSITY = 0.3  # of the model's 226 parameters: 67, and of each of four matrices of 48 a quarter of that
OPTIONS = {"density": DENSITY, "every": EVERY, "batches": BATCHES, "first": FIRST}


def share(done):
    """The code's `p`: all the first time, which is after as many steps as gradients are accumulated for."""
    return 1.0 if done == BATCHES else FIRST * (1 - done / STEPS)


def replaced_by_gradient(active, delta, first, total, p):
    """`select_rigl` on flat arrays: the new mask, and how many that could have gone won again."""
    current = np.flatnonzero(active)
    count = int(len(current) * p)
    outgoing = current[np.argsort(np.abs(delta[current]), kind="stable")][:count]
    remaining = np.setdiff1d(current, outgoing)
    candidates = np.setdiff1d(np.argsort(-np.abs(first), kind="stable")[: len(current)], remaining)
    incoming = candidates[np.argsort(-np.abs(total[candidates]), kind="stable")][:count]
    new = np.setdiff1d(incoming, outgoing)
    changing = outgoing[~np.isin(outgoing, incoming)][: len(new)]
    mask = active.copy()
    mask[changing], mask[new] = False, True
    return mask, len(incoming) - len(new)


def replaced_by_sm3(active, delta, score, p):
    """`select_sm3` on flat arrays."""
    current = np.flatnonzero(active)
    count = int(len(current) * p)
    outgoing = current[np.argsort(np.abs(delta[current]), kind="stable")][:count]
    free = np.flatnonzero(~active)
    mask = active.copy()
    mask[outgoing] = False
    mask[free[np.argsort(-score[free], kind="stable")][:count]] = True
    return mask


def accumulators(gradients):
    """SM3-II on one matrix: the outer product of its row and column maxima."""
    row, column = np.zeros(gradients[0].shape[0]), np.zeros(gradients[0].shape[1])
    for g in gradients:
        nu = np.minimum(row[:, None], column) + g**2
        row, column = nu.max(1), nu.max(0)
    return np.outer(row, column)


def follow(masks, kind):
    """Weights, masks and the number of entries that won again, after ``STEPS`` steps from these masks."""
    base = stack.wide(stack.parameters())
    adam, w, again = stack.Adam(), dict(base), 0
    masks = {p: m.copy() for p, m in masks.items()}
    for done in range(STEPS):
        if done % EVERY == BATCHES:
            gradients = [stack.gradient(w, DATA[(done + i) % len(DATA)]) for i in range(BATCHES)]
            for p in LINEAR:
                before = masks[p].copy()
                for i, active in enumerate(before):
                    g = [one[p][i] for one in gradients]
                    delta = (w[p][i] - base[p][i]).ravel()
                    if kind == "sm3":
                        mask = replaced_by_sm3(active.ravel(), delta, accumulators(g).ravel(), share(done))
                    else:
                        given = active.ravel(), delta, g[0].ravel(), sum(g).ravel(), share(done)
                        mask, won = replaced_by_gradient(*given)
                        again += won
                    masks[p][i] = mask.reshape(active.shape)
                w[p] = np.where(masks[p], w[p], base[p])
                adam.forget({p: masks[p]})
                if kind == "gradient":
                    new = masks[p] & ~before
                    adam.age[p][new] = BATCHES
                    mean = sum(one[p] for one in gradients) / BATCHES
                    square = sum(one[p] ** 2 for one in gradients) / BATCHES
                    adam.mean[p][new] = ((1 - adam.b1**BATCHES) * mean)[new]
                    adam.square[p][new] = ((1 - adam.b2**BATCHES) * square)[new]
        w = adam.step(w, stack.gradient(w, DATA[done % len(DATA)]), masks)
    return w, masks, again


def check(name, kind):
    """A run of the preset is that of NumPy from the same random start; how many entries won again."""
    start = stack.masks(stack.run({"name": name, **OPTIONS}, 1))
    inside = sum(mask.size for mask in start.values())
    for mask in start.values():
        assert (
            mask.sum((1, 2)) == int(DENSITY * sum(map(np.prod, stack.SHAPES.values()))) * mask[0].size // inside
        ).all()
    expected, masks, again = follow(start, kind)
    finished = stack.run({"name": name, **OPTIONS}, STEPS)
    for path, mask in stack.masks(finished).items():
        np.testing.assert_array_equal(mask, masks[path], err_msg=path)
    stack.check(finished, expected, masks)
    return again
