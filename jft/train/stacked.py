"""The step of a fleet: that of one run, over members stacked in a leading axis, with one base that all share.

What a member has of its own (trained values, optimizer state, selection, key, batch, and whatever of the base it changed)
is stacked; all else lies on the devices once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jft import tree
from jft.compiled import program_cache
from jft.train import step
from jft.train.state import Holdings, Layout, State, abstract, lay_out, take

TOGETHER = {"cpu": 1}
"""Members computed at once on one device, all where it is not named. A processor gains nothing from larger products, and
loses what fits into its caches."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """The arrays of which each of the ``members`` has one to itself.

    frozen: a flag for every array of what is frozen, in order. batch: whether batches differ. together: members that
    are computed at once, in products that are as many times larger; the others follow in the same program.
    """

    members: int
    frozen: tuple[bool, ...]
    batch: bool
    together: int


class StackedStep(step.Step):
    """:class:`jft.train.step.Step` for a fleet. one: the layout of a member by itself."""

    def __init__(self, recipe: step.Recipe, layout: Layout, one: Layout, holdings: Holdings, axes: Axes):
        self.recipe, self.layout, self.one, self.axes = recipe, layout, one, axes
        self.holdings = abstract(holdings, layout.holdings)
        # Facts of a member must equal those of a run by itself, which has no axis for members.
        self.single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), holdings.state)
        self.stack = (axes.members,)
        flags = jax.tree.unflatten(jax.tree.structure(holdings.frozen), axes.frozen)
        # The rows of a batch are told where to lie only where the members' axis does not take their place.
        mesh = layout.mesh if _whole_members(layout) else None
        one_step = functools.partial(step.step, recipe, mesh)
        self._jitted = jax.jit(
            over_members(one_step, (True, {}, flags, axes.batch, True, True), axes.members, axes.together),
            # No live weights: a fleet shares the base, so nothing is written into it.
            donate_argnums=(0,),
            out_shardings=(layout.state, {}, layout.replicated),
        )
        # Under vmap, so that counters get one value for each member as well.
        self.start = jax.jit(jax.vmap(recipe.transform.init), out_shardings=layout.state.opt_state)
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def member(self, held: Holdings, index: int) -> tuple[State, dict[str, Any]]:
        """``(state, kept)`` of one member: its own arrays taken out, the shared ones as they are."""
        # Laid out as a run by itself would be, since evaluation and the result use its programs.
        state = jax.device_put(take(held.state, index), self.one.state)
        leaves, structure = jax.tree.flatten(held.frozen)
        flagged = zip(leaves, jax.tree.leaves(self.one.holdings.frozen), self.axes.frozen, strict=True)
        frozen = [jax.device_put(take(x, index), sharding) if owns else x for x, sharding, owns in flagged]
        return state, self.recipe.plan.attach(jax.tree.unflatten(structure, frozen), {}, state.chosen)


def _whole_members(layout: Layout) -> bool:
    """Whether every device has a part of all members."""
    # The counter has the members' axis and no other, so its spec tells where that lies.
    sharding = layout.state.step
    return not (isinstance(sharding, NamedSharding) and any(axis is not None for axis in sharding.spec))


def compile_step(
    recipe: step.Recipe, params: Any, owned: set[str], chosen: Mapping[str, Any], mesh: Any, members: int, batch: bool
) -> StackedStep:
    """The step of a fleet, from shapes: the base ``params``, of which each member has those at ``owned`` for itself,
    and the selection ``chosen`` of one member. batch: whether batches differ.
    """
    plan = recipe.plan
    single = step.shapes(recipe, params, chosen)
    one = lay_out(params, plan, single, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    flags = tree.like(params, {p: p in owned for p in tree.flatten(params)})
    # What comes from a member's seed, weights or selection is its own; only the rest of what is kept can be shared.
    kept, _ = depends(plan.init, (key, params, chosen), (True, flags, jax.tree.map(lambda _: True, chosen)))
    frozen, live, _ = plan.detach(kept)
    if live:
        raise ValueError(f"{', '.join(live)} would be written into, and the members of a fleet share them")
    # On a mesh all at once: their axis may be sharded, and a loop would go along it.
    together = TOGETHER.get(one.device.platform, members) if mesh is None else members
    axes = Axes(members, tuple(jax.tree.leaves(frozen)), batch, min(together, members))
    stack = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype))
    owns = jax.tree.map(lambda x, differs: stack(x) if differs else x, single.frozen, frozen)
    held, layout = Holdings(stack(single.state), {}, owns), _widened(one, frozen, members, batch)
    # `one` is not compared: it follows from what is.
    return _make(step.Key(recipe, layout, held, axes, parts=(recipe, layout, one, held, axes)))


@program_cache(maxsize=8)
def _make(key: step.Key) -> StackedStep:
    return StackedStep(*key.parts)


def _widened(one: Layout, flags: Any, members: int, batch: bool) -> Layout:
    """The layout of all members from that of one: over ``data``, which divides nothing else, where they divide by it."""
    mesh = one.mesh
    if mesh is None:
        return one
    size = mesh.shape.get("data", 1)
    # fsdp and tensor go on to divide weights. Members that do not divide lie on all devices.
    axis = "data" if size > 1 and members % size == 0 else None

    def wide(sharding: NamedSharding) -> NamedSharding:
        # A mesh axis may occur once in a spec, so `data` leaves the rows of the batch.
        return NamedSharding(mesh, PartitionSpec(axis, *(_without(axis, part) for part in sharding.spec)))

    held = one.holdings
    frozen = jax.tree.map(lambda place, owns: wide(place) if owns else place, held.frozen, flags)
    return dataclasses.replace(
        one,
        holdings=Holdings(jax.tree.map(wide, held.state), {}, frozen),
        batch=wide(one.batch) if batch else one.batch,
    )


def _without(axis: str | None, part: Any) -> Any:
    """The axes ``part`` of one dimension but ``axis``."""
    if axis is None or part is None:
        return part
    axes = tuple(a for a in (part if isinstance(part, tuple) else (part,)) if a != axis)
    return axes or None


# Conservative: an equation's results all depend on each of its inputs, inner programs included.
def depends(fn: Callable, args: Sequence[Any], flags: Sequence[Any]) -> Any:
    """A flag for every result of ``fn(*args)``: whether it depends on an argument whose flag is set."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    reached = {v for v, flag in zip(jaxpr.invars, jax.tree.leaves(tuple(flags)), strict=True) if flag}
    for equation in jaxpr.eqns:
        # Literals have a `val`, and no hash.
        if any(not hasattr(v, "val") and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    results = [not hasattr(v, "val") and v in reached for v in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def over_members(fn: Callable, flags: Sequence[Any], members: int, together: int) -> Callable:
    """``fn`` for every member, results stacked. flags: for each argument a tree (or prefix) of whether members differ in it.

    together: members computed at once; the others follow.
    """
    if together >= members:
        # None in in_axes keeps one base for all, instead of a copy for each.
        return jax.vmap(fn, in_axes=tuple(jax.tree.map(lambda differs: 0 if differs else None, f) for f in flags))

    # `lax.map` slices all that it gets, so what is shared goes in as a constant of the loop.
    def one_after_another(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        full = jax.tree.leaves(jax.tree.broadcast(tuple(flags), args))
        stacked = [x for x, differs in zip(leaves, full, strict=True) if differs]

        def one(stacked: list) -> Any:
            rest = iter(stacked)
            mixed = [next(rest) if differs else x for x, differs in zip(leaves, full, strict=True)]
            return fn(*jax.tree.unflatten(structure, mixed))

        return jax.lax.map(one, stacked, batch_size=together if together > 1 else None)

    return one_after_another
