"""Logits in chunks: losses, metrics and gradients are those of all logits at once, and these are never in memory."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import methods, parallel, tree
from jft.cli import main
from jft.models import Classifier, DecoderConfig, Execution, Hooks, Model, T5Config
from jft.models.logits import Logits
from jft.train import evaluation, step
from jft.train.config import ModelConfig
from jft.train.experiment import build_model
from jft.train.objectives import Classification, LanguageModel, Seq2Seq, TowardBase, per_position
from jft.train.optimizers import optimizer
from tests.train import tools

MUTATIONS = [
    ("jft/models/logits.py", "jnp.moveaxis(x, 0, 1).reshape(", "x.reshape("),
    ("jft/models/logits.py", "[:, :T], results)", "[:, -T:], results)"),
    ("jft/models/logits.py", "    @functools.partial(jax.checkpoint, prevent_cse=False)\n", ""),
    ("jft/train/objectives.py", "jax.random.fold_in(key, i), z)", "key, z)"),
    ("jft/train/objectives.py", "each = lambda logits, targets: (*token_nll(logits, targets), _hits(logits, targets))",
     "each = lambda logits, targets: (*token_nll(logits, targets), _hits(-logits, targets))"),
    ("jft/models/t5.py", "return h * self.width**-0.5 if self.scale_outputs else h", "return h"),
    ("jft/models/decoder.py", "return _softcap(scope.dot(\"head\", h, head), self.logit_softcap)",
     "return scope.dot(\"head\", h, head)"),
    ("jft/tangent/linearization.py", "    if until is None and getattr(apply, \"chunk\", None):\n"
     "        return _in_chunks(apply, build, tangents, batch)\n", ""),
    ("jft/tangent/linearization.py", "(point, h), (direction, dh)", "(point, h), (direction, 0 * dh)"),
    ("jft/tangent/linearization.py", "if p in reads}", "if p not in reads}"),
    ("jft/train/step.py", "return dataclasses.replace(apply, chunk=model.execution.logits_chunk)", "return apply"),
]  # fmt: skip

VOCAB, T, CHUNK = 37, 13, 5
DECODER = DecoderConfig(vocab=VOCAB, width=16, layers=2, heads=2, hidden=24)
T5 = T5Config(vocab=VOCAB, width=16, head=8, heads=2, hidden=24, layers=1, decoder_layers=2, buckets=8, max_distance=16)
CONFIGS = {
    "tied": dataclasses.replace(DECODER, tied=True),
    "untied": dataclasses.replace(DECODER, tied=False),
    "softcap": dataclasses.replace(DECODER, tied=False, logit_softcap=0.7),
    "t5 tied": T5,
    "t5 untied": dataclasses.replace(T5, tied=False, scale_outputs=False),
}
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(1, VOCAB, (4, T)).astype(np.int32),
    "segments": np.array([[1] * 4 + [2] * 9, [1] * 13, [1] * 10 + [0] * 3, [1] * 6 + [2] * 7], np.int32),
    "loss_mask": RNG.uniform(0.1, 1, (4, T)).astype(np.float32),
    "valid": np.array([True, True, True, False]),
}
PAIRS = {
    "tokens": RNG.integers(1, VOCAB, (4, 6)).astype(np.int32),
    "decoder_tokens": np.where(RNG.random((4, T)) < 0.1, 0, RNG.integers(1, VOCAB, (4, T))).astype(np.int32),
    "loss_mask": RNG.uniform(0.1, 1, (4, T)).astype(np.float32),
}


def drawn(config, seed=0):
    """Parameters away from where a gradient is zero."""
    params = Model(config).init(jax.random.key(seed))
    return tree.map_with_path(
        lambda p, x: x + 0.2 * jax.random.normal(tree.key_for(jax.random.key(9), p), x.shape), params
    )


def case(name):
    return (CONFIGS[name], PAIRS, Seq2Seq) if name.startswith("t5") else (CONFIGS[name], BATCH, LanguageModel)


def recipe_of(model, params, objective, method="full", accumulate=1, mesh=None, **options):
    plan = methods.method(method, **options).plan(params, model)
    apply = step.apply_for(objective, model, mesh)
    return step.Recipe(apply, plan, objective, optimizer("adamw").unscheduled(), accumulate, jnp.float32)


def gradients(chunk, name, objective, mesh=None, **options):
    config, batch, _ = case(name)
    params = drawn(config)
    model = Model(config, Execution(logits_chunk=chunk))
    recipe = recipe_of(model, params, objective, mesh=mesh, **options)
    kept, trained = recipe.plan.init(jax.random.key(1), params, {})
    # Values that have moved, so that the change of a linearized model is not zero.
    trained = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trained)
    if mesh is not None:
        batch = parallel.put_batch(batch, mesh)
    run = jax.jit(lambda kept, trained, batch: step.gradients(recipe, kept, trained, batch, mesh)[:3])
    return jax.device_get(run(kept, trained, batch))


def times(factor, batch):
    """Other tokens of the same vocabulary."""
    return tree.map_with_path(lambda p, x: (x * factor) % VOCAB if "tokens" in p else x, batch)


def close(found, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max()), found, expected
    )


@pytest.mark.parametrize(("name", "z_loss"), [*((name, 0.1) for name in CONFIGS), ("untied", 0.0)])
def test_a_step(name, z_loss):
    objective = case(name)[2](z_loss=z_loss)
    found, expected = (gradients(chunk, name, objective) for chunk in (CHUNK, 0))
    head = "embed/table" if CONFIGS[name].tied else "head/w"
    assert max(np.abs(g).max() for g in jax.tree.leaves(found[0][head])) > 1e-3
    close(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula(name):
    """In float64, from the last hidden states: their product with the head, and each target by itself."""
    config, given, objective = case(name)
    params, model = drawn(config), Model(config, Execution(logits_chunk=CHUNK))
    t5 = name.startswith("t5")
    site = "decoder/final" if t5 else "final"
    hooks = Hooks(value=lambda name, h, state: (h, h if name == site else None))
    w = np.asarray(params["embed"]["table"].T if config.tied else params["head"]["w"], np.float64)
    right = 0.0
    for factor in range(1, 13):  # of tokens that are drawn at random few are predicted
        batch = times(factor, given)
        h = np.asarray(model.apply(params, batch, hooks)[1][site], np.float64)
        z = (h / 4 if name == "t5 tied" else h) @ w  # the root of a width of 16
        z = 0.7 * np.tanh(z / 0.7) if name == "softcap" else z
        tokens = batch["decoder_tokens"] if t5 else batch["tokens"]
        segments = (tokens != 0) | (np.arange(T) == 0) if t5 else batch["segments"]
        loss = hits = weight = 0.0
        for b in range(4 if t5 else 3):  # the last row is not valid
            for t in range(T - 1):
                if segments[b, t] == segments[b, t + 1] != 0:
                    share, partition = float(batch["loss_mask"][b, t + 1]), np.log(np.sum(np.exp(z[b, t])))
                    loss += share * (partition - z[b, t, tokens[b, t + 1]] + 0.1 * partition**2)
                    hits += share * (np.argmax(z[b, t]) == tokens[b, t + 1])
                    weight += share
        found = step.apply_for(objective(), model)(params, batch)
        total, count, sums = objective(z_loss=0.1).loss(found, batch)
        np.testing.assert_allclose([total, count, sums["accuracy"]], [loss, weight, hits], rtol=1e-5, atol=1e-6)
        right += hits
    assert right > 0


@pytest.mark.parametrize("name", ["untied", "softcap", "t5 tied"])
@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 2}), ("linearized", {}), ("l_lora", {"rank": 2})])
def test_other_methods(name, method, options):
    objective = case(name)[2](z_loss=0.1)
    options = {"method": method, **options}
    close(*(gradients(chunk, name, objective, **options) for chunk in (CHUNK, 0)))


def test_linearized_up_to_a_site():
    options = {"method": "linearized", "until": "final"}
    close(*(gradients(chunk, "softcap", LanguageModel(), **options) for chunk in (CHUNK, 0)))


@pytest.mark.parametrize("chunk", [1, 4, 6, T, 40])
def test_any_chunk(chunk):
    close(*(gradients(c, "untied", LanguageModel(z_loss=0.1)) for c in (chunk, 0)))


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulated_and_on_a_mesh(devices):
    mesh = parallel.make_mesh({"fsdp": 2}, devices=jax.devices()[:2]) if devices == 2 else None
    found = gradients(CHUNK, "tied", LanguageModel(), mesh, accumulate=2)
    close(found, gradients(0, "tied", LanguageModel()))


def outputs_of(name, chunk):
    config, batch, objective = case(name)
    model = Model(config, Execution(logits_chunk=chunk))
    return (lambda seed=0: step.apply_for(objective(), model)(drawn(config, seed), batch)), batch, objective()


@pytest.mark.parametrize("name", ["tied", "t5 untied"])
def test_toward_and_sampled(name):
    (found, batch, objective), (expected, _, _) = (outputs_of(name, chunk) for chunk in (CHUNK, 0))
    assert isinstance(found(), Logits) and not isinstance(expected(), Logits)
    close(objective.toward(found(), found(1), batch), objective.toward(expected(), expected(1), batch))
    # As a step has it: one of them may be an array.
    close(objective.toward(found(), expected(1), batch), objective.toward(expected(), expected(1), batch))
    key = jax.random.key(3)
    close(objective.sampled_loss(key, found(), batch), objective.sampled_loss(key, expected(), batch))
    toward = TowardBase(objective)
    close(toward.loss((found(), found(1)), batch), toward.loss((expected(), expected(1)), batch))


def test_every_position_draws_for_itself():
    """Among equal predictions half of the draws are of either of two targets, in rows and along them."""
    logits = jnp.zeros((64, 65, 2)).at[..., 1].set(1.0)
    total, weight = LanguageModel().sampled_loss(jax.random.key(0), logits, {"tokens": np.ones((64, 65), np.int32)})
    p = np.array([1, np.e]) / (1 + np.e)
    entropy, deviation = -np.sum(p * np.log(p)), np.sqrt(np.sum(p * np.log(p) ** 2) - np.sum(p * np.log(p)) ** 2)
    assert abs(total / weight - entropy) < 4 * deviation / np.sqrt(weight)
    assert abs(total / weight - entropy) > 1e-6


def test_evaluation():
    for name in ("tied", "softcap", "t5 tied"):
        config, batch, objective = case(name)
        params = drawn(config)
        batches = [times(factor, batch) for factor in range(1, 20)]
        found, expected = (
            evaluation.evaluate(Model(config, Execution(logits_chunk=chunk)), params, batches, objective())
            for chunk in (CHUNK, 0)
        )
        assert found.keys() == expected.keys() and found["accuracy"] > 0
        close(found, expected)


def test_apply_gives_arrays():
    config, batch, _ = case("untied")
    params = drawn(config)
    found, expected = (Model(config, Execution(logits_chunk=c)).apply(params, batch) for c in (CHUNK, 0))
    np.testing.assert_array_equal(found, expected)
    logits = outputs_of("untied", CHUNK)[0]()
    np.testing.assert_allclose(logits.whole(), expected, rtol=1e-5, atol=1e-5)


def test_per_position_of_arrays_and_logits():
    """One and the same function of logits, of an array, and of nothing but arrays; forward mode and vmap."""
    w, h = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((4, 7), (2, 11, 4)))
    scale = jnp.asarray(RNG.standard_normal((2, 11)), jnp.float32)
    function = lambda logits, scale: {"sum": scale * jnp.sum(jnp.sin(logits), axis=-1), "logits": logits}

    def of(w, h):
        return per_position(function, Logits(h, w, lambda w, h: h @ w, 3), scale)

    whole = lambda w, h: function(h @ w, scale)
    close(jax.jit(of)(w, h), whole(w, h))
    close(per_position(function, h @ w, scale), whole(w, h))
    close(jax.jvp(of, (w, h), (w + 1, h - 1)), jax.jvp(whole, (w, h), (w + 1, h - 1)))
    stacked = jnp.stack([w, 2 * w])
    close(jax.vmap(of, (0, None))(stacked, h), jax.vmap(whole, (0, None))(stacked, h))


def finetuned(chunk, **options):
    model = Model(CONFIGS["tied"], Execution(logits_chunk=chunk))
    data = [times(factor, BATCH) for factor in (1, 2, 3)]
    options = {"optimizer": {"name": "sgd", "lr": 1e-2}, "log": {"every": 1, "progress": False}} | options
    return jft.finetune(model, drawn(CONFIGS["tied"]), data, steps=3, eval_data=data, **options)


def test_runs():
    found, expected = (finetuned(chunk, method={"name": "sift", "rate": 0.2}) for chunk in (CHUNK, 0))
    close(found.params, expected.params)
    close(found.evaluation, expected.evaluation)


def test_fleets():
    fleet = [{"name": "a"}, {"name": "b", "lr": 2e-2}]
    found, expected = (finetuned(chunk, method={"name": "lora", "rank": 2}, fleet=fleet) for chunk in (CHUNK, 0))
    for a, b in zip(found, expected, strict=True):
        close(a.params, b.params)


def test_fused_attention_of_a_fleet_on_a_mesh_is_refused():
    model, mesh = Model(CONFIGS["tied"], Execution(attention="fused")), parallel.make_mesh({"fsdp": 4, "tensor": 2})
    with pytest.raises(ValueError, match="attention='fused' does not go with a fleet on several devices"):
        jft.finetune(model, drawn(CONFIGS["tied"]), [BATCH], steps=1, mesh=mesh, fleet=[{"name": "a"}, {"name": "b"}])


def test_refusals():
    with pytest.raises(ValueError, match="logits_chunk is -1"):
        Execution(logits_chunk=-1)
    with pytest.raises(ValueError, match="Classifier has no logits for each token"):
        Model(Classifier(DECODER, 3), Execution(logits_chunk=4))

    @dataclasses.dataclass(frozen=True)
    class Whole:
        splits = True

        def weight(self, batch, xp=jnp):
            return xp.ones(())

        def loss(self, outputs, batch):
            return jnp.sum(outputs), jnp.ones(()), {}

        def report(self, means):
            return means

    with pytest.raises(ValueError, match="logits_chunk=5: Whole takes all logits at once"):
        finetuned(CHUNK, objective=Whole())
    with pytest.raises(ValueError, match="logits_chunk=5: Classification takes"):
        step.apply_for(Classification(), Model(DECODER, Execution(logits_chunk=CHUNK)))
    assert step.apply_for(Whole(), tools.bigram) is tools.bigram


def test_from_a_config_and_a_command(capsys):
    section = ModelConfig(arch="decoder", options={"vocab": 8, "width": 8, "layers": 1, "heads": 1}, logits_chunk=7)
    assert build_model(section)[0].execution.logits_chunk == 7
    command = ["bench", "step", "--model=tiny", "--methods", "full", "--batch=1", "--tokens=8", "--json"]
    assert main.call([*command, "--logits-chunk=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["setting"]["logits_chunk"] == 2 and found["costs"][0]["flops"] is None


LARGE, ROWS, TOKENS, LONG = 16001, 2, 256, 32


@functools.cache
def compiled(chunk, tied, method, devices=1):
    """A step of a model most of whose step is logits, compiled and not run."""
    config = dataclasses.replace(DECODER, vocab=LARGE, layers=1, tied=tied)
    model = Model(config, Execution(logits_chunk=chunk))
    mesh = parallel.make_mesh({"fsdp": 2}, devices=jax.devices()[:2]) if devices == 2 else None
    params, batch = model.abstract(), {"tokens": jax.ShapeDtypeStruct((ROWS, TOKENS), np.int32)}
    recipe = recipe_of(model, params, LanguageModel(z_loss=1e-4), method, mesh=mesh)
    return step.compile_step(recipe, params, {}, mesh).compiled(batch)


def rows(program):
    """The most elements of any array with an axis of the vocabulary, over those of one token."""
    shapes = [found.split(",") for found in re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.as_text())]
    return max(np.prod([int(n) for n in shape]) for shape in shapes if str(LARGE) in shape) // LARGE


@pytest.mark.optimized
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["full", "lora", "linearized"])
def test_no_array_holds_all_logits(tied, method):
    whole, chunks = compiled(0, tied, method), compiled(LONG, tied, method)
    assert rows(whole) == ROWS * TOKENS and rows(chunks) == ROWS * LONG
    few, many = (x.memory_analysis().temp_size_in_bytes for x in (chunks, whole))
    print(f"{method} tied={tied}: temporaries {few / many:.3f} of those with all logits ({few} of {many})")
    assert few < 0.3 * many


@pytest.mark.optimized
def test_rows_stay_on_their_devices():
    assert rows(compiled(LONG, False, "full", 2)) == ROWS * LONG // 2
