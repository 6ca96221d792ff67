"""BitFit: bias terms and nothing else."""

import inspect

from jft.presets.bitfit import bitfit
from tests.methods import toy

MUTATIONS = (
    ("jft/presets/bitfit.py", "(b|bias)$", "(b)$"),
    ("jft/presets/bitfit.py", "(b|bias)$", "(bias)$"),
    ("jft/presets/bitfit.py", '(r"(^|/)(b|bias)$",)', '(r"(^|/)(b|bias)",)'),
    ("jft/presets/bitfit.py", '(r"(^|/)(b|bias)$",)', '(r"(b|bias)$",)'),
)
BIASES = {"layers/norm/bias", "layers/up/b", "b"}


def test_what_trains():
    """Of names that only begin or end with one of a bias, none."""
    shapes = toy.shapes() | {
        p: toy.shapes()["layers/up/b"] for p in ("b", "layers/club", "layers/bias_scale", "layers/b/w")
    }
    plan = bitfit().plan(shapes)
    assert set(plan.leaves) == BIASES and not inspect.signature(bitfit).parameters
