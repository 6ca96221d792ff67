"""GreenTrainer: importance, costs and the choice written out in NumPy, and steps in what it chooses."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import Model
from jft.presets.green_trainer import green_trainer, importance
from jft.select import backward
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder

MUTATIONS = (
    ("jft/presets/green_trainer.py", "calibration.at(after).gradient", "calibration.gradient"),
    ("jft/presets/green_trainer.py", ".at(after).gradient(batches)", ".at(after).gradient(batches + 1)"),
    ("jft/presets/green_trainer.py", "jnp.sum(gradient * moved", "jnp.sum(abs(gradient * moved)"),
    ("jft/presets/green_trainer.py", "np.asarray(-jnp.sum", "np.asarray(jnp.sum"),
    ("jft/presets/green_trainer.py", "(self.fraction * (forward + full) - forward) / full", "self.fraction"),
    ("jft/presets/green_trainer.py", "fraction: float = 0.5", "fraction: float = 0.7"),
)
DATA = decoder.batches()


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


@pytest.fixture(scope="module")
def worth(params):
    """``(weights, importance)`` as in train.py: a step on a batch, and the gradient of the same batch after it."""
    before = decoder.wide(params)
    after = decoder.followed(params, lambda n, w: dict.fromkeys(before, True), 1, DATA)
    g = decoder.gradient(after, DATA[0])
    layers = lambda p: decoder.CONFIG.layers if p.startswith("layers/") else 1
    return after, {p: -(g[p] * (after[p] - before[p])).reshape(layers(p), -1).sum(1) for p in before}


def test_importance(params, worth):
    after, expected = worth
    tuned = tree.unflatten({p: jnp.asarray(x, jnp.float32) for p, x in after.items()})
    calibration = RunCalibration(decoder.MODEL, params, expected, LanguageModel(), DATA, train=lambda steps: tuned)
    found = importance(calibration)
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, rtol=2e-3, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_the_choice_and_steps(params, worth):
    flat = tree.flatten(params)
    chain = _chain(length=6)
    assert {p for p, *_ in chain} == set(flat)
    gains = [worth[1][p][i] for p, i, *_ in chain]
    forward, backwards = _costs(chain)
    chosen = _best(gains, chain, 0.5 * (forward + backwards) - forward)
    masks = {}
    for j in chosen:
        path, layer = chain[j][:2]
        if path.startswith("layers/"):
            one = decoder.in_layers(params, [layer], lambda q, p=path: q == p)[path]
            masks[path] = masks.get(path, False) | one
        else:
            masks[path] = True
    result = decoder.check(jft.method("green_trainer", fraction=0.5), lambda n, w: masks, params, DATA, steps=(2,))
    assert 0 < len(chosen) < len(chain) and result.task_vector.paths == [p for p in flat if p in masks]


def _chain(length):
    """(path, layer, FLOPs of its gradient, FLOPs beyond it), from the loss down, written out."""
    c, T = decoder.CONFIG, length
    D, F, Q, K, V = c.width, c.hidden, c.heads * c.head_size, c.kv_heads * c.head_size, c.vocab
    product = lambda i, o: 2 * T * i * o
    out = [("head/w", 0, product(D, V), product(D, V)), ("final_norm/scale", 0, T * D, 0)]
    for i in reversed(range(c.layers)):
        out += [(f"layers/{n}", i, w, a) for n, w, a in [
            ("mlp/down/w", product(F, D), product(F, D)),
            ("mlp/gate/w", product(D, F), 0), ("mlp/up/w", product(D, F), 2 * product(D, F)),
            ("mlp_norm/scale", T * D, 0),
            ("attn/o/w", product(Q, D), product(Q, D) + 8 * T * T * Q),
            ("attn/k/w", product(D, K), 0), ("attn/q/w", product(D, Q), 0),
            ("attn/v/w", product(D, K), 2 * product(D, K) + product(D, Q)),
            ("attn_norm/scale", T * D, 0),
        ]]  # fmt: skip
    return [*out, ("embed/table", 0, T * D, 0)]


def _costs(chain):
    products = sum(w for p, _, w, _ in chain if p.endswith("/w"))
    attention = sum(a - w for p, _, w, a in chain if p.endswith("attn/o/w"))
    return products + attention // 2, sum(w for *_, w, _ in chain) + sum(a for *_, a in chain[:-1])


def _best(worth, chain, budget):
    """The best choice by looking at all of them: for each deepest tensor a knapsack of what lies above it."""
    best, choice = 0.0, []
    for deepest in range(len(chain)):
        room = budget - sum(a for *_, a in chain[:deepest]) - chain[deepest][2]
        if room < 0 or worth[deepest] <= 0:
            continue
        value, above = _knapsack([(worth[j], chain[j][2], j) for j in range(deepest) if worth[j] > 0], room)
        if value + worth[deepest] > best:
            best, choice = value + worth[deepest], [*above, deepest]
    return sorted(choice)


def _knapsack(items, room):
    states = {0: (0.0, [])}
    for gain, cost, j in items:
        for spent, (value, chosen) in sorted(states.items(), reverse=True):
            now = spent + cost
            if now <= room and value + gain > states.get(now, (-1.0, None))[0]:
                states[now] = (value + gain, [*chosen, j])
    return max(states.values(), key=lambda s: s[0])


def test_it_decides_again(params, tmp_path):
    """Four steps at once, and in two parts with a new decision between them, give the same weights."""
    method = jft.method("green_trainer", fraction=0.5, every=2)
    whole = decoder.run(method, 4, params, DATA)
    for steps in (2, 4):
        parts = decoder.run(method, steps, params, DATA, workdir=tmp_path, checkpoint=1)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, parts.params, whole.params)))
    with pytest.raises(ValueError, match="the forward pass alone is"):
        decoder.run(jft.method("green_trainer", fraction=0.2), 1, params, DATA)


def test_costs_are_known_for_one_stack_alone():
    params = decoder.parameters(decoder.clip())
    with pytest.raises(ValueError, match="one stack of layers"):
        backward.chain(RunCalibration(Model(decoder.clip()), params, list(tree.flatten(params)), LanguageModel(), DATA))


def test_defaults_and_errors():
    defaults = {n: p.default for n, p in inspect.signature(green_trainer).parameters.items()}
    # main.py: rho 0.5; train.py: one batch.
    assert defaults == {"fraction": 0.5, "every": 0, "batches": 1, "of": "step"}
    with pytest.raises(ValueError, match="at least 1"):
        jft.method("green_trainer", every=-1)
