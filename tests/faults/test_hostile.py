"""Hostile files: a third of :mod:`tests.faults.hostile` in this process, and the rest by its command."""

import collections

import pytest

from jft.data import sandbox
from tests.faults import hostile

# What code, or a file of another, depends on: not a third of them.
ALWAYS = ("tfds/", "safe/", "link/", "overwrite/", "pickle/", "index/", "recipe/", "metrics/")
MUTATIONS = [
    ("jft/data/tfds.py", '"pythonClassName", "python_class_name")', '"pythonClassName")'),
    ("jft/data/tfds.py", 'not name.startswith("tensorflow_datasets.")', 'not name.startswith("tensorflow_datasets")'),
    ("jft/data/tfds.py", '                if isinstance(value.get("json"), str):', "                if False:"),
    ("jft/merge/recipe.py", "        if count > MAX_VALUES:", "        if count > 10**7 * MAX_VALUES:"),
    ("jft/train/metrics.py", '_ROW = {"step": strict_json.COUNT, ', "_ROW = {"),
]


def test_there_are_many_and_always_the_same():
    names = [case.name for case in hostile.cases()]
    assert len(names) >= 300
    assert names == [case.name for case in hostile.cases()]
    assert len(collections.Counter(name.split("/")[0] for name in names)) >= 30


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged images
def test_hostile_files_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    cases = enumerate(hostile.cases())
    results = list(hostile.run([case for i, case in cases if i % 3 == 0 or case.name.startswith(ALWAYS)]))
    wrong = {name: result for name, result, _ in results if result not in ("refused", "accepted")}
    assert not wrong, "\n".join(f"{name}: {result}" for name, result in wrong.items())


def test_what_goes_wrong_is_seen(tmp_path):
    """The harness itself: a case that passes in silence, hangs, fails raw, runs code, or writes outside is told."""

    def outcome(use, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        case = hostile.Case("x", lambda inside: inside, use, **options)
        return hostile.outcome(case, folder, tmp_path / "mark").split(":")[0]

    def fail(error):
        raise error

    assert outcome(lambda inside: None) == "WRONG"
    assert outcome(lambda inside: fail(ValueError("a.json: bad")), names="a.json") == "refused"
    assert outcome(lambda inside: fail(ValueError("bad")), names="a.json") == "WRONG"
    assert outcome(lambda inside: fail(KeyError("x"))) == "RAW"
    assert outcome(lambda inside: fail(hostile.Hang())) == "HANG"
    assert outcome(lambda inside: (inside.parent / "out").write_text("x"), refused=False) == "REACH"
    assert outcome(lambda inside: fail(ValueError("x")), refused=False) == "WRONG"
    assert outcome(lambda inside: (tmp_path / "mark").write_text("x"), refused=False) == "CODE"
