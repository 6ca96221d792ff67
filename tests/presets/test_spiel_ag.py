"""SpIEL-AG against the rule of its released trainer in float64 NumPy."""

import inspect

import pytest

import jft
from jft.methods.schedules import DropAndGrow
from jft.presets.spiel_ag import spiel_ag
from tests.presets import spiel

MUTATIONS = (
    ("jft/presets/spiel_ag.py", "density: float = 0.01,", "density: float = 0.05,"),
    ("jft/presets/spiel_ag.py", 'of="model"', 'of="candidates"'),
    ("jft/presets/spiel_ag.py", 'batches, "gradient")', 'batches, "sm3")'),
    ("jft/methods/schedules.py", "& (leaving | ~active)", "& ~active"),
    ("jft/methods/schedules.py", "step % self.every == self.batches", "step > 0 and step % self.every == 0"),
    ("jft/methods/schedules.py", "step == self.batches:", "step == self.every:"),
    ("jft/methods/schedules.py", "self.first * (1 - step / steps)", "self.first"),
    ("jft/methods/schedules.py", "(jnp.abs(total[p]), jnp.abs(first[p]))", "(jnp.abs(total[p]),)"),
    ("jft/methods/schedules.py", "losers, coming = leaving & ~winners,", "losers, coming = leaving,"),
)


def test_it_drops_and_grows_as_released():
    """Entries that could have gone and are among the candidates win again, with their values and moments."""
    assert spiel.check("spiel_ag", "gradient") > 0


def test_defaults_are_those_of_the_released_code():
    """SftConfig: density 0.01, reselection_steps 20, initial_reselection_rate 0.2, selection_accumulation_steps 5."""
    defaults = {p.name: p.default for p in inspect.signature(spiel_ag).parameters.values()}
    assert defaults == {"density": 0.01, "every": 20, "first": 0.2, "batches": 5}
    schedule = jft.method("spiel_ag").schedule
    assert [n for n in range(70) if schedule.due(n, 100)] == [5, 25, 45, 65]
    assert [schedule.rate(n, 100) for n in (5, 25, 45)] == [1.0, 0.2 * 0.75, 0.2 * (1 - 0.45)]
    assert schedule.reset and schedule.aged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 5}, "batches=5 and every=5"),
        ({"batches": 0}, "batches=0 and every=20"),
        ({"first": 0.0}, "first is 0.0"),
        ({"grow": "momentum"}, "grow is 'momentum'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DropAndGrow(**options)
