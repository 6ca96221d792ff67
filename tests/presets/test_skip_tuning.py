"""Skip tuning: what trains of a CLIP, weight by weight, and how much of it by default."""

import inspect

import jax
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import Model
from jft.presets.skip_tuning import skip_tuning
from tests.methods import decoder

MUTATIONS = (
    ("jft/presets/skip_tuning.py", "vision: int = 6", "vision: int = 4"),
    ("jft/presets/skip_tuning.py", "text: int = 6", "text: int = 4"),
    ("jft/presets/skip_tuning.py", "projections: bool = True", "projections: bool = False"),
    ("jft/presets/skip_tuning.py", '("text", text)', '("text", vision)'),
)


def test_what_stands_behind_the_cached_layers():
    model, params = Model(decoder.clip()), decoder.parameters(decoder.clip())
    plan = jft.method("skip_tuning", vision=1, text=2).plan(params, model)

    @jax.jit
    def changes(params):
        kept, trained = plan.init(jax.random.key(0), params)
        return decoder.dense(plan.encode(params, kept, jax.tree.map(lambda x: x + 1, trained)))

    changed = changes(params)
    for path, w in tree.flatten(params).items():
        change = np.asarray(changed.get(path, np.zeros(w.shape)))
        behind = path.startswith(("vision/final_norm", "text/final_norm", "vision_projection", "text_projection"))
        layers = {"vision/layers/": (2,), "text/layers/": (0, 1)}
        own = next((v for k, v in layers.items() if path.startswith(k)), ())
        on = np.full(w.shape, behind) if not own else np.zeros(w.shape, bool)
        for i in own:
            on[i] = True
        np.testing.assert_allclose(change, np.where(on, 1.0, 0.0), atol=1e-5, err_msg=path)
    with pytest.raises(ValueError, match="vision, which has 3"):
        jft.method("skip_tuning", vision=4).plan(params, model)


def test_the_defaults_are_the_last_six_of_twelve():
    """train.py: START_LAYER 6 of the 12 layers of either tower, so that 6 to 11 train."""
    config = decoder.clip(12, 12)
    shapes = jax.eval_shape(config.init, jax.random.key(0))
    plan = jft.method("skip_tuning").plan(shapes, Model(config))
    trained = {p: tuple(sorted(how.layers())) for p, how in plan.leaves.items() if tree.stack_of(p)}
    assert trained == {p: tuple(range(6, 12)) for p in tree.flatten(shapes) if tree.stack_of(p)}
    outside = {p for p in plan.leaves if not tree.stack_of(p)}
    norms = {f"{tower}/final_norm/{n}" for tower in ("vision", "text") for n in ("scale", "bias")}
    assert outside == norms | {"vision_projection/w", "text_projection/w"}
    assert [p.default for p in inspect.signature(skip_tuning).parameters.values()] == [6, 6, True]
