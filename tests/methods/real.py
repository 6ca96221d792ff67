"""Runs of presets on real data, for `test_end_to_end_*`: bases, what each preset is given, and what every one promises.

A base that knows upright digits learns turned ones, one that has read Python's source learns docstrings. What is promised:
nothing outside the task vector changes by a bit, the task vector is in the encoding of the method and as large as its budget
says, and applied to the base it gives the tuned model. A preset of each mechanism trains a transformer of 18 thousand weights
on patches of 2 x 2 pixels for 60 steps, every other one that reads images a quarter of it on patches of 4 x 4 for 40.
"""

import functools
import itertools

import jax
import numpy as np

import jft
from jft import delta, tree
from jft.models import Classifier, ClipConfig, DecoderConfig, Model, VisionConfig
from jft.models.clip import TextConfig
from jft.models.memory import Memory
from jft.models.moe import Experts

SCANS = {"source": "digits", "threads": 0, "prefetch": 0}
TEXT = {"source": "stdlib", "tokenizer": "bytes", "max_length": 48, "pack": "concat", "threads": 0, "prefetch": 0}
STEPS, QUIET = 60, {"progress": False}
# One of each way to train: whole weights, stages, noise, factors, tangents; entries once, anew, dropped and grown; parts; gates
# and masks. The others of their kind differ from them in what they select, and train a smaller model.
MECHANISMS = {
    *("full", "gradual_unfreezing", "uniform_layers", "mixout", "lora", "linearized"),
    *("fish_mask", "sift", "spiel_ag"),
    *("block_sparse", "s2ft", "rosa", "diff_pruning", "masking", "finegates", "diablo"),
}
MATRICES = r"layers/.*/w$"


def share(density, extra=0):
    """So many of each matrix: the floor of a density, and a constant."""
    return lambda shape: int(np.floor(density * shape[-2] * shape[-1] + 1e-9)) + extra


def share_of_model(density, small):
    """As many of each matrix as a density of the whole model spreads over the matrices inside layers."""

    def promised(shape):
        sizes = {p: x.size for p, x in tree.flatten(digits(small)[1]).items()}
        inside = sum(n for p, n in sizes.items() if p.startswith("layers/") and p.endswith("/w"))
        return int(density * sum(sizes.values())) * shape[-2] * shape[-1] // inside

    return promised


def factors(rank):
    """As many of each matrix as factors of a rank have."""
    return lambda shape: rank * (shape[-2] + shape[-1])


# name: options, learning rate, and how many of the two layers train (None: all of them may).
LAYERS = {
    "full": ({}, 2e-3, None),
    "pattern": ({"include": "mlp/"}, 2e-3, None),
    "bitfit": ({}, 2e-2, None),
    "last_k_layers": ({}, 3e-3, None),
    "embeddings_and_output": ({}, 2e-2, None),
    "lora": ({"rank": 4}, 1e-2, None),
    "linearized": ({}, 2e-3, None),
    "l_lora": ({"rank": 4, "include": MATRICES}, 1e-2, None),
    "randlora": ({"rank": 4}, 1e-2, None),
    "uniform_layers": ({"fraction": 0.5}, 3e-3, 1),
    "gradual_unfreezing": ({"stages": 2}, 3e-3, None),
    "surgical_fisher": ({"examples": 64}, 3e-3, None),
    "layers_by_score": ({"k": 1, "batches": 2}, 3e-3, 1),
    "subtuning": ({"steps": 10}, 3e-3, None),
    "green_trainer": ({}, 3e-3, None),
    "half_finetuning": ({"stages": 2}, 3e-3, None),
    "locft_bf": ({}, 1e-2, 1),
    "spectrum": ({}, 3e-3, None),
    "cofitune": ({"depth": (0.5, 1.0), "batches": 2}, 1e-2, 1),
    "mixout": ({"p": 0.5}, 3e-3, None),
    "l2_sp": ({}, 2e-3, None),
    "l1_to_base": ({}, 2e-3, None),
}
# name: options, learning rate, and entries promised for each matrix (None: whatever the encoding holds).
ENTRIES = {
    "fish_mask": ({"density": 0.1, "count": 64}, 1e-2, None),
    "lt_sft": ({"density": 0.1, "dense_steps": 20}, 5e-3, None),
    "tr_pts": ({"top": 0.1, "count": 64}, 1e-2, None),
    "sift": ({"rate": 0.1}, 1e-2, share(0.1, 1)),
    "lift": ({"rank": 4, "filter_rank": 8}, 1e-2, factors(4)),
    "super_tuning": ({"sparsity": 0.9}, 1e-2, share(0.1)),
    "shira": ({"rank": 4}, 1e-2, factors(4)),
    "sara": ({"density": 0.2, "above": 0}, 1e-2, None),
    "spiel_ag": ({"density": 0.1}, 1e-2, share_of_model(0.1, small=False)),
    "spiel_ma": ({"density": 0.1}, 1e-2, share_of_model(0.1, small=True)),
}
PARTS = {
    "block_sparse": ({"density": 0.1, "block": (8, 8)}, 1e-2),
    "n_m": ({}, 1e-2),
    "smt": ({"attention": 0.05, "mlp": 0.1, "block": (8, 8), "batches": 5}, 1e-2),
    "s2ft": ({"o": 0.5, "down": 0.25, "v": 0.5, "up": 0.25}, 1e-2),
    "rosa": ({"rank": 4, "density": 0.05, "warmup": 20}, 5e-3),
    "dsee": ({"rank": 4, "count": 64, "filter_rank": 16, "include": MATRICES}, 1e-2),
    "gmt": ({}, 2e-3),
    "spider": ({}, 2e-3),
    "diff_pruning": ({"density": 0.1, "alpha_rate": 10.0}, 5e-3),
    "taps": ({"weight": 0.01}, 5e-3),
    "masking": ({}, 1e-2),
    "mask_finetuning": ({}, 1e-2),
    "r_amt": ({"include": MATRICES}, 1e-2),
    "finegates": ({}, 1e-1),
    "diablo": ({"blocks": 4}, 1e-2),
}
# Presets of language models, mixtures and memories, with the kind of decoder they train.
TEXTS = {
    "pat": ({"fraction": 0.9, "rank": 8, "identity": 0.1}, 2e-2, "dense"),
    "precise_sft": ({"heads": 0.5}, 1e-2, "dense"),
    "esft": ({"p": 0.6, "batches": 2}, 5e-3, "experts"),
    "sparse_memory": ({"slots": 64, "every": 0}, 5e-2, "memory"),
}
# Presets that need a tuned model, two towers or other tasks have runs of their own.
OTHERS = {"rl_subnetwork", "skip_tuning", "tak", "tau_jp"}


def optimizer(lr):
    return {"name": "adamw", "lr": lr, "schedule": "cosine", "warmup": 5}


@functools.cache
def loader(split, **options):
    """Batches of a split, read once for all presets: a pass for evaluation, as many as are trained on for training."""
    train = split == "train"
    batches = jft.data.build({**SCANS, "split": split, **options}, batch_size=64, train=train)
    return list(itertools.islice(batches, STEPS)) if train else list(batches)


@functools.cache
def digits(small=False):
    """A vision transformer that knows upright digits, how well it does on turned ones, and in how many steps it learns them."""
    shape = {"patch": 4, "width": 16, "hidden": 32} if small else {"patch": 2, "width": 32, "hidden": 64}
    model = Model(Classifier(VisionConfig(image=8, channels=1, layers=2, heads=4, **shape), 10, "mean"))
    run = jft.finetune(
        model, model.init(jax.random.key(0)), loader("train"), steps=200, optimizer=optimizer(4e-3), log=QUIET
    )
    return model, run.params, loss(model, run.params), 40 if small else STEPS


def loss(model, params):
    return jft.train.evaluate(model, params, loader("test", rotate=90), "classification")["loss"]


def turned(name, options, lr):
    """The run of a preset from a base that knows digits to turned ones, having learnt and kept what is promised of all."""
    model, base, before, steps = digits(small=name not in MECHANISMS)
    more = {"eval_data": loader("validation", rotate=90)} if name == "subtuning" else {}
    method = jft.method(name, **options, freeze="^classifier/")
    data = loader("train", rotate=90)
    run = jft.finetune(model, base, data, steps=steps, method=method, optimizer=optimizer(lr), log=QUIET, **more)
    assert loss(model, run.params) < 0.95 * before
    if run.plan.method.forward == "linearized":
        f_lin = jft.linearize(model.apply, base)
        assert loss(f_lin, f_lin.direction(run.task_vector)) < 0.95 * before
    kept(base, run)
    return run


@functools.cache
def library(kind):
    """A decoder of bytes that has read Python's source, dense, with experts, or with a memory; and its loss on docstrings."""
    kinds = {
        "dense": {},
        "experts": {"experts": Experts(4, 2, 64)},
        "memory": {"memory": Memory(slots=256, layers=(1,), heads=2, top_k=4, key_size=16)},
    }
    model = Model(DecoderConfig(vocab=512, width=32, layers=2, heads=4, hidden=64, tied=True, **kinds[kind]))
    run = jft.finetune(
        model, model.init(jax.random.key(0)), text("source"), steps=60, optimizer=optimizer(1e-2), log=QUIET
    )
    return model, run.params, heard(model, run.params)


def text(kind, split="train", **options):
    config = {**TEXT, "kind": kind, "split": split, **options}
    return jft.data.build(config, batch_size=16, train=split == "train")


def heard(model, params):
    return jft.train.evaluate(model, params, text("docstrings", "validation", limit=50), "lm")["loss"]


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
END = 256  # the token after the last byte of a name


def pairs(split, **options):
    """Batches of ten scans, one of each digit, and the bytes of their names."""
    tokens = np.full((len(NAMES), 8), END, np.int32)
    for row, name in zip(tokens, NAMES, strict=True):
        row[: len(name)] = list(name.encode())
    scans = [[] for _ in NAMES]
    for batch in jft.data.build({**SCANS, "split": split, **options}, batch_size=50, train=False):
        for image, label, valid in zip(batch["images"], batch["labels"], batch["valid"], strict=True):
            if valid:
                scans[int(label)].append(image)
    return [{"images": np.stack(ten), "tokens": tokens} for ten in zip(*scans, strict=False)]


@functools.cache
def towers():
    """A CLIP of scans and the names of their digits, trained on upright ones, and its loss on turned ones."""
    vision = VisionConfig(image=8, patch=2, channels=1, width=32, layers=2, heads=4, hidden=64)
    words = TextConfig(vocab=257, width=32, layers=2, heads=4, hidden=64, positions=8, eos=END)
    model = Model(ClipConfig(vision, words, projection=16))
    run = jft.finetune(
        model, model.init(jax.random.key(0)), pairs("train"), steps=200, optimizer=optimizer(2e-3), log=QUIET
    )
    return model, run.params, matched(model, run.params)


def matched(model, params):
    return jft.train.evaluate(model, params, pairs("test", rotate=90), "contrastive")["loss"]


def kept(base, run):
    """The promises every method makes."""
    flat, tuned = tree.flatten(base), tree.flatten(run.params)
    for path, x in flat.items():
        change = run.task_vector.deltas.get(path)
        if change is None:
            np.testing.assert_array_equal(tuned[path], x, err_msg=path)
        elif isinstance(change, delta.Entries | delta.Blocks | delta.Slices | delta.Rows):
            outside = ~support(change)
            np.testing.assert_array_equal(np.asarray(tuned[path])[outside], np.asarray(x)[outside], err_msg=path)
    back = tree.flatten(jft.apply(base, run.task_vector))
    for path, x in tuned.items():
        np.testing.assert_allclose(back[path], x, atol=2e-6, err_msg=path)


def support(change):
    """Where an encoding has a value, whatever it is."""
    where = np.zeros(change.view, bool)
    where[tuple(index if isinstance(index, slice) else np.asarray(index) for index in change.at)] = True
    return where.reshape(change.shape)
