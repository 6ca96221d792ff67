"""`State` and `Holdings`: the arrays of a run, how they start or are restored, and their shardings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jft import delta, parallel, tree
from jft.methods import Plan
from jft.models.core import on_mesh

if TYPE_CHECKING:
    from jft.train.step import Step

Seeds = int | Sequence[int]
Overlays = Sequence[Mapping[str, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of a run: argument and result of a step, and all that a checkpoint holds of the run.

    step: updates made, int32. trained: ``{path: pytree}`` of float32 masters. opt_state: of the optimizer, over ``trained``
    only. rng: the run's key data, uint32; a draw in step n folds n in, so the key itself never changes. chosen: ``{path:
    at}``, which parts of weights train, where a method selects inside them. memory: of the method's rule, if it has one.
    What is *kept* of the base is no part of the state: it is never differentiated or saved; live weights among it are
    donated to every step, and follow from the base and the state.
    """

    step: jax.Array
    trained: dict[str, Any]
    opt_state: Any
    rng: jax.Array
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    memory: Any = None


def create(
    plan: Plan,
    trained: Mapping[str, Any],
    chosen: Mapping[str, Any],
    transform: optax.GradientTransformation,
    seed: int,
) -> State:
    """The state before the first step; under ``jax.eval_shape`` its shapes."""
    return State(
        step=jnp.zeros((), jnp.int32),
        # Plain dicts: the tree's structure is part of what a compiled step is found by.
        trained=dict(trained),
        opt_state=transform.init(trained),
        # Key data, not a typed key: a checkpoint holds plain arrays.
        rng=jax.random.key_data(jax.random.key(seed)),
        chosen=dict(chosen),
        memory=plan.method.rule.init(trained) if plan.method.rule else None,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Holdings:
    """All that a run holds on its devices, as arrays or shapes: the state, live weights, and what is frozen."""

    state: State
    live: dict[str, Any]
    frozen: dict[str, Any]


# Values of weights that trained once and stay while others train, by path (:mod:`jft.train.reselection`).
Settled = dict[str, delta.Encoding]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shardings of parameters, of what a run holds and of batches. mesh: None for a single device."""

    mesh: Mesh | None
    params: Any
    holdings: Holdings
    batch: Any
    replicated: Any

    @property
    def state(self) -> State:
        return self.holdings.state

    @property
    def device(self) -> jax.Device:
        """One of its devices, for its memory and peak FLOP/s."""
        # The smallest id, since a set has no order and messages should not change from run to run.
        return min(self.replicated.device_set, key=lambda d: d.id)

    @property
    def devices(self) -> int:
        return len(self.replicated.device_set)


def find_mesh(params: Any) -> Mesh | None:
    """The mesh of the parameters' shardings, if any."""
    for x in jax.tree.leaves(params):
        sharding = getattr(x, "sharding", None)
        # Not an abstract mesh, which has no devices; and a mesh of one device needs no shardings.
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def lay_out(params: Any, plan: Plan, holdings: Holdings, mesh: Mesh | None) -> Layout:
    """The layout of a run on ``mesh``."""
    if mesh is None:
        # Where the parameters lie; shapes and numpy arrays lie nowhere, so then the default device.
        device = next((d for x in jax.tree.leaves(params) for d in getattr(x, "devices", set)()), jax.devices()[0])
        one = SingleDeviceSharding(device)

        def everywhere(value: Any) -> Any:
            return jax.tree.map(lambda _: one, value)

        return Layout(None, everywhere(params), everywhere(holdings), one, one)

    state = holdings.state
    named = parallel.specs(params, mesh)
    # From the weights' specs, so that each value lies with the part of the weight that it changes.
    kept_specs, trained_specs = plan.specs(named, params, state.chosen)
    frozen, live, chosen = plan.detach(kept_specs)
    # Specs stand in for arrays here: a State of them has the structure of the state.
    whole: Any = PartitionSpec()
    state_specs = State(
        step=whole,
        trained=trained_specs,
        opt_state=_like_trained(state.opt_state, state.trained, trained_specs),
        rng=whole,
        chosen=chosen,
        memory=_like_trained(state.memory, state.trained, trained_specs),
    )

    def sharding(spec: PartitionSpec, x: Any) -> NamedSharding:
        # Factors and slots may have axes that the mesh does not divide, where the weight's are divided.
        return NamedSharding(mesh, parallel.dividing(spec, x.shape, mesh))

    specs = Holdings(state_specs, live, frozen)
    return Layout(
        mesh=mesh,
        params=tree.like(params, {p: NamedSharding(mesh, s) for p, s in named.items()}),
        holdings=jax.tree.map(sharding, specs, holdings, is_leaf=lambda s: isinstance(s, PartitionSpec)),
        batch=parallel.batch_sharding(mesh),
        replicated=NamedSharding(mesh, whole),
    )


def _like_trained(opt_state: Any, trained: Any, specs: Any) -> Any:
    """Specs of the optimizer's state: a leaf at the path and of the shape of a trained one is sharded as that is.

    Whatever else there is (counters, adafactor's factored moments) is small and replicated.
    """
    spec_of = tree.flatten(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    shapes = {path: x.shape for path, x in tree.flatten(trained).items()}

    def find(path: str, x: Any) -> PartitionSpec:
        # optax puts the tree of values below its own names, so a moment's path ends with the value's.
        ends = [p for p, shape in shapes.items() if path.endswith("/" + p) and shape == x.shape]
        # The longest: `head/w` may be the end of `text/head/w`.
        return spec_of[max(ends, key=len)] if ends else PartitionSpec()

    return tree.map_with_path(find, opt_state)


def abstract(value: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, for compiling before anything is allocated."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), value, shardings)


def hold(
    update: Step, params: Any, chosen: Any, seed: Seeds, donate: bool = False, overlays: Overlays = ({},)
) -> Holdings:
    """All that a run holds before its first step. ``params`` are sharded as in ``update.layout``.

    seed, overlays: of a fleet those of its members; overlays: by path, weights in place of the base's. donate: live weights
    take over the memory of ``params``, which cannot be used afterwards.
    """
    plan, shardings = update.recipe.plan, update.layout.state
    chosen = jax.device_put(chosen, shardings.chosen)
    frozen, live, trained = _start(update, params, chosen, seed, donate, overlays, {})
    trained = jax.device_put(trained, shardings.trained)
    keys = [np.asarray(jax.random.key_data(jax.random.key(s))) for s in _as_sequence(seed)]
    rule = plan.method.rule
    memory = (jax.vmap(rule.init) if update.stack else rule.init)(trained) if rule else None
    state = State(
        step=jax.device_put(np.zeros(update.stack, np.int32), shardings.step),
        trained=trained,
        # Compiled with the layout's shardings, so that moments are made where they lie.
        opt_state=update.start(trained),
        rng=jax.device_put(join(keys, update.holdings.state.rng), shardings.rng),
        chosen=chosen,
        memory=jax.device_put(memory, shardings.memory),
    )
    return Holdings(state, live, frozen)


def take_up(
    update: Step, params: Any, state: State, settled: Settled, seed: Seeds, donate: bool, overlays: Overlays
) -> Holdings:
    """All that a run holds that goes on from ``state``: live weights hold its values again, and what settled in them."""
    # Initial values are made and dropped: what is kept may depend on the same draw.
    frozen, live, _ = _start(update, params, state.chosen, seed, donate, overlays, settled)
    return Holdings(state, _commit(update, frozen, live, state), frozen)


def _as_sequence(seed: Seeds) -> Sequence[int]:
    return seed if isinstance(seed, Sequence) else [seed]


def _start(
    update: Step, params: Any, chosen: Any, seed: Seeds, donate: bool, overlays: Overlays, settled: Settled
) -> tuple[Any, Any, Any]:
    """``(frozen, live, trained)`` of all members, each made as a run by itself makes its own."""
    plan, like, shardings = update.recipe.plan, update.holdings, update.layout.holdings
    each: list[tuple[Any, Any, Any]] = []
    for i, (key, weights) in enumerate(zip(map(jax.random.key, _as_sequence(seed)), overlays, strict=True)):
        base = {**tree.flatten(params), **weights}
        start = tree.like(params, {p: settled[p].written(w) if p in settled else w for p, w in base.items()})
        selected = take(chosen, i) if update.stack else chosen
        # With values that settled, weights are no longer the base that changes are measured from.
        kept, trained = plan.init(key, start, selected, base if settled else None)
        frozen, live, _ = plan.detach(kept)
        if each:  # what members share is held once, not until all are made
            frozen = jax.tree.map(lambda to, a, b: b if to.ndim > b.ndim else a, like.frozen, each[0][0], frozen)
        each.append((frozen, live, trained))
    frozens, lives, values = zip(*each, strict=True)
    frozen = jax.device_put(join(frozens, like.frozen), shardings.frozen)
    # The first member's: a fleet has no live weights.
    return frozen, own(lives[0], shardings.live, donate), join(values, like.state.trained)


def measured(update: Step, held: Holdings, calibrations: Sequence[Callable[[], Any]], steps: int) -> Holdings:
    """Holdings with the memory of the method's rule, measured on each member's base before the first of ``steps`` updates."""
    plan, rule = update.recipe.plan, update.recipe.plan.method.rule
    if rule is None:
        return held
    memory = held.state.memory
    first = [rule.start(take(memory, i) if update.stack else memory, steps) for i in range(len(calibrations))]
    # Calibrations are functions, called one by one: each may hold a copy of the parameters.
    each = [rule.measure(plan, look(), start) for start, look in zip(first, calibrations, strict=True)]
    each = [start if measure is None else measure for start, measure in zip(first, each, strict=True)]
    # The rule decides, so all members have a memory or none has.
    if each[0] is not None:
        memory = jax.device_put(join(each, update.holdings.state.memory), update.layout.state.memory)
    return dataclasses.replace(held, state=dataclasses.replace(held.state, memory=memory))


def go_back(update: Step, held: Holdings, state: State) -> Holdings:
    """Holdings with another state of the same run and live weights that have its values."""
    return Holdings(state, _commit(update, held.frozen, held.live, state), held.frozen)


def _commit(update: Step, frozen: Any, live: Any, state: State) -> Any:
    plan = update.recipe.plan

    def write(live: Any, frozen: Any, state: State) -> Any:
        with on_mesh(update.layout.mesh):
            return plan.detach(plan.commit(plan.attach(frozen, live, state.chosen), state.trained))[1]

    # Donated, or there would be two copies of the live weights for a moment.
    return jax.jit(write, donate_argnums=0)(live, frozen, state) if live else live


def own(live: Any, shardings: Any, donate: bool) -> Any:
    """Live weights for the run alone: copies, unless it may take the base's."""
    live = jax.device_put(live, shardings)
    # `device_put` gives back the same array where it lies there already, and the step donates it.
    return live if donate else jax.tree.map(lambda x: jnp.array(x, copy=True), live)


def join(each: Sequence[Any], like: Any) -> Any:
    """Equal trees of all members as one: stacked where ``like`` has an axis more, else the first member's."""
    return jax.tree.map(lambda to, *x: stack(x) if to.ndim > np.ndim(x[0]) else x[0], like, *each)


def stack(arrays: Sequence[Any]) -> Any:
    """Arrays of all members as one; on the host where they are all there, which compiles nothing."""
    if all(isinstance(x, np.ndarray) or x.is_fully_addressable for x in arrays):
        return np.stack([np.asarray(x) for x in arrays])
    return jnp.stack(arrays)


def take(value: Any, i: int) -> Any:
    """The part of member ``i``: the inverse of :func:`stack`."""

    def part(x: Any) -> Any:
        if isinstance(x, np.ndarray) or x.is_fully_addressable:
            # Through the host, which compiles nothing.
            return jnp.asarray(np.asarray(x)[i])
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    return jax.tree.map(part, value)
