"""The two protocols of task arithmetic: one model for all tasks by addition, forgetting one task by negation.

Ilharco et al. 2022, arXiv:2212.04089; the searches are those of Ortiz-Jimenez et al. 2023, arXiv:2305.12827: the
coefficient is chosen on validation data from a grid, and the test data are looked at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jft import delta, merge
from jft.delta import TaskVector

# (task, split, parameters) to accuracy in [0, 1]; splits are "validation" and "test".
Score = Callable[[str, str, Any], float]


def mean(values: Mapping[str, float]) -> float:
    """The unweighted mean over tasks."""
    return sum(values.values()) / len(values)


def addition(
    base: Any,
    vectors: Mapping[str, TaskVector],
    single: Mapping[str, Mapping[str, float]],
    score: Score,
    grid: Sequence[float],
) -> dict[str, Any]:
    """``base + c * sum(vectors)`` with the ``c`` of ``grid`` that has the highest mean normalised validation accuracy.

    single: ``{split: {task: accuracy of the model fine-tuned on it}}``. Returns the coefficient, mean absolute and
    normalised test accuracy, both for each task, and the validation curve over the grid.
    """
    measures = {task: functools.partial(score, task, "validation") for task in vectors}
    found = merge.addition_search(base, vectors, measures, single["validation"], grid)
    params = delta.apply(base, merge.task_arithmetic(vectors), scale=found.best, check=False)
    absolute = {task: score(task, "test", params) for task in vectors}
    relative = {task: value / single["test"][task] for task, value in absolute.items()}
    return {
        "coefficient": found.best,
        "absolute": mean(absolute),
        "normalised": mean(relative),
        "tasks": {task: {"absolute": absolute[task], "normalised": relative[task]} for task in vectors},
        "curve": [
            {
                "coefficient": row["coefficient"],
                "mean": row["score"],
                "tasks": {task: row[f"normalised/{task}"] for task in vectors},
            }
            for row in found.table
        ],
    }


def negation(
    base: Any,
    vector: TaskVector,
    target: str,
    controls: Sequence[str],
    score: Score,
    grid: Sequence[float],
    threshold: float,
) -> dict[str, Any]:
    """``base - c * vector`` with the ``c`` of ``grid`` that forgets ``target`` most and keeps the controls.

    A coefficient is allowed where the mean validation accuracy on ``controls`` is at least ``threshold`` times that of
    the base; if none is, the coefficient is 0. Returns it with test accuracies on target and control, before and after.
    """

    def control(params: Any, split: str = "validation") -> float:
        return sum(score(name, split, params) for name in controls) / len(controls)

    found = merge.negation_search(
        base, vector, functools.partial(score, target, "validation"), control, grid, threshold
    )
    after = delta.apply(base, vector, scale=-found.best, check=False)
    row: dict[str, Any] = {
        "coefficient": found.best,
        "target": score(target, "test", after),
        "control": control(after, "test"),
        "base_target": score(target, "test", base),
        "base_control": control(base, "test"),
        "curve": [{key: row[key] for key in ("coefficient", "target", "control")} for row in found.table],
    }
    return row | {"drop": row["base_target"] - row["target"]}


def cosines(vectors: Mapping[str, TaskVector]) -> list[list[float]]:
    """The cosine between every two task vectors, symmetric, in the order of ``vectors``."""
    listed = list(vectors.values())
    upper = {(i, j): float(listed[i].cosine(listed[j])) for i in range(len(listed)) for j in range(i, len(listed))}
    return [[upper[min(i, j), max(i, j)] for j in range(len(listed))] for i in range(len(listed))]
