"""Presets that train single entries of weights, on real scans. See `tests/methods/real.py`."""

import numpy as np
import pytest

import jft
from jft import delta, tree
from tests.methods import real

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", real.ENTRIES)
def test_it_learns_turned_digits(name):
    options, lr, promised = real.ENTRIES[name]
    run = real.turned(name, options, lr)
    for path, change in run.task_vector.deltas.items():
        assert isinstance(change, delta.Entries), path
        if promised is not None:
            assert len(change.values) == change.shape[0] * promised(change.shape), path


def test_the_subnetwork_of_a_tuned_model_is_trained_again():
    """rl_subnetwork: the entries that another run changed, and no others."""
    model, base, before, _ = real.digits()
    first = jft.finetune(
        model, base, real.loader("train", rotate=90), steps=20, optimizer=real.optimizer(5e-3), log=real.QUIET,
        method=jft.method("sift", rate=0.2),
    )  # fmt: skip
    run = jft.finetune(
        model, base, real.loader("train", rotate=90), steps=real.STEPS, optimizer=real.optimizer(5e-3), log=real.QUIET,
        method=jft.method("rl_subnetwork", tuned=first.params),
    )  # fmt: skip
    assert real.loss(model, run.params) < 0.95 * before
    real.kept(base, run)
    for path, change in run.task_vector.deltas.items():
        moved = np.abs(np.asarray(tree.flatten(first.params)[path] - tree.flatten(base)[path])) > 1e-5
        np.testing.assert_array_equal(real.support(change), moved, err_msg=path)
