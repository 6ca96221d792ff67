"""The last layers train."""

import pytest

from jft.presets.last_k_layers import last_k_layers
from tests.methods import toy

MUTATIONS = (
    ("jft/presets/last_k_layers.py", "range(-k, 0)", "range(k)"),
    ("jft/presets/last_k_layers.py", "k: int = 1", "k: int = 2"),
    ("jft/presets/last_k_layers.py", "if k < 1:", "if k < 0:"),
)


@pytest.mark.parametrize(("options", "last"), [({}, 1), ({"k": 3}, 3)])
def test_what_trains(options, last):
    plan = last_k_layers(**options).plan(toy.shapes(), toy.model())
    assert set(plan.leaves) == {p for p in toy.shapes() if p.startswith("layers/")}
    for how in plan.leaves.values():
        runs = [trains for trains, size in zip(how.trains, how.sizes, strict=True) for _ in range(size)]
        assert runs == [False] * (4 - last) + [True] * last


@pytest.mark.parametrize(
    ("k", "message"), [(0, "k of at least 1, not 0"), (9, "layer -9 does not exist: the model has 4 layers")]
)
def test_what_is_refused(k, message):
    with pytest.raises(ValueError, match=message):
        last_k_layers(k).plan(toy.shapes(), toy.model())
