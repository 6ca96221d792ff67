"""Faults of runs of several processes, the short form: one of each kind."""

import pytest

from tests.faults import processes

MUTATIONS = [
    ("jft/cli/errors.py", "    if peers is not None:", "    if peers is None:"),
    ("jft/train/experiment.py", '    parallel.agree("content",', "    dict("),
    ("jft/parallel/distributed.py", '        arguments["coordinator_bind_address"] = "localhost:0"', "        pass"),
]
CASES = [
    "differs/learning rate, 4 processes",
    "differs/work directory",
    "differs/content of the data",
    "error/missing file",
    "error/broken row",
    "SIGKILL/process 0, step",
    "absent/process 1",
]


@pytest.mark.parametrize("name", CASES)
def test_all_end_with_a_line(name, tmp_path):
    assert not processes.cases()[f"processes/{name}"](tmp_path / "run")
