"""SpIEL-MA against its rule in float64 NumPy."""

import inspect

import jft
from jft.presets.spiel_ma import spiel_ma
from tests.presets import spiel

MUTATIONS = (
    ("jft/presets/spiel_ma.py", "every: int = 20,", "every: int = 100,"),
    ("jft/presets/spiel_ma.py", 'of="model"', 'of="candidates"'),
    ("jft/presets/spiel_ma.py", '"sm3")', '"gradient")'),
    ("jft/methods/schedules.py", "valid = ~active", "valid = leaving | ~active"),
    ("jft/select/scores.py", "rows[..., :, None] * columns", "rows[..., :, None] + columns"),
    ("jft/select/scores.py", "out[path] = (jnp.max(nu", "out[path] = (jnp.sum(nu"),
)  # fmt: skip


def test_it_drops_and_grows_by_sm3():
    spiel.check("spiel_ma", "sm3")


def test_defaults_are_those_of_the_released_code():
    """SftConfig: density 0.01, reselection_steps 20, initial_reselection_rate 0.2, selection_accumulation_steps 5."""
    defaults = {p.name: p.default for p in inspect.signature(spiel_ma).parameters.values()}
    assert defaults == {"density": 0.01, "every": 20, "first": 0.2, "batches": 5}
    assert jft.method("spiel_ma").schedule.grow == "sm3"
