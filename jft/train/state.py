"""`State`: everything that changes from step to step, and where it lies on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jft import parallel, tree
from jft.methods import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step takes and gives back, and all that a checkpoint holds of the run.

    step: updates made, int32. trained: ``{path: pytree}`` of float32 masters. opt_state: of the optimizer, over ``trained``
    only. rng: the run's key data, uint32; a draw in step n folds n in, so the key itself never changes. What is *kept* of
    the base stands beside the state: it is never donated, differentiated or saved.
    """

    step: jax.Array
    trained: dict[str, Any]
    opt_state: Any
    rng: jax.Array


def create(trained: Mapping[str, Any], transform: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step; under ``jax.eval_shape`` its shapes."""
    return State(
        step=jnp.zeros((), jnp.int32),
        trained=dict(trained),
        opt_state=transform.init(trained),
        rng=jax.random.key_data(jax.random.key(seed)),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where parameters, what is kept of them, the state and batches lie. mesh: None for a single device."""

    mesh: Mesh | None
    params: Any
    kept: Any
    state: State
    batch: Any
    replicated: Any

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


def lay_out(params: Any, plan: Plan, kept: Any, state: State, mesh: Mesh | None) -> Layout:
    """The layout of a run on ``mesh``; ``kept`` and ``state`` are arrays or shapes."""
    if mesh is None:
        device = next((d for x in jax.tree.leaves(params) for d in getattr(x, "devices", set)()), jax.devices()[0])
        one = SingleDeviceSharding(device)

        def everywhere(value: Any) -> Any:
            return jax.tree.map(lambda _: one, value)

        return Layout(None, everywhere(params), everywhere(kept), everywhere(state), one, one)

    named = parallel.specs(params, mesh)
    kept_specs, trained_specs = plan.specs(named, params)
    # Specs stand in for arrays here: a State of them has the structure of the state.
    whole: Any = PartitionSpec()
    state_specs = State(
        step=whole,
        trained=trained_specs,
        opt_state=_like_trained(state.opt_state, state.trained, trained_specs),
        rng=whole,
    )

    def placed(specs: Any) -> Any:
        return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

    return Layout(
        mesh=mesh,
        params=tree.like(params, {p: NamedSharding(mesh, s) for p, s in named.items()}),
        kept=placed(kept_specs),
        state=placed(state_specs),
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
