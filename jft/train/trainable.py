"""What trains: each member's plan and selection, found from the base and its first batches, or as a checkpoint has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jft import parallel, tree
from jft.methods import Method, Plan, selecting
from jft.select.calibration import Calibration
from jft.select.granularity import Block
from jft.select.layers import Listed
from jft.train import step
from jft.train.calibration import calibration_of
from jft.train.feed import Streams
from jft.train.members import Members
from jft.train.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Saved:
    """Of the newest checkpoint of a run: updates made, what its method decided, and the shapes of its selection."""

    step: int = 0
    decided: Mapping[str, Any] | None = None
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def saved(workdir: Path | None) -> Saved:
    """What the run in ``workdir``, if there is one, says of what trains."""
    if workdir is None or not (workdir / "checkpoints").is_dir():
        return Saved()
    from jft.train.checkpoints import newest

    step, decided, found = newest(workdir / "checkpoints")
    return Saved(step, decided, {p.removeprefix("chosen/"): x for p, x in found.items() if p.startswith("chosen/")})


def method_at(method: Method, made: int, steps: int) -> Method:
    """The method that trains update ``made``: itself, unless its schedule goes from one to the next."""
    return method if method.schedule is None else method.schedule.method_at(method, made, steps)


def decided(plan: Plan) -> dict[str, Any] | None:
    """The table of whole layers that ``plan`` trains, where its method has come to one."""
    chosen = plan.method.select.layers
    return dict(chosen.pairs) if isinstance(chosen, Listed) else None


def begin(plan: Plan, calibration: Calibration, cells: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """``{path: at}`` of what trains from the start, inside the weights that ``plan`` selects in."""
    schedule = plan.method.schedule
    return selecting.choose(plan, calibration, cells) if schedule is None else schedule.begin(plan, calibration, cells)


def grids(plan: Plan, params: Any, mesh: Any) -> Mapping[str, tuple[int, int]]:
    """Into how many cells the last two axes of each weight are cut: as many as it has shards, where its units divide so."""
    if mesh is None:
        return {}
    specs = parallel.specs(params, mesh)
    cells = {}
    for path, x in tree.flatten(params).items():
        if path in plan.selects:
            spec = (*specs[path], *(None,) * len(x.shape))[: len(x.shape)]
            unit = plan.granularity(path, x.shape)
            block = (unit.rows, unit.columns) if isinstance(unit, Block) else (1, 1)
            wanted = [parallel.shards(axis, mesh) for axis in (None, *spec)[-2:]]
            sizes = [n // b for n, b in zip((1, *x.shape)[-2:], block, strict=True)]
            rows, columns = (n if size % n == 0 else 1 for n, size in zip(wanted, sizes, strict=True))
            cells[path] = rows, columns
    return cells


@dataclasses.dataclass(frozen=True)
class Trainable:
    """recipe: of the step. plans: each member's. chosen: ``{path: at}`` of all members, as the step takes it.

    decided: what the method came to, where it finds from data which whole layers train. calibration: ``calibration(i,
    params)`` is what scores of member ``i`` may look at.
    """

    recipe: step.Recipe
    plans: list[Plan]
    chosen: Mapping[str, Any]
    decided: Mapping[str, Any] | None
    calibration: Callable[[int, Any], Any]


def find(config: RunConfig, members: Members, streams: Streams, params: Any, workdir: Path | None) -> Trainable:
    """What trains: by name, or as the run in ``workdir`` that is taken up says, or found now."""
    before = saved(workdir)
    # The newest state is that of the update before: what is due at its step is still to come.
    made = max(before.step - 1, 0)
    plans = [method_at(m.method, made, config.steps).plan(m.start(params), config.model) for m in members]
    apply, loss, optimizer = members.apply(config.model, config.mesh), config.objective, members[0].optimizer
    decayed = optimizer.decayed(tree.flatten(params))
    recipe = step.Recipe(apply, plans[0], loss, optimizer.unscheduled(), config.accumulate, config.dtype, decayed)
    recipes = [dataclasses.replace(recipe, plan=plan) for plan in plans]

    def calibration(index: int, params: Any) -> Any:
        member, stream = members[index], streams.feed(index)
        rest = member.optimizer, config.steps, member.eval_data, config.eval_batches
        return calibration_of(recipes[index], config.model, params, stream, config.mesh, member.seed, *rest)

    decided = before.decided
    if members[0].method.undecided:
        tables = [decided or m.method.decide(calibration(i, m.start(params))) for i, m in enumerate(members)]
        plans = [m.method.decided(t).plan(params, config.model) for m, t in zip(members, tables, strict=True)]
        decided = tables[0]
    plans = members.plans([plan.anchored() if optimizer.to_base else plan for plan in plans])
    chosen = before.chosen
    if plans[0].selects and not chosen:
        cells = grids(plans[0], params, config.mesh)
        each = [begin(plan, calibration(i, members[i].start(params)), cells) for i, plan in enumerate(plans)]
        chosen = members.chosen(each, params)
    return Trainable(dataclasses.replace(recipe, plan=plans[0]), plans, chosen, decided, calibration)
