"""A study: one base, several tasks, several methods, and arithmetic with the task vectors that come out.

A config holds ``studies``: by name, what :func:`study` describes. Each part that trains is a *partial* train config (the
keys of ``jft.train.config``), laid over the defaults in this order: ``common``, the task, the method. So a config for eight
CLIP data sets differs from the quickstart's in its values alone.

In the workdir each run has ``STUDY/TASK/METHOD/`` with its metrics, task vector and ``outcome.json``, or ``seed_N/`` in there
where a study has seeds; what is whole already is not run again. Beside them ``results.json``, CSV tables, ``plots/`` and
``report.html``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jft import files
from jft.analysis import (
    environment,
    grafting,
    merging,
    protocols,
    report,
    run_store,
    seeds,
    settings,
    tables,
    task_runs,
)
from jft.analysis.bases import prepare
from jft.analysis.tasks import prepare_all
from jft.methods import registry

Say = Callable[[str], None]
HEADS = {
    "probe": "Each task has a linear probe fitted on the base's features, then held fixed.",
    "zero_shot": "Each task has CLIP's zero-shot classifier as its head, held fixed.",
    "none": "",
}
METRICS = ("accuracy", "bits_per_byte", "perplexity", "loss")
# Coefficients of merged vectors: those that sum up want small ones, those that average want large ones.
GRID = (0.0, 0.15, 0.25, 0.4, 0.6, 1.0, 1.6, 2.5, 4.0)


def study(**parts: Any) -> ConfigDict:
    """The config of one study, with defaults for absent parts.

    title, note: of its section in the report. metric: accuracy, bits_per_byte, perplexity or loss.
    base: either ``source`` (a directory or hub id), or ``train``, a partial train config to pretrain from. common: a
    partial train config of all runs. tasks: ``{name: partial train config}``, and besides its keys ``test_data``, ``names``
    and ``templates`` (for zero-shot heads). methods: ``{name: partial train config}``, at least ``method``.
    One that trains nothing, ``{"of": METHOD, "forward": "linearized", "until": SITE}``, evaluates the task vectors of another
    in the model linearized at the base, up to SITE where one is given (post-hoc linearization); ``"standard"``, linear ones
    in the ordinary model.
    fleet: the tasks of a method train side by side as one fleet (``jft.finetune``), which holds what all of them train in
    memory at once; methods that select anew during the run, and tasks whose configs differ in more than their data, do not.
    Seconds are then a task's share of its fleet's.
    seeds: each run is made once with each, which changes the order of its data and what its method draws; scores and what
    becomes of arithmetic are means with their standard error, and base, heads and test data are the same for all. Empty:
    one run each, with ``common.seed``. A method may have ``seeds`` of its own in their place, fewer where it is slow.
    splits: the ``split`` that ``data``, ``eval_data`` (validation) and ``test_data`` have where a task gives ``data`` alone.
    head: ``kind`` probe (linear, fitted on the frozen base), zero_shot (CLIP) or none; ``pool``: what it reads, as in
    ``model.pool``; ``penalty`` of the probe; ``examples`` it is fitted on at most (0: all); ``pad``: all heads
    have as many columns as the widest, so that steps compile once.
    arithmetic: ``points`` of the coefficient grid on [0, ``largest``]; ``addition``, ``negation``: whether to; ``control``:
    the task that negation must keep (empty: the mean of all others) and the share ``threshold`` of it.
    disentangle: ``pairs`` of tasks whose weight-disentanglement error is mapped on ``points`` coefficients from ``lowest`` to
    ``largest`` for each. nonlinear: the method whose accuracy linearized ones are compared with (empty: the first that is
    not linearized).
    merging: the table of merging rules (:mod:`jft.analysis.merging_rules`). ``methods``: ``{method: rules}`` whose task vectors
    are merged, no rules being all of them; ``pair``: the two tasks that rules of at most two models merge; ``grid``: of the
    coefficient that validation data choose for what a rule gives; ``examples`` of each task's training data that rules read,
    in batches of ``batch_size``; ``steps`` of rules that learn, which run for the first ``learned_seeds`` seeds alone.
    grafting: ``method`` whose task vectors are cut down to the ``densities``, of the first ``seeds`` seeds; ``steps``, ``bias``
    and ``learning_rate`` of the mask that is learned (:func:`jft.merge.graft`).
    other_tasks: what `tak` and `tau_jp` read of the other tasks' training data: ``examples`` of each in batches of
    ``batch_size``, and ``draws`` of TAK's curvature (:func:`jft.select.grams.jacobian_factors`).
    """
    config = ordered(
        {
            "title": "Study",
            "note": "",
            "metric": "accuracy",
            "base": {"source": "", "description": "", "train": {}},
            "common": {},
            "tasks": {},
            "methods": {},
            "fleet": False,
            "seeds": (),
            "splits": {"data": "train", "eval_data": "validation", "test_data": "test"},
            "head": {"kind": "probe", "pool": "auto", "penalty": 1.0, "examples": 0, "pad": True},
            "arithmetic": {
                "points": 21,
                "largest": 1.0,
                "addition": True,
                "negation": True,
                "control": "",
                "threshold": 0.95,
            },
            "disentangle": {"pairs": (), "points": 17, "lowest": -2.0, "largest": 2.0},
            "merging": {
                "methods": {},
                "pair": (),
                "grid": GRID,
                "examples": 256,
                "batch_size": 16,
                "steps": 200,
                "learned_seeds": 1,
            },
            "grafting": {
                "method": "",
                "densities": (0.003, 0.01, 0.03, 0.1, 0.3),
                "seeds": 1,
                "steps": 20,
                "bias": 5.0,
                "learning_rate": 2e5,
            },
            "other_tasks": {"examples": 256, "batch_size": 8, "draws": 4},
            "nonlinear": "",
        }
    )
    for name, part in parts.items():
        if name not in config:
            raise ValueError(f"a study has no part {name!r}; it has: {', '.join(config)}")
        config[name] = ordered({**config[name].to_dict(), **part}) if isinstance(config[name], ConfigDict) else part
    return config


def ordered(value: Any) -> Any:
    """A ConfigDict of nested dicts that keeps the order they are written in: that of tasks and methods in every table."""
    if not isinstance(value, Mapping):
        return value
    return ConfigDict({key: ordered(inner) for key, inner in value.items()}, sort_keys=False)


def collection(title: str, summary: str = "", **studies: ConfigDict) -> ConfigDict:
    """A config of several studies under one title: what ``get_config()`` of a study's file returns."""
    return ConfigDict(
        {"title": title, "summary": summary, "studies": ConfigDict(studies, sort_keys=False)}, sort_keys=False
    )


def check(config: Mapping[str, Any]) -> None:
    """``ValueError``, naming study, key and value, for a config that could only fail later."""
    if not config.get("studies"):
        raise ValueError(
            "the config has no studies; build it with jft.analysis.study.collection(title, NAME=study(...))"
        )
    for name, entry in config["studies"].items():
        files.check_name(name, "the name of a study")
        try:
            _check(entry)
        except ValueError as error:
            raise ValueError(f"study {name!r}: {error}") from None


def _check(study: Mapping[str, Any]) -> None:
    methods, tasks = study["methods"], study["tasks"]
    if study["metric"] not in METRICS:
        raise ValueError(f"metric {study['metric']!r} is unknown; choose one of {', '.join(METRICS)}")
    if not tasks or not methods:
        raise ValueError(f"there are no {'methods' if tasks else 'tasks'}")
    if bool(study["base"]["source"]) == bool(study["base"]["train"]):
        raise ValueError("give base.source (a pretrained model) or base.train (how to pretrain one)")
    control = study["arithmetic"]["control"]
    if control and control not in tasks:
        raise ValueError(f"arithmetic.control {control!r} is not one of {', '.join(tasks)}")
    if study["nonlinear"] and study["nonlinear"] not in methods:
        raise ValueError(f"nonlinear {study['nonlinear']!r} is not one of {', '.join(methods)}")
    for what, names in (("task", tasks), ("method", methods)):
        for name in names:
            files.check_name(name, f"the name of a {what}")
    settings.of_maps(study)
    merging.check(study)
    grafting.check(study)
    for method in methods:
        seeds.check([seed for seed in settings.seeds_of(study, method) if seed is not None])
        settings.check_method(study, method)
        for task in tasks:
            options = settings.of_run(study, task, method).method
            # A typo in the last method must not wait for those before it to train.
            if options:
                registry.check_names(options["name"], options.keys() - {"name", *registry.GENERAL})


def run(config: ConfigDict, workdir: Path, command: str, say: Say = print) -> Path:
    """All studies of ``config`` in ``workdir``. Returns the path of the report."""
    since = time.perf_counter()
    # As JSON returns it, so that results.json records what ran.
    plain = run_store.plain(config)
    check(plain)
    workdir.mkdir(parents=True, exist_ok=True)
    entries = [_run(name, entry, workdir / name, say) for name, entry in plain["studies"].items()]
    results = {
        "title": plain["title"],
        "summary": plain.get("summary", ""),
        "created": environment.now(),
        "seconds": time.perf_counter() - since,
        "device": environment.devices(),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "command": command,
        "config": plain,
        "studies": entries,
    }
    run_store.write_json(results, workdir / "results.json")
    for entry in entries:
        tables.write(entry, workdir)
    return report.write(results, workdir)


def _run(name: str, config: Mapping[str, Any], workdir: Path, say: Say) -> dict[str, Any]:
    """One study: its entry in ``results.json``."""
    say(f"{name}: base")
    base = prepare(config["base"], config["common"], workdir / "base")
    tasks = prepare_all(config, base, workdir)
    runs = []
    # Methods that train come first: the others take their task vectors.
    for method in sorted(config["methods"], key=lambda m: settings.source(config, m) != m):
        # None: the seed that ``common`` has.
        for seed in settings.seeds_of(config, method):
            since = time.perf_counter()
            suffix = "" if seed is None else f", seed {seed}"
            for outcome in task_runs.of_method(config, base, list(tasks.values()), method, seed, workdir):
                runs.append(outcome)
                before, after = (
                    report.score(score, config["metric"]) for score in (tasks[outcome["task"]].base, outcome["score"])
                )
                say(f"{name}: {outcome['task']}, {method}{suffix}: {before} -> {after}")
            say(f"{name}: {method}{suffix} took {time.perf_counter() - since:.1f} s")
    order = list(config["methods"])
    runs.sort(key=lambda run: order.index(run["method"]))  # as in every table and figure
    return {
        "name": name,
        "title": config["title"],
        "note": config["note"],
        "metric": config["metric"],
        "head": HEADS[config["head"]["kind"]],
        "base": base.facts,
        "tasks": [task.facts for task in tasks.values()],
        "seeds": list(config["seeds"]),
        "fleet": config["fleet"],
        "methods": [_summary(method, config, runs) for method in config["methods"]],
        "runs": runs,
        **protocols.examined(name, config, base, tasks, runs, workdir, say),
        "merging_pair": list(config["merging"]["pair"]),
        "merging": merging.rows(config, base, tasks, runs, workdir, say),
        "grafting": grafting.rows(config, base, tasks, runs, workdir, say),
        "advantage": protocols.advantages(config, tasks, runs),
        "control": config["arithmetic"]["control"] or "the mean of the other tasks",
        "control_threshold": config["arithmetic"]["threshold"],
    }


def _summary(method: str, config: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over tasks and seeds, for one method, and the standard error over seeds of its mean score."""
    of_method = [run for run in runs if run["method"] == method]
    means = seeds.means(of_method, ("score", "trained", "density", "bytes", "step_seconds", "seconds"))
    source = settings.source(config, method)
    options = dict(config["methods"][source].get("method", {}))
    preset = options.pop("name", "full")
    preset_text = f"{preset}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    forward = of_method[0].get("forward", "standard")
    return {
        "name": method,
        "preset": preset_text if source == method else f"{preset_text}, {forward}",
        "source": source,
        "forward": forward,
        **means,
        "error": seeds.error_of_mean(of_method),
        "trained": round(means["trained"]),
    }
