"""Files of before the forms of change had one room each: task vectors load, and runs go on from their checkpoints."""

import functools
import pathlib
import tarfile

import jax
import numpy as np
import pytest

import jft
from jft import delta, tree
from tests.methods import decoder

FILES = pathlib.Path(__file__).parent / "written"
# What each run was: a preset and its options, Adam at 1e-2, seed 3, four steps over three batches.
RUNS = {
    "dense": ("pattern", {"include": ("attn/q/w",)}, {"dense"}),
    "rows": ("last_k_layers", {"k": 1}, {"rows"}),
    "blocks": ("block_sparse", {"density": 0.3, "block": (4, 4)}, {"blocks"}),
    "entries": ("fish_mask", {"density": 0.02, "count": 4}, {"entries"}),
    "rosa": ("rosa", {"rank": 1, "density": 0.1, "warmup": 1, "squared": False, "low_rank_rate": 1.0}, {"sum"}),
    "low_rank": ("lora", {"rank": 1, "include": ("attn/q", "mlp/down")}, {"low_rank"}),
    "diagonal": ("diablo", {"blocks": 2, "include": ("attn/q",)}, {"blocks"}),
    "bit_mask": ("masking", {"include": ("attn/q",)}, {"bit_mask"}),
    "gate": ("finegates", {"include": ("attn/q",)}, {"gate"}),
    "sum": (
        "dsee",
        {"rank": 1, "count": 6, "include": ("attn/q",), "filter_rank": 16, "alpha": None},
        {"sum"},
    ),
}


def stored(name):
    return {p.replace("|", "/"): x for p, x in np.load(FILES / f"{name}.npz").items()}


@functools.cache
def base():
    """The weights that all of them started from, to the bit."""
    return jax.device_put(tree.unflatten(stored("base")))


def check(tau, name):
    """The tuned weights are those that were written beside."""
    tuned, expected = tree.flatten(jft.apply(base(), tau)), stored(name)
    assert {p for p, _ in tau.items()} == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(tuned[path], value, atol=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_task_vectors_load(name):
    tau = jft.TaskVector.load(FILES / f"{name}.safetensors")
    assert {encoding.kind for _, encoding in tau.items()} == RUNS[name][2]
    check(tau, name)


@pytest.mark.parametrize("name", ["rows", "blocks", "rosa", "low_rank", "sum"])
def test_checkpoints_are_gone_on_from(name, tmp_path):
    """Two steps were saved; two more give what four did."""
    with tarfile.open(FILES / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    preset, options, _ = RUNS[name]
    run = jft.finetune(
        decoder.MODEL, base(), decoder.batches(3), steps=4, method=jft.method(preset, **options), seed=3,
        optimizer={"name": "adam", "lr": 1e-2}, workdir=tmp_path / "run", checkpoint={"every": 2, "keep": 1},
        log={"progress": False},
    )  # fmt: skip
    assert [row["step"] for row in run.metrics if row.get("split", "train") == "train"][-1] == 4
    assert int(run.state.step) == 4
    check(run.task_vector, name)


def test_what_is_written_now_names_its_encoding():
    """Diagonal blocks have a kind of their own now; those of before are blocks, and mean the same."""
    before = jft.TaskVector.load(FILES / "diagonal.safetensors")
    for _, encoding in before.items():
        blocks = np.asarray(encoding.values).reshape(4, 2, *encoding.values.shape[1:])
        now = delta.DiagonalBlocks(jax.device_put(blocks))
        np.testing.assert_array_equal(now.dense(), encoding.dense())
