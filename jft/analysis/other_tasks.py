"""What a method reads of the other tasks of a study: curvatures for TAK, batches for tau-Jp, as the files they take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jft import data, files, tree
from jft.analysis import run_store, settings
from jft.analysis.bases import Base
from jft.analysis.tasks import Task
from jft.select.grams import jacobian_factors
from jft.tangent import Curvature, merged
from jft.train.calibration import RunCalibration

SITE = "features"  # what heads read: the outputs that all tasks share


def options(
    name: str, study: Mapping[str, Any], base: Base, others: Sequence[Task], params: Any, workdir: Path, folder: Path
) -> dict[str, Any]:
    """The options of method ``name`` that name files of ``others``; nothing for a method that reads none.

    What is of one task lies in ``workdir/TASK``, for all runs, what is of one run, in ``folder``. params: those that the run
    starts from. Training data alone are read, without labels.
    """
    return WRITERS[name](study, base, others, params, workdir, folder) if name in WRITERS else {}


def _curvature(
    study: Mapping[str, Any], base: Base, others: Sequence[Task], params: Any, workdir: Path, folder: Path
) -> dict[str, Any]:
    """TAK's factors of the features' Jacobian, merged over the others."""

    def write(task: Task, path: Path) -> None:
        batches = _batches(study, base, task)
        calibration = RunCalibration(task.model, task.params(base.params), base.matrices, task.objective, batches)
        factors = jacobian_factors(calibration, len(batches), draws=study["other_tasks"]["draws"], site=SITE)
        Curvature.of(factors, base.params).save(path)

    loaded = [Curvature.load(_written(study, base, task, workdir, "curvature.safetensors", write)) for task in others]
    # Heads differ from task to task and are frozen, and the features' Jacobian is of the backbone alone.
    curvature = dataclasses.replace(merged(loaded), base=tree.fingerprint(params))
    path = folder / "other_tasks.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    curvature.save(path)
    return {"curvature": str(path)}


def _inputs(
    study: Mapping[str, Any], base: Base, others: Sequence[Task], params: Any, workdir: Path, folder: Path
) -> dict[str, Any]:
    """tau-Jp's stacked batches, a file for each task."""

    def write(task: Task, path: Path) -> None:
        batches = _batches(study, base, task)
        fields: dict[str, Any] = {
            key: np.stack([batch[key] for batch in batches]) for key in batches[0] if key != "labels"
        }
        with files.whole(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **fields)

    return {"data": [str(_written(study, base, task, workdir, "inputs.npz", write)) for task in others]}


def _written(
    study: Mapping[str, Any], base: Base, task: Task, workdir: Path, name: str, write: Callable[[Task, Path], None]
) -> Path:
    """The file ``name`` of a task, written unless it is there for the same data, settings and base."""
    path = workdir / task.name / name

    def compute() -> str:
        write(task, path)
        return name

    parts = {"data": settings.data_parts(study, task.name)["data"], "other_tasks": study["other_tasks"]}
    run_store.kept(path.with_suffix(".json"), {**parts, "base": base.fingerprint}, compute)
    return path


def _batches(study: Mapping[str, Any], base: Base, task: Task) -> list[Any]:
    sizes = study["other_tasks"]
    loader = data.build(
        settings.data_parts(study, task.name)["data"],
        batch_size=sizes["batch_size"],
        tokenizer=base.tokenizer,
        image_size=base.image_size,
    )
    return list(itertools.islice(iter(loader), max(1, sizes["examples"] // sizes["batch_size"])))


# Preset -> what writes its files.
WRITERS: dict[str, Callable[..., dict[str, Any]]] = {"tak": _curvature, "tau_jp": _inputs}
