"""Presets that train whole weights, layers or factors, on real scans. See `tests/methods/real.py`."""

import pytest

from jft import delta
from jft.methods import entries
from tests.methods import real


def test_no_preset_is_left_out():
    groups = (real.LAYERS, real.ENTRIES, real.PARTS, real.TEXTS, real.OTHERS)
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert set().union(*groups) == set(entries())


@pytest.mark.slow
@pytest.mark.parametrize("name", real.LAYERS)
def test_it_learns_turned_digits(name):
    options, lr, layers = real.LAYERS[name]
    run = real.turned(name, options, lr)
    if layers is not None:
        changed = run.task_vector.deltas
        assert all(path.startswith("layers/") and isinstance(x, delta.Rows) for path, x in changed.items())
        assert len({tuple(x.indices.tolist()) for x in changed.values()}) == 1, "the same layers of every weight"
        assert all(len(x.indices) == layers for x in changed.values())
