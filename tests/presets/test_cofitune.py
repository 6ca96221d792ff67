"""CoFiTune: importance of units by differences in NumPy, steps under the soft mask, and the search for layers."""

import functools
import inspect

import jax
import numpy as np
import pytest

import jft
from jft import tree
from jft.presets.cofitune import RangeSearch, SoftMask, cofitune, importance
from jft.select.layers import Between
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder
from tests.methods.evaluations import Evaluations

MUTATIONS = (
    ("jft/presets/cofitune.py", "return jnp.abs(jnp.tanh(z))", "return jax.nn.sigmoid(z)"),
    ("jft/presets/cofitune.py", "return jnp.abs(jnp.tanh(z))", "return jax.random.uniform(jax.random.key(0), z.shape)"),
    ("jft/presets/cofitune.py", "return jnp.abs(jnp.tanh(z))", "return jnp.square(jnp.tanh(z))"),
    ("jft/presets/cofitune.py", "z = (gradient - jnp.mean(gradient, ", "z = (abs(gradient) - jnp.mean(abs(gradient), "),
    ("jft/presets/cofitune.py", "ddof=min(1, gradient.shape[-1] - 1)", "ddof=0"),
    ("jft/presets/cofitune.py", 'of = jnp.abs if self.size == "absolute"', "of = jnp.abs if True"),
    ("jft/presets/cofitune.py", 'of = jnp.abs if self.size == "absolute"', "of = jnp.abs if False"),
    ("jft/presets/cofitune.py", 'r"mlp/up/w"', 'r"mlp/(?:up|gate)/w"'),
    ("jft/presets/cofitune.py", "DEPTH, MODULES = (0.25, 0.5)", "DEPTH, MODULES = (0.5, 0.75)"),
    ("jft/presets/cofitune.py", "parts: tuple[int, ...] = (2, 4)", "parts: tuple[int, ...] = (4, 2)"),
)
DATA = decoder.batches(2)
L, RATE, BATCHES = decoder.CONFIG.layers, 0.1, 2
UNITS = {"heads": 4, "channels": 12, "outputs": 8}


@functools.cache
def params():
    return decoder.parameters()


@functools.cache
def calibration():
    paths = [p for p in tree.flatten(params()) if p.startswith("layers/")]
    return RunCalibration(decoder.MODEL, params(), paths, LanguageModel(), DATA)


def dropped(batch):
    """What the two passes multiply with, ``(attention [L, B, T, H K], mlp [L, B, T, D])`` each: the same draws as there."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), int(batch["tokens"].sum()))
    one = lambda key: np.asarray(jax.random.bernoulli(key, 1 - RATE, (*batch["tokens"].shape, 8))) / (1 - RATE)
    stack = lambda key: np.stack([one(k) for k in jax.random.split(key, L)])
    return [tuple(stack(k) for k in jax.random.split(each)) for each in jax.random.split(key)]


@functools.cache
def gradients():
    """``{unit: [B, L, n]}`` of all examples: the derivative of KL(p || p') in a gate of 1 on a unit, by differences."""
    w, noise = decoder.wide(params()), [dropped(b) for b in DATA]

    def divergence(gates):
        out = []
        for batch, draws in zip(DATA, noise, strict=True):
            logits = [decoder.passed(w, batch["tokens"], gates, draw)[1] for draw in draws]
            p, q = (x - x.max(-1, keepdims=True) for x in logits)
            p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
            out.append((np.exp(p) * (p - q)).sum((1, 2)))
        return np.concatenate(out)

    found = {}
    for unit, n in UNITS.items():
        found[unit] = np.zeros((8, L, n))
        for i, j in np.ndindex(L, n):
            both = []
            for by in (1e-5, -1e-5):
                gates = np.ones((L, n))
                gates[i, j] += by
                both.append(divergence({unit: gates}))
            found[unit][:, i, j] = (both[0] - both[1]) / 2e-5
    return found


def expected(size):
    """CoFiTune's softmask_utils.py: sums of signed gradients, torch's std (n - 1) over a layer, abs(tanh z)."""
    total = {u: (g if size == "signed" else abs(g)).sum(0) for u, g in gradients().items()}
    z = {u: (g - g.mean(1, keepdims=True)) / g.std(1, ddof=1, keepdims=True) for u, g in total.items()}
    return {u: abs(np.tanh(x)) for u, x in z.items()}


@pytest.mark.parametrize("size", ["signed", "absolute"])
def test_importance(size):
    found = importance(calibration(), BATCHES, RATE, size)
    reference = expected(size)
    names = {"heads": "layers/attn/heads", "channels": "layers/mlp/channels", "outputs": "layers/mlp/outputs"}
    for unit, name in names.items():
        np.testing.assert_allclose(found[name], reference[unit], atol=2e-3, err_msg=unit)
    # Of two query heads that share keys and values the more important one counts.
    np.testing.assert_allclose(found["layers/attn/kv_heads"], reference["heads"].reshape(L, 2, 2).max(2), atol=2e-3)
    assert len(found) == 4


def test_the_soft_mask_scales_gradients_of_up_down_q_k_and_v():
    found = expected("signed")
    columns = lambda unit, times: 1 - np.repeat(unit, times, axis=1)[:, None]
    grouped = found["heads"].reshape(L, 2, 2).max(2)
    scale = {
        "layers/mlp/up/w": columns(found["channels"], 1),
        "layers/mlp/down/w": columns(found["outputs"], 1),
        "layers/attn/q/w": columns(found["heads"], 2),
        "layers/attn/k/w": columns(grouped, 2),
        "layers/attn/v/w": columns(grouped, 2),
    }
    masks = decoder.in_layers(params(), (1, 2), lambda p: p in scale or p in ("layers/mlp/gate/w", "layers/attn/o/w"))
    method = jft.method("cofitune", depth=(0.25, 0.75), modules=r"(attn|mlp)/\w+/w", batches=BATCHES, dropout=RATE)
    change = lambda g: {p: x * scale.get(p, 1.0) for p, x in g.items()}
    options = {"steps": (2,), "change": change, "kind": decoder.Descent}
    decoder.check(method, lambda n, w: masks, params(), DATA, **options)


def test_defaults_are_those_of_the_code():
    """pipeline_sft.sh: bottom2, layers 8 to 15 of 32 and 10 to 19 of 40, up_proj and down_proj; softmask_llama.py: 0.003."""
    defaults = {n: p.default for n, p in inspect.signature(cofitune).parameters.items()}
    assert (defaults["dropout"], defaults["size"], defaults["search"], defaults["soft_mask"]) == (
        0.003,
        "signed",
        0,
        True,
    )
    assert SoftMask() == cofitune().rule and cofitune(soft_mask=False).rule is None
    layers = cofitune().select.layers
    assert layers == Between(0.25, 0.5)
    assert (layers.of(32), layers.of(40)) == (tuple(range(8, 16)), tuple(range(10, 20)))
    plan = cofitune().plan(params(), decoder.MODEL)
    trained = {p: how.layers() for p, how in plan.leaves.items() if any(how.trains)}
    assert {p: tuple(x) for p, x in trained.items()} == {"layers/mlp/up/w": (1,), "layers/mlp/down/w": (1,)}


def test_range_search_goes_down_the_tree():
    def worth(table):
        layers, cost = table[next(iter(table))], 0.1 * sum("attn" in p for p in table)
        return cost + abs(np.mean(layers) - 2) + 0.01 * len(layers)

    search = RangeSearch(1, modules=((r"attn/",), (r"mlp/up/",)))
    found = Evaluations(calibration(), worth)
    assert search(found) == {"layers/mlp/up/w": (2,)}
    tried = [x[next(iter(x))] for x in found.tried]
    assert tried == [(0, 1), (2, 3), (2,), (3,), (2,), (2,)]
    with pytest.raises(ValueError, match="no weight of the chosen layers matches nothing/"):
        RangeSearch(1, modules=(("nothing/",),))(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": (0.5, 0.5)}, "0 <= low < high"),
        ({"metric": "accuracy"}, "metric='accuracy' would do nothing: it is of a search, and search is 0"),
        ({"groups": [["attn/"]]}, "groups=.* would do nothing: it is of a search"),
        ({"search": 5, "depth": (0.0, 0.5)}, r"depth=\(0.0, 0.5\) would do nothing: search=5 finds"),
        ({"search": 5, "modules": "attn/"}, "modules='attn/' would do nothing"),
        ({"soft_mask": False, "batches": 2}, "batches=2 would do nothing: it is of the soft mask"),
        ({"soft_mask": False, "dropout": 0.1}, "dropout=0.1 would do nothing"),
        ({"dropout": 1.0}, "dropout 1.0 is not between"),
        ({"size": "squared"}, "size is 'squared'"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jft.method("cofitune", **options)


def test_a_soft_mask_of_nothing_is_refused():
    with pytest.raises(ValueError, match="give soft_mask=False"):
        decoder.run(jft.method("cofitune", modules="mlp/gate"), 1, params(), DATA)
    assert jft.method("cofitune", search=5, groups=[["attn/"]], metric="accuracy").select.layers.steps == 5
