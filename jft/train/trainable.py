"""What trains: each member's plan and selection, found from the base and its first batches, or as a checkpoint has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jft import tree
from jft.methods import Plan
from jft.train import selection, step
from jft.train.members import Members
from jft.train.run_config import RunConfig
from jft.train.streams import Streams


@dataclasses.dataclass(frozen=True)
class Trainable:
    """recipe: of the step. plans: each member's. chosen: ``{path: at}`` of all members, as the step takes it.

    decided: what the method came to, where it finds from data which whole layers train. probe: ``probe(i, params)`` is what
    scores of member ``i`` may look at.
    """

    recipe: step.Recipe
    plans: list[Plan]
    chosen: Mapping[str, Any]
    decided: Mapping[str, Any] | None
    probe: Callable[[int, Any], Any]


def find(config: RunConfig, members: Members, streams: Streams, params: Any, workdir: Path | None) -> Trainable:
    """What trains: by name, or as the run in ``workdir`` that is taken up says, or found now."""
    before = selection.saved(workdir)
    # The newest state is that of the update before: what is due at its step is still to come.
    made = max(before.step - 1, 0)
    plans = [selection.method_at(m.method, made, config.steps).plan(m.start(params), config.model) for m in members]
    apply, loss, optimizer = members.apply(config.model, config.mesh), config.objective, members[0].optimizer
    decayed = optimizer.decayed(tree.flatten(params))
    recipe = step.Recipe(apply, plans[0], loss, optimizer.unscheduled(), config.accumulate, config.dtype, decayed)
    recipes = [dataclasses.replace(recipe, plan=plan) for plan in plans]

    def probe(index: int, params: Any) -> Any:
        member, stream = members[index], streams.feed(index)
        evaluation = member.eval_data, config.eval_batches
        return selection.probe_of(
            recipes[index], config.model, params, stream, config.mesh, member.seed, member.optimizer, *evaluation
        )

    decided = before.decided
    if members[0].method.undecided:
        tables = [decided or m.method.decide(probe(i, m.start(params))) for i, m in enumerate(members)]
        plans = [m.method.decided(t).plan(params, config.model) for m, t in zip(members, tables, strict=True)]
        decided = tables[0]
    plans = members.plans([plan.anchored() if optimizer.to_base else plan for plan in plans])
    chosen = before.chosen
    if plans[0].selects and not chosen:
        cells = selection.grids(plans[0], params, config.mesh)
        each = [selection.begin(plan, probe(i, members[i].start(params)), cells) for i, plan in enumerate(plans)]
        chosen = members.chosen(each, params)
    return Trainable(dataclasses.replace(recipe, plan=plans[0]), plans, chosen, decided, probe)
