"""Which parts of weights train: what scores may look at, what a run that is taken up says, and selecting anew."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jft import parallel, tree
from jft.methods import InPlace, Method, Plan, Select, selecting
from jft.methods.parametrise import Parametrisation
from jft.methods.schedules import Standing
from jft.select.granularity import Block
from jft.select.layers import Listed
from jft.select.probe import Probe
from jft.train import evaluation, renewal, step
from jft.train.feed import Feed
from jft.train.probe import LoopProbe
from jft.train.renewal import Settled
from jft.train.state import Holdings


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


def begin(plan: Plan, probe: Probe, cells: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """``{path: at}`` of what trains from the start, inside the weights that ``plan`` selects in."""
    schedule = plan.method.schedule
    return selecting.choose(plan, probe, cells) if schedule is None else schedule.begin(plan, probe, cells)


def renew(
    update: step.Step, held: Holdings, base: Any, settled: Settled, look: Any, made: int, steps: int, seed: int
) -> tuple[step.Step, Holdings, Settled]:
    """What the run goes on with after its schedule has selected anew before update ``made``; ``look(params)`` is a probe."""
    plan = update.recipe.plan
    kept = plan.attach(held.frozen, held.live, held.state.chosen)
    probe = look(plan.merged(base, kept, held.state.trained))
    where = grids(plan, base, update.layout.mesh)
    standing = Standing(plan, kept, held.state.trained, probe, where, made, steps)
    found = plan.method.schedule.renew(standing)
    after = found.method.plan(base, probe.model) if found.method else plan
    return renewal.renew(update, held, base, settled, found, after, seed)


def probe_of(
    recipe: step.Recipe,
    model: Any,
    params: Any,
    stream: Feed,
    mesh: Any,
    seed: int,
    optimizer: Any,
    eval_data: Any = None,
    eval_batches: int = 0,
) -> LoopProbe:
    """What scores may look at: ``params``, and the batches that the stream gives next."""

    def train(steps: int, table: Any = None, how: Any = None, penalties: tuple = ()) -> Any:
        from jft.train.finetune import finetune

        if table is None:
            which = _phase(recipe.plan, how or InPlace(), penalties)
        else:
            method = recipe.plan.method
            which = Method(Select(), InPlace(), method.also, method.freeze, name="phase").decided(table)
        position = stream.position()
        tuned = finetune(
            model,
            params,
            _Borrowed(stream, recipe.objective),
            steps=steps,
            method=which,
            optimizer=optimizer,
            objective=recipe.objective,
            mesh=mesh,
            accumulate=recipe.accumulate,
            dtype=recipe.dtype,
            seed=seed,
            log={"progress": False},
        )
        stream.seek(position)
        # In float32, so that small steps from a base of fewer bits are seen.
        inside = recipe.plan.selects or tuple(recipe.plan.leaves)
        wide = lambda p, x: jax.ShapeDtypeStruct(
            x.shape, jnp.promote_types(x.dtype, jnp.float32) if p in inside else x.dtype
        )
        return tuned.merged(tree.map_with_path(wide, params))

    def evaluate(params: Any) -> dict[str, float]:
        if eval_data is None or hasattr(eval_data, "__next__"):
            raise ValueError("this method chooses by evaluation, again and again; give eval_data, a list or a loader")
        compute = evaluation.sums(step.apply_of(model), recipe.objective)
        return evaluation.mean(compute, params, eval_data, recipe.objective, mesh, eval_batches)

    return LoopProbe(
        model,
        params,
        recipe.plan.selects or tuple(recipe.plan.leaves),
        recipe.objective,
        lambda: _ahead(stream),
        seed=seed,
        mesh=mesh,
        dtype=recipe.dtype,
        accumulate=recipe.accumulate,
        train=train,
        evaluate=evaluate,
    )


def _phase(plan: Plan, how: Parametrisation, penalties: tuple) -> Method:
    """Training of the candidates of ``plan`` as a whole, and as it does of whatever trains beside them."""
    inside = plan.selects or tuple(plan.leaves)
    named = {p: f"^{re.escape(p)}$" for p in plan.leaves}
    beside = tuple(pattern for p, pattern in named.items() if p not in inside)
    return Method(Select(tuple(named[p] for p in inside)), how, beside, penalties=penalties, name="phase")


def _ahead(stream: Feed) -> Iterator[Any]:
    """The batches that ``stream`` will give, from the next one on."""
    count = 0
    while True:
        count += 1
        yield stream.ahead(count)[-1]


class _Borrowed:
    """The stream as data of another run; going back to where it stood is left to the lender."""

    def __init__(self, stream: Feed, objective: Any):
        self._stream, self._objective, self._taken = stream, objective, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._taken += 1
        return self._stream.next(self._taken - 1, self._objective)


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
