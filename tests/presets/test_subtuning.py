"""SubTuning: every candidate set trained and evaluated by the reference; the search over a table of gains."""

import inspect

import pytest

import jft
from jft import tree
from jft.presets.subtuning import Greedy, subtuning
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder
from tests.methods.evaluations import Evaluations

MUTATIONS = (
    ("jft/presets/subtuning.py", "found[place] < best + self.tolerance", "found[place] < best"),
    ("jft/presets/subtuning.py", "np.argsort(-np.asarray(found)", "np.argsort(np.asarray(found)"),
    ("jft/presets/subtuning.py", "len(chosen) < self.most", "len(chosen) <= self.most"),
    ("jft/presets/subtuning.py", "self._worth(calibration, [*chosen, layer])", "self._worth(calibration, [layer])"),
    ("jft/presets/subtuning.py", "tolerance: float = 0.0,\n    most", "tolerance: float = 0.1,\n    most"),
)
DATA = decoder.batches()
L = decoder.CONFIG.layers


@pytest.mark.slow
def test_the_search_and_the_run_that_follows():
    params = decoder.parameters()
    held_out, steps = decoder.batches(1, seed=9), 2

    def worth(layers):
        masks = decoder.in_layers(params, layers)
        return -decoder.loss_and_gradient(decoder.followed(params, lambda n, w: masks, steps, DATA), held_out[0])[0]

    chosen, best = [], -float("inf")
    while len(chosen) < 2:
        found = {i: worth([*chosen, i]) for i in range(L) if i not in chosen}
        layer = max(found, key=found.get)
        if found[layer] <= best:
            break
        best, chosen = found[layer], [*chosen, layer]
    masks = decoder.in_layers(params, chosen)
    method = jft.method("subtuning", steps=steps, most=2)
    decoder.check(method, lambda n, w: masks, params, DATA, steps=(3,), eval_data=held_out)
    with pytest.raises(ValueError, match="give eval_data"):
        decoder.run(method, 1, params, DATA)


@pytest.fixture(scope="module")
def calibration():
    params = decoder.parameters()
    paths = [p for p in tree.flatten(params) if p.startswith("layers/")]
    return RunCalibration(decoder.MODEL, params, paths, LanguageModel(), DATA)


def test_it_stops_where_the_gain_is_small_and_keeps_to_its_shortlist(calibration):
    gains = {0: 0.5, 1: 0.1, 2: 0.4, 3: 0.3}
    found = Evaluations(calibration, lambda table: 1 - sum(gains[i] for i in table["layers/attn/q/w"]))
    chosen = lambda **options: Greedy(1, **options)(found)["layers/attn/q/w"]
    assert chosen(tolerance=0.35) == (0, 2)
    assert chosen(tolerance=0.2) == (0, 2, 3)
    assert chosen() == (0, 1, 2, 3) and chosen(most=1) == (0,)
    found.tried.clear()
    assert chosen(shortlist=2) == (0, 2)
    assert len(found.tried) == 4 + 1


def test_a_layer_that_makes_it_worse_is_not_added(calibration):
    """Kaplun et al. 2023: the search ends with the first round that gains nothing."""
    found = Evaluations(calibration, lambda table: abs(sum(table["layers/mlp/up/w"]) - 3.0))
    table = Greedy(1)(found)
    assert table["layers/mlp/up/w"] == (3,) and len(found.tried) == 4 + 3
    with pytest.raises(ValueError, match="no evaluation gave a loss that is a number"):
        Greedy(1)(Evaluations(calibration, lambda table: float("inf")))
    with pytest.raises(ValueError, match="evaluation gives loss, not 'accuracy'"):
        Greedy(1, "accuracy")(found)


def test_defaults():
    defaults = {n: p.default for n, p in inspect.signature(subtuning).parameters.items()}
    assert defaults == {"steps": 100, "metric": "loss", "tolerance": 0.0, "most": 0, "shortlist": 0}
