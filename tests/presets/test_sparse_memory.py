"""Sparse memory fine-tuning against its paper in float64 NumPy: TF-IDF of the slots that data reads, and steps of the best."""

import functools
import inspect

import jax
import numpy as np
import pytest

import jft
from jft.models import DecoderConfig, Model
from jft.models.memory import Memory
from jft.presets.sparse_memory import Slots, sparse_memory
from jft.select.memory import accesses, slot_counts
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder
from tests.models import test_memory as remembering

DATA = decoder.batches()
MUTATIONS = (
    ("jft/presets/sparse_memory.py", "slots: int = 512", "slots: int = 500"),
    ("jft/presets/sparse_memory.py", "every: int = 1\n", "every: int = 0\n"),
    ("jft/presets/sparse_memory.py", "jnp.float32(known.size)", "jnp.float32(known.size + 1)"),
    ("jft/presets/sparse_memory.py", "jnp.asarray(known.batches, jnp.float32)", "jnp.asarray(known.counts, jnp.float32)"),
    ("jft/presets/sparse_memory.py", "budget.Globally(count=slots)", "budget.Globally(count=slots + 1)"),
    ("jft/select/memory.py", "xp.log((size + 1) / (batches + 1))", "xp.log((size + 1) * (batches + 1))"),
)  # fmt: skip


def best(score, count):
    """Bool mask of the ``count`` largest of each row; ties: the lower."""
    order = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


REMEMBERS = DecoderConfig(
    vocab=13, width=8, layers=2, heads=2, hidden=8, memory=Memory(25, (1,), heads=2, top_k=3, key_size=4), init_std=0.4
)


reads = functools.partial(jax.jit(accesses, static_argnums=0), Model(REMEMBERS))


def memory_masks(params, batch, background, count):
    counts = np.asarray(reads(params, batch), np.float64)
    known = [np.asarray(reads(params, b)) > 0 for b in background]
    idf = np.log((len(known) + 1) / (np.sum(known, axis=0) + 1))
    return {"memory/table": best(counts / counts.sum() * idf, count)[:, None]}


def test_sparse_memory_chooses_once():
    params, background = decoder.parameters(REMEMBERS), decoder.batches(6, rows=1, seed=7)
    known = slot_counts(Model(REMEMBERS), params, background)
    masks = memory_masks(params, DATA[0], background, 4)
    method = jft.method("sparse_memory", slots=4, background=known, every=0)
    decoder.check(method, lambda n, w: masks, params, DATA, Model(REMEMBERS), REMEMBERS)


@pytest.mark.slow
def test_sparse_memory_chooses_for_every_batch():
    """Plain descent on the slots of the batch that comes next, at the weights of that moment."""
    params, background = decoder.parameters(REMEMBERS), decoder.batches(6, rows=1, seed=7)
    data = decoder.batches(4, rows=1, length=4)
    method = jft.method("sparse_memory", slots=4, background=slot_counts(Model(REMEMBERS), params, background))
    # The table changes no query of the layers before it, and there is one memory layer: reads are those of the base.
    masks_at = lambda n, w: memory_masks(params, data[n], background, 4)
    seen = [masks_at(n, None)["memory/table"][:, 0] for n in range(3)]
    assert (seen[0] != seen[1]).any()
    result = decoder.check(
        method, masks_at, params, data, Model(REMEMBERS), REMEMBERS, steps=(3,), kind=decoder.Descent
    )
    assert result.task_vector.paths == ["memory/table"]


def test_a_background_from_a_file(tmp_path):
    params = decoder.parameters(REMEMBERS)
    known = slot_counts(Model(REMEMBERS), params, DATA[:2])
    np.savez(tmp_path / "known.npz", counts=known.counts, batches=known.batches, size=known.size)
    method = jft.method("sparse_memory", slots=3, background=str(tmp_path / "known.npz"))
    calibration = RunCalibration(Model(REMEMBERS), params, ["memory/table"], LanguageModel(), DATA)
    assert np.asarray(method.select.score(calibration)["memory/table"]).shape == (25,)
    other = jft.method("sparse_memory", background=type(known)(np.zeros(9), np.zeros(9), 1))
    with pytest.raises(ValueError, match="counts 9 slots, and the memory has 25"):
        other.select.score(calibration)


def test_slots_are_scored_as_a_decoder_in_numpy_reads_them():
    """Counts of a decoder with three memory layers written out in NumPy, for the new data and for the background."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), remembering.params())
    batches = [remembering.TOKENS, np.roll(remembering.TOKENS, 1, axis=1), (remembering.TOKENS + 3) % 19]
    counts = [remembering.reference(weights, tokens)[2] for tokens in batches]
    background = slot_counts(remembering.MODEL, remembering.params(), batches[1:])
    known = np.sum([c > 0 for c in counts[1:]], axis=0)
    expected = counts[0] / counts[0].sum() * np.log(3 / (known + 1))
    calibration = RunCalibration(
        remembering.MODEL, remembering.params(), ["memory/table"], LanguageModel(), [{"tokens": batches[0]}]
    )
    np.testing.assert_allclose(Slots(background)(calibration)["memory/table"], expected, rtol=1e-5, atol=1e-7)


def test_defaults():
    """The paper scores every batch by itself."""
    assert {p.name: p.default for p in inspect.signature(sparse_memory).parameters.values()} == {
        "slots": 512, "background": None, "batches": 1, "every": 1,
    }  # fmt: skip
