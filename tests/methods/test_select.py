"""One language of selection: a score, a granularity and a budget pick entries, blocks, heads, matrices and layers alike."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.methods import InPlace, LowRank, Method, Select
from jft.select import budget, granularity, layers, scores
from jft.select.layers import Last
from tests.methods import decoder

DATA = decoder.batches(3)
LAYERS = decoder.CONFIG.layers


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


def sizes(params):
    """The sum of squares of every weight of every layer, ``{path: [L]}``, of weights in layers."""
    flat = decoder.wide(params)
    return {p: (w**2).reshape(w.shape[0], -1).sum(1) for p, w in flat.items() if p.startswith("layers/")}


def spread(params, chosen):
    """Masks of whole layers of weights, ``{path: indices}``."""
    masks = {}
    for path, indices in chosen.items():
        mask = np.zeros(tree.flatten(params)[path].shape, bool)
        mask[list(indices)] = True
        masks[path] = mask
    return masks


@dataclasses.dataclass(frozen=True)
class Squares:
    """``w^2``, entry by entry."""

    def __call__(self, calibration):
        return {p: jnp.square(calibration.params[p].astype(jnp.float32)) for p in calibration.paths}


def select(unit, how, **more):
    return Select(linear_only=True, score=Squares(), granularity=unit, budget=how, **more)


def test_matrices_a_share_of_each_weight(params):
    """One of the four layers of every weight: the matrix with the most weight in it."""
    chosen = {p: [int(np.argmax(x))] for p, x in sizes(params).items() if p.endswith("/w")}
    assert len(set(map(tuple, chosen.values()))) > 1, "no case: the same layer everywhere"
    method = Method(select(granularity.Matrix(), budget.PerLeaf(density=0.25)), InPlace())
    run = decoder.check(method, lambda n, w: spread(params, chosen), params, DATA)
    assert {p: x.indices.tolist() for p, x in run.task_vector.items()} == chosen


def test_matrices_that_compete_with_all_others(params):
    """The five matrices of the model with the least weight in them, whichever they are."""
    every = [(x[i], p, i) for p, x in sizes(params).items() if p.endswith("/w") for i in range(LAYERS)]
    chosen = {}
    for _, path, i in sorted(every)[:5]:
        chosen.setdefault(path, []).append(i)
    method = Method(select(granularity.Matrix(), budget.Globally(count=5), largest=False), InPlace())
    decoder.check(method, lambda n, w: spread(params, chosen), params, DATA)


@pytest.mark.parametrize("pool", ["sum", "mean", "max", "l2"])
def test_layers(params, pool):
    """The two layers whose weights together score most, by each way to pool."""
    flat = {p: w for p, w in decoder.wide(params).items() if p in sizes(params) and p.endswith("/w")}
    rows = np.concatenate([(w**2).reshape(LAYERS, -1) for w in flat.values()], axis=1)
    pooled = {"sum": rows.sum(1), "mean": rows.mean(1), "max": rows.max(1), "l2": np.sqrt((rows**2).sum(1))}[pool]
    best = np.argsort(-pooled)[:2]
    method = Method(select(granularity.Layer(), budget.PerLeaf(count=2), pool=pool), InPlace())
    table = method.undecided(_probe(params, flat))
    assert {p: set(x) for p, x in table.items()} == {p: set(best.tolist()) for p in flat}


def _probe(params, paths):
    from jft.train.calibration import RunCalibration
    from jft.train.objectives import LanguageModel

    return RunCalibration(decoder.MODEL, params, list(paths), LanguageModel(), DATA)


def test_layers_within_a_share_of_the_parameters(params):
    """Half of the parameters: two of four equal layers."""
    method = Method(select(granularity.Layer(), budget.Globally(density=0.5)), InPlace())
    table = method.undecided(_probe(params, [p for p in sizes(params) if p.endswith("/w")]))
    assert {len(x) for x in table.values()} == {2}


def test_what_trains_beside_a_selection_takes_nothing_of_its_budget(params):
    """A head that scores most, trained by ``also``: as many matrices as without it."""
    flat = {**tree.flatten(params), "head/w": 100 * tree.flatten(params)["head/w"]}
    chosen = select(granularity.Matrix(), budget.Globally(count=3))
    paths = {}
    for also in ((), ("^head/",)):
        method = Method(chosen, InPlace(), also=also)
        run = jft.finetune(decoder.MODEL, tree.unflatten(flat), DATA, steps=1, method=method, log={"progress": False})
        paths[also] = {p: x.indices.tolist() for p, x in run.task_vector.items() if p != "head/w"}
        assert ("head/w" in run.task_vector.paths) == bool(also)
    assert paths[()] == paths["^head/",] and sum(map(len, paths[()].values())) == 3


def test_whole_weights_by_name(params):
    found = {p: x.sum() for p, x in sizes(params).items() if p.endswith("/w")}
    best = max(found, key=found.get)
    method = Method(select(granularity.Name(), budget.Globally(count=1)), InPlace())
    decoder.check(method, lambda n, w: {best: True}, params, DATA)


def test_low_rank_in_the_matrices_with_the_best_score(params):
    """What is selected as a whole trains by any parametrisation."""
    chosen = {p: int(np.argmax(x)) for p, x in sizes(params).items() if p.endswith("/w")}
    method = Method(select(granularity.Matrix(), budget.PerLeaf(count=1)), LowRank(2, 2.0))
    run = jft.finetune(decoder.MODEL, params, DATA, steps=1, method=method, log={"progress": False})
    for path, change in run.task_vector.items():
        assert change.indices.tolist() == [chosen[path]]
        assert {k: v.shape[0] for k, v in run.state.trained[path][0].items()} == {"a": 1, "b": 1}


def test_a_model_of_ones_own():
    """Numbered layers or none: whole matrices by score in any ``apply``."""
    params = {"one": {"w": jnp.ones((4, 4)) * 2}, "two": {"w": jnp.ones((4, 4))}}
    apply = lambda p, b: b["images"] @ p["one"]["w"] @ p["two"]["w"]
    batch = {"images": np.eye(4, dtype=np.float32), "labels": np.arange(4, dtype=np.int32)}
    method = Method(
        Select(score=scores.Magnitude(), granularity=granularity.Matrix(), budget=budget.Globally(count=1)), InPlace()
    )
    run = jft.finetune(apply, params, [batch], steps=1, method=method, log={"progress": False})
    assert run.task_vector.paths == ["one/w"]


def test_every_way_to_say_a_choice_is_one_argument(params):
    """Indices, a depth and a table come to the same plan."""
    plan = lambda layers, **more: Method(Select(("attn/q/w",), layers=layers, **more), InPlace()).plan(
        params, decoder.MODEL
    )
    cut = lambda p: {k: how for k, how in p.leaves.items() if any(how.trains)}
    several = plan((-2, -1)), plan([2, 3]), plan(Last(2)), plan({"layers/attn/q/w": (2, 3)})
    assert len({str(cut(p)) for p in several}) == 1
    assert Select(layers=(1,)) == Select(layers=[1]) and hash(Select(layers={"a": None})) == hash(
        Select(layers={"a": None})
    )


def test_a_run_goes_on_with_what_it_chose(params, tmp_path):
    method = Method(select(granularity.Matrix(), budget.PerLeaf(density=0.25)), InPlace())
    how = dict(method=method, seed=1, log={"progress": False}, checkpoint={"every": 1})
    whole = jft.finetune(decoder.MODEL, params, DATA, steps=2, workdir=tmp_path / "whole", **how)
    jft.finetune(decoder.MODEL, params, DATA, steps=1, workdir=tmp_path / "parts", **how)
    (tmp_path / "parts" / "task_vector.safetensors").unlink()
    parts = jft.finetune(decoder.MODEL, params, DATA, steps=2, workdir=tmp_path / "parts", **how)
    for path, change in whole.task_vector.items():
        np.testing.assert_allclose(change.values, parts.task_vector.deltas[path].values, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Select(score=scores.Magnitude()), "needs a budget"),
        (lambda: Select(layers=(1,), score=scores.Magnitude(), budget=budget.Globally(count=1)), "give one of them"),
        (lambda: Select(layers="last"), "is no choice of layers"),
        (lambda: Select(layers=1.5), "is no choice of layers"),
        (
            lambda: select((("attn", granularity.Matrix()), ("mlp", granularity.Entry())), budget.Globally(count=1)),
            "mixes whole weights and parts inside them",
        ),
        (
            lambda: (
                select((("attn", granularity.Matrix()), ("mlp", granularity.Layer())), budget.Globally(count=1)).choice
            ),
            "at one granularity",
        ),
        (
            lambda: Method(Select(layers=(9,)), InPlace()).plan(decoder.parameters(), decoder.MODEL),
            "layer 9 does not exist",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stacked_experts_are_no_matrices():
    weights = {"layers/mlp/experts/up/w": jnp.ones((2, 3, 4, 5))}

    class Calibration:
        params, paths, lead = weights, tuple(weights), staticmethod(lambda path: 2)

    scored = layers.Scored(Squares(), granularity.Matrix(), budget.PerLeaf(count=1))
    with pytest.raises(ValueError, match=r"selected by granularity=Expert\(\)"):
        scored(Calibration)
    assert layers.Scored(Squares(), granularity.Name(), budget.Globally(count=1))(Calibration) == dict.fromkeys(weights)


def test_the_cli_tells_what_is_chosen():
    from jft.cli.methods import _trains

    tell = lambda **how: _trains(Method(Select(**how), InPlace()))
    assert tell(layers=(0, -1)) == "all weights of layers 0, -1"
    assert tell(layers=Last(3)) == "all weights of layers the last 3"
    chosen = dict(score=scores.Magnitude(), granularity=granularity.Layer(), budget=budget.PerLeaf(count=1))
    assert tell(**chosen) == "all weights, of which the base and the data decide"
