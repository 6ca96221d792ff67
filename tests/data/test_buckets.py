"""Buckets: rows padded to a few lengths, in an order that seed and position alone decide."""

import collections
import itertools
import json

import numpy as np
import pytest

from jft import data
from jft.data import buckets

WORDS = ["a", "word", "or", "two", "of", "text"]


def texts(tmp_path, count=300):
    """Three in four texts of about 13 bytes, the others of up to 120."""
    r = np.random.default_rng(0)
    lengths = np.where(r.random(count) < 0.75, r.integers(9, 16, count), r.integers(20, 121, count))
    rows = [{"text": f"{i:04d}" + "x" * (n - 4), "label": "ab"[i % 2], "response": "y" * (1 + i % 30)}
            for i, n in enumerate(lengths)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "jsonl", "files": str(tmp_path / "rows.jsonl"), "tokenizer": "bytes", "max_length": 128}


def classified(tmp_path, **options):
    return {**texts(tmp_path), "task": "classification", **options}


def make(settings, process=0, processes=1, batch_size=8, **more):
    return data.build(settings, batch_size=batch_size, process_index=process, process_count=processes, **more)


def take(loader, count):
    batches = iter(loader)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True)
    )


def numbers(batch):
    """The texts of a batch, by the number that each starts with."""
    return [int(bytes(row[:4].astype(np.uint8))) for row in batch["tokens"]]


def test_the_buckets_chosen_are_the_cheapest_of_all():
    """Against every choice there is; and no bucket that saves nothing."""
    r = np.random.default_rng(1)
    sample = np.minimum(r.geometric(0.05, (400, 1)), 128)
    found = buckets.choose(sample, (128,), 3)
    lengths = -(-sample[:, 0] // 16) * 16
    cost = lambda chosen: sum(min(c for c in chosen if c >= n) for n in lengths)
    best = min(itertools.combinations(range(16, 128, 16), 2), key=lambda pair: cost((*pair, 128)))
    assert len(found) == 3 and found[-1] == (128,)
    assert cost([f for (f,) in found]) == cost((*best, 128))
    assert buckets.choose(np.full((50, 1), 13), (128,)) == ((16,), (128,))
    assert buckets.choose(np.full((50, 1), 125), (128,)) == ((128,),), "no bucket that saves nothing"
    # Long prompts have short answers here: pairs, and not the longest of each.
    pairs = np.asarray([[100, 5], [100, 9], [20, 5], [20, 9]] * 20)
    assert buckets.choose(pairs, (128, 64)) == ((32, 16), (112, 16), (128, 64))


def test_rows_are_the_padded_ones_cropped_and_each_record_comes_once_an_epoch(tmp_path):
    settings = classified(tmp_path)
    loader, padded = make(settings), make({**settings, "buckets": False})
    assert 1 < len(loader.shapes) <= 4 and padded.shapes == ()
    # 32 batches are a window, and 300 records 37.5 batches.
    window, whole = take(loader, 32), take(padded, 32)
    assert {b["tokens"].shape[1] for b in whole} == {128}
    by_number = {n: (b, i) for b in whole for i, n in enumerate(numbers(b))}
    assert collections.Counter(itertools.chain(*map(numbers, window))) == collections.Counter(
        dict.fromkeys(by_number, 1)
    )
    used, place = collections.Counter(), {n: i for i, n in enumerate(itertools.chain(*map(numbers, whole)))}
    for batch in window:
        length = batch["tokens"].shape[1]
        used[length] += 1
        assert (length,) in loader.shapes
        longest = max((batch["segments"] > 0).sum(1))
        assert min(s for (s,) in loader.shapes if s >= longest) == length, "the smallest that holds the batch"
        # Within a bucket the order of the data stays.
        own = [min(s for (s,) in loader.shapes if s >= n) for n in (batch["segments"] > 0).sum(1)]
        at = [place[n] for n, bucket in zip(numbers(batch), own, strict=True) if bucket == length]
        assert at == sorted(at)
        for row, number in enumerate(numbers(batch)):
            other, i = by_number[number]
            assert not other["segments"][i, length:].any() and other["labels"][i] == batch["labels"][row]
            np.testing.assert_array_equal(batch["tokens"][row], other["tokens"][i, :length])
    assert used[16] >= 20
    order = [b["tokens"].shape[1] for b in window]
    assert order != sorted(order) and order != [b["tokens"].shape[1] for b in take(make(settings, seed=1), 32)]


KINDS = {
    "classification": {"task": "classification"},
    "dropped": {"task": "classification", "too_long": "drop", "max_length": 64},
    "lm": {"task": "lm"},
    "sft": {"task": "sft", "prompt": "text", "response": "response", "max_length": 160},
    "seq2seq": {"task": "seq2seq", "prompt": "text", "response": "response", "max_target_length": 40},
    "listed": {"task": "classification", "buckets": [32, 64]},
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_processes_take_the_same_bucket_and_give_the_batches_of_one(tmp_path, kind, train):
    settings = {**texts(tmp_path), **KINDS[kind]}
    whole = take(make(settings, train=train), 35)
    parts = [take(make(settings, process=p, processes=2, train=train), 35) for p in range(2)]
    assert [b["tokens"].shape[1] for b in parts[0]] == [b["tokens"].shape[1] for b in parts[1]]
    joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in whole[0]} for i in range(35)]
    assert same(whole, joined)
    assert len({b["tokens"].shape[1] for b in whole}) > 1


@pytest.mark.parametrize("kind", ["classification", "dropped", "seq2seq"])
def test_a_position_goes_on_exactly_also_on_other_processes(tmp_path, kind):
    settings = {**texts(tmp_path), **KINDS[kind]}
    batches = iter(make(settings))
    for _ in range(29):
        next(batches)
    state = batches.get_state()
    rest = [next(batches) for _ in range(6)]  # over the end of the window
    batches.close()
    halves = []
    for p in range(2):
        half = iter(make({**settings, "threads": 0, "prefetch": 0}, process=p, processes=2))
        half.set_state(state)
        halves.append([next(half) for _ in range(6)])
    assert same(rest, [{k: np.concatenate([h[i][k] for h in halves]) for k in rest[0]} for i in range(6)])
    with pytest.raises(data.DataError, match=r"belongs to other data settings.*buckets"):
        iter(make({**settings, "buckets": False})).set_state(state)


def test_records_that_are_left_out_give_their_place_to_others(tmp_path):
    settings = {**texts(tmp_path), **KINDS["dropped"]}
    loader = make(settings)
    assert loader.indexed, "a number is the position, as without dropping"
    seen = collections.Counter(itertools.chain(*map(numbers, take(loader, 75))))
    kept = {i for i, (n,) in enumerate(loader.measured[0].all()) if n}
    assert set(seen) == kept and 200 < len(kept) < 290
    assert max(seen.values()) <= 4, "two epochs, and one more of those that fill a window"


def test_evaluation_counts_every_example_once(tmp_path):
    loader = make(classified(tmp_path), train=False)
    batches = list(loader)
    valid = [n for b in batches for n, v in zip(numbers(b), b["valid"], strict=True) if v]
    assert sorted(valid) == list(range(300)) and len(batches) == len(loader) == 38
    assert same(batches, list(loader))


@pytest.mark.slow
def test_worker_processes_keep_the_order(tmp_path):
    settings = classified(tmp_path)
    assert same(take(make(settings), 40), take(make({**settings, "workers": 2}), 40))


@pytest.mark.parametrize(
    ("value", "message"),
    [([16, 300], "up to"), ([[16, 16]], "is not one"), (["16"], "is not one"), (7, "True, False or a list")],
)
def test_wrong_buckets_are_refused(tmp_path, value, message):
    with pytest.raises(data.DataError, match=message):
        take(make(classified(tmp_path, buckets=value)), 1)
    with pytest.raises(data.DataError, match="leave one of them out"):
        make({**texts(tmp_path), "task": "lm", "pack": "concat", "buckets": [16]})


def test_the_largest_batch_is_that_of_the_longest_text(tmp_path):
    settings = classified(tmp_path)
    loader = make(settings)
    # All 300 are in the sample, so that the longest is known.
    assert loader.largest()["tokens"].shape == (8, max(b["tokens"].shape[1] for b in take(loader, 60)))
    assert loader.largest(known=False)["tokens"].shape == (8, 128)
    part = make(settings, process=1, processes=2)
    assert part.largest()["tokens"].shape == (4, 128), "the same on all processes, whatever each has read"


@pytest.mark.parametrize("pack", ["concat", "first_fit"])
def test_an_epoch_of_packed_rows_is_as_many_as_they_fill(tmp_path, pack):
    settings = {**texts(tmp_path), "task": "lm", "pack": pack}
    rows = sum(int(b["valid"].sum()) for b in make(settings, train=False))
    assert make(settings).epoch * 8 == pytest.approx(rows, abs=2)
    assert make(classified(tmp_path)).epoch == 300 / 8
