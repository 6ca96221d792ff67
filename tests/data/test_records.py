"""JSON arrays, Parquet and rows in memory; ShareGPT and Alpaca; classes from the data; the pass over all records."""

import json

import numpy as np
import pytest

from jft import data
from jft.data.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
ROWS = [{"text": f"text {i}", "label": ["no", "yes", "maybe"][i % 3]} for i in range(12)]


def write(folder, kind, rows=ROWS):
    """Settings of a source that holds ``rows``."""
    path = folder / f"rows.{kind}"
    if kind == "rows":
        return {"source": "rows", "rows": rows}
    if kind == "columns":
        return {"source": "rows", "rows": {k: [row[k] for row in rows] for k in rows[0]}}
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": kind, "files": str(path)}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "rows", "columns"])
def test_one_table_in_every_form_gives_one_batch(tmp_path, kind):
    loader = data.build(
        {**write(tmp_path, kind), "task": "classification"}, batch_size=12, tokenizer=BYTES, train=False
    )
    assert loader.classes == ("maybe", "no", "yes"), "the labels that there are, sorted"
    batch = next(iter(loader))
    assert sorted(batch["labels"]) == [0] * 4 + [1] * 4 + [2] * 4
    texts = {BYTES.decode(row[: s.sum()]): label for row, s, label in
             zip(batch["tokens"], batch["segments"], batch["labels"], strict=True)}  # fmt: skip
    assert texts == {row["text"]: loader.classes.index(row["label"]) for row in ROWS}


def test_parquet_has_names_of_classes_and_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    table = datasets.Dataset.from_dict({"image": [pixels, pixels + 1], "label": [1, 0]}, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    settings = {"source": "parquet", "files": str(tmp_path / "*.parquet"), "image": {"size": 4}}
    loader = data.build(settings, batch_size=2, train=False)
    assert loader.classes == ("x", "y")
    batch = next(iter(loader))
    assert batch["labels"].tolist() == [1, 0] and batch["images"].shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    ("name", "text", "source", "message"),
    [
        ("a.json", '[{"text": "x"}', "json", r"a\.json: bad JSON at column 15"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', "json", "one object a line is source 'jsonl'"),
        ("a.json", '{"rows": [{"text": "x"}]}', "json", r"set field to the key that holds the array \(rows\)"),
        ("a.json", "[]", "json", "the file holds no records"),
        ("a.json", '[{"text": "x"}, 3]', "json", r"a\.json, entry 1: an entry must be an object"),
        ("a.jsonl", '[\n{"text": "x"}\n]', "jsonl", "a file that is one array is source 'json'"),
        ("a.jsonl", '[{"text": "x"}]', "jsonl", "a file that is one array is source 'json'"),
        ("a.parquet", "nothing", "parquet", "not a Parquet file"),
    ],
)
def test_wrong_files(tmp_path, name, text, source, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(data.DataError, match=message):
        data.build(
            {"source": source, "files": str(tmp_path / name), "task": "lm"}, batch_size=1, tokenizer=BYTES
        ).survey()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no row"),
        (3, "must be a list of dicts, or a dict of columns, got int"),
        ({"text": ["a", "b"], "label": [1]}, "the columns differ in length"),
        ([{"text": "a"}, "b"], r"rows\[1\]: a row must be a dict of fields, got 'b'"),
    ],
)
def test_wrong_rows(rows, message):
    with pytest.raises(data.DataError, match=message):
        data.build({"source": "rows", "rows": rows, "task": "lm"}, batch_size=1, tokenizer=BYTES).survey()


def classes_of(values, **options):
    rows = [{"text": "x", "label": value} for value in values]
    loader = data.build({"source": "rows", "rows": rows, "task": "classification", **options}, batch_size=len(rows),
                        tokenizer=BYTES, train=False)  # fmt: skip
    return loader.classes, sorted(next(iter(loader))["labels"].tolist())


def test_classes_are_the_values_that_the_labels_have():
    assert classes_of([0, 1, 1]) == (("0", "1"), [0, 1, 1])
    assert classes_of(["2", "0", "1"]) == (("0", "1", "2"), [0, 1, 2])
    assert classes_of([0, 3, 1]) == (("0", "1", "2", "3"), [0, 1, 3]), "2 is a class that no row has"
    # From 1 to 5 they are names: the label 5 is the last class, and no index out of range.
    assert classes_of([5, 1, 2, 3, 4, 10]) == (("1", "2", "3", "4", "5", "10"), [0, 1, 2, 3, 4, 5])
    assert classes_of([1.0, 2.0]) == (("1", "2"), [0, 1])
    assert classes_of([-1, 1, 0, -1]) == (("-1", "0", "1"), [0, 0, 1, 2])
    assert classes_of(["0.5", 1, 0.5]) == (("0.5", "1"), [0, 0, 1])
    for missing in (None, ""):
        with pytest.raises(data.DataError, match=r"label 'label' is (None|''), neither one of the 2 classes"):
            classes_of(["a", "b", missing])
    assert classes_of([True, False]) == (("False", "True"), [0, 1])
    for values in (["a", "a"], [i + 0.5 for i in range(1001)]):
        with pytest.raises(data.DataError, match="which make no classes; set label to another field, or classes"):
            classes_of(values)


def test_evaluation_has_the_classes_of_training():
    train = data.build({"source": "rows", "rows": ROWS, "task": "classification"}, batch_size=3, tokenizer=BYTES)
    rest = {"batch_size": 2, "tokenizer": BYTES, "train": False, "classes": train.classes}
    two = data.build({"source": "rows", "rows": ROWS[1:3], "task": "classification"}, **rest)
    assert two.classes == train.classes and next(iter(two))["labels"].tolist() == [2, 0]
    with pytest.raises(data.DataError, match="label 'label' is 'never', neither one of the 3 classes"):
        data.build({"source": "rows", "rows": [{"text": "x", "label": "never"}], "task": "classification"}, **rest)


def example(record, **options):
    loader = data.build({"source": "rows", "rows": [record], "task": "sft", "max_length": 400, **options}, batch_size=1,
                        tokenizer=BYTES, train=False)  # fmt: skip
    batch = loader.sample()
    decode = lambda which: BYTES.decode(batch["tokens"][0][which])
    return decode(batch["segments"][0] > 0), decode(batch["loss_mask"][0] > 0)


def test_sharegpt_is_a_conversation():
    turns = [{"from": "system", "value": "Be brief"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    whole = "<bos><system>Be brief<end><user>Hi<end><assistant>Yo<end>"
    assert example({"conversations": turns}) == (whole, "Yo<end>")
    assert example({"chat": turns}, messages="chat") == (whole, "Yo<end>")


def test_alpaca_has_its_prompts():
    record = {"instruction": "Add {them}", "input": "2, 3", "output": "5"}
    whole, target = example(record)
    assert whole == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {them}\n\n### Input:\n2, 3\n\n"
        "### Response:\n5<eos>"
    )
    assert target == "5<eos>"
    assert example({**record, "input": ""})[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {them}\n\n### Response:\n5<eos>"
    )
    assert example(record, chat=True)[0] == "<bos><user>Add {them}\n\n2, 3<end><assistant>5<end>"
    assert example({"question": "Q", "answer": "A"}) == ("QA<eos>", "A<eos>")


def test_numbers_as_labels():
    rows = [{"text": "a", "label": "2.5"}, {"text": "b", "label": 3}]
    loader = data.build(
        {"source": "rows", "rows": rows, "task": "regression"}, batch_size=2, tokenizer=BYTES, train=False
    )
    batch = next(iter(loader))
    assert batch["labels"].dtype == np.float32 and batch["labels"].tolist() == [2.5, 3.0] and loader.classes is None
    with pytest.raises(data.DataError, match=r"rows\[0\]: label 'label' is 'x', which is no number"):
        data.build({"source": "rows", "rows": [{"text": "a", "label": "x"}], "task": "regression"}, batch_size=1,
                   tokenizer=BYTES)  # fmt: skip


def survey(rows, seconds=60.0, **options):
    loader = data.build({"source": "rows", "rows": rows, "task": "classification", "max_length": 32, **options},
                        batch_size=4, tokenizer=BYTES)  # fmt: skip
    found = loader.survey(seconds)
    return loader, found, found.text("data", loader)


def test_the_pass_over_the_data_counts():
    rows = [{"text": "x" * n, "label": "ab"[n % 2]} for n in (10,) * 60 + (31, 32, 33, 40)]
    _, found, text = survey(rows)
    assert (found.records, found.seen, found.dropped, found.truncated) == (64, 64, 0, 2)
    assert found.tokens == 600 + 31 + 32 * 3 and found.positions == 60 * 16 + 4 * 32 and found.highest == ord("x")
    assert text == (
        "data: 64 records, 11.4 tokens each, at most 32; 2 truncated to 32 tokens; rows of 16, 32 tokens, 33% padding"
    )
    _, found, text = survey(rows, too_long="drop")
    assert (found.dropped, found.truncated) == (2, 0) and "; 2 dropped;" in text


def test_the_pass_over_the_data_is_bounded():
    _, found, text = survey(ROWS * 100, seconds=0.0)
    assert found.seen < found.records == 1200
    assert f"data: 1,200 records, {found.seen:,} looked at in 0 s (check_data), the rest as training reads them" in text


def test_the_pass_finds_every_record_that_cannot_be_used():
    rows = [{**row} for row in ROWS * 60]
    rows[100]["text"], rows[300] = None, {"label": "no"}
    loader = data.build({"source": "rows", "rows": rows, "task": "classification", "buckets": False}, batch_size=4,
                        tokenizer=BYTES)  # fmt: skip
    with pytest.raises(data.DataError, match="2 records of 720 cannot be used") as caught:
        loader.survey()
    for part in (r"rows[100]: field 'text' must be text, got NoneType", "rows[300]: no field 'text'"):
        assert part in str(caught.value)
    rows[300] = rows[0]
    with pytest.raises(data.DataError, match=r"^rows\[100\]: field 'text' must be text"):
        loader.survey()


def test_evaluation_data_is_that_of_training_with_other_keys():
    from jft.data.config import derived

    base = {"source": "csv", "files": "a.csv", "holdout": 0.1, "limit": 5, "text": "body"}
    assert derived(base, {"held_out": 0.1}) == {"source": "csv", "files": "a.csv", "text": "body", "held_out": 0.1}
    assert derived(base, {"source": "jsonl", "files": "b"}) == {"source": "jsonl", "files": "b"}
    assert derived(base, {}) == {}
    mixed = {"mixture": [{**base, "weight": 2}], "max_length": 8}
    assert derived(mixed, {"split": "test"}) == {
        "mixture": [{"source": "csv", "files": "a.csv", "text": "body"}], "max_length": 8, "split": "test",
    }  # fmt: skip
