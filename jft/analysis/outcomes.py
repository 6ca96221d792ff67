"""One run of a study: trained by the ordinary loop, measured, and kept as ``outcome.json`` when it is whole."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jft import data, tree
from jft.analysis import records, settings
from jft.analysis.bases import Base
from jft.analysis.points import Forward
from jft.analysis.tasks import Task
from jft.delta import TaskVector

POINTS = 400  # of a learning curve that are kept


VECTOR = "task_vector.safetensors"


def run(
    study: Mapping[str, Any], base: Base, task: Task, method: str, seed: int | None, workdir: Path
) -> dict[str, Any]:
    """Fine-tune ``task`` by ``method`` with ``seed`` (None: the config's) in ``workdir``, or take what is whole there.

    The task vector that is kept speaks of the backbone alone, so that it applies to the base of every task. A method that
    takes the task vectors of another evaluates the one in ``workdir``, where that one's run is.
    """
    source = settings.source(study, method)
    config = settings.of_run(study, task.name, source, seed)
    compared = {**records.plain(config), "base": base.fingerprint, "metric": study["metric"], "head": study["head"]}
    if source != method:
        return _again(study, base, task, method, config.seed, compared, workdir)
    return _trained(study, base, task, method, config, compared, workdir)


def _again(
    study: Mapping[str, Any], base: Base, task: Task, method: str, seed: int, compared: Any, workdir: Path
) -> dict[str, Any]:
    """What the run in ``workdir`` trained, in another forward pass; its record lies beside that of the run."""
    name, first = f"outcome_{method}.json", records.read(workdir, compared)
    if first is None:
        raise ValueError(f"{workdir} holds no finished run to take the task vector of")
    compared = {**compared, "forward": study["methods"][method]}
    done = records.read(workdir, compared, name)
    if done is not None:
        return {"seed": seed, **done}
    vector = TaskVector.load(workdir / VECTOR)
    forward = settings.forward(study, method, vector)
    found = {
        **first,
        "seed": seed,
        "method": method,
        **_scores(task, base, vector.resolve(base.params), forward),
        "curve": [],
    }
    return records.write(workdir, compared, found, name)


def _trained(
    study: Mapping[str, Any], base: Base, task: Task, method: str, config: Any, compared: Any, workdir: Path
) -> dict[str, Any]:
    from jft.train import finetune

    done = records.read(workdir, compared)
    if done is not None:
        return {"seed": config.seed, **done}
    since = time.perf_counter()
    chosen = dict(config.method)
    if task.head is not None:
        chosen["freeze"] = (*_listed(chosen.get("freeze", ())), *frozen(task.model.config.backbone))
    loader = data.build(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=base.tokenizer,
        image_size=base.image_size,
    )
    finished = finetune(
        task.model,
        task.params(base.params),
        loader,
        steps=config.steps,
        method=chosen,
        optimizer=dataclasses.asdict(config.optimizer),
        objective=task.objective,
        mesh=base.mesh,
        accumulate=config.accumulate,
        seed=config.seed,
        workdir=workdir,
        checkpoint=dataclasses.asdict(config.checkpoint),
        log=dataclasses.asdict(config.log),
        manifest={"source": base.source, "config": records.plain(config), "data": config.data},
    )
    vector = finished.task_vector if task.head is None else finished.task_vector.exclude("^classifier/")
    path = workdir / VECTOR
    vector.save(path)
    return records.write(workdir, compared, _measured(task, method, config.seed, base, finished, vector, path, since))


def _measured(
    task: Task, method: str, seed: int, base: Base, finished: Any, vector: TaskVector, path: Path, since: float
) -> dict[str, Any]:
    """The entry of ``runs`` in ``results.json``."""
    rows = [row for row in finished.metrics if row["split"] == "train"]
    # The first row has the compilation in it; one that follows another at once has no step to tell of.
    speeds = [row["steps_per_s"] for row in rows[1:] if row["steps_per_s"] > 0]
    tau = vector.resolve(base.params)
    thinned = rows[:: -(-len(rows) // POINTS)]
    return {
        "task": task.name,
        "method": method,
        "seed": seed,
        **_scores(task, base, tau, Forward.of(vector)),
        "trained": tree.count(finished.state.trained),
        "density": vector.nnz / tree.count(base.params),
        "bytes": path.stat().st_size,
        "norm": float(tau.norm()),
        "step_seconds": 1 / float(np.median(speeds)) if speeds else None,
        "seconds": time.perf_counter() - since,
        "curve": [{"step": row["step"], "loss": row["loss"]} for row in thinned],
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
    """Patterns of what never trains beside a head: the head, and of CLIP all that is not the image encoder."""
    clip = ("^text/", "^text_projection/", "^logit_scale$") if backbone.family == "clip" else ()
    return ("^classifier/", *clip)
