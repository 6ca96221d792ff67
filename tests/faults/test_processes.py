"""Faults of runs of several processes, the short form: one of each kind."""

import pytest

from jft.train import config, experiment
from tests.faults import processes

MUTATIONS = [
    ("jft/cli/errors.py", "    if peers is not None:", "    if peers is None:"),
    ("jft/train/experiment.py", '    parallel.agree("content",', "    dict("),
    ("jft/train/experiment.py", '(".json", ".safetensors")]', '(".json",)]'),
]
CASES = [
    "differs/learning rate, 4 processes",
    "differs/work directory",
    "differs/content of the data",
    "error/missing file",
    "error/broken row",
    "absent/process 1",
]


@pytest.mark.parametrize("name", CASES)
def test_all_end_with_a_line(name, tmp_path):
    assert not processes.cases()[f"processes/{name}"](tmp_path / "run")


def test_a_lost_process_ends_the_others_with_what_was_saved(tmp_path):
    # Process 0, in which JAX's own service would be; that they go on is part of the long form.
    assert not processes.struck(tmp_path / "run", 2, 0, "save", again=False)


def test_the_content_of_a_base_is_what_its_model_is_made_of(tmp_path):
    def content(**changed):
        files = {"config.json": "{}", "model.safetensors": "x" * 9, "README.md": "about"} | changed
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return experiment._base_content(config.ModelConfig(source=str(tmp_path)))

    assert content() == content(**{"README.md": "other"})
    assert len({content(), content(**{"model.safetensors": "x" * 8 + "y"}), content(**{"config.json": "[]"})}) == 3
