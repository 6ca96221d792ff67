"""The two protocols of task arithmetic: one model for all tasks by addition, forgetting one task by negation.

Ilharco et al. 2022, arXiv:2212.04089; the searches are those of Ortiz-Jimenez et al. 2023, arXiv:2305.12827: the
coefficient is chosen on validation data from a grid, and the test data are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jft import merge
from jft.delta import TaskVector

# (task, split, task vectors, coefficients [P, T] or [P]) to accuracies [P] in [0, 1]; splits are "validation" and "test".
Score = Callable[[str, str, Sequence[TaskVector], Any], np.ndarray]


def mean(values: Mapping[str, Any]) -> Any:
    """The unweighted mean over tasks."""
    return sum(values.values()) / len(values)


def nonlinear_advantage(linear: float, nonlinear: float, classes: int) -> float:
    """``(error of linear - error of nonlinear) C / (C - 1)``, from accuracies: 1 is from guessing to being always right.

    Ortiz-Jimenez, Favero and Frossard 2023, arXiv:2305.12827, section 4.2.
    """
    # Guessing is right once in C, so errors lie within (C - 1) / C.
    return (nonlinear - linear) * classes / (classes - 1)


def addition(
    vectors: Mapping[str, TaskVector],
    single: Mapping[str, Mapping[str, float]],
    score: Score,
    grid: Sequence[float],
) -> dict[str, Any]:
    """The sum of task vectors times the ``c`` of ``grid`` that has the highest mean normalised validation accuracy.

    single: ``{split: {task: accuracy of the model fine-tuned on it}}``. Returns the coefficient, mean absolute and
    normalised test accuracy, both for each task, and the validation curve over the grid.
    """
    taus = list(vectors.values())
    validation = {task: score(task, "validation", taus, grid) for task in vectors}
    by_coefficient = {c: {task: accuracies[i] for task, accuracies in validation.items()} for i, c in enumerate(grid)}
    result = merge.search(lambda c: merge.addition_row(by_coefficient[c], single["validation"]), grid)
    # The only look at test data, at the coefficient that validation chose.
    absolute = {task: float(score(task, "test", taus, [result.best])[0]) for task in vectors}
    relative = {task: value / single["test"][task] for task, value in absolute.items()}
    return {
        "coefficient": result.best,
        "absolute": mean(absolute),
        "normalised": mean(relative),
        "tasks": {task: {"absolute": absolute[task], "normalised": relative[task]} for task in vectors},
        "curve": [
            {
                "coefficient": row["coefficient"],
                "mean": row["score"],
                "tasks": {task: row[f"normalised/{task}"] for task in vectors},
            }
            for row in result.table
        ],
    }


def negation(
    vector: TaskVector,
    target: str,
    controls: Sequence[str],
    score: Score,
    grid: Sequence[float],
    threshold: float,
) -> dict[str, Any]:
    """Minus the task vector times the ``c`` of ``grid`` that forgets ``target`` most and keeps the controls.

    A coefficient is allowed where the mean validation accuracy on ``controls`` is at least ``threshold`` times that of
    the base; if none is, the coefficient is 0. Returns it with test accuracies on target and control, before and after.
    """

    def target_and_control(split: str, coefficients: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        points = [[-c] for c in coefficients]
        control = mean({name: np.asarray(score(name, split, [vector], points)) for name in controls})
        return np.asarray(score(target, split, [vector], points)), control

    candidates = list(dict.fromkeys([0.0, *grid]))  # the base itself, once
    by_coefficient = dict(zip(candidates, zip(*target_and_control("validation", candidates), strict=True), strict=True))
    result = merge.search(lambda c: merge.negation_row(*by_coefficient[c], by_coefficient[0.0][1], threshold), grid)
    (base_target, after_target), (base_control, after_control) = target_and_control("test", [0.0, result.best])
    row: dict[str, Any] = {
        "coefficient": result.best,
        "target": float(after_target),
        "control": float(after_control),
        "base_target": float(base_target),
        "base_control": float(base_control),
        "curve": [{key: row[key] for key in ("coefficient", "target", "control")} for row in result.table],
    }
    return row | {"drop": row["base_target"] - row["target"]}


def cosines(vectors: Mapping[str, TaskVector]) -> list[list[float]]:
    """The cosine between every two task vectors, symmetric, in the order of ``vectors``."""
    taus = list(vectors.values())
    # Once for each pair, as a cosine is symmetric and costs a pass over both.
    upper = {(i, j): float(taus[i].cosine(taus[j])) for i in range(len(taus)) for j in range(i, len(taus))}
    return [[upper[min(i, j), max(i, j)] for j in range(len(taus))] for i in range(len(taus))]
