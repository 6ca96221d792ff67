"""Runs that train parts of weights: the same on any mesh, resumed to the bit, in place, and with memory for what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import DecoderConfig, Model
from jft.parallel import make_mesh
from jft.train import step
from jft.train.objectives import LanguageModel
from jft.train.optimizers import Optimizer

# Adam divides tiny gradients by their own size, rounding errors included.
SGD = {"name": "sgd", "lr": 0.1}
QUIET = {"progress": False, "every": 1}
METHODS = {
    "entries": {"name": "lift", "rank": 2, "filter_rank": 8, "exact": True},
    "blocks": {"name": "block_sparse", "density": 0.2, "block": (8, 8), "scope": "global"},
    "rows": {"name": "sparse_rows"},
}


def rows():
    """Half of the rows of two kinds of matrices, by magnitude: a composition by hand."""
    from jft.methods import InPlace, Method, Select
    from jft.select import budget, granularity, scores

    unit = ((r"attn/o/w$", granularity.Row()), (r"mlp/up/w$", granularity.Column()))
    select = Select(linear_only=True, score=scores.Magnitude(), granularity=unit, budget=budget.PerMatrix(density=0.5))
    return Method(select, InPlace(), name="rows and columns")


def method(name):
    return rows() if name == "rows" else METHODS[name]


@pytest.fixture(scope="module")
def model():
    return Model(DecoderConfig(vocab=64, width=96, layers=2, heads=4, hidden=192, tied=True))


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(0, 64, (8, 12)).astype(np.int32)} for _ in range(3)]


def train(model, params, data, which, steps=3, **options):
    optimizer = {"name": "adamw", "lr": 1e-2, **options.pop("optimizer", {})}
    return jft.finetune(model, params, data, steps=steps, method=which, optimizer=optimizer, log=QUIET, **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_selects_and_trains_the_same(model, params, data, name):
    one = train(model, params, data, method(name), optimizer=SGD)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    many = train(model, params, data, method(name), mesh=mesh, optimizer=SGD)
    for path, change in one.task_vector.deltas.items():
        other = many.task_vector.deltas[path]
        np.testing.assert_array_equal(change.dense() != 0, other.dense() != 0, err_msg=path)
        np.testing.assert_allclose(change.dense(), other.dense(), atol=1e-5, err_msg=path)
    spread = [x.sharding.spec for x in jax.tree.leaves(many.state.trained)]
    assert any(any(axis for axis in spec) for spec in spread), "what trains lies with its weight"


@pytest.mark.optimized
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_bits(model, params, data, tmp_path, name):
    whole = train(model, params, data, method(name), steps=4)
    train(model, params, data, method(name), steps=2, workdir=tmp_path, checkpoint={"every": 2})
    (tmp_path / "task_vector.safetensors").unlink()
    rest = train(model, params, data, method(name), steps=4, workdir=tmp_path, checkpoint={"every": 2})
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)
    assert jft.TaskVector.load(tmp_path / "task_vector.safetensors").nbytes == whole.task_vector.nbytes


@pytest.mark.optimized
def test_what_does_not_train_keeps_its_bits_and_the_base_is_untouched(model, params, data):
    before = jax.tree.map(np.array, params)
    run = train(model, params, data, METHODS["entries"])
    jax.tree.map(np.testing.assert_array_equal, params, before)
    for path, x in tree.flatten(run.params).items():
        change = run.task_vector.deltas.get(path)
        same = np.asarray(x) == np.asarray(tree.flatten(before)[path])
        assert same.all() if change is None else same[np.asarray(change.dense()) == 0].all()
    back = jft.apply(params, run.task_vector)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), back, run.params)


def test_accumulation_changes_nothing(model, params, data):
    a, b = (train(model, params, data, METHODS["blocks"], accumulate=n, optimizer=SGD) for n in (1, 4))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a.params, b.params)


def test_donated_weights_are_taken_over(model, params, data):
    own = jax.tree.map(jnp.copy, params)
    run = train(model, own, data, METHODS["blocks"], donate=True)
    assert tree.flatten(own)["layers/attn/q/w"].is_deleted()
    kept = train(model, params, data, METHODS["blocks"])
    jax.tree.map(np.testing.assert_array_equal, run.params, kept.params)


@pytest.mark.optimized
def test_the_step_holds_gradients_and_moments_of_what_trains_alone(model, params):
    """Sizes of the compiled step's state, and that the live weights are its own output without a copy."""
    plan = jft.method(**METHODS["blocks"] | {"scope": "matrix"}).plan(params, model)
    from jft.methods import select

    chosen = select.expected(plan, tree.flatten(params), {})
    recipe = step.Recipe(step.Apply(model), plan, LanguageModel(), Optimizer())
    update = step.compile_step(recipe, params, chosen, None)
    state = update.holdings.state
    linear = sum(tree.size(tree.flatten(params)[p]) for p in plan.selects)
    assert tree.count(state.trained) <= 1.1 * 0.2 * linear
    assert tree.nbytes(state.opt_state) <= 2 * tree.nbytes(state.trained) + 64
    compiled = update.compiled({"tokens": jax.ShapeDtypeStruct((8, 12), jnp.int32)})
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= tree.nbytes(update.holdings.live)


def test_decay_goes_to_zero_or_to_the_base(model, params, data):
    decay = {"weight_decay": 0.5, "clip": 0.0}
    plain, zero, base = (
        train(model, params, data, METHODS["entries"], steps=1, optimizer={**decay, **more})
        for more in ({"weight_decay": 0.0}, {}, {"decay_to": "base"})
    )
    # In the first step the values are the base's: toward the base nothing decays, toward zero all of it does.
    jax.tree.map(np.testing.assert_array_equal, base.params, plain.params)
    path = "layers/mlp/up/w"
    moved = plain.task_vector.deltas[path].dense() - zero.task_vector.deltas[path].dense()
    support = np.asarray(plain.task_vector.deltas[path].dense()) != 0
    want = 1e-2 * 0.5 * np.asarray(tree.flatten(params)[path])
    np.testing.assert_allclose(np.asarray(moved)[support], want[support], atol=1e-6)


def test_bfloat16_weights_are_rounded_masters(model, params, data):
    low = tree.cast(params, jnp.bfloat16)
    run = train(model.with_(dtype=jnp.bfloat16), low, data, METHODS["entries"])
    path = "layers/mlp/up/w"
    assert tree.flatten(run.params)[path].dtype == jnp.bfloat16
    assert run.state.trained[path].dtype == jnp.float32
    back = tree.flatten(jft.apply(low, run.task_vector))[path]
    np.testing.assert_array_equal(back, tree.flatten(run.params)[path])
