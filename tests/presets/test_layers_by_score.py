"""Layers by score: residual streams of a NumPy pass in float64, their correlations, and steps in the layer they choose."""

import functools
import inspect

import numpy as np
import pytest

import jft
from jft.presets.layers_by_score import Correlation, layers_by_score
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder

MUTATIONS = (
    ("jft/presets/layers_by_score.py", "-loss / jnp.where", "loss * loss / jnp.where"),
    ("jft/presets/layers_by_score.py", "batches: int = 8,\n    pool", "batches: int = 9,\n    pool"),
    ("jft/presets/layers_by_score.py", "largest=largest", "largest=False"),
    ("jft/presets/layers_by_score.py", 'site: str = "layers/in"', 'site: str = "layers/mlp/out"'),
    ("jft/presets/layers_by_score.py", "return batch[self.name]", "return batch[self.name] ** 2"),
)
DATA = decoder.batches(3)


@functools.cache
def likelihood():
    rows = [{"tokens": b["tokens"][i : i + 1]} for b in DATA for i in range(4)]
    return np.array([-decoder.loss_and_gradient(decoder.wide(decoder.parameters()), r)[0] for r in rows])


def scores(target):
    """The root mean square over features of their correlation with ``target``, of what enters each layer."""
    base, out = decoder.wide(decoder.parameters()), []
    for h in zip(*(decoder.passed(base, b["tokens"])[0] for b in DATA), strict=True):
        pooled = np.concatenate(h).mean(1)
        pooled, y = pooled - pooled.mean(0), target - target.mean()
        r = pooled.T @ y / np.sqrt((pooled**2).sum(0) * (y**2).sum())
        out.append(np.sqrt(np.mean(r**2)))
    return np.asarray(out)


def test_steps_in_the_layer_that_goes_most_with_the_likelihood():
    params = decoder.parameters()
    masks = decoder.in_layers(params, np.argsort(-scores(likelihood()))[:1])
    decoder.check(jft.method("layers_by_score", batches=3), lambda n, w: masks, params, DATA, steps=(2,))


def test_scores_of_the_likelihood_and_of_a_number_from_the_batch():
    prior = np.random.default_rng(0).normal(size=12)
    named = [{**b, "prior": np.float32(prior[4 * i : 4 * i + 4])} for i, b in enumerate(DATA)]
    paths = ["layers/attn/q/w"]
    calibration = RunCalibration(decoder.MODEL, decoder.parameters(), paths, LanguageModel(), named)
    np.testing.assert_allclose(Correlation("prior", 3)(calibration)["layers"], scores(prior), rtol=1e-4)
    np.testing.assert_allclose(Correlation(None, 3)(calibration)["layers"], scores(likelihood()), rtol=1e-4)
    with pytest.raises(ValueError, match="no 'other' to correlate layers with, only prior, tokens"):
        Correlation("other", 3)(calibration)


def test_defaults():
    defaults = {n: p.default for n, p in inspect.signature(layers_by_score).parameters.items()}
    assert defaults == {"k": 1, "target": None, "batches": 8, "pool": "mean", "largest": True, "score": None}
    with pytest.raises(ValueError, match="count 0 is not a positive"):
        layers_by_score(k=0)
