"""Spectrum: signal-to-noise ratios and the best of each type against float64 NumPy from the released formula."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.methods import Method, Select
from jft.presets.spectrum import SignalToNoise, spectrum
from jft.select.layers import Scored
from tests.methods import decoder

MUTATIONS = (
    ("jft/presets/spectrum.py", "IQR = 1.349", "IQR = 1.394"),
    ("jft/presets/spectrum.py", "[0.25, 0.75]", "[0.1, 0.9]"),
    ("jft/presets/spectrum.py", "(min(w.shape) / max(w.shape)) ** 0.5", "(min(w.shape) / max(w.shape)) ** 2"),
    ("jft/presets/spectrum.py", "* (1 + (min", "* (0 + (min"),
    ("jft/presets/spectrum.py", "above = s > edge", "above = s >= edge"),
    ("jft/presets/spectrum.py", "/ s[0]", "/ s[-1]"),
    ("jft/presets/spectrum.py", "jnp.where(jnp.all(above), 1.0, noise)", "noise"),
    ("jft/presets/spectrum.py", "kinds.setdefault(kind, [])", "kinds.setdefault(path, [])"),
    ("jft/presets/spectrum.py", "density: float = 0.5", "density: float = 0.25"),
    ("jft/presets/spectrum.py", "also=AROUND if around", "also=AROUND if not around"),
    ("jft/presets/spectrum.py", "or lead > 1:", "or lead > 2:"),
    ("jft/presets/spectrum.py", "jnp.inf)", "0.0)"),
)
PARAMS = decoder.parameters()


def ratio(w):
    """``spectrum.py`` of the authors' code: estimate_sigma_with_full_iqr, marchenko_pastur_threshold, the SNR over s_1."""
    s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    n, m = w.shape
    sigma = (np.quantile(s, 0.75) - np.quantile(s, 0.25)) / 1.349
    edge = sigma * (1 + np.sqrt(min(n, m) / max(n, m)))
    signal = sum(x for x in s if x > edge)
    noise = [x for x in s if x <= edge]
    divisor = sum(noise) if noise else 1.0
    return np.inf if divisor == 0 else signal / divisor / s[0]


def calibration(params, leads=None):
    flat = {p: jnp.asarray(w) for p, w in params.items()}
    lead = (leads or {}).get
    return types.SimpleNamespace(paths=tuple(flat), params=flat, lead=lambda p: lead(p, flat[p].ndim - 2))


def test_the_ratio_of_each_matrix():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(6, 24, 16))
    signal = noise + 4 * rng.normal(size=(6, 24, 3)) @ rng.normal(size=(6, 3, 16))
    alike = np.stack([np.diag([2.0] * k + [0.0] * (16 - k)) for k in (16, 14, 0)])
    found = SignalToNoise()(
        calibration({"wide": signal.swapaxes(1, 2), "tall": noise, "alike": alike, "one": signal[0]})
    )
    for name, ws in (("wide", signal.swapaxes(1, 2)), ("tall", noise), ("one", signal[0])):
        want = [ratio(w) for w in ws] if ws.ndim == 3 else ratio(ws)
        np.testing.assert_allclose(found[name], want, rtol=1e-5)
        assert found[name].dtype == jnp.float32
    assert len(set(np.argsort(found["wide"]).tolist())) == 6 and np.max(found["wide"]) < np.min(found["tall"])
    # No spread, so the edge is zero: 16 signals of 2 over 1; 14 over zeros, which are noise; zeros alone.
    np.testing.assert_allclose(found["alike"], [16 * 2 / 1.0 / 2, np.inf, np.inf], rtol=1e-6)
    assert [ratio(w) for w in alike[:2]] == [16.0, np.inf]


def best(density):
    """Masks of the layers of each type that train, with what stands around the layers."""
    masks = {p: True for p in ("embed/table", "head/w") if p in tree.flatten(PARAMS)}
    for path, w in decoder.wide(PARAMS).items():
        if path.startswith("layers/") and path.endswith("/w"):
            order = sorted(range(len(w)), key=lambda i: ratio(w[i]), reverse=True)
            mask = np.zeros(w.shape, bool)
            mask[order[: int(len(w) * density)]] = True
            masks[path] = mask
    return masks


def test_the_best_of_each_type_trains():
    masks = best(0.5)
    layers = {p: tuple(np.flatnonzero(m.any((1, 2)))) for p, m in masks.items() if p.startswith("layers/")}
    assert len(set(layers.values())) > 2 and all(len(x) == 2 for x in layers.values()), "no case"
    assert {"embed/table", "head/w"} <= set(masks)
    run = decoder.check(jft.method("spectrum"), lambda n, w: masks, PARAMS, decoder.batches(3))
    assert {p: tuple(run.task_vector[p].indices.tolist()) for p in layers} == layers
    assert all(sum(len(x) for x in jax.tree.leaves(run.state.trained[p])) == 2 for p in layers)


def test_defaults():
    method = jft.method("spectrum")
    assert method.select.budget.density == 0.5  # ModelModifier(top_percent=50)
    assert method.select.choice.budget.units(32, 1, "") == 16 and method.also
    quarter = jft.method("spectrum", density=0.25, around=False)
    assert quarter.select.choice.budget.units(30, 1, "") == 7 and not quarter.also  # int(30 * 25 / 100)


def test_types_over_layers_that_are_numbered():
    """q of all blocks is one pool, and k another, whatever the model calls them; what is in no layer is one by itself."""
    rng = np.random.default_rng(1)
    draw = lambda size: rng.normal(size=(12, 8)) + size * rng.normal(size=(12, 1)) @ rng.normal(size=(1, 8))
    params = {f"blocks/{i}/{name}": draw(size) for name in "qk" for i, size in enumerate(rng.permutation(10)[:5])}
    params["other"] = draw(0)
    scored = jft.method("spectrum", density=0.4, around=False).select.choice
    assert isinstance(scored, Scored)
    expected = {"other"}
    for name in "qk":
        own = [p for p in params if p.endswith(name)]
        expected |= set(sorted(own, key=lambda p: -ratio(params[p]))[:2])
    assert scored(calibration(params)) == dict.fromkeys([p for p in params if p in expected])


@pytest.mark.parametrize(
    ("params", "leads", "message"),
    [
        ({"layers/up/b": np.zeros((4, 8))}, {"layers/up/b": 1}, "holds no matrices"),
        ({"layers/experts/up/w": np.zeros((2, 3, 4, 8))}, {}, "stacks matrices of experts.*exclude="),
    ],
)
def test_what_is_not_ranked(params, leads, message):
    with pytest.raises(ValueError, match=message):
        SignalToNoise()(calibration(params, leads))


def test_a_density_of_nothing():
    with pytest.raises(ValueError, match="density 0"):
        spectrum(density=0.0)
    assert isinstance(spectrum(), Method) and isinstance(spectrum().select, Select)
