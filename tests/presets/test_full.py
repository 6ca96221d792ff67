"""Full fine-tuning: every weight."""

import inspect

from jft.presets.full import full
from tests.methods import toy

MUTATIONS = (
    ("jft/presets/full.py", "Method(Select(), InPlace())", "Method(Select(linear_only=True), InPlace())"),
    ("jft/presets/full.py", "Method(Select(), InPlace())", 'Method(Select(), InPlace(), freeze=("head",))'),
    ("jft/presets/full.py", "Method(Select(), InPlace())", "Method(Select(), InPlace(anchor=True))"),
)


def test_what_trains():
    plan = full().plan(toy.shapes(), toy.model())
    assert set(plan.leaves) == set(toy.shapes())
    assert not any(how.anchor or how.selects for how in plan.leaves.values())
    assert not inspect.signature(full).parameters
