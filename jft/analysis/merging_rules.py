"""The rules that a study merges its task vectors by: all of the registry, and those that are functions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from jft import merge
from jft.analysis.merging_inputs import Inputs, Statistics
from jft.delta import TaskVector

Merged = TaskVector | Sequence[TaskVector]
# What a registered rule with statistics reads: see `Inputs.statistics`.
STATISTICS: dict[str, Statistics] = {"fisher": "fisher", "regmean": "grams", "mats": "factors"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table. run: the merge; one task vector, or one for each task.

    reads: the data that it looks at, "" for none. models: the least and largest number of task vectors. start: for a rule
    that learns, what it begins from; objective: what it minimises, of :attr:`Inputs.objectives`.
    """

    name: str
    run: Callable[[Inputs], Merged]
    reads: str = ""
    models: tuple[int, int | None] = (1, None)
    start: Callable[[Inputs], TaskVector] | None = None
    objective: str = ""

    @property
    def learns(self) -> bool:
        return self.start is not None


def entries() -> dict[str, Entry]:
    """All rows by name: the registry's under their first preset, then functions, then those that learn."""
    rows = [*map(_registered, merge.RULES), *_functions(), *_learning()]
    return {row.name: row for row in rows}


def _registered(name: str) -> Entry:
    rule = merge.RULES[name].build()
    kind = STATISTICS.get(name) if rule.statistics else None

    def run(inputs: Inputs) -> Merged:
        statistics = inputs.statistics(kind) if kind else None
        return merge.RULES[name](inputs.taus, base=inputs.base.params, statistics=statistics, seed=inputs.seed or 0)

    return Entry(name, run, f"{kind} of training data" if kind else "", rule.models)


def _functions() -> list[Entry]:
    """Rules around rules, of activations, and of scores."""
    around: dict[str, Callable[..., TaskVector]] = {
        "lines": merge.with_lines(merge.task_arithmetic, beta=1.0),
        "svc": merge.svc,
        "knots": merge.knots,
        "core_space": merge.core_space,
    }
    return [
        *(Entry(name, functools.partial(_of_vectors, rule)) for name, rule in around.items()),
        Entry("esm", lambda i: merge.esm(i.taus, moments=i.grams), "grams of training data"),
        Entry("regmean_plus_plus", _regmean_plus_plus, "grams of training data"),
        Entry("pleas", _pleas, "activations of training data"),
        Entry(
            "greedy_soup",
            lambda i: merge.greedy_soup(i.base.params, i.vectors, i.score, check=False),
            "validation accuracy",
        ),
        Entry("localize_and_stitch", _localize_and_stitch, "labelled training data"),
    ]


def _localize_and_stitch(inputs: Inputs) -> TaskVector:
    return merge.localize_and_stitch(
        inputs.taus,
        base=inputs.base.params,
        objectives=[inputs.objectives["cross_entropy"]] * len(inputs.tasks),
        batches=inputs.numbered,
        data=inputs.data,
        density=0.1,
        learning_rate=1e5,
    )


def _of_vectors(rule: Callable[..., TaskVector], inputs: Inputs) -> TaskVector:
    return rule(inputs.taus)


def _regmean_plus_plus(inputs: Inputs) -> TaskVector:
    return merge.regmean_plus_plus(inputs.taus, inputs.calibrations(), base=inputs.base.params, batches=inputs.count)


def _pleas(inputs: Inputs) -> TaskVector:
    calibrations = inputs.calibrations(tuned=False)
    return merge.pleas(inputs.taus, calibrations, base=inputs.base.params, batches=inputs.count, permute=False)


def _learning() -> list[Entry]:
    """Rules whose coefficients or components gradient descent finds, with rates that suit some hundred steps."""
    by_layer = functools.partial(merge.adamerging, by="layer")
    learners: list[tuple[str, Callable[..., TaskVector], str, float]] = [
        ("learned_soup", _soup, "cross_entropy", 0.1),
        ("learn_coefficients", _ties_weights, "cross_entropy", 0.02),
        ("adamerging_task", _from_average(functools.partial(merge.adamerging, by="task")), "entropy", 0.01),
        ("adamerging_layer", _from_average(by_layer), "entropy", 0.01),
        ("adamerging_plus_plus", _from_average(functools.partial(by_layer, density=0.2)), "entropy", 0.01),
        ("adarank", _from_average(merge.adarank), "entropy", 0.01),
        ("atlas", merge.atlas, "cross_entropy", 0.03),
        ("atlas_4", functools.partial(merge.atlas, partitions=4), "cross_entropy", 0.03),
    ]
    return [_learner(*learner) for learner in learners]


def _from_average(rule: Callable[..., TaskVector]) -> Callable[..., TaskVector]:
    """The rule from coefficients ``1 / N``; the published 0.3, for eight tasks of CLIP, is too large for others."""
    return lambda taus, **how: rule(taus, init=1 / len(taus), **how)


def _learner(name: str, merge_by: Callable[..., TaskVector], objective: str, rate: float) -> Entry:
    def run(inputs: Inputs, rate: float = rate, steps: int | None = None) -> TaskVector:
        return merge_by(
            inputs.taus,
            base=inputs.base.params,
            objective=inputs.objectives[objective],
            batches=inputs.together,
            data=inputs.data,
            learning_rate=rate,
            steps=steps or inputs.config["merging"]["steps"],
        )

    labels = "labelled" if objective == "cross_entropy" else "unlabelled"
    # A step of rate 0 goes nowhere.
    return Entry(name, run, f"{labels} training data", (1, None), lambda i: run(i, rate=0.0, steps=1), objective)


def _soup(
    taus: Sequence[TaskVector],
    *,
    base: Any,
    objective: merge.learned.Objective,
    batches: Sequence[Any],
    data: str,
    learning_rate: float,
    steps: int,
) -> TaskVector:
    optimizer = optax.adamw(learning_rate)
    again = itertools.cycle(batches)
    return merge.learned_soup(base, taus, objective, batches=again, steps=steps, optimizer=optimizer, check=False)


def _ties_weights(taus: Sequence[TaskVector], *, learning_rate: float, **how: Any) -> TaskVector:
    # Trimmed by whole model, which needs values that are known.
    merged = lambda weights, _: merge.ties(taus, weights=weights)
    return merge.learn_coefficients(merged, jnp.ones(len(taus)), taus, optimizer=optax.adam(learning_rate), **how)
