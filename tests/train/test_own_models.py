"""Models of other libraries in training mode: dropout, batch statistics, and what becomes of them."""

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jft
from jft import tree
from jft.models import LoadError, adapters

MUTATIONS = [
    ("jft/train/step.py", "trained = trained | statistics", "trained = trained"),
    ("jft/train/step.py", "one(trained | statistics, *part)", "one(trained, *part)"),
    ("jft/train/step.py", 'jax.random.fold_in(tree.key_for(key, "model"), index)', 'tree.key_for(key, "model")'),
    ("jft/train/step.py", "draws = plan.random or recipe.training is not None", "draws = plan.random"),
    ("jft/methods/plan.py", "shapes = {p: x for p, x in shapes.items() if p not in held}", "shapes = dict(shapes)"),
    ("jft/methods/plan.py", "running = {} if linearized else", "running ="),
    ("jft/models/adapters.py", "_call(self.evaluated, params, batch, None)", "_call(self.static, params, batch, None)"),
    ("jft/models/adapters.py", "evaluated.eval()", "evaluated.train()"),
    ("jft/models/parameters.py", "np.array(checkpoint.tensor(path), x.dtype)", "np.array(checkpoint.tensor(path))"),
]
MOMENTUM = 0.8
X = lambda batch: (batch["x"],)
DRAWN = np.random.default_rng(0)
BATCHES = [
    {"x": DRAWN.normal(1, 3, (8, 4)).astype(np.float32), "labels": np.arange(8, dtype=np.int32) % 3} for _ in range(2)
]
STILL = {"optimizer": {"name": "sgd", "lr": 1e-12}, "log": {"every": 1, "progress": False}}


class Nnx(nnx.Module):
    def __init__(self, rate, rngs):
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(5, momentum=MOMENTUM, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


class Linen(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x))


class Equinox(equinox.Module):
    first: equinox.nn.Linear
    norm: equinox.nn.BatchNorm
    drop: equinox.nn.Dropout
    last: equinox.nn.Linear

    def __init__(self, rate, key):
        self.first, self.last = equinox.nn.Linear(4, 5, key=key), equinox.nn.Linear(5, 3, key=key)
        self.norm = equinox.nn.BatchNorm(5, "batch", momentum=MOMENTUM, mode="batch")
        self.drop = equinox.nn.Dropout(rate)

    def __call__(self, x, state, key=None):
        x, state = self.norm(self.first(x), state)
        return self.last(self.drop(x, key=key)), state


def build_nnx(rate):
    return adapters.from_nnx(Nnx(rate, nnx.Rngs(0)), X)


def build_linen(rate):
    variables = Linen(rate).init(jax.random.key(0), BATCHES[0]["x"], train=False)
    return adapters.from_linen(Linen(rate), variables, X, training={"train": True}, train=False)


def build_equinox(rate):
    module, state = equinox.nn.make_with_state(Equinox)(rate, jax.random.key(0))
    return adapters.from_equinox(module, X, state=state)


def normed(params, x):
    """Of the function below: the batch normalised by itself, and its moments."""
    h = x @ params["w"]
    mean, var = h.mean(0), h.var(0)
    return (h - mean) / jnp.sqrt(var + 1e-5), mean, var


def in_training(params, x, *, rate, key):
    y, mean, var = normed(params, x)
    keep = jax.random.bernoulli(key, 1 - rate, y.shape)
    move = lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new
    after = params | {"mean": move(params["mean"], mean), "var": move(params["var"], var)}
    return jnp.where(keep, y / (1 - rate), 0) @ params["head"], after


def build_function(rate):
    def evaluated(params, x):
        return (x @ params["w"] - params["mean"]) / jnp.sqrt(params["var"] + 1e-5) @ params["head"]

    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (4, 5)), "head": jax.random.normal(keys[1], (5, 3))}
    params |= {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    training = lambda params, x, key: in_training(params, x, rate=rate, key=key)
    return adapters.from_function(evaluated, params, X, training, statistics=("^mean$", "^var$"))


BUILDERS = {"nnx": build_nnx, "linen": build_linen, "equinox": build_equinox, "function": build_function}


def outputs(name, apply, params, batch, rate):
    """What the library itself gives in evaluation."""
    found = apply.module(params)
    if name == "nnx":
        found.eval()
        return found(batch["x"])
    if name == "linen":
        return Linen(rate).apply(found, batch["x"], train=False)
    if name == "equinox":
        module, state = found
        return jax.vmap(equinox.nn.inference_mode(module), in_axes=(0, None), out_axes=(0, None))(batch["x"], state)[0]
    return (batch["x"] @ found["w"] - found["mean"]) / np.sqrt(found["var"] + 1e-5) @ found["head"]


def loss(logits, batch):
    return float(-jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), batch["labels"]]))


def first(params):
    """``x -> h`` of the first layer, of any of the four."""
    flat = {path.split("/")[-1]: x for path, x in tree.flatten(params).items() if "first" in path or "Dense_0" in path}
    if not flat:
        return lambda x: x @ np.asarray(params["w"])
    kernel = np.asarray(flat.get("kernel", np.transpose(flat["weight"]) if "weight" in flat else None))
    return lambda x: x @ kernel + np.asarray(flat["bias"])


@pytest.fixture(scope="module", params=BUILDERS)
def run(request):
    """Four steps whose learning rate moves nothing, with dropout; and their model."""
    apply, params = BUILDERS[request.param](0.5)
    options = {**STILL, "eval_data": BATCHES[:1], "eval_every": 4}
    return request.param, apply, params, jft.finetune(apply, params, BATCHES, steps=4, method="full", **options)


def test_statistics_are_those_of_the_batches(run):
    name, apply, params, run = run
    mean, var, layer = np.zeros(5), np.ones(5), first(params)
    for batch in BATCHES * 2:
        h = layer(batch["x"].astype(np.float64))
        mean, var = (MOMENTUM * old + (1 - MOMENTUM) * new for old, new in ((mean, h.mean(0)), (var, h.var(0))))
    found = {path: np.asarray(x) for path, x in tree.flatten(run.params).items() if path in apply.statistics}
    assert apply.trains
    if name == "equinox":
        assert found["state/0"] == 4, "its counter of batches"
    expected = dict(zip(("mean", "var"), (mean, var), strict=True))
    each = {"state/1": "mean", "state/2": "var"}
    for path in set(found) - {"state/0"}:
        np.testing.assert_allclose(found[path], expected[each.get(path, path.split("/")[-1])], rtol=2e-5, atol=1e-5)
    others = [path for path in tree.flatten(params) if path not in apply.statistics]
    for path in others:
        np.testing.assert_allclose(tree.flatten(run.params)[path], tree.flatten(params)[path], atol=1e-6)
    assert set(run.task_vector.paths) == {*others, *apply.statistics}


def test_dropout_in_training_alone(run):
    name, apply, _, run = run
    losses = [row["loss"] for row in run.metrics if row["split"] == "train"]
    # The same batch through the same weights: what differs is drawn, in each step anew.
    assert abs(losses[0] - losses[2]) > 1e-3 and abs(losses[1] - losses[3]) > 1e-3
    logits = outputs(name, apply, run.params, BATCHES[0], 0.5)
    np.testing.assert_allclose(jax.jit(apply)(run.params, BATCHES[0]), logits, rtol=1e-5, atol=1e-5)
    assert run.evaluation["loss"] == pytest.approx(loss(logits, BATCHES[0]), rel=1e-5)


def test_the_task_vector_and_files_hold_them(run, tmp_path):
    _, apply, params, run = run
    moved = jft.apply(params, run.task_vector)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, run.params)
    read = jft.models.load_params(jft.save(apply, run.params, tmp_path / "model"), like=params)
    assert jax.tree.structure(read) == jax.tree.structure(run.params)
    jax.tree.map(np.testing.assert_array_equal, read, run.params)
    assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype("float32")}
    half = jft.save(apply, run.params, tmp_path / "half", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(jft.models.load_params(half, params))} == {np.dtype("float32")}


def test_microbatches_follow_each_other():
    """Statistics move with each; without noise each normalises its own rows; dropout is another in each."""
    apply, params = build_function(0.0)
    batch = BATCHES[0]
    run = jft.finetune(apply, params, [batch], steps=1, accumulate=2, **STILL)
    parts = [{key: x[rows] for key, x in batch.items()} for rows in (slice(0, None, 2), slice(1, None, 2))]
    state, total = params, 0.0
    for part in parts:
        logits, state = in_training(state, part["x"], rate=0.0, key=jax.random.key(0))
        total -= float(jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(4), part["labels"]])) / 8
    assert run.metrics[0]["loss"] == pytest.approx(total, rel=1e-5)
    for path in ("mean", "var"):
        np.testing.assert_allclose(run.params[path], state[path], rtol=1e-5, atol=1e-6)
    # Every second row is a microbatch: these are equal, and with one mask for both their losses would be as well.
    dropping, params = build_function(0.5)
    twice = {key: np.repeat(x[:4], 2, axis=0) for key, x in batch.items()}
    noisy = jft.finetune(dropping, params, [twice], steps=1, accumulate=2, seed=1, **STILL)
    halves = {key: x[:4] for key, x in batch.items()}
    alone = jft.finetune(dropping, params, [halves], steps=1, seed=1, **STILL)
    assert abs(noisy.metrics[0]["loss"] - alone.metrics[0]["loss"]) > 1e-3


def test_a_run_goes_on_with_them(tmp_path):
    apply, params = build_function(0.5)
    options = {"optimizer": {"lr": 1e-2}, "method": {"name": "lora", "rank": 1}, "log": {"progress": False}}
    whole = jft.finetune(apply, params, BATCHES, steps=4, **options)
    for steps in (2, 4):
        part = jft.finetune(apply, params, BATCHES, steps=steps, workdir=tmp_path, checkpoint={"every": 2}, **options)
    jax.tree.map(np.testing.assert_array_equal, part.params, whole.params)
    assert not np.allclose(whole.params["mean"], 0)
    assert set(whole.task_vector.paths) == {"w", "head", "mean", "var"}


def test_modes_that_stay():
    """In evaluation mode, and linearized, nothing of the state moves, and no key is drawn."""
    module = Nnx(0.5, nnx.Rngs(0))
    module.eval()
    apply, params = adapters.from_nnx(module, X)
    assert not apply.trains and "norm/mean" not in tree.flatten(params)
    apply, params = build_function(0.5)
    run = jft.finetune(apply, params, BATCHES, steps=2, method="linearized", log={"progress": False})
    assert set(run.task_vector.paths) == {"w", "head"}


def test_what_cannot_be(tmp_path):
    apply, params = build_function(0.5)
    with pytest.raises(ValueError, match="give training="):
        adapters.from_function(lambda p, x: x, params, X, statistics="mean")
    with pytest.raises(ValueError, match="statistic 'n' is int32; only floating-point"):
        adapters.from_function(lambda p, x: x, {"n": jnp.arange(3)}, X, lambda p, x, key: x, statistics="n")
    endless = jft.data.build({"source": "digits", "split": "train"}, batch_size=8)
    with pytest.raises(ValueError, match="which is endless: build it with train=False"):
        jft.finetune(apply, params, BATCHES, steps=1, eval_data=endless)
    jft.save(apply, params, tmp_path / "model")
    with pytest.raises(LoadError, match=r"jft\.models\.load_params"):
        jft.load(tmp_path / "model")
    with pytest.raises(LoadError, match="holds 'head', unlike"):
        jft.models.load_params(tmp_path / "model", {k: x for k, x in params.items() if k != "head"})
    with pytest.raises(LoadError, match=r"'head' has shape \(5, 3\), not \(3, 5\)"):
        jft.models.load_params(tmp_path / "model", params | {"head": params["head"].T})
