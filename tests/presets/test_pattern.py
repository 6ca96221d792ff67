"""Training by name."""

import pytest

from jft.presets.pattern import pattern
from tests.methods import toy

MUTATIONS = (
    ("jft/presets/pattern.py", "Select(patterns(include))", "Select(patterns(include)[:1])"),
    ("jft/presets/pattern.py", "Select(patterns(include))", "Select(exclude=patterns(include))"),
    ("jft/presets/pattern.py", "= EVERYTHING)", '= "layers/")'),
)


@pytest.mark.parametrize(
    ("include", "trains"),
    [("up/w$", {"layers/up/w"}), (("norm", "^head"), {"layers/norm/scale", "layers/norm/bias", "head/w"})],
)
def test_what_trains(include, trains):
    assert set(pattern(include).plan(toy.shapes(), toy.model()).leaves) == trains


def test_by_default_everything():
    assert set(pattern().plan(toy.shapes(), toy.model()).leaves) == set(toy.shapes())
