import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jft.data.errors import DataError
from jft.data.packing import pack, pad

LENGTH, FILL = 16, 99
sequences = st.lists(st.integers(2, LENGTH), min_size=1, max_size=40)


def rows_of(lengths, how):
    """Rows packed from sequences whose token t is 1000 * sequence + t; all but the first token are targets."""
    examples = []
    for number, length in enumerate(lengths):
        mask = np.ones(length, np.float32)
        mask[0] = 0
        examples.append({"tokens": np.arange(length, dtype=np.int32) + 1000 * (number + 1), "loss_mask": mask})
    parent = grain.MapDataset.source(examples).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return list(pack(parent, how, LENGTH, FILL))


def segments_of(row):
    return [np.flatnonzero(row["segments"] == s) for s in range(1, row["segments"].max() + 1)]


def check(rows):
    for row in rows:
        assert all(len(v) == LENGTH for v in row.values())
        padding = row["segments"] == 0
        assert (row["tokens"][padding] == FILL).all()
        assert not row["loss_mask"][padding].any()
        assert not row["positions"][padding].any()
        for places in segments_of(row):
            assert (np.diff(places) == 1).all()
            assert row["positions"][places].tolist() == list(range(len(places)))
            assert row["loss_mask"][places[0]] == 0
            assert (row["loss_mask"][places[1:]] == 1).all()
            assert len(set(row["tokens"][places] // 1000)) == 1
            assert (np.diff(row["tokens"][places]) == 1).all()


@settings(max_examples=40, deadline=None)
@given(sequences)
def test_first_fit_keeps_every_sequence_whole(lengths):
    rows = rows_of(lengths, "first_fit")
    check(rows)
    packed = [row["tokens"][places] for row in rows for places in segments_of(row)]
    assert sorted(int(p[0]) // 1000 for p in packed) == list(range(1, len(lengths) + 1))
    assert all(len(p) == lengths[int(p[0]) // 1000 - 1] for p in packed)
    assert len(rows) <= len(lengths)


@settings(max_examples=40, deadline=None)
@given(sequences)
def test_concat_keeps_every_token_in_order(lengths):
    rows = rows_of(lengths, "concat")
    check(rows)
    kept = np.concatenate([row["tokens"][row["segments"] > 0] for row in rows])
    assert kept.tolist() == [1000 * (n + 1) + t for n, length in enumerate(lengths) for t in range(length)]
    assert all((row["segments"] > 0).all() for row in rows[:-1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, LENGTH))
def test_one_sequence_a_row(length):
    example = {"tokens": np.arange(length, dtype=np.int32), "loss_mask": (np.arange(length) > 0).astype(np.float32)}
    row = pad(example, LENGTH, FILL)
    assert row["tokens"].tolist() == [*range(length), *[FILL] * (LENGTH - length)]
    assert row["segments"].sum() == length
    assert row["loss_mask"].sum() == length - 1


def test_unknown_packing_is_refused():
    with pytest.raises(DataError, match="Did you mean 'first_fit'"):
        pack(None, "firstfit", LENGTH, FILL)
