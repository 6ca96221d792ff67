"""Presets of blocks, slices, gates and masks, of language models and of towers, on real data. See `tests/methods/real.py`."""

import numpy as np
import pytest

import jft
from jft import delta, tree
from tests.methods import real

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", real.PARTS)
def test_it_learns_turned_digits(name):
    real.turned(name, *real.PARTS[name])


@pytest.mark.parametrize("name", real.TEXTS)
def test_it_learns_docstrings(name):
    options, lr, kind = real.TEXTS[name]
    model, base, before = real.library(kind)
    run = jft.finetune(
        model,
        base,
        real.text("docstrings"),
        steps=real.STEPS,
        method=jft.method(name, **options),
        optimizer=real.optimizer(lr),
        log=real.QUIET,
    )
    assert real.heard(model, run.params) < before
    real.kept(base, run)


def test_the_last_layers_of_both_towers_learn_turned_digits():
    """skip_tuning: the last layer of each tower, final norms and projections, and nothing else."""
    model, base, before = real.towers()
    run = jft.finetune(
        model, base, real.pairs("train", rotate=90), steps=real.STEPS, optimizer=real.optimizer(5e-3), log=real.QUIET,
        method=jft.method("skip_tuning", vision=1, text=1),
    )  # fmt: skip
    assert real.matched(model, run.params) < 0.7 * before
    real.kept(base, run)
    changed = run.task_vector.deltas
    behind = ("vision/final_norm/", "text/final_norm/", "vision_projection/", "text_projection/")
    stacked = ("vision/layers/", "text/layers/")
    assert set(changed) == {path for path in tree.flatten(base) if path.startswith((*behind, *stacked))}
    for path, change in changed.items():
        if path.startswith(stacked):
            assert isinstance(change, delta.Rows), path
            np.testing.assert_array_equal(change.indices, [1], err_msg=path)
