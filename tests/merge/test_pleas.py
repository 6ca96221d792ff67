"""PLeaS: alignment undoes permutations of units and heads, and the fit is least squares of mean activations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import tree
from jft.delta import TaskVector, apply
from jft.merge import average
from jft.merge.pleas import _assignment, align, pleas
from jft.models import DecoderConfig, Model
from jft.models.moe import Experts
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.merge.test_regmean import data, inputs

MUTATIONS = [
    ("jft/merge/pleas.py", "chosen[i] * per + inside[i, chosen[i]]", "chosen[i] * per + inside[i, i]"),
    ("jft/merge/pleas.py", "_assignment(b @ a.T)[0] for a, b", "_assignment(a @ b.T)[0] for a, b"),
    ("jft/merge/pleas.py", "return near + least_norm", "return least_norm"),
    ("jft/merge/pleas.py", "maximize=True", "maximize=False"),
]
MODEL = Model(DecoderConfig(vocab=16, width=8, layers=2, heads=4, kv_heads=2, hidden=6, qkv_bias=True, mlp_bias=True))


def weights(seed):
    """Weights of which no bias is zero."""
    r = np.random.default_rng(seed)
    shapes = tree.flatten(MODEL.abstract())
    draw = lambda p, s: r.normal(size=s).astype(np.float32) * (0.3 if p.endswith("/w") else 1)
    return tree.unflatten({p: jnp.asarray(draw(p, x.shape)) for p, x in shapes.items()})


def shuffled(params, seed):
    """Units, groups of heads and heads inside groups in another order, layer by layer."""
    r = np.random.default_rng(seed)
    flat = {p: np.array(x) for p, x in tree.flatten(params).items()}
    for layer in range(2):
        units = r.permutation(6)
        groups = r.permutation(2)
        heads = np.concatenate([g * 2 + r.permutation(2) for g in groups])
        spread = lambda order: (order[:, None] * 2 + np.arange(2)).ravel()
        for names, order in (
            (("mlp/up", "mlp/gate"), units),
            (("attn/q",), spread(heads)),
            (("attn/k", "attn/v"), spread(groups)),
        ):
            for name, leaf in itertools.product(names, "wb"):
                x = flat[f"layers/{name}/{leaf}"]
                x[layer] = x[layer][..., order]
        for name, order in (("mlp/down", units), ("attn/o", spread(heads))):
            flat[f"layers/{name}/w"][layer] = flat[f"layers/{name}/w"][layer][order]
    return tree.unflatten({p: jnp.asarray(x) for p, x in flat.items()})


def test_alignment_undoes_permutations():
    params = weights(0)
    other = shuffled(params, 1)
    assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))
    back = align(MODEL, other, params)
    for path, x in tree.flatten(params).items():
        np.testing.assert_array_equal(tree.flatten(back)[path], x, err_msg=path)
    # Of any other model the function stays what it was.
    once = align(MODEL, params, weights(5))
    tokens = data()[0]
    np.testing.assert_allclose(MODEL.apply(once, tokens), MODEL.apply(params, tokens), atol=1e-4)
    assert (np.asarray(once["layers"]["mlp"]["up"]["w"]) != params["layers"]["mlp"]["up"]["w"]).any()


def test_assignment_is_the_best_of_all():
    likeness = np.random.default_rng(0).normal(size=(4, 4))
    order, value = _assignment(likeness)
    every = [sum(likeness[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(4))]
    assert value == pytest.approx(max(every))
    assert likeness[range(4), order].sum() == pytest.approx(value)


def calibrations(model, params, paths):
    return [RunCalibration(model, params, paths, LanguageModel(), data(seed)) for seed in (0, 1)]


def test_pleas():
    """The fit against least squares in float64; two orders of one model are one model; better than the average."""
    base = weights(0)
    models = [jax.tree.map(lambda b, w: b + 0.3 * w, base, weights(seed)) for seed in (1, 2)]
    taus = [TaskVector.between(base, m) for m in models]
    paths = ("layers/mlp/up/w", "layers/attn/o/w", "head/w")
    merged = apply(base, pleas(taus, calibrations(MODEL, base, paths), base=base, batches=2))
    merged, second = tree.flatten(merged), align(MODEL, models[1], models[0])
    averaged = tree.flatten(jax.tree.map(lambda a, b: (a + b) / 2, models[0], second))
    for path in paths:
        for layer in (0, 1) if path.startswith("layers") else ((),):
            x, y = [], []
            for batch in (*data(0), *data(1)):
                keep = batch["segments"].ravel() > 0
                both = []
                for m in (models[0], second):
                    z = np.asarray(inputs(MODEL, m, batch)[path[:-2]], np.float64)[layer].reshape(len(keep), -1)[keep]
                    both.append((z, z @ np.asarray(tree.flatten(m)[path], np.float64)[layer]))
                x.append(sum(z for z, _ in both) / 2)
                y.append(sum(z for _, z in both) / 2)
            x, y = np.concatenate(x), np.concatenate(y)
            expected = np.linalg.lstsq(x, y, rcond=None)[0]
            np.testing.assert_allclose(np.asarray(merged[path])[layer], expected, atol=3e-3 * np.abs(expected).max())
            assert np.linalg.norm(x @ expected - y) < 0.99 * np.linalg.norm(x @ np.asarray(averaged[path])[layer] - y)
    for path, x in averaged.items():
        if path not in paths:
            np.testing.assert_allclose(merged[path], x, atol=1e-5)
    one = TaskVector.between(base, models[0])
    two = TaskVector.between(base, shuffled(models[0], 3))
    same = apply(base, pleas([one, two], calibrations(MODEL, base, paths), base=base, batches=1))
    for path, x in tree.flatten(models[0]).items():
        np.testing.assert_allclose(tree.flatten(same)[path], x, atol=1e-4, err_msg=path)
    # Without an alignment it is another.
    assert float((average([one, two]) - one).norm()) > 0.1 * float(one.norm())


def test_wrong_uses():
    mixture = Model(DecoderConfig(vocab=16, width=8, layers=1, heads=2, hidden=4, experts=Experts(2, 1, 4)))
    params = mixture.init(jax.random.key(0))
    with pytest.raises(ValueError, match="experts"):
        align(mixture, params, params)
    with pytest.raises(ValueError, match="have none"):
        align(MODEL, {"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))})
    base, paths = mixture.init(jax.random.key(1)), ("layers/mlp/experts/up/w",)
    with pytest.raises(ValueError, match="outside experts"):
        pleas(
            [TaskVector.between(base, params)], calibrations(mixture, base, paths), base=base, batches=1, permute=False
        )
    base = weights(0)
    with pytest.raises(ValueError, match="at least one calibration"):
        pleas([TaskVector.between(base, weights(1))], [], base=base, batches=1)
