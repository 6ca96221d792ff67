"""Selection of what trains, from the start and anew during a run: from one plan and what it holds to the next.

Masters and moments of whatever trains before and after keep their values; every other value starts from the live weight,
every other moment at zero or at the schedule's seed. What is dropped goes back to the base, or *settles*: its value stays in
the weight, and is noted as an encoding of values, not of a change, so that the task vector and a run that is taken up later
have it to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import delta, parallel, tree
from jft.methods import InPlace, Method, Parametrisation, Plan, SomeLayers, WithLowRank, select
from jft.methods.schedules import Renewal, Standing
from jft.select.granularity import Block
from jft.select.layers import Listed
from jft.train import step
from jft.train.calibration import calibration_of
from jft.train.state import Holdings, Settled, own

if TYPE_CHECKING:
    from jft.select.calibration import Calibration
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
    """The selection of the run in ``workdir``, if there is one."""
    if workdir is None or not (workdir / "checkpoints").is_dir():
        return Saved()
    # Here: that module loads Orbax, which a run without a workdir never needs.
    from jft.train.checkpoints import newest

    step, decided, shapes = newest(workdir / "checkpoints")
    # The prefix is the field's name in `State`, whose flat form a checkpoint holds.
    return Saved(step, decided, {p.removeprefix("chosen/"): x for p, x in shapes.items() if p.startswith("chosen/")})


def method_at(method: Method, made: int, steps: int) -> Method:
    """The method that trains update ``made``: itself, unless its schedule goes from one to the next."""
    return method if method.schedule is None else method.schedule.method_at(method, made, steps)


def decided(plan: Plan) -> dict[str, Any] | None:
    """The table of whole layers that ``plan`` trains, where its method has decided on one."""
    chosen = plan.method.select.layers
    return dict(chosen.pairs) if isinstance(chosen, Listed) else None


def begin(plan: Plan, calibration: Calibration, cells: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """``{path: at}`` of what trains from the start, inside the weights that ``plan`` selects in."""
    schedule = plan.method.schedule
    return select.choose(plan, calibration, cells) if schedule is None else schedule.begin(plan, calibration, cells)


def grids(plan: Plan, params: Any, mesh: Any) -> Mapping[str, tuple[int, int]]:
    """Into how many cells the last two axes of each weight are cut: as many as it has shards, where its units divide so."""
    if mesh is None:
        return {}
    specs = parallel.specs(params, mesh)
    cells = {}
    for path, x in tree.flatten(params).items():
        if path in plan.selects:
            # A PartitionSpec may be shorter than the shape.
            spec = (*specs[path], *(None,) * len(x.shape))[: len(x.shape)]
            unit = plan.granularity(path, x.shape)
            # A cell must hold whole blocks, or one would lie on two devices.
            block = (unit.rows, unit.columns) if isinstance(unit, Block) else (1, 1)
            # The None in front makes a vector a matrix of one row.
            shards = [parallel.shards(axis, mesh) for axis in (None, *spec)[-2:]]
            sizes = [n // b for n, b in zip((1, *x.shape)[-2:], block, strict=True)]
            rows, columns = (n if size % n == 0 else 1 for n, size in zip(shards, sizes, strict=True))
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
    """The weights that train: by name, as in the resumed run in ``workdir``, or selected now."""
    # First: what trains decides the shapes of the state, and thereby what can be restored.
    before = saved(workdir)
    # The newest state is that of the update before: a selection due at its step is still to be made.
    made = max(before.step - 1, 0)
    plans = [method_at(m.method, made, config.steps).plan(m.start(params), config.model) for m in members]
    # Of the first member: a fleet's optimizers differ in their rates alone.
    loss, optimizer = config.objective, members[0].optimizer
    apply = members.apply(config.model, config.mesh, loss)
    # From the whole base, so that a new selection decays what a first one would.
    decayed = optimizer.decayed(tree.flatten(params))
    recipe = step.Recipe(apply, plans[0], loss, optimizer.unscheduled(), config.accumulate, config.dtype, decayed)
    recipes = [dataclasses.replace(recipe, plan=plan) for plan in plans]

    # A function, since each selection needs one at the weights of its time, and most methods need none.
    def calibration(index: int, params: Any) -> Any:
        member, stream = members[index], streams.feed(index)
        rest = member.optimizer, config.steps, member.eval_data, config.eval_batches
        return calibration_of(recipes[index], config.model, params, stream, config.mesh, member.seed, *rest)

    # A decision is taken once in a run, also where the data would now say otherwise.
    decided = before.decided
    if members[0].method.undecided:
        tables = [decided or m.method.decide(calibration(i, m.start(params))) for i, m in enumerate(members)]
        plans = [m.method.decided(t).plan(params, config.model) for m, t in zip(members, tables, strict=True)]
        decided = tables[0]
    plans = members.plans([plan.anchored() if optimizer.to_base else plan for plan in plans])
    # Shapes are enough here: values come with the checkpoint.
    chosen = before.chosen
    if plans[0].selects and not chosen:
        if config.log.progress and jax.process_index() == 0:
            # Scores may take half a minute on a processor, before anything else is printed.
            print(f"selecting what trains in {len(plans[0].selects)} weights by {members[0].method.name}", flush=True)
        cells = grids(plans[0], params, config.mesh)
        each = [begin(plan, calibration(i, members[i].start(params)), cells) for i, plan in enumerate(plans)]
        chosen = members.chosen(each, plans[0], params)
    return Trainable(dataclasses.replace(recipe, plan=plans[0]), plans, chosen, decided, calibration)


def renew(
    update: step.Step, held: Holdings, base: Any, settled: Settled, look: Any, made: int, steps: int, seed: int
) -> tuple[step.Step, Holdings, Settled]:
    """The step and holdings after the schedule has selected anew before update ``made``; ``look(params)`` calibrates."""
    plan = update.recipe.plan
    kept = plan.attach(held.frozen, held.live, held.state.chosen)
    # At the weights as they now are, in the base's dtypes; `base` itself stays what changes are measured from.
    calibration = look(plan.merged(base, kept, held.state.trained))
    cells = grids(plan, base, update.layout.mesh)
    standing = Standing(plan, kept, held.state.trained, calibration, cells, made, steps)
    renewal = plan.method.schedule.renew(standing)
    after = renewal.method.plan(base, calibration.model) if renewal.method else plan
    return _renewed(update, held, base, settled, renewal, after, seed)


def _renewed(
    update: step.Step, held: Holdings, base: Any, settled: Settled, found: Renewal, plan: Plan, seed: int
) -> tuple[step.Step, Holdings, Settled]:
    """The step and holdings of the selection ``found``, from those of the one before, and all settled values.

    settled: values, not changes, of what trained once.
    """
    recipe, old, mesh = update.recipe, update.recipe.plan, update.layout.mesh
    kept = old.attach(held.frozen, held.live, held.state.chosen)
    trained = held.state.trained
    origin = tree.flatten(base)
    anew = found.weights
    current = {
        p: w if p in anew else _starting_weight(old, p, kept[p], trained.get(p, ()), w) for p, w in origin.items()
    }
    # Weight decay to the base needs its values, which `find` saw to for the first selection.
    plan = plan.anchored() if recipe.optimizer.to_base else plan
    recipe = dataclasses.replace(recipe, plan=plan)
    # From the cache where plan and shapes are as before.
    new = step.compile_step(recipe, base, found.chosen, mesh, seed)
    chosen = jax.device_put(dict(found.chosen), new.layout.state.chosen)
    if old.method.schedule.reset:
        # Weights that start anew have nothing to reset or to settle.
        leaves = {p: how for p, how in old.leaves.items() if p not in anew}
        current = {p: _reset(leaves.get(p), kept[p], trained.get(p), w, origin[p]) for p, w in current.items()}
    else:
        settled = settle(settled, {p: h for p, h in old.leaves.items() if p not in anew}, kept, current)
        # After `settle`: what trains again is the state's from now on.
        settled = resting(settled, plan.leaves)
    # The run's seed again: fixed random parts, as projections, must be the ones of before.
    after, fresh = plan.init(jax.random.key(seed), tree.like(base, current), chosen, origin)
    carry = functools.partial(_carry, old, kept, plan, after)
    # Masters carry over, not the weight that was rounded to the base's dtype.
    values = {p: carry(p, trained[p], current[p].astype(jnp.float32)) for p in fresh if p in trained and p not in anew}
    values |= {p: plan.leaves[p].collect(after[p], anew[p]) for p in fresh if p in anew}
    values = {p: values.get(p, x) for p, x in fresh.items()}
    # Committed, since live weights must hold the carried values and not the initial ones.
    frozen, live, _ = plan.detach(plan.commit(after, values))

    values = jax.device_put(values, new.layout.state.trained)
    start = new.start(values)
    if not found.restart:
        shapes = {p: w.shape for p, w in current.items()}
        start = _moments(held.state.opt_state, start, trained, values, carry, found, recipe.optimizer, shapes)
    state = dataclasses.replace(held.state, trained=values, opt_state=start, chosen=chosen)
    shardings = new.layout.holdings
    # Copies: a weight may be the base's own array, which the step would donate.
    now = Holdings(state, own(live, shardings.live, donate=False), jax.device_put(frozen, shardings.frozen))
    return new, now, settled


def _carry(
    old: Plan, kept: Mapping[str, Any], new: Plan, after: Mapping[str, Any], path: str, values: Any, fill: jax.Array
) -> Any:
    """``values``, shaped like what trained before, as those of what trains now; ``fill`` where they had none."""
    # Through the dense weight: slots of two selections have no relation but their places in it.
    inside = new.leaves[path].collect(after[path], old.leaves[path].spread(kept[path], values, fill))
    # A low-rank change beside what is selected stays as it is.
    return {**values, **inside} if isinstance(inside, dict) else inside


def _starting_weight(plan: Plan, path: str, kept: Any, trained: Any, w: jax.Array) -> jax.Array:
    """The weight that the next selection starts from, in the dtype of the base ``w``."""
    how = plan.leaves.get(path)
    if how is None:
        return kept.astype(w.dtype)
    # Without the low-rank part, which goes on by itself and would be counted twice.
    inside = {"own": trained["own"]} if isinstance(how, WithLowRank) else trained
    # Plain, since a structured weight cannot be cut by another selection.
    return how.bind(kept, inside, structured=False).astype(w.dtype)


def _reset(how: Parametrisation | None, kept: Any, trained: Any, w: jax.Array, base: jax.Array) -> jax.Array:
    """``w`` with what trains back at the base: what stays selected is written again from its master."""
    if how is None or trained is None:
        return w
    if how.selects:
        origin = jax.tree.map(lambda leaf: leaf.origin(kept) if callable(leaf.origin) else None, how.leaves()[1])
    else:
        origin = how.collect(kept, base)
    return how.spread(kept, origin, w).astype(w.dtype)


def _moments(
    before: Any,
    start: Any,
    trained: Mapping,
    values: Mapping,
    carry: Any,
    renewal: Renewal,
    optimizer: Any,
    shapes: Mapping,
) -> Any:
    """The optimizer's state: what is shaped like trained values carries over, and so do counters."""

    # By keys, since the classes of optax's states are its own: any dict over the trained paths is a moment.
    def moments(of: Mapping) -> Any:
        return lambda x: isinstance(x, dict) and x.keys() == of.keys()

    # With paths, whose last key is the moment's name in optax's named tuple.
    old, _ = jax.tree_util.tree_flatten_with_path(before, is_leaf=moments(trained))
    new, structure = jax.tree.flatten(start, is_leaf=moments(values))
    out = []
    # Both have the same optimizer, so they differ inside moments only.
    for (keys, then), now in zip(old, new, strict=True):
        if not moments(trained)(then):
            out.append(then)
            continue
        name = keys[-1].name if hasattr(keys[-1], "name") else ""
        moved = dict(now)
        for path in (now.keys() & then.keys()) - renewal.weights.keys():
            # Factored moments (adafactor) have other shapes than values, and cannot be moved by place.
            if jax.tree.map(jnp.shape, then[path]) == jax.tree.map(jnp.shape, trained[path]):
                moved[path] = carry(path, then[path], _fill(_seed(name, path, renewal, optimizer), shapes[path]))
        out.append(moved)
    return jax.tree.unflatten(structure, out)


def _fill(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(seed, jnp.float32), shape)


def _seed(name: str, path: str, renewal: Renewal, optimizer: Any) -> Any:
    """The initial moment of a newcomer, as Adam would hold it after ``renewal.age`` gradients with these means."""
    if path not in renewal.seeds or not renewal.age:
        return 0.0
    mean, square = renewal.seeds[path]
    if name == "age":
        return jnp.full(mean.shape, renewal.age, jnp.float32)
    if name in ("mu", "nu"):
        decay = optimizer.b1 if name == "mu" else optimizer.b2
        # What `age` steps of a moving average of this mean leave; Adam's bias correction divides it out again.
        return (mean if name == "mu" else square) * (1 - decay**renewal.age)
    return 0.0


def settle(
    settled: Settled, leaves: Mapping[str, Parametrisation], kept: Mapping[str, Any], current: Mapping[str, jax.Array]
) -> Settled:
    """Values of all that trained so far; where something settled before and trained since, what it is now."""
    # Base None: encoded are values, not a change.
    now = {p: how.encode(None, kept[p], how.collect(kept[p], current[p])) for p, how in leaves.items()}
    return {**settled, **{p: settled[p].under(above) if p in settled else above for p, above in now.items()}}


def resting(settled: Settled, leaves: Mapping[str, Parametrisation]) -> Settled:
    """The part of ``settled`` outside the whole weights and layers of ``leaves``, whose values the state has."""
    rest = {p: _not_training(values, leaves.get(p)) for p, values in settled.items()}
    # Arrays of no size cannot be saved.
    return {p: x for p, x in rest.items() if x is not None and all(y.size for y in jax.tree.leaves(x))}


def _not_training(values: delta.Encoding, how: Parametrisation | None) -> delta.Encoding | None:
    # Whole weights train, so nothing of them rests.
    if isinstance(how, InPlace):
        return None
    # What is selected inside weights stays noted: its newer values lie over it, by `under`.
    if not isinstance(how, SomeLayers) or not isinstance(values, delta.Rows):
        return values
    indices = np.flatnonzero(~np.isin(values.indices, how.layers()))
    return delta.Rows(values.indices[indices], values.values[indices], values.shape)


def change(
    settled: Settled, base: Mapping[str, jax.Array], encoded: Mapping[str, delta.Encoding]
) -> dict[str, delta.Encoding]:
    """The whole change from the base: what settled, minus the base there, with what trains now over it."""
    # Subtracted once, at the end: a sum of rounded changes would not give the weight back to the bit.
    moved = {p: values.minus(base[p]) for p, values in settled.items()}
    return {**encoded, **{p: x.under(encoded[p]) if p in encoded else x for p, x in moved.items()}}
