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
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jft import tree
from jft.compiled import program_cache
from jft.train import setup, step
from jft.train.state import Holdings, Layout, State, abstract, lay_out

TOGETHER = {"cpu": 1}
"""Members computed at once on one device, all where it is not named. A processor gains nothing from larger products, and
loses what fits into its caches."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """Of which arrays each of the ``members`` has its own.

    frozen: a flag for every array of what is frozen, in order. batch: whether batches differ. together: members that
    are computed at once, in products that are as many times larger; the others follow in the same program.
    """

    members: int
    frozen: tuple[bool, ...]
    batch: bool
    together: int


def own(fn: Callable, args: Sequence[Any], owned: Sequence[Any]) -> tuple[Any, Any]:
    """``(shapes of fn(*args), a flag for each)``: whether it depends on an argument whose flag in ``owned`` is set."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    flags = jax.tree.leaves(tuple(owned))
    jaxpr = closed.jaxpr
    reached = {v for v, mine in zip(jaxpr.invars, flags, strict=True) if mine}
    for equation in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    found = [not hasattr(v, "val") and v in reached for v in jaxpr.outvars]
    return shapes, jax.tree.unflatten(jax.tree.structure(shapes), found)


def over_members(fn: Callable, flags: Sequence[Any], members: int, together: int) -> Callable:
    """``fn`` for every member, results stacked. flags: for each argument a tree (or prefix) of whether members differ in it."""
    if together >= members:
        return jax.vmap(fn, in_axes=tuple(jax.tree.map(lambda mine: 0 if mine else None, f) for f in flags))

    def one_after_another(*args: Any) -> Any:
        full = tuple(_broadcast(f, a) for f, a in zip(flags, args, strict=True))
        leaves, structure = jax.tree.flatten(args)
        mine = jax.tree.leaves(full)
        stacked = [x for x, m in zip(leaves, mine, strict=True) if m]

        def one(stacked: list) -> Any:
            rest = iter(stacked)
            return fn(
                *jax.tree.unflatten(structure, [next(rest) if m else x for x, m in zip(leaves, mine, strict=True)])
            )

        return jax.lax.map(one, stacked, batch_size=together if together > 1 else None)

    return one_after_another


def _broadcast(flags: Any, value: Any) -> Any:
    """A prefix of flags as a flag for every leaf."""
    return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), flags, value)


class Fleet(step.Step):
    """:class:`jft.train.step.Step` for a fleet. one: the layout of a member by itself; params: flags of the base's weights."""

    def __init__(self, recipe: step.Recipe, layout: Layout, one: Layout, holdings: Holdings, axes: Axes):
        self.recipe, self.layout, self.one, self.axes = recipe, layout, one, axes
        self.holdings = abstract(holdings, layout.holdings)
        self._numbers = (axes.members,)
        self.flags = jax.tree.unflatten(jax.tree.structure(holdings.frozen), axes.frozen)
        # The rows of a batch are told where to lie only where the members' axis does not take their place.
        mesh = layout.mesh if _whole_members(layout) else None
        self._jitted = jax.jit(
            over_members(
                functools.partial(step.step, recipe, mesh),
                (True, {}, self.flags, axes.batch, True, True),
                axes.members,
                axes.together,
            ),
            donate_argnums=(0,),
            out_shardings=(layout.state, {}, layout.replicated),
        )
        self.start = jax.jit(jax.vmap(recipe.transform.init), out_shardings=layout.state.opt_state)
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def member(self, held: Holdings, index: int) -> tuple[State, dict[str, Any]]:
        """``(state, kept)`` of one member: its own arrays taken out, the shared ones as they are."""
        state = jax.device_put(taken(held.state, index), self.one.state)
        leaves, structure = jax.tree.flatten(held.frozen)
        places = jax.tree.leaves(self.one.holdings.frozen)
        flagged = zip(leaves, places, self.axes.frozen, strict=True)
        own = [jax.device_put(taken(x, index), place) if owns else x for x, place, owns in flagged]
        return state, self.recipe.plan.attach(jax.tree.unflatten(structure, own), {}, state.chosen)


def _whole_members(layout: Layout) -> bool:
    """Whether every device has a part of all members."""
    place = layout.state.step
    return not (isinstance(place, NamedSharding) and any(axis is not None for axis in place.spec))


def compile_fleet(
    recipe: step.Recipe,
    params: Any,
    owned: Mapping[str, bool],
    chosen: Mapping[str, Any],
    mesh: Any,
    members: int,
    batch: bool,
) -> Fleet:
    """The step of a fleet, from shapes of one member: the base ``params``, of which it has those that ``owned`` flags for
    itself, and its selection ``chosen``. batch: whether batches differ.
    """
    plan = recipe.plan
    single = setup.shapes(recipe, params, chosen)
    one = lay_out(params, plan, single, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    flags = tree.like(params, {p: owned.get(p, False) for p in tree.flatten(params)})
    _, (kept, _) = own(plan.init, (key, params, chosen), (True, flags, jax.tree.map(lambda _: True, chosen)))
    frozen, live, _ = plan.detach(kept)
    if live:
        raise ValueError(f"{', '.join(live)} would be written into, and the members of a fleet share them")
    together = TOGETHER.get(one.device.platform, members) if mesh is None else members
    axes = Axes(members, tuple(jax.tree.leaves(frozen)), batch, min(together, members))
    held = Holdings(_stacked(single.state, members), {}, _flagged(single.frozen, frozen, members))
    layout = _widened(one, frozen, members, batch)
    return _make(step.Key(recipe, layout, held, axes, parts=(recipe, layout, one, held, axes)))


@program_cache(maxsize=8)
def _make(key: step.Key) -> Fleet:
    return Fleet(*key.parts)


def _stacked(value: Any, members: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype), value)


def _flagged(value: Any, flags: Any, members: int) -> Any:
    return jax.tree.map(lambda x, mine: _stacked(x, members) if mine else x, value, flags)


def _widened(one: Layout, flags: Any, members: int, batch: bool) -> Layout:
    """The layout of all members from that of one: over ``data``, which divides nothing else, where they divide by it."""
    mesh = one.mesh
    if mesh is None:
        return one
    size = mesh.shape.get("data", 1)
    axis = "data" if size > 1 and members % size == 0 else None

    def wide(place: NamedSharding) -> NamedSharding:
        inner = (_without(axis, part) for part in place.spec)
        return NamedSharding(mesh, PartitionSpec(axis, *inner))

    held = one.holdings
    frozen = jax.tree.map(lambda place, mine: wide(place) if mine else place, held.frozen, flags)
    return dataclasses.replace(
        one,
        holdings=Holdings(jax.tree.map(wide, held.state), {}, frozen),
        batch=wide(one.batch) if batch else one.batch,
    )


def _without(axis: str | None, part: Any) -> Any:
    """The axes ``part`` of one dimension but ``axis``."""
    if axis is None or part is None:
        return part
    left = tuple(a for a in (part if isinstance(part, tuple) else (part,)) if a != axis)
    return left or None


def hold(update: Fleet, params: Any, mine: Sequence[Mapping[str, Any]], chosen: Any, seeds: Sequence[int]) -> Holdings:
    """All that a fleet holds before its first step. mine: by path, each member's weights in place of the base's."""
    plan, places = update.recipe.plan, update.layout.holdings
    frozen, trained, chosen = _init(update, params, mine, chosen, seeds)
    trained = jax.device_put(trained, places.state.trained)
    rule = plan.method.rule
    members = update.axes.members
    keys = np.stack([np.asarray(jax.random.key_data(jax.random.key(seed))) for seed in seeds])
    state = State(
        step=jax.device_put(np.zeros(members, np.int32), places.state.step),
        trained=trained,
        opt_state=update.start(trained),
        rng=jax.device_put(keys, places.state.rng),
        chosen=chosen,
        memory=jax.device_put(jax.vmap(rule.init)(trained), places.state.memory) if rule else None,
    )
    return Holdings(state, {}, frozen)


def take_up(
    update: Fleet, params: Any, mine: Sequence[Mapping[str, Any]], state: State, seeds: Sequence[int]
) -> Holdings:
    """All that a fleet holds that goes on from ``state``."""
    frozen, _, _ = _init(update, params, mine, state.chosen, seeds)
    return Holdings(state, {}, frozen)


def _init(update: Fleet, params: Any, mine: Sequence[Mapping[str, Any]], chosen: Any, seeds: Sequence[int]) -> Any:
    """``(frozen, trained, chosen)`` of all members, each made as a run by itself makes its own."""
    plan, places = update.recipe.plan, update.layout.holdings
    chosen = jax.device_put(chosen, places.state.chosen)
    frozen: Any = None
    trained, owned = [], []
    for i, (seed, own) in enumerate(zip(seeds, mine, strict=True)):
        base = tree.like(params, {**tree.flatten(params), **own})
        kept, values = plan.init(jax.random.key(seed), base, taken(chosen, i))
        trained.append(values)
        leaves = jax.tree.leaves(plan.detach(kept)[0])
        owned.append([x for x, owns in zip(leaves, update.axes.frozen, strict=True) if owns])
        frozen = frozen or plan.detach(kept)[0]
    rest = iter([joint(x) for x in zip(*owned, strict=True)])
    leaves, structure = jax.tree.flatten(frozen)
    joined = [next(rest) if owns else x for x, owns in zip(leaves, update.axes.frozen, strict=True)]
    placed = jax.device_put(jax.tree.unflatten(structure, joined), places.frozen)
    return placed, jax.tree.map(lambda *x: joint(x), *trained), chosen


def joint(arrays: Sequence[Any]) -> Any:
    """Arrays of all members as one; on the host where they are all there, which compiles nothing."""
    if all(x.is_fully_addressable for x in arrays):
        return np.stack([np.asarray(x) for x in arrays])
    return jnp.stack(arrays)


def taken(value: Any, i: int) -> Any:
    """The part of member ``i``: the inverse of :func:`joint`."""

    def take(x: Any) -> Any:
        if isinstance(x, np.ndarray) or x.is_fully_addressable:
            return jnp.asarray(np.asarray(x)[i])
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    return jax.tree.map(take, value)
