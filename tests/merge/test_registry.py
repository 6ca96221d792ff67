"""What is true of every rule: its page, its signature, what it says of wrong options."""

import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jft import merge
from jft.delta import Dense, TaskVector

PAGE = Path(__file__).parents[2] / "docs" / "merging.md"
# What is no rule: types, the search for coefficients, parts of rules.
OTHERS = {
    *("COMPRESSIONS", "RULES", "MergingRule", "Rule", "Search", "Tensor", "register", "weights_of"),
    *("GRID", "search", "addition_row", "addition_search", "addition_measure"),
    *("negation_row", "negation_search", "negation_measure", "product", "draws", "constrained"),
    *("entropy", "cross_entropy", "relative_gap", "explained_variance"),
}
MUTATIONS = [
    ("jft/merge/registry.py", "if choices and name in options", "if not choices and name in options"),
    ("jft/merge/registry.py", "{**presets[preset], **given}", "{**given, **presets[preset]}"),
]


def test_the_page_lists_every_rule():
    section = PAGE.read_text(encoding="utf-8").split("## Rules in memory")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert named <= set(merge.__all__)
    assert set(merge.__all__) - named - OTHERS == set()


@pytest.mark.parametrize("name", merge.RULES)
def test_a_rule_says_what_it_is(name):
    rule = merge.RULES[name]
    assert "arXiv:" in rule.paper or "mergekit" in rule.paper or "doi:" in rule.paper or "huggingface.co" in rule.paper
    options = inspect.signature(rule).parameters
    assert list(options)[:2] == ["vectors", "weights"]
    assert {"scale", "base", "preset", "seed", *rule.options} <= set(options)
    for preset in rule.presets:
        assert isinstance(rule.build(preset=preset), merge.Rule)
    with pytest.raises(ValueError, match=f"{name} has no option 'densety'"):
        rule.build(densety=1)
    with pytest.raises(ValueError, match=f"{name} has no preset 'papre'"):
        rule.build(preset="papre")


def test_options_stand_before_those_of_a_preset():
    tau = TaskVector({"w": Dense(jnp.asarray([1.0, -3.0, 2.0, 0.5]))})
    merged = merge.ties([tau], preset="mergekit", density=0.5)
    assert merged["w"].dense().tolist() == [0, -3, 2, 0]
    assert merged.manifest["rule"] == "ties"
    with pytest.raises(ValueError, match="elect of ties is 'most'; it may be 'sum', 'weighted', 'count'"):
        merge.ties([tau], elect="most")


def test_one_vector_is_no_list():
    with pytest.raises(ValueError, match="takes a list of task vectors"):
        merge.ties(TaskVector({}))
    with pytest.raises(ValueError, match="at least one"):
        merge.ties([])
