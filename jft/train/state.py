"""`State`: everything that changes from step to step, and where it lies on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jft import delta, parallel, tree
from jft.methods import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step takes and gives back, and all that a checkpoint holds of the run.

    step: updates made, int32. trained: ``{path: pytree}`` of float32 masters. opt_state: of the optimizer, over ``trained``
    only. rng: the run's key data, uint32; a draw in step n folds n in, so the key itself never changes. chosen: ``{path:
    at}``, which parts of weights train, where a method selects inside them. memory: of the method's rule, if it has one.
    What is *kept* of the base stands beside the state: it is never differentiated or saved; live weights among it are
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
        trained=dict(trained),
        opt_state=transform.init(trained),
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
    """Where parameters, what a run holds and batches lie. mesh: None for a single device."""

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
        """One of its devices: what memory and peak FLOP/s are asked of."""
        return min(self.replicated.device_set, key=lambda d: d.id)

    @property
    def devices(self) -> int:
        return len(self.replicated.device_set)


def find_mesh(params: Any) -> Mesh | None:
    """The mesh that the parameters already lie on, if any."""
    for x in jax.tree.leaves(params):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def lay_out(params: Any, plan: Plan, holdings: Holdings, mesh: Mesh | None) -> Layout:
    """The layout of a run on ``mesh``."""
    if mesh is None:
        device = next((d for x in jax.tree.leaves(params) for d in getattr(x, "devices", set)()), jax.devices()[0])
        one = SingleDeviceSharding(device)

        def everywhere(value: Any) -> Any:
            return jax.tree.map(lambda _: one, value)

        return Layout(None, everywhere(params), everywhere(holdings), one, one)

    state = holdings.state
    named = parallel.specs(params, mesh)
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

    def place(spec: PartitionSpec, x: Any) -> NamedSharding:
        return NamedSharding(mesh, parallel.dividing(spec, x.shape, mesh))

    specs = Holdings(state_specs, live, frozen)
    return Layout(
        mesh=mesh,
        params=tree.like(params, {p: NamedSharding(mesh, s) for p, s in named.items()}),
        holdings=jax.tree.map(place, specs, holdings, is_leaf=lambda s: isinstance(s, PartitionSpec)),
        batch=parallel.batch_sharding(mesh),
        replicated=NamedSharding(mesh, whole),
    )


def _like_trained(opt_state: Any, trained: Any, specs: Any) -> Any:
    """Specs of the optimizer's state: a leaf at the path and of the shape of a trained one lies as that does.

    Whatever else there is (counters, adafactor's factored moments) is small and replicated.
    """
    spec_of = tree.flatten(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    shapes = {path: x.shape for path, x in tree.flatten(trained).items()}

    def find(path: str, x: Any) -> PartitionSpec:
        ends = [p for p, shape in shapes.items() if path.endswith("/" + p) and shape == x.shape]
        return spec_of[max(ends, key=len)] if ends else PartitionSpec()

    return tree.map_with_path(find, opt_state)


def abstract(value: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, for compiling before anything is allocated."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), value, shardings)
