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
from jft.analysis.tasks import Task
from jft.delta import TaskVector

POINTS = 400  # of a learning curve that are kept


def run(
    study: Mapping[str, Any], base: Base, task: Task, method: str, seed: int | None, workdir: Path
) -> dict[str, Any]:
    """Fine-tune ``task`` by ``method`` with ``seed`` (None: the config's) in ``workdir``, or take what is whole there.

    The task vector that is kept speaks of the backbone alone, so that it applies to the base of every task.
    """
    from jft.train import finetune

    config = settings.of_run(study, task.name, method, seed)
    compared = {**records.plain(config), "base": base.fingerprint, "metric": study["metric"], "head": study["head"]}
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
    path = workdir / "task_vector.safetensors"
    vector.save(path)
    return records.write(workdir, compared, _measured(task, method, config.seed, base, finished, vector, path, since))


def _measured(
    task: Task, method: str, seed: int, base: Base, finished: Any, vector: TaskVector, path: Path, since: float
) -> dict[str, Any]:
    """The entry of ``runs`` in ``results.json``."""
    rows = [row for row in finished.metrics if row["split"] == "train"]
    # The first row has the compilation in it; one that follows another at once has no step to tell of.
    speeds = [row["steps_per_s"] for row in rows[1:] if row["steps_per_s"] > 0]
    backbone = {key: value for key, value in finished.params.items() if task.head is None or key != "classifier"}
    thinned = rows[:: -(-len(rows) // POINTS)]
    return {
        "task": task.name,
        "method": method,
        "seed": seed,
        "score": task.score("test", backbone),
        "validation": task.score("validation", backbone),
        "trained": tree.count(finished.state.trained),
        "density": vector.nnz / tree.count(base.params),
        "bytes": path.stat().st_size,
        "norm": float(vector.resolve(base.params).norm()),
        "step_seconds": 1 / float(np.median(speeds)) if speeds else None,
        "seconds": time.perf_counter() - since,
        "curve": [{"step": row["step"], "loss": row["loss"]} for row in thinned],
    }


def _listed(patterns: Any) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def frozen(backbone: Any) -> tuple[str, ...]:
    """Patterns of what never trains beside a head: the head, and of CLIP all that is not the image encoder."""
    clip = ("^text/", "^text_projection/", "^logit_scale$") if backbone.family == "clip" else ()
    return ("^classifier/", *clip)
