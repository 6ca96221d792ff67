"""Blocks of matrices with the largest score, in float64 NumPy."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest

import jft
from jft.methods import select
from jft.presets.block_sparse import block_sparse
from jft.train import report
from tests.methods import stack
from tests.methods.stack import DATA, LAYERS, LINEAR, W

MUTATIONS = (
    ("jft/presets/block_sparse.py", 'pool: How = "l2"', 'pool: How = "max"'),
    ("jft/presets/block_sparse.py", 'round="nearest"', 'round="ceil"'),
    ("jft/presets/block_sparse.py", '"global"] = "matrix"', '"global"] = "layer"'),
    ("jft/presets/block_sparse.py", 'score: scores.Score | str = "gradient"', 'score: scores.Score | str = "snip"'),
    ("jft/presets/block_sparse.py", '"global": budget.Globally', '"global": budget.PerLayer'),
)


def blocks(count, together=False):
    """Masks of the blocks of 2 x 2 (12 in each matrix) with the largest gradient norm."""
    norms = {}
    for p in sorted(LINEAR):
        g = stack.gradient(W, DATA[0])[p]
        cut = g.reshape(LAYERS, g.shape[1] // 2, 2, g.shape[2] // 2, 2)
        norms[p] = np.sqrt((cut**2).sum((2, 4)))
    chosen = stack.largest_of_all(norms, count) if together else stack.largest_of_each(norms, count)
    return {p: np.repeat(np.repeat(m, 2, 1), 2, 2) for p, m in chosen.items()}


def test_defaults():
    given = {name: p.default for name, p in inspect.signature(block_sparse).parameters.items()}
    assert given == {"density": 0.05, "block": (128, 128), "score": "gradient", "pool": "l2", "scope": "matrix"}


def test_blocks_and_steps():
    stack.check_entries({"name": "block_sparse", "density": 0.36, "block": (2, 2)}, blocks(4))


def test_blocks_of_the_whole_model_compete():
    method = {"name": "block_sparse", "density": 0.25, "block": (2, 2), "scope": "global"}
    stack.check_entries(method, blocks(12, together=True), steps=(1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "head"}, "scope 'head' is unknown; choose one of matrix, layer, global"),
        ({"score": "best"}, "score 'best' is unknown; choose one of gradient, magnitude, snip, random"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        block_sparse(**options)


@pytest.mark.parametrize(
    ("options", "selected"),
    [
        # One of 4 blocks and one of 8; one of all 12; a quarter; 1.6 and 3.2 blocks to the nearest.
        ({"density": 0.02}, 32 / 192),
        ({"density": 0.02, "scope": "global"}, 16 / 192),
        ({"density": 0.25}, 48 / 192),
        ({"density": 0.4}, 80 / 192),
    ],
)
def test_the_density_of_whole_blocks(options, selected):
    shapes = {"a": jax.ShapeDtypeStruct((8, 8), "float32"), "b": jax.ShapeDtypeStruct((8, 16), "float32")}
    plan = block_sparse(**options, block=(4, 4)).plan(shapes)
    assert select.density(plan, shapes) == pytest.approx((options["density"], selected))
    # Of stacked layers each has as many.
    stacked = {f"layers/{p}/w": jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for p, x in shapes.items()}
    if options.get("scope") != "global":
        method = block_sparse(**options, block=(4, 4))
        # Models that jft does not know have no stacks of linear layers.
        method = dataclasses.replace(method, select=dataclasses.replace(method.select, linear_only=False))
        plan = method.plan(stacked)
        assert select.density(plan, stacked)[1] == pytest.approx(selected)


def test_a_run_says_what_its_density_came_to(capsys):
    params = {"a": np.ones((8, 8), np.float32), "b": np.ones((8, 16), np.float32)}
    batch = {"x": np.ones((2, 8), np.float32), "labels": np.arange(2)}
    method = {"name": "block_sparse", "density": 0.02, "block": (4, 4), "score": "magnitude"}
    run = jft.finetune(lambda p, b: b["x"] @ p["a"] @ p["b"], params, [batch], steps=1, method=method)
    assert "warning: density 0.167 trains, not the 0.02 of the budget" in capsys.readouterr().out
    assert sum(x.values.size for _, x in run.task_vector.items()) == 32
    assert report.whole_units(0.05, 0.0479) == "density 0.0479 in whole units, of a budget of 0.05"
