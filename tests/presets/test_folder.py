"""The folder of presets: one to a file, named after it, independent of each other."""

import ast
import inspect
import pathlib

import jft
from jft.cli import methods
from tests.mutate import ROOT as REPOSITORY
from tests.mutate import mutations

ROOT = pathlib.Path(jft.__file__).parent
FILES = sorted(p for p in (ROOT / "presets").glob("*.py") if p.stem != "__init__")


def test_every_preset_has_a_file_of_its_name():
    registered = {name: entry.build.__module__ for name, entry in jft.methods.entries().items()}
    ours = {name: module for name, module in registered.items() if module.startswith("jft.")}
    assert ours == {p.stem: f"jft.presets.{p.stem}" for p in FILES}


def test_no_preset_imports_another():
    """Deleting a method is deleting a file."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.startswith("jft.presets")], path


def test_include_and_exclude_are_no_arguments_of_presets():
    """They go with all; where include is an argument, it is part of the method, and the preset says so."""
    for name, entry in jft.methods.entries().items():
        assert "exclude" not in entry.arguments, name
        assert "include" in entry.options and "exclude" in entry.options
        assert ("include" in entry.arguments) == (
            "part of the method" in " ".join(inspect.getdoc(entry.build).split())
        ), name


def test_every_preset_has_a_test_that_three_mutations_fail():
    for path in FILES:
        assert len(mutations([REPOSITORY / "tests" / "presets" / f"test_{path.stem}.py"])) >= 3, path.stem


def test_every_published_preset_has_a_card():
    for name, entry in jft.methods.entries().items():
        assert (entry.card is None) == (entry.paper == "-"), name


def test_the_page_of_methods_is_of_today():
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == methods.markdown(jft.methods.entries()), "write it anew: jft methods --markdown > docs/methods.md"
