import ml_collections
import pytest

from jft import data
from jft.data import DataError

DIGITS = {"source": "digits", "task": "parity"}
LINES = {"source": "jsonl", "files": "a.jsonl", "task": "lm"}


@pytest.fixture(autouse=True)
def in_a_directory_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "hello", "n": 1}\n' * 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`source` is missing"),
        ([], "must be a mapping"),
        ({"source": "jsnol"}, "data source 'jsnol' is unknown. Did you mean 'jsonl'"),
        ({**DIGITS, "tsak": 1}, "no setting 'tsak'. Did you mean 'task'"),
        ({**DIGITS, "max_length": 5}, "no setting 'max_length'"),
        ({**LINES, "task": "llm"}, "data task 'llm' is unknown. Did you mean 'lm'"),
        ({**LINES, "files": "b.jsonl"}, "no file matches 'b.jsonl'"),
        ({**LINES, "image": {"size": 3}}, "no setting 'image'"),
        ({**LINES, "pack": "best"}, "pack 'best' is unknown"),
        ({**DIGITS, "pack": "concat"}, "pack: 'concat' is for lm and sft"),
        ({"source": "jsonl", "task": "lm"}, "a setting is missing.*files"),
        ({**DIGITS, "limit": 0}, "limit must be at least 1"),
        ({**LINES, "limit": 2.5}, "limit must be a whole number"),
        ({**LINES, "holdout": 0.1, "held_out": 0.1}, "not both"),
        ({**LINES, "held_out": 2}, "between 0 and 1"),
        ({**DIGITS, "weight": 0}, "weight must be a positive number"),
        ({**DIGITS, "threads": -1}, "threads must be a whole number"),
        ({"mixture": []}, "mixture must be a list"),
        ({"mixture": [DIGITS, {**DIGITS, "task": "thirds"}]}, "other classes"),
        ({"mixture": [DIGITS, LINES]}, r"give both the same task"),
        ({"mixture": [{**LINES, "pack": "concat"}, LINES]}, "pack and max_length must agree"),
        ({"mixture": [{**LINES, "tokenizer": "bytes"}, {**LINES, "tokenizer": "bpe:300"}]}, "must name one tokenizer"),
        ({**LINES, "tokenizer": "nowhere"}, "no such file or directory"),
        ({**LINES, "too_long": "cut"}, "too_long 'cut' is unknown"),
    ],
)
def test_wrong_settings_are_one_clear_error(settings, message):
    with pytest.raises(DataError, match=message):
        data.build(settings, batch_size=4, tokenizer="bytes")


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(DataError, match="text needs a tokenizer"):
        data.build(LINES, batch_size=4)


@pytest.mark.parametrize(("batch_size", "count", "message"), [(3, 2, "multiple of the 2"), (0, 1, "positive multiple")])
def test_batch_size_divides_over_processes(batch_size, count, message):
    with pytest.raises(DataError, match=message):
        data.build(DIGITS, batch_size=batch_size, process_index=0, process_count=count)


def test_config_dicts_and_unset_keys():
    settings = ml_collections.ConfigDict({**DIGITS, "limit": ml_collections.config_dict.placeholder(int)})
    assert data.build(settings, batch_size=4).examples == 1197
    mixture = ml_collections.ConfigDict(
        {"mixture": [{**LINES, "weight": 2}, LINES], "max_length": 8, "tokenizer": "bytes"}
    )
    loader = data.build(mixture, batch_size=4)
    assert loader.examples == 40
    assert next(iter(loader))["tokens"].shape == (4, 8)
    with pytest.raises(TypeError, match="endless"):
        len(loader)


def test_tasks_are_chosen_where_none_is_named():
    assert data.build({"source": "digits"}, batch_size=4).classes == tuple("0123456789")
    assert (
        "loss_mask"
        in data.build({"source": "stdlib", "kind": "docs", "pack": "concat"}, batch_size=4, tokenizer="bytes").sample()
    )


def test_a_trained_tokenizer_is_kept_and_shared(tmp_path):
    loader = data.build({**LINES, "tokenizer": "bpe:266"}, batch_size=4, directory=tmp_path / "run")
    again = data.build({**LINES, "tokenizer": "bpe:266"}, batch_size=4, directory=tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    assert again.tokenizer.vocab_size == loader.tokenizer.vocab_size
    shared = data.build(LINES, batch_size=4, tokenizer=loader.tokenizer, train=False)
    assert shared.tokenizer is loader.tokenizer


def test_huggingface_source(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "label": [0, 1, 1, 0]},
        features=datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}),
    )
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "kept"))
    settings = {"source": "hf", "directory": str(tmp_path / "kept"), "task": "classification", "max_length": 4}
    loader = data.build(settings, batch_size=2, tokenizer="bytes")
    assert loader.classes == ("x", "y")
    assert next(iter(loader))["tokens"].shape == (2, 4)
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        data.build({**settings, "split": "test"}, batch_size=2, tokenizer="bytes")
    with pytest.raises(DataError, match="is not a directory"):
        data.build({**settings, "directory": "nowhere"}, batch_size=2, tokenizer="bytes")


def test_huggingface_source_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'jft\[hf\]'"):
        data.build({"source": "hf", "name": "x", "task": "lm"}, batch_size=2, tokenizer="bytes")
