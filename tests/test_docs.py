"""Pages of the documentation whose examples are run as they stand."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jft

DOCS = Path(__file__).parents[1] / "docs"


def test_own_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "own_models.md").read_text()
    names: dict = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, re.S)):
        exec(compile(block, f"own_models.md, example {number}", "exec"), names)
    jax.tree.map(np.testing.assert_array_equal, names["again"], names["run"].params)
    changed = jft.apply(names["params"], jft.TaskVector.load("change.safetensors"))
    scores = jft.train.evaluate(names["apply"], changed, names["held_out"], "classification")
    assert scores["loss"] == pytest.approx(names["run"].evaluation["loss"], rel=1e-4)
