"""Every preset on real scans: a base that knows upright digits learns turned ones, better than it was, by what was promised.

What is promised: nothing outside the task vector changes by a bit, the task vector is in the encoding of the method and as
large as its budget says, and applied to the base it gives the tuned model.
"""

import jax
import numpy as np
import pytest

import jft
from jft import delta, tree
from jft.methods import entries
from jft.models import Classifier, DecoderConfig, Model, VisionConfig
from jft.models.memory import Memory
from jft.models.moe import Experts

SCANS = {"source": "digits", "threads": 0, "prefetch": 0}
TEXT = {"source": "stdlib", "tokenizer": "bytes", "max_length": 48, "pack": "concat", "threads": 0, "prefetch": 0}
STEPS, QUIET = 60, {"progress": False}
MATRICES = r"layers/.*/w$"


def share(density, extra=0):
    """So many of each matrix: the floor of a density, and a constant."""
    return lambda shape: int(np.floor(density * shape[-2] * shape[-1] + 1e-9)) + extra


def factors(rank):
    """As many of each matrix as factors of a rank have."""
    return lambda shape: rank * (shape[-2] + shape[-1])


# name: options, learning rate, and entries promised for each matrix (None: whatever the encoding holds).
DIGITS = {
    "full": ({}, 2e-3, None),
    "pattern": ({"include": "mlp/"}, 2e-3, None),
    "bitfit": ({}, 2e-2, None),
    "last_k_layers": ({}, 3e-3, None),
    "embeddings_and_output": ({}, 2e-2, None),
    "lora": ({"rank": 4}, 1e-2, None),
    "linearized": ({}, 2e-3, None),
    "l_lora": ({"rank": 4}, 1e-2, None),
    "uniform_layers": ({"fraction": 0.5}, 3e-3, None),
    "gradual_unfreezing": ({"stages": 2}, 3e-3, None),
    "surgical_fisher": ({"examples": 64}, 3e-3, None),
    "subtuning": ({"steps": 10}, 3e-3, None),
    "green_trainer": ({}, 3e-3, None),
    "half_finetuning": ({"stages": 2}, 3e-3, None),
    "locft_bf": ({}, 1e-2, None),
    "cofitune": ({"depth": (0.5, 1.0), "batches": 2}, 1e-2, None),
    "fish_mask": ({"density": 0.1, "count": 64}, 1e-2, None),
    "lt_sft": ({"density": 0.1, "dense_steps": 20}, 5e-3, None),
    "tr_pts": ({"density": 0.1, "count": 64}, 1e-2, None),
    "sift": ({"rate": 0.1}, 1e-2, share(0.1, 1)),
    "lift": ({"rank": 4, "filter_rank": 8}, 1e-2, factors(4)),
    "super_tuning": ({"sparsity": 0.9}, 1e-2, share(0.1)),
    "shira": ({"rank": 4}, 1e-2, factors(4)),
    "sara": ({"density": 0.2}, 1e-2, None),
    "spiel_ag": ({"density": 0.1}, 1e-2, share(0.1)),
    "spiel_ma": ({"density": 0.1}, 1e-2, share(0.1)),
    "block_sparse": ({"density": 0.1, "block": (8, 8)}, 1e-2, None),
    "smt": ({"attention": 0.2, "mlp": 0.2, "block": (8, 8), "batches": 5}, 1e-2, None),
    "s2ft": ({"o": 0.5, "down": 0.25, "v": 0.5, "up": 0.25}, 1e-2, None),
    "rosa": ({"rank": 4, "density": 0.05, "warmup": 20}, 5e-3, None),
    "dsee": ({"rank": 4, "count": 64}, 1e-2, None),
    "gmt": ({}, 2e-3, None),
    "spider": ({}, 2e-3, None),
    "mixout": ({"p": 0.5}, 3e-3, None),
    "l2_sp": ({}, 2e-3, None),
    "l1_to_base": ({}, 2e-3, None),
    "diff_pruning": ({"density": 0.1, "alpha_rate": 10.0}, 5e-3, None),
    "taps": ({"weight": 0.01}, 5e-3, None),
    "masking": ({}, 1e-2, None),
    "mask_finetuning": ({}, 1e-2, None),
    "r_amt": ({"include": MATRICES}, 1e-2, None),
    "finegates": ({}, 1e-1, None),
    "diablo": ({"blocks": 4}, 1e-2, None),
}
# Presets of language models, mixtures, memories and towers, or that need a tuned model, have runs of their own.
TEXTS = {
    "pat": ({"fraction": 0.9, "rank": 8, "identity": 0.1}, 5e-3, "dense"),
    "precise_sft": ({"heads": 0.5}, 1e-2, "dense"),
    "esft": ({"p": 0.6, "batches": 2}, 5e-3, "experts"),
    "sparse_memory": ({"slots": 64}, 5e-2, "memory"),
}
OTHERS = {"rl_subnetwork", "layers_by_score", "skip_tuning"}


def optimizer(lr):
    return {"name": "adamw", "lr": lr, "schedule": "cosine", "warmup": 5}


def loader(split, **options):
    return jft.data.build({**SCANS, "split": split, **options}, batch_size=64, train=split == "train")


@pytest.fixture(scope="module")
def digits():
    """A vision transformer that knows upright digits, and how well it does on turned ones."""
    vit = VisionConfig(image=8, patch=2, channels=1, width=32, layers=2, heads=4, hidden=64)
    model = Model(Classifier(vit, 10, "mean"))
    run = jft.finetune(
        model, model.init(jax.random.key(0)), loader("train"), steps=200, optimizer=optimizer(4e-3), log=QUIET
    )
    return model, run.params, loss(model, run.params)


def loss(model, params):
    return jft.train.evaluate(model, params, loader("test", rotate=90), "classification")["loss"]


def kept(base, run):
    """The promises every method makes."""
    flat, tuned = tree.flatten(base), tree.flatten(run.params)
    for path, x in flat.items():
        change = run.task_vector.deltas.get(path)
        if change is None:
            np.testing.assert_array_equal(tuned[path], x, err_msg=path)
        elif isinstance(change, delta.Entries | delta.Blocks | delta.Slices | delta.Rows):
            outside = np.ones(x.shape, bool) & (np.asarray(support(change)) == 0)
            np.testing.assert_array_equal(np.asarray(tuned[path])[outside], np.asarray(x)[outside], err_msg=path)
    back = tree.flatten(jft.apply(base, run.task_vector))
    for path, x in tuned.items():
        np.testing.assert_allclose(back[path], x, atol=2e-6, err_msg=path)


def support(change):
    """Ones where an encoding has a value, whatever it is."""
    return type(change)(**{**vars(change), "values": np.ones_like(change.values)}).dense()


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS)
def test_it_learns_turned_digits(digits, name):
    options, lr, promised = DIGITS[name]
    model, base, before = digits
    more = {"eval_data": loader("validation", rotate=90)} if name == "subtuning" else {}
    run = jft.finetune(
        model,
        base,
        loader("train", rotate=90),
        steps=STEPS,
        method=jft.method(name, **options, freeze="^classifier/"),
        optimizer=optimizer(lr),
        log=QUIET,
        **more,
    )
    assert loss(model, run.params) < 0.95 * before
    if run.plan.method.forward == "linearized":
        f_lin = jft.linearize(model.apply, base)
        assert loss(f_lin.__call__, f_lin.direction(run.task_vector)) < 0.95 * before
    kept(base, run)
    for path, change in run.task_vector.deltas.items():
        if promised is not None:
            assert isinstance(change, delta.Entries), path
            assert len(change.values) == change.shape[0] * promised(change.shape), path


def test_no_preset_is_left_out():
    assert set(DIGITS) | set(TEXTS) | OTHERS == set(entries())


@pytest.mark.slow
def test_the_subnetwork_of_a_tuned_model_is_trained_again(digits):
    """rl_subnetwork: the entries that another run changed, and no others; layers_by_score beside it."""
    model, base, before = digits
    first = jft.finetune(
        model, base, loader("train", rotate=90), steps=20, optimizer=optimizer(5e-3), log=QUIET,
        method=jft.method("sift", rate=0.2),
    )  # fmt: skip
    run = jft.finetune(
        model, base, loader("train", rotate=90), steps=STEPS, optimizer=optimizer(5e-3), log=QUIET,
        method=jft.method("rl_subnetwork", tuned=first.params),
    )  # fmt: skip
    assert loss(model, run.params) < 0.95 * before
    kept(base, run)
    for path, change in run.task_vector.deltas.items():
        moved = np.abs(np.asarray(tree.flatten(first.params)[path] - tree.flatten(base)[path])) > 1e-5
        np.testing.assert_array_equal(np.asarray(support(change)) != 0, moved, err_msg=path)


@pytest.fixture(scope="module")
def library():
    """Decoders of bytes that have read Python's source: dense, with experts, and with a memory; by kind, once each."""
    kinds = {
        "dense": {},
        "experts": {"experts": Experts(4, 2, 64)},
        "memory": {"memory": Memory(slots=256, layers=(1,), heads=2, top_k=4, key_size=16)},
    }
    made = {}

    def make(kind):
        if kind not in made:
            model = Model(DecoderConfig(vocab=512, width=32, layers=2, heads=4, hidden=64, tied=True, **kinds[kind]))
            run = jft.finetune(
                model, model.init(jax.random.key(0)), text("source"), steps=60, optimizer=optimizer(1e-2), log=QUIET
            )
            made[kind] = model, run.params, heard(model, run.params)
        return made[kind]

    return make


def text(kind, split="train", **options):
    config = {**TEXT, "kind": kind, "split": split, **options}
    return jft.data.build(config, batch_size=16, train=split == "train")


def heard(model, params):
    return jft.train.evaluate(model, params, text("docstrings", "validation", limit=50), "lm")["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_it_learns_docstrings(library, name):
    options, lr, kind = TEXTS[name]
    model, base, before = library(kind)
    run = jft.finetune(
        model,
        base,
        text("docstrings"),
        steps=STEPS,
        method=jft.method(name, **options),
        optimizer=optimizer(lr),
        log=QUIET,
    )
    assert heard(model, run.params) < before
    kept(base, run)
