"""Surgical fine-tuning: Fisher scores of layers from float64 gradients of single examples, and steps in what they choose."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import Model
from jft.models.core import Execution
from jft.presets.surgical_fisher import TargetLogit, surgical_fisher
from jft.train.calibration import RunCalibration
from jft.train.objectives import Classification, Contrastive, LanguageModel
from tests.methods import decoder

MUTATIONS = (
    (
        "jft/presets/surgical_fisher.py",
        "jnp.sqrt(jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), axis=1))",
        "jnp.sum(x.reshape(x.shape[0], -1), axis=1)",
    ),
    ("jft/presets/surgical_fisher.py", "TargetLogit(objective)) if self.of", "objective) if self.of"),
    (
        "jft/presets/surgical_fisher.py",
        "    k: int = 1,\n    examples: int = 100",
        "    k: int = 1,\n    examples: int = 1024",
    ),
    ("jft/presets/surgical_fisher.py", "outside: bool = True", "outside: bool = False"),
    ("jft/presets/surgical_fisher.py", 'sums.get("nll", loss)', "loss"),
)
DATA = decoder.batches(2)
L, COUNT = decoder.CONFIG.layers, 7


@functools.cache
def fisher(of):
    """``{path: [L, ..]}``: the mean over examples of the squared gradient of the target's logit, or of its log probability."""
    model = Model(decoder.CONFIG, Execution(dtype=jnp.float64))

    def one(weights, row):
        logits, ahead = model.apply(weights, row[None])[0, :-1], row[1:]
        logits = jax.nn.log_softmax(logits) if of == "likelihood" else logits
        return jnp.mean(logits[jnp.arange(len(ahead)), ahead])

    with jax.enable_x64(True):
        weights = tree.unflatten(decoder.wide(decoder.parameters()))
        rows = np.concatenate([b["tokens"] for b in DATA])[:COUNT]
        found = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))(weights, rows)
        return {
            p: np.mean(np.asarray(g) ** 2, axis=0) for p, g in tree.flatten(found).items() if p.startswith("layers/")
        }


def scores(of, pool):
    """fim_calculator.py: the sum over a layer's tensors of ``torch.norm(F, p="fro")``; or of F itself."""
    each = np.linalg.norm if pool == "frobenius" else np.sum
    return np.array([sum(each(x[i].ravel()) for x in fisher(of).values()) for i in range(L)])


@pytest.mark.parametrize(("of", "pool"), [("logit", "frobenius"), ("likelihood", "sum")])
def test_scores(of, pool):
    params = decoder.parameters()
    paths = [p for p in tree.flatten(params) if p.startswith("layers/")]
    calibration = RunCalibration(decoder.MODEL, params, paths, LanguageModel(), DATA)
    score = surgical_fisher(examples=COUNT, of=of, pool=pool).select.score
    np.testing.assert_allclose(score(calibration)["layers"], scores(of, pool), rtol=1e-4)


@pytest.mark.slow
def test_steps():
    """fine_tuner.py freezes the other layers alone: embeddings and head train."""
    params = decoder.parameters()
    masks = decoder.in_layers(params, np.argsort(-scores("logit", "frobenius"))[:2])
    masks |= {p: True for p in tree.flatten(params) if not p.startswith("layers/")}
    decoder.check(jft.method("surgical_fisher", k=2, examples=COUNT), lambda n, w: masks, params, DATA, steps=(2,))


def test_target_logits():
    logits = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], np.float32)
    batch = {"labels": np.array([2, 0]), "valid": np.array([True, True])}

    @jax.jit
    def found(logits, batch, tokens):
        classes = TargetLogit(Classification()).loss(logits, batch)
        return classes, TargetLogit(LanguageModel(z_loss=0.1)).loss(logits[None], {"tokens": tokens})

    classes, following = found(logits, batch, np.array([[1, 2]]))
    np.testing.assert_allclose(classes[:2], (-1.0 + 0.5, 2), atol=1e-6)
    np.testing.assert_allclose(following[:2], (-1.0, 1), atol=1e-6)


def test_defaults_and_errors():
    defaults = {n: p.default for n, p in inspect.signature(surgical_fisher).parameters.items()}
    # get_samples(100) and empirical=True in fim_calculator.py.
    expected = {"k": 1, "examples": 100, "of": "logit", "per": "example", "pool": "frobenius", "outside": True}
    assert defaults == expected
    assert not surgical_fisher(outside=False).also
    for options, message in (
        ({"k": 0}, "count 0 is not a positive"),
        ({"of": "loss"}, "of is 'loss'"),
        ({"pool": "l1"}, "pool is 'l1'"),
    ):
        with pytest.raises(ValueError, match=message):
            jft.method("surgical_fisher", **options)
    params = decoder.parameters()
    calibration = RunCalibration(decoder.MODEL, params, ["layers/mlp/up/w"], Contrastive(), DATA)
    with pytest.raises(ValueError, match="Contrastive has no target logits; take of='likelihood'"):
        surgical_fisher().select.score(calibration)
