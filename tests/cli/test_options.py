"""Config files and overrides on the command line."""

import pytest
from ml_collections import ConfigDict

from jft.cli import options
from jft.cli.errors import UsageError


@pytest.fixture
def config():
    return ConfigDict(
        {"steps": 10, "name": "a", "lr": 0.1, "flag": True, "shape": (1, 2), "none": None, "method": {"name": "full"}}
        | {"data": {"classes": 2, "files": "a.csv"}}
    )


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("steps", "20", 20),
        ("lr", "3", 3.0),
        ("lr", "1e-4", 1e-4),
        ("name", "3", "3"),
        ("flag", "false", False),
        ("shape", "(4,)", (4,)),
        ("shape", "5", (5,)),
        ("none", "x", "x"),
        ("method.rank", "4", 4),
        ("method.name", "lora", "lora"),
        ("data.classes", '("no", "yes")', ("no", "yes")),
        ("data.files", "('b.csv', 'c.csv')", ("b.csv", "c.csv")),
        ("data.files", "3", "3"),
    ],
)
def test_override(config, path, text, value):
    options.override(config, path, text)
    found = config
    for key in path.split("."):
        found = found[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("stpes", "3", r"unknown config key 'stpes' \(did you mean 'steps'\?\)"),
        ("steps", "many", "is int"),
        ("steps", "1.5", "is int"),
        ("flag", "1", "is bool"),
        ("method", "lora", "is a group of keys"),
        ("data.classes", "two", "is int"),
        ("steps", "(1, 2)", "is int"),
        ("steps.x", "1", "unknown config key"),
    ],
)
def test_override_refused(config, path, text, message):
    before = config.to_dict()
    with pytest.raises(UsageError, match=message):
        options.override(config, path, text)
    assert config.to_dict() == before


def test_load_takes_an_argument_and_refuses_one_too_many(tmp_path):
    file = tmp_path / "with.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config(a='x'):\n    return ConfigDict({'a': a})\n")
    assert options.load(f"{file}:b,c").a == "b,c"
    assert options.load(str(file)).a == "x"
    file.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n")
    with pytest.raises(UsageError, match="takes no argument"):
        options.load(f"{file}:b")
    file.write_text("")
    with pytest.raises(UsageError, match=r"defines no get_config"):
        options.load(str(file))
    with pytest.raises(UsageError, match=r"did you mean 'with.py'"):
        options.load(str(tmp_path / "wiht.py"))
