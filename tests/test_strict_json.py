"""The JSON reader: what it takes as it is, and where it says what is wrong."""

import json

import pytest

from jft import strict_json

MUTATIONS = [
    ("jft/strict_json.py", "    if len(value) < len(pairs):", "    if len(value) > len(pairs):"),
    (
        "jft/strict_json.py",
        "return value if nan or math.isfinite(value)",
        "return value if True or math.isfinite(value)",
    ),
    ("jft/strict_json.py", "> MAX_DEPTH and depth(value) > MAX_DEPTH", "> MAX_DEPTH and depth(value) > 9 * MAX_DEPTH"),
    ("jft/strict_json.py", "return float(name) if nan else fail(", "return float(name) if not nan else fail("),
    ("jft/strict_json.py", "lambda x: _whole(x) and 0 < x < 2**31)", "lambda x: _whole(x) and 0 <= x < 2**31)"),
    ("jft/strict_json.py", "lambda x: _number(x) and x > 0)", "lambda x: x > 0)"),
    ("jft/strict_json.py", "    return type(x) is int\n", "    return isinstance(x, int)\n"),
    ("jft/files.py", "    if size > limit:\n", "    if size > 2 * limit:\n"),
]


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "value", [{"a": [1, 2.5, "é\n", True, None, {"b": "\U0001f600"}]}, [], "x", 0, 1e300, json.loads(nested(128))]
)
def test_reads_what_json_writes(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert strict_json.loads(text, "x") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x: empty, where JSON should be"),
        ("{", "x: bad JSON at column 2: Expecting property name enclosed in double quotes"),
        ('{\n"a":\n}', "x: bad JSON at line 3, column 1: Expecting value"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "x: the key 'c' stands twice in one object"),
        ("[NaN]", "x: NaN is no JSON number"),
        ("[-Infinity]", "x: -Infinity is no JSON number"),
        ("[1e999]", "x: the number 1e999 is beyond the range of a float"),
        ("9" * 5000, "x: bad JSON: Exceeds the limit"),
        ('"\\ud800"', r"x: a lone surrogate \(\\ud800\), which no text can hold"),
        (b'"\xe9"', r"x: not UTF-8 text \(byte 1\)"),
        (nested(129), "x: more than 128 objects or lists inside each other"),
        (nested(100_000), "x: more than 128 objects or lists inside each other"),
        ('{"a":' * 129 + "1" + "}" * 129, "x: more than 128"),
    ],
)
def test_errors_name_place_and_reason(text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        strict_json.loads(text, "x")
    with pytest.raises(ValueError, match=r"; fetch it again$"):
        strict_json.loads(text, "x", hint="fetch it again")


def test_numbers_of_runs_may_be_infinite():
    assert strict_json.loads("[Infinity, 1e999]", "x", nan=True) == [float("inf"), float("inf")]
    assert str(strict_json.loads("NaN", "x", nan=True)) == "nan"


def test_files_are_bounded_objects(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert strict_json.read(file, limit=8) == {"a": 1}
    for text, limit, message in (
        ('{"a": 1}', 7, r"a\.json: 8 bytes, where 7 at most are read; mend it"),
        ("[1]", 99, r"a\.json: holds a JSON list, not an object; mend it"),
        ("null", 99, r"a\.json: holds null, not an object; mend it"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            strict_json.read(file, limit=limit, hint="mend it")
    with pytest.raises(FileNotFoundError):
        strict_json.read(tmp_path / "none")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (strict_json.SIZE, [1, 2**31 - 1], [0, -1, 2**31, 1.0, True, "1", None]),
        (strict_json.COUNT, [0, 5], [-1, False, 0.0]),
        (strict_json.POSITIVE, [1, 0.5], [0, -0.5, float("nan"), float("inf"), 10**400, True, "1"]),
        (strict_json.NUMBER, [0, -2.5], [float("nan"), -float("inf"), "0", None, False]),
        (strict_json.FRACTION, [1, 0.25], [0, 1.5, float("nan")]),
        (strict_json.FLAG | strict_json.NULL, [True, None], [0, 1, "true"]),
        (strict_json.listed(strict_json.TEXT), [[], ["a"]], ["a", [1], [["a"]]]),
    ],
)
def test_kinds(kind, good, bad):
    assert all(map(kind.test, good))
    assert not any(map(kind.test, bad))


def test_a_schema_names_key_and_value():
    schema = {"size": strict_json.SIZE, "name": strict_json.TEXT | strict_json.NULL}
    strict_json.need({"size": 1, "name": None, "other": []}, schema, "x")
    with pytest.raises(ValueError, match=r"^x: size is '3'; it must be a whole number from 1"):
        strict_json.check({"size": "3"}, schema, "x")
    with pytest.raises(ValueError, match=r"^x: name is 3; it must be text or null; mend it$"):
        strict_json.need({"size": 1, "name": 3}, schema, "x", hint="mend it")
    with pytest.raises(ValueError, match=r"^x: lacks 'name'; mend it$"):
        strict_json.need({"size": 1}, schema, "x", hint="mend it")
    with pytest.raises(ValueError, match=r"^x: \[1\] is no object$"):
        strict_json.need([1], schema, "x")
