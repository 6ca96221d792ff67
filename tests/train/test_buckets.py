"""Training on buckets: the losses of padded rows at a part of their cost; epochs, and rates of tokens that are real."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

import jft
from jft import data
from jft.data.batches import equally_long
from jft.data.tokenizer import byte_tokenizer
from jft.models import Classifier, DecoderConfig, EncoderConfig, Model, T5Config
from jft.train import config as configs
from jft.train import experiment, feed, metrics, step
from jft.train.objectives import Classification, infer

BYTES = byte_tokenizer()
SMALL = {"vocab": BYTES.vocab_size, "width": 16, "layers": 1, "heads": 2, "hidden": 32}


def rows(count=96):
    """Texts of 13 tokens, and one in eight of 40."""
    return [{"text": f"{i:013d}" if i % 8 else f"{i:040d}", "label": "ab"[i % 2], "response": "yes" * (1 + i % 2)}
            for i in range(count)]  # fmt: skip


KINDS = {
    "classification": ({"task": "classification"}, Classifier(EncoderConfig(**SMALL, positions=128), 2)),
    "sft": ({"task": "sft", "prompt": "text", "response": "response"}, DecoderConfig(**SMALL)),
    "seq2seq": (
        {"task": "seq2seq", "prompt": "text", "response": "response", "max_target_length": 32},
        T5Config(**SMALL),
    ),
}


def loader(kind, **options):
    settings = {"source": "rows", "rows": rows(), "max_length": 128, **KINDS[kind][0], **options}
    return data.build(settings, batch_size=8, tokenizer=BYTES)


def padded(batch, like):
    """The batch with rows of the lengths in ``like``."""
    grow = lambda x, n: np.pad(x, [(0, 0), (0, n - x.shape[1])]) if x.ndim == 2 else x
    return {k: grow(x, like[k].shape[-1]) for k, x in batch.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_padded_rows(kind):
    batches = list(itertools.islice(loader(kind), 12))
    full = next(iter(loader(kind, buckets=False)))
    batch = min(batches, key=lambda b: b["tokens"].shape[1])
    assert batch["tokens"].shape[1] <= 32 < full["tokens"].shape[1] == 128
    model = Model(KINDS[kind][1])
    params, objective = model.init(jax.random.key(0)), infer(batch)

    @jax.jit
    def run(params, batch):
        loss = lambda p: objective.loss(model.apply(p, batch), batch)[0] / objective.weight(batch)
        return jax.value_and_grad(loss)(params)

    (value, gradient), (reference, expected) = run(params, batch), run(params, padded(batch, full))
    assert value == pytest.approx(float(reference), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)


@pytest.fixture(scope="module")
def encoder():
    model = Model(KINDS["classification"][1])
    return model, model.init(jax.random.key(0))


def train(encoder, batches, **options):
    options = {
        "method": "bitfit",
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "log": {"every": 1, "progress": False},
    } | options
    return jft.finetune(*encoder, batches, **options)


def test_a_run_is_that_on_padded_rows_and_an_epoch_costs_a_third_of_it(encoder):
    bucketed, full = loader("classification"), next(iter(loader("classification", buckets=False)))
    batches = list(itertools.islice(bucketed, 12))
    run = train(encoder, bucketed, epochs=1)
    assert int(run.state.step) == 12
    whole = train(encoder, [padded(b, full) for b in batches], epochs=1)
    losses = [[row["loss"] for row in r.metrics] for r in (run, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert len(set(losses[0])) == 12
    # The log speaks of tokens that are no padding, and of its share.
    row = train(encoder, bucketed, epochs=1, log={"every": 12, "progress": False}).metrics[-1]
    real, positions = (sum(np.sum(x(b["segments"])) for b in batches) for x in (np.sign, np.ones_like))
    assert row["padding"] == pytest.approx(1 - real / positions)
    assert row["tokens_per_s"] == pytest.approx(row["steps_per_s"] * real / 12)
    # As XLA counts the steps of an epoch.
    plan = jft.method("bitfit").plan(encoder[1], encoder[0])
    recipe = step.Recipe(step.apply_of(encoder[0]), plan, Classification(), jft.train.Optimizer(name="adamw"))
    update = step.compile_step(dataclasses.replace(recipe, dtype=np.dtype("float32")), encoder[1], {}, None)
    flops = sum(step.flops(update.compiled(b)) for b in batches)
    assert flops < 0.4 * len(batches) * step.flops(update.compiled(padded(batches[0], full)))


def test_a_fleet_pads_its_members_to_the_longest_of_a_step(encoder):
    """Each member as by itself, though their buckets differ."""
    streams = [loader("classification"), data.build({"source": "rows", "rows": rows(40)[::-1], "task": "classification",
                                                     "max_length": 128}, batch_size=8, tokenizer=BYTES, seed=3)]  # fmt: skip
    lengths = [[b["tokens"].shape[1] for b in itertools.islice(s, 6)] for s in streams]
    assert lengths[0] != lengths[1]
    fleet = train(encoder, None, fleet=[{"data": s} for s in streams], steps=6)
    for run, stream in zip(fleet, streams, strict=True):
        alone = train(encoder, stream, steps=6)
        assert run.metrics[-1]["loss"] == pytest.approx(alone.metrics[-1]["loss"], rel=1e-5)


def test_a_run_in_buckets_goes_on_bit_by_bit(encoder, tmp_path):
    whole = train(encoder, loader("classification"), steps=12, workdir=tmp_path / "whole")
    options = {"workdir": tmp_path / "parts", "checkpoint": 5}
    train(encoder, loader("classification"), steps=5, **options)
    rest = train(encoder, loader("classification", threads=0, prefetch=0), steps=12, **options)
    assert [row["loss"] for row in rest.metrics] == [row["loss"] for row in whole.metrics]
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)


def test_batches_of_several_lengths_become_of_one():
    made = [{"tokens": np.full((2, n), 7), "segments": np.ones((2, n), int), "decoder_tokens": np.full((2, m), 8),
             "decoder_segments": np.ones((2, m), int), "loss_mask": np.ones((2, m)), "labels": np.arange(2)}
            for n, m in ((3, 6), (5, 4))]  # fmt: skip
    found = equally_long(made)
    for batch, old in zip(found, made, strict=True):
        for name, value in old.items():
            length = {"labels": None, "tokens": 5, "segments": 5}.get(name, 6)
            assert length is None or batch[name].shape == (2, length)
            np.testing.assert_array_equal(batch[name][:, : value.shape[-1]] if length else batch[name], value)
            assert length is None or not batch[name][:, value.shape[-1] :].any()
    images = [{"images": np.zeros((2, n))} for n in (3, 5)]
    assert equally_long(images) == images, "no text: its shapes are its own"


def test_mfu_is_of_tokens_that_are_no_padding():
    meter = metrics.Meter(metrics.Work(1000.0, "", 1e4, 100))
    meter._since -= 2.0
    for _ in range(4):
        meter.add(2, 30, 100)
    rates = meter.read()
    assert rates["padding"] == pytest.approx(0.7)
    # 120 tokens of 10 FLOPs each in 2 s, of 1e4 a second.
    assert rates["mfu"] == pytest.approx(120 * 10 / 2 / 1e4, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of steps and epochs; steps is None and epochs None"),
        ({"steps": 1, "epochs": 1}, "give exactly one of steps and epochs"),
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"epochs": 1, "data": iter([])}, "data is a list_iterator, of which nothing tells how long a pass is"),
    ],
)
def test_exactly_one_of_steps_and_epochs(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        train(encoder, options.pop("data", []), **options)


def test_epochs_are_rounded_up_to_steps():
    from jft.train.finetune import _steps

    assert (
        _steps(None, 0.1, [range(30)]) == 3 and _steps(None, 2, [range(7)]) == 14 and _steps(None, 0.5, [range(7)]) == 4
    )
    assert _steps(None, 2, [loader("sft")]) == 24
    with pytest.raises(ValueError, match=r"2 epochs are \[6, 8\] steps for the members of the fleet; give steps"):
        _steps(None, 2, [range(3), range(4)])


def job(tmp_path, **changes):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    config = configs.default()
    config.epochs, config.batch_size, config.log.progress = 1.0, 8, False
    config.model.arch, config.model.classes = "encoder", -1
    config.model.options = {k: v for k, v in SMALL.items() if k != "vocab"} | {"positions": 128}
    config.data = {"source": "jsonl", "files": str(tmp_path / "rows.jsonl"), "task": "classification",
                   "tokenizer": "bytes", "max_length": 128, "holdout": 0.2}  # fmt: skip
    config.eval_data = {"held_out": 0.2}
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = config
        for section in sections:
            node = node[section]
        with node.unlocked(), node.ignore_type():
            node[last] = value
    return config


def test_a_run_by_epochs_from_a_config(tmp_path, capsys):
    config = job(tmp_path, log__progress=True, checkpoint__every=4)
    run = experiment.run(config, tmp_path / "run")
    assert int(run.state.step) == 4 and run.task_vector.manifest["steps"] == 4
    assert {"loss", "accuracy", "f1", "matthews"} == set(run.evaluation)
    said = capsys.readouterr().out
    assert "1 epochs of 4 steps, each of 8 rows" in said
    assert "data: 32 records, " in said and "eval_data: 8 records, " in said and "% padding" in said
    assert "with rows of 48 tokens, the longest" in said
    # Once more, from where it ended; and a line that breaks later is found before anything is compiled.
    again = experiment.run(job(tmp_path, checkpoint__every=4), tmp_path / "run")
    assert again.evaluation["loss"] == pytest.approx(run.evaluation["loss"], rel=1e-6)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"text": "no label"}\n{"text": 3, "label": "a"}\n')
    wrong = job(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows(40)) + '{"text": 1, "label": "a"}\n{"text": 3, "label": "a"}\n'
    )
    with pytest.raises(data.DataError, match=r"data: 2 records of \d+ cannot be used: .*rows.jsonl:4\d: field 'text'"):
        experiment.run({**wrong.to_dict(), "eval_data": {}, "data": {k: v for k, v in wrong.data.items() if k != "holdout"}},
                       tmp_path / "other")  # fmt: skip
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "config.steps=3 and config.epochs=1 are both given; set one of them to 0"),
        ({"epochs": 0.0}, r"how long to train is not given; set config.steps .* or config.epochs"),
        ({"steps": -1}, "cannot be negative"),
        ({"model__classes": 1}, "config.model.classes is 1, but the data has 2 classes"),
        ({"model__options__vocab": 100}, "tokens with ids up to 263, but embed/table has 100 rows"),
    ],
)
def test_wrong_configs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.run(job(tmp_path, **changes), tmp_path / "run")


def test_a_token_without_a_row_is_refused(encoder):
    experiment._check_tokens(encoder[1], BYTES.vocab_size - 1)
    with pytest.raises(ValueError, match=f"the data holds the token {BYTES.vocab_size}, but .*embed/table has"):
        experiment._check_tokens(encoder[1], BYTES.vocab_size)


def test_a_position_is_peeked_at_with_its_bucket():
    """The largest batch is not one that is taken."""
    source = feed.Feed(loader("classification"))
    first, largest = source.peek(), source.largest()
    assert largest["tokens"].shape[1] == 48 and source.largest(known=False)["tokens"].shape[1] == 128
    assert set(largest) == set(first) and all(largest[k].dtype == first[k].dtype for k in first)
    np.testing.assert_array_equal(source.next(0, Classification())["tokens"], first["tokens"])
    source.close()
