"""Slot accesses counted by hand, and TF-IDF as the formula says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models import Model
from jft.models.decoder import DecoderConfig
from jft.select.memory import Accesses, accesses, slot_counts, tf_idf, top_rows
from tests.models import test_memory as reference


def test_accesses_of_a_batch():
    counts = jax.jit(lambda p: accesses(reference.MODEL, p, reference.TOKENS))(reference.params())
    np.testing.assert_array_equal(counts, reference.expected()[2])
    assert counts.sum() == 2 * 7 * 3 * 2 * 3  # tokens, layers, heads, slots each


def test_padding_reads_nothing():
    segments = np.ones((2, 7), np.int32)
    segments[:, 4:] = 0
    batch = {"tokens": reference.TOKENS, "segments": segments}
    short = slot_counts(reference.MODEL, reference.params(), [reference.TOKENS[:, :4]])
    padded = slot_counts(reference.MODEL, reference.params(), [batch])
    np.testing.assert_array_equal(short.counts, padded.counts)
    assert padded.counts.sum() == 2 * 4 * 18


def test_counts_add_up_over_batches():
    both = [reference.TOKENS[:1], reference.TOKENS[1:]]
    total = slot_counts(reference.MODEL, reference.params(), both)
    one, two = (slot_counts(reference.MODEL, reference.params(), [batch]) for batch in both)
    np.testing.assert_array_equal(total.counts, reference.expected()[2])
    np.testing.assert_array_equal(total.batches, (one.counts > 0).astype(int) + (two.counts > 0))
    assert (total.size, total.counts.dtype, (one + two).size) == (2, np.int64, 2)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_tf_idf(make):
    counts, batches, size = [6, 0, 3, 1, 2], [9, 0, 0, 4, 0], 9
    scores = tf_idf(make(counts), make(batches), size)
    expected = [c / 12 * math.log((size + 1) / (b + 1)) for c, b in zip(counts, batches, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-12)
    assert scores[0] == 0  # a slot that every background batch reads
    assert scores.dtype == (np.float64 if make is np.asarray else jnp.float32)
    np.testing.assert_array_equal(top_rows(scores, 2), [2, 4])
    np.testing.assert_array_equal(top_rows(scores, 4), [0, 2, 3, 4])  # 0 and 1 are equal


def test_tf_idf_of_nothing_is_zero():
    assert not tf_idf(np.zeros(3), np.zeros(3), 5).any()


def test_scores_of_what_two_data_sets_read():
    new = slot_counts(reference.MODEL, reference.params(), [np.full((1, 6), 3)])
    old = slot_counts(reference.MODEL, reference.params(), [np.full((1, 6), 3), np.full((1, 6), 8)])
    scores = tf_idf(new.counts, old.batches, old.size)
    assert isinstance(new, Accesses) and np.all(scores[old.batches == 2] == 0)
    assert np.all((scores > 0) == ((new.counts > 0) & (old.batches < 2)))


def test_wrong_uses_are_refused():
    plain = Model(DecoderConfig(vocab=5, width=4, layers=1, heads=1))
    with pytest.raises(ValueError, match="this 'llama' model has no memory layers"):
        accesses(plain, {}, np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="no batches"):
        slot_counts(reference.MODEL, reference.params(), [])
    with pytest.raises(ValueError, match="6 rows of a table of 5"):
        top_rows(np.zeros(5), 6)
