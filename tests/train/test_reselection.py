"""Runs whose selection changes, interrupted and taken up again."""

import numpy as np
import pytest

from jft import tree
from tests.methods import stack
from tests.methods.stack import DATA


class Ends(list):
    """Batches that cannot be read any more after so many."""

    def __init__(self, batches, after):
        super().__init__(batches)
        self.left = after

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return super().__getitem__(i)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("method", "reads"),
    [
        ({"name": "lift", "rank": 1, "filter_rank": 2, "every": 2}, 5),
        ({"name": "lift", "rank": 1, "filter_rank": 2, "every": 3}, 5),
        ({"name": "spiel_ag", "density": 0.3, "every": 2, "batches": 1}, 7),
        ({"name": "spiel_ma", "density": 0.3, "every": 3, "batches": 2}, 7),
        ({"name": "sara", "threshold": 0.15, "nuclear": 0.01, "above": 0, "again": 0.25}, 5),
    ],
)  # fmt: skip
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(method, reads, tmp_path):
    """Its newest checkpoint is that of step 4, where every second step selects anew."""
    with pytest.raises(OSError, match="disk"):
        stack.run(method, 8, data=Ends(DATA, reads), workdir=tmp_path, checkpoint=2)
    resumed = stack.run(method, 8, workdir=tmp_path, checkpoint=2)
    whole = stack.run(method, 8)
    assert resumed.metrics[0]["step"] > 4
    for path, w in tree.flatten(whole.params).items():
        np.testing.assert_array_equal(tree.flatten(resumed.params)[path], w, err_msg=path)
        if path in whole.task_vector:
            one, other = (np.asarray(r.task_vector[path].dense()) for r in (whole, resumed))
            np.testing.assert_array_equal(other, one, err_msg=path)


def test_a_run_asked_to_go_on_for_longer_is_the_longer_run(tmp_path):
    method = {"name": "lift", "rank": 1, "filter_rank": 2, "every": 2}
    for steps in (4, 8):
        resumed = stack.run(method, steps, workdir=tmp_path, checkpoint=2)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, stack.run(method, 8))), strict=True):
        np.testing.assert_array_equal(a, b)
