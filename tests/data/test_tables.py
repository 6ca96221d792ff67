import json
import pickle

import pytest

from jft import data
from jft.data.tables import Csv, Jsonl


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


def read_all(kind, file):
    source = kind(file)
    return [source[i] for i in range(len(source))]


def test_jsonl_by_offset_over_files(tmp_path):
    write(tmp_path / "a.jsonl", '\ufeff{"x": 1}\n\n{"x": "zwei ü"}\r\n')
    write(tmp_path / "b.jsonl", '{"x": 3}')
    source = Jsonl(str(tmp_path / "*.jsonl"))
    assert [source[i]["x"] for i in range(len(source))] == [1, "zwei ü", 3]
    assert source.where(1).endswith("a.jsonl:3")
    assert source.where(2).endswith("b.jsonl:1")
    assert pickle.loads(pickle.dumps(source))[2] == {"x": 3}


def test_csv_with_quotes_and_line_breaks(tmp_path):
    file = write(tmp_path / "a.csv", 'text,label\n"one, ""two""\nthree",1\r\n\nfour,0\n')
    source = Csv(file)
    assert [source[i] for i in range(2)] == [
        {"text": 'one, "two"\nthree', "label": "1"},
        {"text": "four", "label": "0"},
    ]
    assert source.where(1).endswith("a.csv:5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": 1}\n{"x": \n', r"a\.jsonl:2: bad JSON at column"),
        ('{"x": 1}\n[1, 2]\n', r"a\.jsonl:2: a line must hold a JSON object .* list"),
        ("", r"a\.jsonl: the file holds no records"),
        ("\n \n", r"a\.jsonl: the file holds no records"),
    ],
)
def test_bad_jsonl(tmp_path, text, message):
    with pytest.raises(data.DataError, match=message):
        read_all(Jsonl, write(tmp_path / "a.jsonl", text))


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n{"x": "\xff"}\n')
    with pytest.raises(data.DataError, match=r"a\.jsonl:2: not UTF-8"):
        Jsonl(str(tmp_path / "a.jsonl"))[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", r"a\.csv:3: 3 values for the 2 columns"),
        ('a,b\n1,"2\n', r"a\.csv:2: a quote opened in this row is never closed"),
        ("a,a\n1,2\n", r"a\.csv:1: a column name stands twice"),
        ("a,b\n", r"a\.csv: the file holds no records"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    with pytest.raises(data.DataError, match=message):
        read_all(Csv, write(tmp_path / "a.csv", text))


def test_csv_files_share_a_header(tmp_path):
    files = [write(tmp_path / "a.csv", "a,b\n1,2\n"), write(tmp_path / "b.csv", "b,a\n1,2\n")]
    with pytest.raises(data.DataError, match=r"b\.csv:1: header .* differs"):
        Csv(files)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none*.jsonl", "no file matches"), ("", "is a directory"), ("a.jsonl.gz", "is compressed")],
)
def test_missing_and_unreadable_files(tmp_path, name, message):
    write(tmp_path / "a.jsonl.gz", "x")
    with pytest.raises(data.DataError, match=message):
        Jsonl(str(tmp_path / name))


def test_memory_holds_offsets_only(tmp_path):
    file = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "x" * 1000, "i": i}) + "\n" for i in range(500)))
    source = Jsonl(file)
    assert len(pickle.dumps(source)) < 500 * 40
    assert source[499]["i"] == 499
