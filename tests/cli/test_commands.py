"""docs/commands.md: it has every command, and what those print that train nothing."""

import pytest

from jft.cli import main
from tests import commands

PAGE = commands.PAGE.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    commands.files(folder)
    return folder


def test_the_page_has_every_command():
    assert list(commands.outputs(PAGE)) == [command.shown for command in commands.commands()]
    assert {f"jft {name}" for name in main.commands()} == set(commands.SECTIONS) - {"jft"}
    assert PAGE.startswith(commands.INTRODUCTION)


def test_outputs_are_as_committed(folder, monkeypatch):
    """`make commands` writes the page anew."""
    monkeypatch.chdir(folder)
    committed, differ = commands.outputs(PAGE), []
    for command in commands.commands():
        if not command.trains:
            output = commands.in_process(command)
            # Help by its words: Python versions break its lines differently.
            same = str.split if command.help else str
            if same(output) != same(committed[command.shown]):
                differ.append(f"$ {command.shown}\n{output}")
    assert not differ, "\n\n".join(differ)
