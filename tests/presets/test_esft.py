"""ESFT against its paper in float64 NumPy: experts until their share of the data is reached, and steps of them."""

import functools
import inspect

import jax
import numpy as np
import pytest

import jft
from jft.dot import dot
from jft.models import DecoderConfig, Hooks, Model
from jft.models.moe import Experts
from jft.presets.esft import ExpertUse, esft
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder

DATA = decoder.batches()
MUTATIONS = (
    ("jft/presets/esft.py", "0.2 if kind", "0.5 if kind"),
    ("jft/presets/esft.py", "else 0.1)", "else 0.2)"),
    ("jft/presets/esft.py", "self.batches, self.kind)", 'self.batches, "token")'),
    ("jft/presets/esft.py", "activations.until(jax.device_get(x), self.p)", "activations.until(1 - jax.device_get(x), self.p)"),
    ("jft/select/activations.py", "before < p * total", "before < p * total - ranked"),
)  # fmt: skip


def best(score, count):
    """Bool mask of the ``count`` largest of each row; ties: the lower."""
    order = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


MIXTURE = DecoderConfig(vocab=13, width=8, layers=2, heads=2, hidden=8, experts=Experts(5, 2, 6), init_std=0.4)


@pytest.mark.parametrize("kind", ["token", "gate"])
def test_experts_are_taken_until_they_have_the_share(kind):
    params, model = decoder.parameters(MIXTURE), Model(MIXTURE)
    probabilities = np.concatenate([_routing(model, params, b) for b in DATA[:2]], axis=1)
    top2 = best(probabilities, 2)
    gates = np.where(top2, probabilities, 0)
    gates /= gates.sum(-1, keepdims=True)
    use = top2.mean(1) / 2 if kind == "token" else gates.mean(1)
    chosen = np.zeros(use.shape, bool)
    for layer, row in enumerate(use):
        for i in np.argsort(-row, kind="stable"):
            if row[chosen[layer]].sum() >= 0.5:
                break
            chosen[layer, i] = True
    masks = {f"layers/mlp/experts/{n}/w": chosen[:, :, None, None] for n in ("gate", "up", "down")}
    assert 0 < chosen.sum() < chosen.size
    method = jft.method("esft", p=0.5, kind=kind, batches=2)
    steps = (1, 3) if kind == "token" else (1,)
    decoder.check(method, lambda n, w: masks, params, DATA, model, MIXTURE, steps=steps)


@functools.partial(jax.jit, static_argnums=0)
def _router(model, params, batch):
    """Logits ``[L, B, T, E]`` of all experts for every token."""

    def product(name, x, w, state):
        y = dot(x, w)
        return y, y if name.endswith("router") else None

    return model.apply(params, batch, hooks=Hooks(product=product))[1]["layers/mlp/router"]


def _routing(model, params, batch):
    """Probabilities ``[L, N, E]`` of all experts for every token."""
    logits = np.asarray(_router(model, params, batch), np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).reshape(len(e), -1, e.shape[-1])


def test_defaults_are_those_of_the_released_scripts():
    """README: --score_function=token --top_p=0.2; the paper's ESFT-Gate: 0.1."""
    assert {p.name: p.default for p in inspect.signature(esft).parameters.values()} == {
        "p": None, "kind": "token", "batches": 8,
    }  # fmt: skip
    assert jft.method("esft").select.score == ExpertUse(0.2, "token", 8)
    assert jft.method("esft", kind="gate").select.score == ExpertUse(0.1, "gate", 8)
    assert jft.method("esft").select.paths(
        {p: np.zeros(2) for p in ("layers/mlp/experts/up/w", "layers/mlp/router/w", "layers/mlp/shared/up/w")}, ()
    ) == ["layers/mlp/experts/up/w"]


def test_a_model_without_experts_is_refused():
    calibration = RunCalibration(decoder.MODEL, decoder.parameters(), ["layers/attn/o/w"], LanguageModel(), DATA)
    with pytest.raises(ValueError, match="has no experts to score"):
        jft.method("esft").select.score(calibration)
