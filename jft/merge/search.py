"""The search for coefficients: the best of several points, with or without a constraint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jft.delta import TaskVector, apply
from jft.delta.manifest import verify
from jft.merge.rule import Vectors
from jft.merge.sums import task_arithmetic

# Rounded, so that tables and command lines show 0.15 and not 0.15000000000000002.
GRID = tuple(float(c) for c in np.linspace(0, 1, 21).round(2))
Evaluate = Callable[[Any], float]
Row = dict[str, Any]
Point = float | tuple[Any, ...] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search.

    best: the coefficient, or the point: a tuple or dict of coefficients and options. table: one row per point tried, in
    order: ``coefficient`` (the point), ``score``, ``feasible``, and what was measured. feasible: False where no point met
    the constraint; ``best`` is then the base itself, which is 0 among numbers and None among other points.
    """

    best: Any
    table: list[Row]
    feasible: bool = True

    @property
    def row(self) -> Row | None:
        """The row of ``best``; None where nothing was feasible and 0 was not tried."""
        return next((row for row in self.table if row["coefficient"] == self.best), None)


def search(score: Callable[[Any], float | Mapping[str, Any]], grid: Iterable[Point] = GRID) -> Search:
    """The coefficient, or point, of ``grid`` with the highest score; of equal ones, the smallest in magnitude.

    grid: numbers, or points with several (tuples, or dicts by name: :func:`jft.merge.product`, :func:`jft.merge.draws`),
    whose magnitude is the sum of those of their numbers; of equal ones still, the first. score: coefficient or point -> a
    number, or a row with ``score``, optionally ``feasible`` (False: never chosen), and whatever else belongs in the table.
    A score that is not finite is never chosen. Where nothing is feasible, best is 0 (None among points of several numbers)
    and ``feasible`` False. Raises ``ValueError`` for an empty grid, or one with repeats or numbers that are not finite.
    """
    coefficients = _coefficients(grid)
    return best_of([row_of(c, score(c)) for c in coefficients])


def best_of(table: list[Row]) -> Search:
    """The search whose rows, of :func:`row_of`, are ``table``."""
    feasible = [row for row in table if math.isfinite(rank(row)[0])]
    if not feasible:
        return Search(0.0 if isinstance(table[0]["coefficient"], float) else None, table, feasible=False)
    return Search(max(feasible, key=rank)["coefficient"], table)


def rank(row: Row) -> tuple[float, float]:
    """What the best row has most of: the score, minus infinity for what may not be chosen; then minus the magnitude."""
    eligible = row["feasible"] and math.isfinite(row["score"])
    return row["score"] if eligible else -math.inf, -sum(abs(x) for x in numbers(row["coefficient"]))


def addition_search(
    base: Any,
    vectors: Vectors,
    evaluate: Mapping[str, Evaluate],
    single: Mapping[str, float],
    grid: Iterable[float] = GRID,
    check: bool = True,
) -> Search:
    """The ``c`` for which ``base + c * sum(vectors)`` has the highest mean normalised accuracy over the tasks.

    evaluate: task -> function from parameters to validation accuracy. single: task -> accuracy of the model fine-tuned
    on that task alone, which its accuracy is divided by. A list of one vector, merged by any other rule, is searched just
    as well. Rows hold ``accuracy/TASK``, ``normalised/TASK``, ``accuracy`` (mean) and ``score`` (mean normalised). One set
    of merged parameters exists at a time. check: verify that ``base`` is the base of the vectors. Ilharco et al. 2022,
    arXiv:2212.04089; Ortiz-Jimenez et al. 2023, arXiv:2305.12827.

    Raises ``ValueError`` where tasks of ``evaluate`` and ``single`` differ, or a single-task accuracy is not positive.
    """
    measure = addition_measure(evaluate, single)
    return search(_at_coefficient(base, task_arithmetic(vectors), measure, check), grid)


def addition_measure(evaluate: Mapping[str, Evaluate], single: Mapping[str, float]) -> Callable[[Any], Row]:
    """``parameters -> row`` of :func:`addition_search`, whose arguments these are and whose errors it raises."""
    _same_tasks(evaluate, single)
    return lambda params: addition_row({task: fn(params) for task, fn in evaluate.items()}, single)


def addition_row(accuracies: Mapping[str, float], single: Mapping[str, float]) -> Row:
    """A row of :func:`addition_search`, from the accuracies at one coefficient."""
    normalised = {task: float(a) / float(single[task]) for task, a in accuracies.items()}
    return {
        **{f"accuracy/{task}": float(a) for task, a in accuracies.items()},
        **{f"normalised/{task}": n for task, n in normalised.items()},
        "accuracy": float(sum(accuracies.values())) / len(accuracies),
        "score": sum(normalised.values()) / len(normalised),
    }


def negation_search(
    base: Any,
    tau: TaskVector,
    target: Evaluate,
    control: Evaluate,
    grid: Iterable[float] = GRID,
    threshold: float = 0.95,
    check: bool = True,
) -> Search:
    """The ``c`` for which ``base - c * tau`` has the lowest target accuracy, control staying at ``threshold`` of the base's.

    target, control: functions from parameters to validation accuracy, on the task to forget and on one to keep. The
    constraint is ``control(params) >= threshold * control(base)``. Rows hold ``target``, ``control``, ``feasible`` and
    ``score`` (minus target). Papers as in :func:`addition_search`. Raises ``ValueError`` for a threshold outside (0, 1].
    """
    return search(_at_coefficient(base, -tau, negation_measure(base, target, control, threshold), check), grid)


def negation_measure(base: Any, target: Evaluate, control: Evaluate, threshold: float = 0.95) -> Callable[[Any], Row]:
    """``parameters -> row`` of :func:`negation_search`, whose arguments these are; control of the base is measured now."""
    _check_threshold(threshold)
    before = control(base)
    return lambda params: negation_row(target(params), control(params), before, threshold)


def negation_row(target: float, control: float, before: float, threshold: float = 0.95) -> Row:
    """A row of :func:`negation_search`, from the accuracies at one coefficient and that of the base on the control."""
    _check_threshold(threshold)
    feasible = float(control) >= threshold * float(before)
    return {"target": float(target), "control": float(control), "score": -float(target), "feasible": feasible}


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is the fraction of control accuracy to keep, in (0, 1], not {threshold}")


def _at_coefficient(base: Any, tau: TaskVector, measure: Callable[[Any], Row], check: bool) -> Callable[[float], Row]:
    """``c -> measure(base + c * tau)``; the base is verified once, and the parameters are gone when it returns."""
    if check:
        verify(tau.manifest, base)
    # 0 is the base itself: no second set of parameters.
    return lambda c: measure(base if c == 0 else apply(base, tau, c, check=False))


def row_of(point: Any, value: float | Mapping[str, Any]) -> Row:
    """The row of the table for a point and the value of its score function."""
    row = dict(value) if isinstance(value, Mapping) else {"score": value}
    if "score" not in row:
        raise ValueError(f"the score function must return a number or a row with 'score'; it has {', '.join(row)}")
    feasible = bool(row.pop("feasible", True))
    return {"coefficient": point, **row, "score": float(row["score"]), "feasible": feasible}


def _coefficients(grid: Iterable[Any]) -> list[Any]:
    coefficients = [c if isinstance(c, tuple | Mapping) else float(c) for c in grid]
    if not coefficients:
        raise ValueError("the grid has no coefficients to try")
    finite = all(math.isfinite(x) for c in coefficients for x in numbers(c))
    if len({key_of(c) for c in coefficients}) != len(coefficients) or not finite:
        raise ValueError(f"the grid must be distinct finite numbers, not {coefficients}")
    if len({type(c) for c in coefficients}) > 1:
        raise ValueError(f"the points of a grid must be of one kind, numbers, tuples or dicts, not {coefficients}")
    return coefficients


def numbers(point: Any) -> list[float]:
    """The numbers of a point, those within tuples and lists of it as well; names and flags are none."""
    if isinstance(point, Mapping):
        return numbers(tuple(point.values()))
    if isinstance(point, tuple | list):
        return [x for part in point for x in numbers(part)]
    return [] if point is None or isinstance(point, str | bool) else [float(point)]


def key_of(point: Any) -> Any:
    """Equal and hashable for equal points, whatever the order of their names."""
    if isinstance(point, Mapping):
        return frozenset((name, key_of(value)) for name, value in point.items())
    return tuple(map(key_of, point)) if isinstance(point, tuple | list) else point


def _same_tasks(evaluate: Mapping[str, Any], single: Mapping[str, float]) -> None:
    if not evaluate:
        raise ValueError("evaluate names no tasks")
    unmatched = sorted(set(evaluate) ^ set(single))
    if unmatched:
        raise ValueError(f"evaluate and single must name the same tasks; {unmatched[0]!r} is in one alone")
    for task, accuracy in single.items():
        if not accuracy > 0:
            raise ValueError(f"the single-task accuracy of {task!r} must be positive to normalise by, not {accuracy}")
