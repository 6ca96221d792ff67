"""The runs of a study: trained by the ordinary loop, measured, and each kept as ``outcome.json`` when it is whole."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft import data, methods, tree
from jft.analysis import other_tasks, run_store, seeds, settings
from jft.analysis.bases import Base
from jft.analysis.interpolation import Forward
from jft.analysis.tasks import Task
from jft.delta import TaskVector

POINTS = 400  # of a learning curve that are kept


VECTOR = "task_vector.safetensors"
FLEETS = "fleets"  # the folder of a study for checkpoints of fleets


@dataclasses.dataclass(frozen=True)
class Training:
    """A run that trains: its task, method and train config, and its folder. compared: what a record there must agree with."""

    task: Task
    method: str
    config: Any
    workdir: Path
    compared: Mapping[str, Any]

    @classmethod
    def of(
        cls, study: Mapping[str, Any], base: Base, task: Task, method: str, seed: int | None, workdir: Path
    ) -> Training:
        """The run of ``task`` by ``method`` with ``seed`` (None: the config's) in a study's ``workdir``."""
        config = settings.of_run(study, task.name, method, seed)
        facts = {"base": base.fingerprint, "metric": study["metric"], "head": study["head"]}
        if config.method.get("name") in other_tasks.WRITERS:
            facts["other_tasks"] = study["other_tasks"]
        folder = seeds.folder(workdir, task.name, method, seed)
        return cls(task, method, config, folder, {**run_store.plain(config), **facts})

    @property
    def outcome(self) -> dict[str, Any] | None:
        """Its record, or None."""
        record = run_store.read(self.workdir, self.compared)
        return None if record is None else {"seed": self.config.seed, **record}


def of_method(
    study: Mapping[str, Any], base: Base, tasks: Sequence[Task], method: str, seed: int | None, workdir: Path
) -> Iterator[dict[str, Any]]:
    """The outcome of each task by ``method`` with ``seed`` (None: the config's) in a study's ``workdir``.

    What is whole there is taken, the rest fine-tuned: the tasks one by one, or as a fleet where the study has ``fleet``. A
    method that takes the task vectors of another evaluates those. The task vector that is kept speaks of the backbone alone,
    so that it applies to the base of every task.
    """
    source = settings.source(study, method)
    runs = [Training.of(study, base, task, source, seed, workdir) for task in tasks]
    if source != method:
        yield from (_other_forward(study, base, run, method) for run in runs)
        return
    missing = [run for run in runs if run.outcome is None]
    fleet_of = {run.task.name: fleet for fleet in _fleets(missing, study["fleet"]) for run in fleet}
    for run in runs:
        outcome = run.outcome
        if outcome is None:
            _train(study, base, tasks, fleet_of[run.task.name], workdir)
            outcome = run.outcome
        assert outcome is not None, f"the run in {run.workdir} left no record"
        yield outcome


def _fleets(runs: Sequence[Training], in_fleets: bool) -> list[list[Training]]:
    """Runs grouped by which train in one program: equal but for task and data.

    Those that select anew, those that read other tasks, and those that train by epochs, train alone.
    """
    groups: dict[Any, list[Training]] = {}
    for run in runs:
        single = not in_fleets or run.config.method.get("name") in other_tasks.WRITERS
        # Epochs of data of several sizes are not equally many steps.
        single = single or methods.method(**run.config.method).schedule is not None or bool(run.config.epochs)
        rest = json.dumps({**run_store.plain(run.config), "data": None, "eval_data": None}, sort_keys=True)
        key = run.task.name if single else (run.task.model, run.task.objective, rest)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def _other_forward(study: Mapping[str, Any], base: Base, run: Training, method: str) -> dict[str, Any]:
    """The outcome of ``run``'s task vector in the forward pass of ``method``, recorded in the folder of the run."""
    name, first = f"outcome_{method}.json", run.outcome
    if first is None:
        raise ValueError(f"{run.workdir} holds no finished run to take the task vector of")
    compared = {**run.compared, "forward": study["methods"][method]}
    record = run_store.read(run.workdir, compared, name)
    if record is not None:
        return {"seed": run.config.seed, **record}
    vector = TaskVector.load(run.workdir / VECTOR)
    forward = settings.forward(study, method, vector)
    scores = _scores(run.task, base, vector.resolve(base.params), forward)
    return run_store.write(run.workdir, compared, {**first, "method": method, **scores, "curve": []}, name)


def _train(
    study: Mapping[str, Any], base: Base, tasks: Sequence[Task], runs: Sequence[Training], workdir: Path
) -> None:
    """Fine-tune ``runs`` of ``tasks``, one by itself or several as a fleet; keep and record each."""
    from jft.train import finetune

    since = time.perf_counter()
    config, task = runs[0].config, runs[0].task
    method = dict(config.method)
    # The head is held fixed, so that the task vectors of all tasks are changes of one backbone.
    if task.head is not None:
        method["freeze"] = (*_listed(method.get("freeze", ())), *frozen(task.model.config.backbone))
    params = task.params(base.params)
    others = [other for other in tasks if other.name != task.name]
    method |= other_tasks.options(method.get("name", "full"), study, base, others, params, workdir, runs[0].workdir)
    common: dict[str, Any] = {
        "steps": config.steps or None,
        "epochs": config.epochs or None,
        "method": method,
        "optimizer": dataclasses.asdict(config.optimizer),
        "objective": task.objective,
        "mesh": base.mesh,
        "accumulate": config.accumulate,
        "seed": config.seed,
        "checkpoint": dataclasses.asdict(config.checkpoint),
        "log": dataclasses.asdict(config.log),
    }
    per_run = [
        {"data": _loader(run.config, base), "workdir": run.workdir, "manifest": _manifest(run, base)} for run in runs
    ]
    if len(runs) == 1:
        loader = per_run[0].pop("data")
        results = [
            run_store.train(lambda: finetune(task.model, params, loader, **common, **per_run[0]), [runs[0].workdir])
        ]
    else:
        heads = [{} if run.task.head is None else {"params": {"classifier": run.task.head}} for run in runs]
        members = [
            {"name": run.task.name, **head, **options} for run, head, options in zip(runs, heads, per_run, strict=True)
        ]
        folder = workdir / FLEETS / _folder(runs)
        results = run_store.train(
            lambda: finetune(task.model, params, None, **common, workdir=folder, fleet=members),
            [run.workdir for run in runs],
        )
    share = (time.perf_counter() - since) / len(runs)
    for run, result in zip(runs, results, strict=True):
        # The other members of a fleet are recorded before the error is raised.
        if result.error is not None:
            continue
        since = time.perf_counter() - share  # of the training its share, of what follows its own
        vector = result.task_vector if run.task.head is None else result.task_vector.exclude("^classifier/")
        # The vector before its record, which says that all is there.
        vector.save(run.workdir / VECTOR)
        run_store.write(run.workdir, run.compared, _outcome(run, base, result, vector, since, len(runs)))
    for result in results:
        if result.error is not None:
            raise result.error


def _folder(runs: Sequence[Training]) -> str:
    """A name for the checkpoints of a fleet. Where some tasks are done, the rest are another fleet, with other checkpoints."""
    tasks = zlib.crc32(" ".join(run.task.name for run in runs).encode())
    return f"{runs[0].method}_seed_{runs[0].config.seed}_{tasks:08x}"


def _loader(config: Any, base: Base) -> Any:
    return data.build(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=base.tokenizer,
        image_size=base.image_size,
    )


def _manifest(run: Training, base: Base) -> dict[str, Any]:
    return {"source": base.source, "config": run_store.plain(run.config), "data": run.config.data}


def _outcome(run: Training, base: Base, result: Any, vector: TaskVector, since: float, members: int) -> dict[str, Any]:
    """The entry of ``runs`` in ``results.json``, of one of a fleet's ``members``, or of a run by itself."""
    rows = [row for row in result.metrics if row["split"] == "train"]
    # The first row has the compilation in it; one that follows another at once has no step to tell of.
    speeds = [row["steps_per_s"] for row in rows[1:] if row["steps_per_s"] > 0]
    tau = vector.resolve(base.params)
    curve = rows[:: -(-len(rows) // POINTS)]
    return {
        "task": run.task.name,
        "method": run.method,
        "seed": run.config.seed,
        **_scores(run.task, base, tau, Forward.of(vector)),
        "trained": tree.count(result.state.trained),
        "density": vector.nnz / tree.count(base.params),
        "bytes": (run.workdir / VECTOR).stat().st_size,
        "norm": float(tau.norm()),
        "step_seconds": 1 / float(np.median(speeds)) / members if speeds else None,
        "seconds": time.perf_counter() - since,
        "curve": [{"step": row["step"], "loss": row["loss"]} for row in curve],
    }


def _scores(task: Task, base: Base, tau: TaskVector, forward: Forward) -> dict[str, Any]:
    """The metric on both splits at a resolved task vector, and the forward pass."""
    test, validation = (
        float(task.scores(split, base.params, [tau], [1.0], forward)[0]) for split in ("test", "validation")
    )
    return {"score": test, "validation": validation, "forward": forward.name, "until": forward.until}


def _listed(patterns: Any) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def frozen(backbone: Any) -> tuple[str, ...]:
    """Patterns of the weights that never train under a head: the head, and of CLIP all that is not the image encoder."""
    clip = ("^text/", "^text_projection/", "^logit_scale$") if backbone.family == "clip" else ()
    return ("^classifier/", *clip)
