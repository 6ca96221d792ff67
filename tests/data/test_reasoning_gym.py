"""The source over reasoning-gym's generators, with a stand-in for the library, whose dependencies are many."""

import sys
import types

import pytest

from jft import data
from jft.data import DataError


@pytest.fixture
def library(monkeypatch):
    """A generator ``double`` with one setting of its own."""

    def create_dataset(name, size, seed, factor=2):
        assert name == "double"
        return [
            {"question": f"{factor} x {i + seed}?", "answer": factor * (i + seed), "metadata": {}} for i in range(size)
        ]

    gym, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    gym.create_dataset, factory.DATASETS = create_dataset, {"double": None}
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


SETTINGS = {"source": "reasoning_gym", "name": "double", "task": "sft", "prompt": "question", "response": "answer"}


def build(**settings):
    return data.build({**SETTINGS, "max_length": 16, **settings}, batch_size=2, tokenizer="bytes", train=False)


def test_questions_and_answers(library):
    loader = build(size=3, generator_seed=5, options={"factor": 3})
    assert loader.examples == 3
    batch = next(iter(loader))
    rows = [
        loader.tokenizer.decode(row[segments > 0])
        for row, segments in zip(batch["tokens"], batch["segments"], strict=True)
    ]
    assert rows == ["3 x 5?15<eos>", "3 x 6?18<eos>"]


def test_refusals(library):
    with pytest.raises(DataError, match="no generator 'duble'"):
        build(name="duble")
    with pytest.raises(DataError, match="unexpected keyword argument 'other'"):
        build(options={"other": 1})


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        build()
