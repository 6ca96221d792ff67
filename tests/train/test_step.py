"""One step: against float64 NumPy, the same for any accumulation and mesh, and at the cost of what trains alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jft
from jft import tree
from jft.delta import BlockLayout, EntryLayout, SliceLayout
from jft.methods import InPlaceSelected
from jft.presets.finegates import Gates
from jft.train import step
from jft.train.objectives import Classification, Contrastive, LanguageModel
from jft.train.optimizers import Given, Optimizer
from jft.train.state import hold
from tests.train import tools


def recipe_of(apply, params, method="full", objective=None, optimizer=None, **options):
    plan = jft.method(method) if isinstance(method, str) else method
    optimizer = optimizer or Optimizer(clip=0.0)
    return step.Recipe(
        apply, plan.plan(params), objective or Classification(), optimizer,
        decayed=optimizer.decayed(tree.flatten(params)), **options,
    )  # fmt: skip


def prepare(recipe, params, mesh=None, chosen=None):
    update = step.compile_step(recipe, params, chosen or {}, mesh)
    return update, hold(update, jax.device_put(params, update.layout.params), chosen or {}, 0)


@pytest.mark.parametrize("parts", [2, 4])
def test_any_accumulation_gives_the_same_gradient(parts):
    params, batch = tools.bigram_parameters(), tools.token_batches()[0]
    results = []
    for accumulate in (1, parts):
        recipe = recipe_of(tools.bigram, params, objective=LanguageModel(z_loss=1e-3), accumulate=accumulate)
        kept, trained = recipe.plan.init(jax.random.key(0), params)
        results.append(jax.jit(lambda t, b, r=recipe, k=kept: step.gradients(r, k, t, b))(trained, batch))
    whole, split = results
    per_row = LanguageModel().weights(batch, np).sum(1)
    assert per_row.max() > 3 * per_row.min(), "the test needs uneven rows"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), split, whole)


def test_scalars_of_a_batch_go_to_every_microbatch():
    def apply(params, batch):
        return tools.apply(params, batch) * batch["boost"]

    batch = {**tools.batches(1)[0], "boost": np.float32(2.0)}
    one, two = (
        jft.finetune(apply, tools.parameters(), [batch], steps=2, accumulate=parts, log={"progress": False}).params
        for parts in (1, 2)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


def test_accumulation_must_divide_the_batch():
    params = tools.parameters()
    update, held = prepare(recipe_of(tools.apply, params, accumulate=3), params)
    with pytest.raises(ValueError, match="batch of 8 does not divide into accumulate=3"):
        update(held, tools.batches()[0], np.float32(0.1), np.True_)


def test_contrastive_refuses_accumulation():
    with pytest.raises(ValueError, match=r"accumulate=2 does not go with Contrastive.*another loss"):
        recipe_of(tools.apply, tools.parameters(), objective=Contrastive(), accumulate=2)


def test_adamw_against_float64():
    """Three steps of decoupled decay, bias-corrected moments and clipping, written out."""
    params, data = tools.parameters(), tools.batches(3)
    lr, decay, b1, b2, eps, clip = 0.01, 0.1, 0.9, 0.95, 1e-6, 0.5
    chosen = Optimizer(lr=lr, weight_decay=decay, b1=b1, b2=b2, eps=eps, clip=clip)
    update, held = prepare(recipe_of(tools.apply, params, optimizer=chosen), params)
    reference = {p: np.asarray(x, np.float64) for p, x in tree.flatten(params).items()}
    m = {p: np.zeros_like(x) for p, x in reference.items()}
    v = {p: np.zeros_like(x) for p, x in reference.items()}
    for t, batch in enumerate(data, 1):
        held, out = update(held, batch, np.float32(lr), np.True_)
        loss, gradient = tools.reference_gradient(tree.unflatten(reference), batch)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        np.testing.assert_allclose(out["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(out["grad_norm"], norm, rtol=1e-5)
        assert norm > clip, "the test needs clipping to act"
        for p in reference:
            g = gradient[p] * clip / norm
            m[p], v[p] = b1 * m[p] + (1 - b1) * g, b2 * v[p] + (1 - b2) * g**2
            direction = m[p] / (1 - b1**t) / (np.sqrt(v[p] / (1 - b2**t)) + eps)
            wd = decay if p.endswith("/w") else 0.0
            reference[p] = reference[p] - lr * (direction + wd * reference[p])
        norm = np.sqrt(sum((x**2).sum() for x in reference.values()))
        np.testing.assert_allclose(out["param_norm"], norm, rtol=1e-5)
    for p, x in reference.items():
        np.testing.assert_allclose(held.state.trained[p], x, rtol=1e-4, atol=1e-6)
    assert int(held.state.step) == 3


@pytest.mark.optimized
def test_frozen_weights_cost_nothing():
    """Norms, optimizer state and FLOPs are of what trains; the gradient norm leaves frozen weights out."""
    params, batch = tools.parameters(), tools.batches()[0]
    flops = {}
    for method in ("full", "bitfit"):
        update, held = prepare(recipe_of(tools.apply, params, method), params)
        flops[method] = step.flops(update.compiled(batch))
        if method == "bitfit":
            assert set(held.state.trained) == {"one/b", "two/b"}
            moments = [x for x in jax.tree.leaves(held.state.opt_state) if x.ndim]
            assert sum(x.size for x in moments) == 2 * (tools.HIDDEN + tools.CLASSES)
            _, out = update(held, batch, np.float32(0.1), np.True_)
            _, gradient = tools.reference_gradient(params, batch)
            norm = np.sqrt(sum((g**2).sum() for p, g in gradient.items() if p.endswith("/b")))
            np.testing.assert_allclose(out["grad_norm"], norm, rtol=1e-5)
    assert flops["bitfit"] < 0.75 * flops["full"]


def test_learning_rate_multipliers():
    """LoRA+: b learns b_rate times faster than a, and the update says so."""
    params, batch = tools.parameters(), tools.batches()[0]
    trained = {}
    for rate in (1.0, 4.0):
        method = jft.method("lora", rank=2, b_rate=rate)
        optimizer = Optimizer("sgd", momentum=0.0, clip=0.0)
        update, held = prepare(recipe_of(tools.apply, params, method, optimizer=optimizer), params)
        trained[rate] = update(held, batch, np.float32(0.1), np.True_)[0].state.trained["one/w"]
    np.testing.assert_allclose(trained[4.0]["b"], 4 * trained[1.0]["b"], rtol=1e-6)
    np.testing.assert_allclose(trained[4.0]["a"], trained[1.0]["a"])


def test_a_bad_step_changes_nothing_and_none_after_it():
    params, data = tools.parameters(), tools.batches(2)
    update, held = prepare(recipe_of(tools.apply, params), params)
    before = jax.device_get(held.state)
    bad = {**data[0], "images": np.full_like(data[0]["images"], np.nan)}
    held, out = update(held, bad, np.float32(0.1), np.True_)
    assert not out["sound"]
    held, out = update(held, data[1], np.float32(0.1), out["sound"])
    assert np.isfinite(out["loss"])
    assert not out["sound"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(held.state), before)


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_meshes_agree_with_one_device(shape, method):
    from jft.models import DecoderConfig, Model

    model = Model(DecoderConfig(vocab=32, width=128, layers=2, heads=4, hidden=256))
    params = model.init(jax.random.key(0))
    r = np.random.default_rng(0)
    data = [{"tokens": r.integers(0, 32, (16, 8)).astype(np.int32)} for _ in range(3)]
    options = {
        "steps": 6,
        "method": method,
        "optimizer": {"lr": 1e-3},
        "log": {"every": 1, "progress": False},
        "accumulate": 2,
    }
    one = jft.finetune(model, params, data, **options)
    many = jft.finetune(model, params, data, mesh=jft.parallel.make_mesh(shape), **options)
    np.testing.assert_allclose([m["loss"] for m in many.metrics], [m["loss"] for m in one.metrics], rtol=1e-5)
    specs = {p: x.sharding.spec for p, x in tree.flatten(many.state.trained).items()}
    assert any("fsdp" in str(s) for s in specs.values()), specs
    moments = [x for p, x in tree.flatten(many.state.opt_state).items() if "/mu/" in f"/{p}"]
    assert any("fsdp" in str(x.sharding.spec) for x in moments)


def test_masters_stay_float32_under_bfloat16():
    from jft.models import DecoderConfig, Model

    model = Model(DecoderConfig(vocab=16, width=16, layers=1, heads=2, hidden=32)).with_(dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), jnp.bfloat16)
    data = [{"tokens": np.arange(32, dtype=np.int32).reshape(4, 8) % 16}]
    run = jft.finetune(model, params, data, steps=3, optimizer={"lr": 1e-6}, log={"progress": False})
    assert {x.dtype for x in jax.tree.leaves(run.state.trained)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(run.params)} == {np.dtype(jnp.bfloat16)}
    # 3e-6 is far below bfloat16's resolution of these weights: only float32 masters can hold it.
    change = run.task_vector["head/w"].norm()
    assert 0 < change < 1e-3


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor", "muon"])
def test_every_optimizer_lowers_the_loss(name):
    lr = {"adafactor": 0.05, "sgd": 0.1}.get(name, 0.01)
    run = jft.finetune(
        tools.apply, tools.parameters(), tools.batches(), steps=40,
        optimizer={"name": name, "lr": lr}, log={"every": 20, "progress": False}, eval_data=tools.batches(),
    )  # fmt: skip
    assert run.evaluation["loss"] < 0.9
    assert run.metrics[0]["lr"] == lr


def test_muon_treats_each_layer_as_a_matrix():
    """Its update of a stacked matrix has singular values near one, layer by layer; biases and tables go by NAdamW."""
    r = np.random.default_rng(0)
    values = {
        "layers/q/w": r.normal(size=(3, 8, 8)) + 4 * np.eye(8),
        "layers/q/b": r.normal(size=(3, 8)),
        "embed/table": r.normal(size=(8, 8)),
    }
    values = {p: jnp.asarray(x, jnp.float32) for p, x in values.items()}
    transform = Optimizer("muon", clip=0.0).transform()
    updates, _ = transform.update(values, transform.init(values), values)
    singular = np.linalg.svd(np.asarray(updates["layers/q/w"]), compute_uv=False)
    assert singular.min() > 0.3
    assert singular.max() < 1.5
    # The first step of AdamW with Nesterov momentum: (0.9 (1 - 0.9) / (1 - 0.9^2) + 1) times the sign.
    first = 0.9 * 0.1 / (1 - 0.9**2) + 1
    for path in ("embed/table", "layers/q/b"):
        np.testing.assert_allclose(updates[path], -first * np.sign(values[path]), rtol=1e-4)


def test_muon_of_parts_of_weights():
    """Each block is a matrix, and so are all rows, or columns, of a weight, whatever cells they lie in; entries are none."""
    r = np.random.default_rng(0)
    hows = {
        "entries/w": EntryLayout(),
        "blocks/w": BlockLayout(4, 2),
        "rows/w": SliceLayout(-2),
        "columns/w": SliceLayout(-1),
    }
    hows = {p: InPlaceSelected(layout) for p, layout in hows.items()} | {"gates/w": Gates()}
    shapes = {
        "entries/w": (3, 2, 2, 8),  # [L, g, g, k]
        "blocks/w": (3, 2, 1, 5, 4, 2),  # [L, g, g, n, b, c]
        "rows/w": (3, 2, 3, 8),  # [L, g, r, O]
        "columns/w": (3, 8, 2, 3),  # [L, I, g, r]
    }
    values = {p: jnp.asarray(r.normal(size=shape), jnp.float32) for p, shape in shapes.items()}
    values["gates/w"] = {name: jnp.asarray(r.normal(size=(3, 8)), jnp.float32) for name in ("rows", "columns")}
    matrices = lambda trained: {
        p: jax.tree.map(
            lambda what, x: jax.tree.map(lambda y: what.stacked_matrices(y.ndim), x), hows[p].leaves()[1], t
        )
        for p, t in trained.items()
    }
    muon = Optimizer("muon", clip=0.0)
    transform = muon.transform(matrices=matrices)
    updates, _ = transform.update(values, transform.init(values), values)
    first = 0.9 * 0.1 / (1 - 0.9**2) + 1
    for path in ("entries/w", "gates/w"):
        for x, g in zip(jax.tree.leaves(updates[path]), jax.tree.leaves(values[path]), strict=True):
            np.testing.assert_allclose(x, -first * np.sign(g), rtol=1e-4)
    whole = {"blocks/w": (30, 4, 2), "rows/w": (3, 6, 8), "columns/w": (3, 8, 6)}
    plain = {p: values[p].reshape(shape) for p, shape in whole.items()}
    transform = muon.transform()
    expected, _ = transform.update(plain, transform.init(plain), plain)
    for path, x in expected.items():
        np.testing.assert_allclose(updates[path].reshape(x.shape), x, atol=1e-5)


def test_muon_of_low_rank_and_entries_that_come_later():
    method = {"name": "rosa", "rank": 2, "density": 0.2, "warmup": 2}
    run = jft.finetune(
        tools.apply, tools.parameters(), tools.batches(), steps=20, method=method,
        optimizer={"name": "muon", "lr": 0.02}, log={"every": 1, "progress": False},
    )  # fmt: skip
    assert run.metrics[-1]["loss"] < 0.9 * run.metrics[0]["loss"]


def test_any_optax_transformation():
    run = jft.finetune(
        tools.apply, tools.parameters(), tools.batches(), steps=10, optimizer=optax.sgd(0.1), log={"progress": False}
    )
    assert "lr" not in run.metrics[-1]
    assert isinstance(Given(optax.sgd(0.1)).unscheduled(), Given)


def test_schedules():
    flat = Optimizer(lr=2.0, warmup=4)
    assert [flat.rate(i, 10) for i in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    linear = dataclasses.replace(flat, schedule="linear", end=0.5)
    np.testing.assert_allclose([linear.rate(i, 10) for i in (4, 7, 10)], [2.0, 1.5, 1.0])
    cosine = dataclasses.replace(flat, schedule="cosine", warmup=0)
    np.testing.assert_allclose([cosine.rate(i, 10) for i in (0, 5, 10)], [2.0, 1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamm"}, "'adamm' is unknown"),
        ({"lr": 0.0}, "must be positive"),
        ({"schedule": "step"}, "'step' is unknown"),
        ({"name": "adam", "weight_decay": 0.1}, "adamw with the same settings"),
        ({"learning_rate": 1.0}, "no option 'learning_rate'"),
    ],
)
def test_optimizer_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jft.train.optimizer(options)


def test_equal_runs_share_a_compiled_step():
    params, data = tools.parameters(), tools.batches()
    made = []
    for lr in (0.1, 0.2):
        recipe = recipe_of(tools.apply, params, optimizer=Optimizer(lr=lr).unscheduled())
        made.append(prepare(recipe, params)[0])
    assert made[0] is made[1]
    made[0].compiled(data[0])
    other = recipe_of(tools.apply, params, method="bitfit")
    assert prepare(other, params)[0] is not made[0]


@pytest.mark.optimized
def test_each_device_computes_its_share_of_the_batch():
    """Weights lie over fsdp, and so do rows: left to itself, XLA may compute with all rows on every device."""
    model = jft.models.Model(jft.models.DecoderConfig(vocab=128, width=128, layers=2, heads=4, hidden=256))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    batch = {"tokens": jax.ShapeDtypeStruct((16, 64), jnp.int32)}
    cost = []
    for mesh in (None, jft.parallel.make_mesh({"fsdp": 8})):
        plan = jft.method("full").plan(params, model)
        recipe = step.Recipe(step.apply_of(model, mesh), plan, LanguageModel(), Optimizer())
        cost.append(step.flops(step.compile_step(recipe, params, {}, mesh).compiled(batch)))
    assert cost[1] < 1.3 * cost[0] / 8
