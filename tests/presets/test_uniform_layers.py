"""Layers spaced evenly over the depth: the published indices, other depths by hand, and steps in them."""

import inspect

import pytest

import jft
from jft.presets.uniform_layers import EverySecond, uniform_layers
from jft.select.layers import Spaced
from tests.methods import decoder

MUTATIONS = (
    ("jft/presets/uniform_layers.py", "step = 2 if k", "step = 1 if k"),
    ("jft/presets/uniform_layers.py", "last = -(-length // step) - 1", "last = -(-length // step)"),
    ("jft/presets/uniform_layers.py", "2 * i * last + k - 1", "2 * i * last"),
    ("jft/presets/uniform_layers.py", "fraction: float = 0.25", "fraction: float = 0.5"),
    ("jft/presets/uniform_layers.py", '"ends"] = "paper"', '"ends"] = "floor"'),
)
DATA = decoder.batches(2)


@pytest.mark.parametrize(
    ("fraction", "length", "expected"),
    [
        # Wang et al. 2024, arXiv:2412.12785: 8 of 32 layers.
        (0.25, 32, (0, 4, 8, 12, 18, 22, 26, 30)),
        (0.25, 24, (0, 4, 8, 14, 18, 22)),
        (0.25, 7, (0, 6)),
        (0.5, 4, (0, 2)),
        (0.75, 4, (0, 2, 3)),
        (1.0, 5, (0, 1, 2, 3, 4)),
        (0.01, 32, (0,)),
    ],
)
def test_indices(fraction, length, expected):
    assert EverySecond(fraction).of(length) == expected


def test_the_default_is_the_paper_s_choice():
    assert uniform_layers().select.layers == EverySecond(0.25)
    assert uniform_layers(0.5, "floor").select.layers == Spaced(0.5)
    assert uniform_layers(0.5, "ends").select.layers == Spaced(0.5, ends=True)
    assert [p.default for p in inspect.signature(uniform_layers).parameters.values()] == [0.25, "paper"]


def test_steps():
    params = decoder.parameters()
    masks = decoder.in_layers(params, (0, 2))
    decoder.check(jft.method("uniform_layers", fraction=0.5), lambda n, w: masks, params, DATA, steps=(2,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction 0.0"),
        ({"fraction": 1.1}, "fraction 1.1"),
        ({"spacing": "even"}, "spacing is 'even'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jft.method("uniform_layers", **options)
