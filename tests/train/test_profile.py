"""The profile: a trace of the steps asked for and of no other, whatever comes between, and a run that is not changed by it."""

import gzip
import json
import signal

import jax
import numpy as np
import pytest

import jft
from jft.cli import main
from jft.train import Preempted, Profiling, preemption
from jft.train.profile import Profile
from tests.train import tools

QUIET = {"every": 1, "progress": False}

MUTATIONS = [
    ("jft/train/profile.py", "first = begin + options.start", "first = options.start"),
    ("jft/train/profile.py", "if jax.process_index() == 0 else first", ""),
    ("jft/train/profile.py", "if n == self._steps[-1]:", "if n == self._steps[-1] + 1:"),
    (
        "jft/train/profile.py",
        "        if not self._active:\n            # Else",
        "        if True:\n            # Else",
    ),
    ("jft/train/profile.py", "        self._active = False\n        try:", "        try:"),
    ("jft/train/finetune.py", "stack.callback(trace.close)", ""),
    (
        "jft/train/profile.py",
        'StepTraceAnnotation("train", step_num=n)',
        'StepTraceAnnotation("train", step_num=n + 1)',
    ),
]


def train(workdir=None, steps=10, **options):
    options = {"log": QUIET, "optimizer": {"lr": 1e-2}} | options
    return jft.finetune(tools.apply, tools.parameters(), tools.batches(), steps=steps, workdir=workdir, **options)


def traces(workdir):
    """The numbers of the steps in each trace, oldest first, read from both files of it."""
    out = []
    for file in sorted(workdir.glob("profile/plugins/profile/*/*.xplane.pb")):
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [e for plane in planes for line in plane.lines for e in line.events if e.name == "train"]
        found = sorted((e.start_ns, dict(e.stats)["step_num"]) for e in events)
        out.append([number for _, number in found])
        shown = json.loads(gzip.decompress((file.parent / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
        numbers = [int(e["args"]["step_num"]) for e in shown if e.get("name") == "train"]
        assert sorted(numbers) == sorted(out[-1])
    return out


def test_the_steps_and_the_same_run(tmp_path, capsys):
    options = {"checkpoint": 4, "eval_data": tools.batches(), "eval_every": 4, "log": {"every": 1}}
    run = train(tmp_path, profile={"start": 2, "steps": 3}, **options)
    assert traces(tmp_path) == [[2, 3, 4]]
    out = capsys.readouterr().out
    assert f"profile of steps 2 to 4 in {tmp_path / 'profile'}: xprof --logdir" in out
    assert out.index("profile of") < out.index("train 6/10"), "it stops there, not with the run"
    expected = train(tmp_path / "without", **options)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state), jax.device_get(expected.state))
    assert not (tmp_path / "without" / "profile").exists()


def test_a_run_that_goes_on_counts_from_there(tmp_path, capsys):
    train(tmp_path, steps=5, checkpoint=5)
    train(tmp_path, steps=9, profile={"start": 1, "steps": 2}, checkpoint=9)
    assert traces(tmp_path) == [[6, 7]]
    train(tmp_path, steps=11, profile={"start": 3, "steps": 2}, log={"every": 1})
    assert "no profile: the run ended before step 12, where it was to begin" in capsys.readouterr().out
    assert len(traces(tmp_path)) == 1


def test_an_interrupt_ends_the_trace(tmp_path, monkeypatch):
    def reached(self, step):
        if step == 4:
            self._note(signal.SIGTERM, None)
        return self._stop.is_set()

    monkeypatch.setattr(preemption.Watch, "reached", reached)
    with pytest.raises(Preempted):
        train(tmp_path, profile={"start": 2, "steps": 6})
    assert traces(tmp_path) == [[2, 3]]
    # Another trace can begin: the profiler of the process has stopped.
    with jax.profiler.trace(str(tmp_path / "another")):
        pass


def test_a_failure_ends_the_trace(tmp_path):
    data = tools.batches(6)
    data[4]["images"][0, 0] = np.inf
    with pytest.raises(jft.train.NonFiniteError):
        jft.finetune(
            tools.apply,
            tools.parameters(),
            data,
            steps=8,
            workdir=tmp_path,
            log=QUIET,
            profile={"start": 3, "steps": 5},
        )
    (steps,) = traces(tmp_path)
    assert steps[:2] == [3, 4]


def test_the_first_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    trace = Profile(Profiling(2, 0), None, None, 0, tmp_path)
    for n in range(2):
        with trace.step(n):
            pass
    trace.close()
    assert not list(tmp_path.iterdir())


def test_rates_leave_out_what_the_trace_costs(tmp_path, monkeypatch):
    """The profiler takes a second, in an interval whose steps take some milliseconds."""
    import time

    stop = jax.profiler.stop_trace

    def slow():
        stop()
        time.sleep(2.0)

    monkeypatch.setattr(jax.profiler, "stop_trace", slow)
    run = train(tmp_path, profile={"start": 2, "steps": 1}, log={"every": 5, "progress": False})
    assert min(row["steps_per_s"] for row in run.metrics) > 2.5


def test_from_a_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model": {
                    "arch": "vision",
                    "classes": -1,
                    "options": {
                        "image": 8,
                        "patch": 4,
                        "channels": 1,
                        "width": 16,
                        "layers": 1,
                        "heads": 2,
                        "hidden": 32,
                    },
                },
                "data": {"source": "digits", "split": "train"},
                "steps": 4,
                "batch_size": 16,
            }
        )
    )
    argv = ["train", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path}", "--config.profile.steps=2"]
    assert main.call([*argv, "--config.profile.start=1"]) == 0
    assert traces(tmp_path) == [[1, 2]]
    assert "profile of steps 1 to 2" in capsys.readouterr().out


def test_steps_end_inside_the_trace(tmp_path, monkeypatch):
    calls = []

    def recorded(name, call):
        return lambda *args, **options: (calls.append(name), call(*args, **options))[1]

    run = {"wait": (jax, "block_until_ready")}
    run |= {name: (jax.profiler, f"{name}_trace") for name in ("start", "stop")}
    for name, (module, attribute) in run.items():
        monkeypatch.setattr(module, attribute, recorded(name, getattr(module, attribute)))
    train(tmp_path, profile={"start": 2, "steps": 3})
    assert calls == ["wait", "start", "wait", "stop"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="profile is given, but no workdir"):
        train(profile=1)
    with pytest.raises(ValueError, match=r"profile.start \(3\) \+ profile.steps \(8\) is beyond steps=10"):
        train(tmp_path, profile=8)
    with pytest.raises(ValueError, match=r"profile.steps is -1"):
        train(tmp_path, profile=-1)
