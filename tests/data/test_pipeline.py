import itertools
import json

import numpy as np
import pytest

from jft import data

DIGITS = {"source": "digits", "task": "identity", "limit": 50}
TEXT = {"source": "stdlib", "kind": "docs", "tokenizer": "bytes", "max_length": 96, "task": "lm"}


def make(settings=DIGITS, process=0, processes=1, batch_size=8, **more):
    return data.build(settings, batch_size=batch_size, process_index=process, process_count=processes, **more)


def take(loader, count):
    batches = iter(loader)
    taken = list(itertools.islice(batches, count))
    if hasattr(batches, "close"):
        batches.close()
    return taken


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True)
    )


def test_the_order_depends_on_the_seed_alone():
    first = take(make(seed=1), 10)
    assert same(first, take(make(seed=1), 10))
    assert not same(first, take(make(seed=2), 10))
    assert same(first, take(make({**DIGITS, "threads": 0, "prefetch": 1}, seed=1), 10))


def test_every_epoch_is_a_new_permutation():
    epochs = np.concatenate([b["images"] for b in take(make(batch_size=10), 10)]).reshape(2, 50, -1)
    keys = [[row.tobytes() for row in epoch] for epoch in epochs]
    assert set(keys[0]) == set(keys[1])
    assert len(set(keys[0])) == len({r.tobytes() for r in np.unique(epochs[0], axis=0)})
    assert keys[0] != keys[1]


AUGMENTED = {**DIGITS, "image": {"size": 12, "crop": "random", "flip": True, "channels": 1, "area": (0.3, 1)}}


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("settings", [DIGITS, AUGMENTED, {"mixture": [AUGMENTED, {**AUGMENTED, "weight": 2}]}])
def test_processes_together_give_the_batches_of_one(settings, processes, train):
    whole = take(make(settings, train=train), 6)
    parts = [take(make(settings, process=p, processes=processes, train=train), 6) for p in range(processes)]
    joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in whole[0]} for i in range(6)]
    assert same(whole, joined)


PACKED = [{**TEXT, "pack": "concat"}, {**TEXT, "pack": "first_fit", "too_long": "truncate"}]


@pytest.mark.parametrize(
    "settings",
    [
        DIGITS,
        AUGMENTED,
        {"mixture": [{**DIGITS, "weight": 3}, {**DIGITS, "rotate": 90}]},
        {**TEXT, "too_long": "truncate"},
        *PACKED,
    ],
)
def test_resumes_exactly(settings):
    batches = iter(make(settings))
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    json.loads(state)
    rest = [next(batches) for _ in range(5)]
    batches.set_state(state)
    assert same(rest, [next(batches) for _ in range(5)])
    batches.close()
    fresh = iter(make(settings))
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert same(rest, [next(fresh) for _ in range(5)])
    fresh.close()


def test_resumes_on_other_processes_and_batch_sizes():
    batches = iter(make())
    for _ in range(4):
        next(batches)
    state = batches.get_state()
    rest = take(batches, 2)
    halves = []
    for process in range(2):
        half = iter(make(process=process, processes=2))
        half.set_state(state)
        halves.append(take(half, 2))
    assert same(rest, [{k: np.concatenate([h[i][k] for h in halves]) for k in rest[0]} for i in range(2)])
    larger = iter(make(batch_size=16))
    larger.set_state(state)
    assert same([next(larger)], [{k: np.concatenate([b[k] for b in rest]) for k in rest[0]}])


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (DIGITS, {"seed": 5}, "seed: saved 0, now 5"),
        (PACKED[0], {"process": 1, "processes": 2}, "processes: saved 1, now 2"),
        (PACKED[0], {"batch_size": 4}, "batch_size: saved 8, now 4"),
    ],
)
def test_a_position_of_other_settings_is_refused(settings, changes, message):
    state = iter(make(settings)).get_state()
    with pytest.raises(data.DataError, match=message):
        iter(make(settings, **changes)).set_state(state)
    with pytest.raises(data.DataError, match="not a data position"):
        iter(make(settings)).set_state(b"\x00")


def test_evaluation_counts_every_example_once():
    loader = make(train=False, batch_size=16)
    assert len(loader) == 4
    assert loader.examples == 50
    batches = list(loader)
    assert len(batches) == 4
    assert [int(b["valid"].sum()) for b in batches] == [16, 16, 16, 2]
    assert same(batches, list(loader))


@pytest.mark.parametrize("settings", [*PACKED, {**TEXT, "too_long": "drop", "max_length": 2000}])
def test_text_evaluation_agrees_over_processes(settings):
    whole = list(make(settings, train=False))
    parts = [list(make(settings, process=p, processes=2, train=False)) for p in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == len(make(settings, train=False))
    assert same(whole, [{k: np.concatenate([p[i][k] for p in parts]) for k in whole[0]} for i in range(len(whole))])
    last = whole[-1]
    assert not last["loss_mask"][~last["valid"]].any()
    assert all((b["segments"] > 0).any(axis=1).all() for b in whole)


def test_packed_processes_read_disjoint_documents():
    # Each topic appears once an epoch: of two processes, neither reads what the other does.
    rows = [take(make(PACKED[0], process=p, processes=2, batch_size=2), 60) for p in range(2)]
    texts = [{r.tobytes() for b in part for r in b["tokens"]} for part in rows]
    assert not texts[0] & texts[1]


def test_mixture_keeps_its_weights():
    settings = {"mixture": [{**DIGITS, "weight": 3}, {**DIGITS, "invert": True, "weight": 1}]}
    batch = next(iter(make(settings, batch_size=40)))
    inverted = (batch["images"].mean(axis=(1, 2, 3)) > 0).sum()
    assert 8 <= inverted <= 12
    everything = list(make(settings, train=False, batch_size=10))
    assert sum(int(b["valid"].sum()) for b in everything) == 100


@pytest.mark.parametrize("pack", [False, "concat", "first_fit"])
def test_left_out_records_cost_nothing(tmp_path, pack):
    texts = [("word " * (i % 7)).strip() for i in range(70)]  # every seventh is empty, and has no target
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    settings = {"source": "jsonl", "files": str(tmp_path / "a.jsonl"), "task": "lm", "tokenizer": "bytes",
                "max_length": 32, "pack": pack}  # fmt: skip
    batches = iter(make(settings))
    first = [next(batches) for _ in range(3)]
    assert all((b["segments"] > 0).any(axis=1).all() for b in first)
    state = batches.get_state()
    rest = [next(batches) for _ in range(3)]
    batches.set_state(state)
    assert same(rest, [next(batches) for _ in range(3)])
    counted = sum(float((b["tokens"] == 258).sum() if pack else b["valid"].sum()) for b in make(settings, train=False))
    assert counted >= 60 if pack else counted == 60


@pytest.mark.slow
def test_worker_processes_keep_the_order():
    for settings in (DIGITS, PACKED[0]):
        assert same(take(make(settings), 4), take(make({**settings, "workers": 2}), 4))
