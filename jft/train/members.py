"""`Members` and `Fleet`: the difference, to the loop, between one run and several at once.

Every member of a fleet is a run as :func:`jft.finetune` would have made it, with its own data, seed, learning rate and
selection: its result is the same to rounding. The base, the reading of data that members have in common, compilation, and the
start and end of the run are there once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft import files, methods, tree
from jft.methods import Method, Plan
from jft.methods.parametrise import Parametrisation
from jft.models.core import is_jft_model
from jft.names import nearest
from jft.select.granularity import Granularity
from jft.train import memory_check, stacked, step
from jft.train.optimizers import Given, Optimizer
from jft.train.optimizers import optimizer as find_optimizer
from jft.train.run_config import RunConfig, check_manifest

# Not steps, accumulate or objective: one program runs all members.
KEYS = ("name", "data", "eval_data", "seed", "lr", "optimizer", "method", "params", "manifest", "workdir")
Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Member:
    """One run, by itself (then without a name) or of a fleet.

    params: by path, weights that this member has in place of the shared base's.
    """

    name: str
    data: Any
    eval_data: Any
    seed: int
    optimizer: Optimizer | Given
    method: Method
    params: Mapping[str, Any]
    manifest: Mapping[str, Any]
    workdir: Path | None

    @property
    def label(self) -> str:
        """How messages about it begin."""
        return f"member {self.name!r}: " if self.name else ""

    def start(self, base: Any) -> Any:
        """The parameters this member starts from."""
        return tree.like(base, {**tree.flatten(base), **self.params}) if self.params else base


def member(name: str, options: Options, shared: Options, base: Any) -> Member:
    """The member with ``options`` of its own over those ``shared`` by all; both by :data:`KEYS`."""
    workdir, parent = options.get("workdir"), shared["workdir"]
    if workdir is None:
        # The name of a run by itself is empty, and `dir / ""` is the directory.
        workdir = None if parent is None else Path(parent) / name
    params = tree.flatten(options.get("params", {}))
    _check_weights(name, params, tree.flatten(base))
    return Member(
        name=name,
        data=options.get("data", shared["data"]),
        eval_data=options.get("eval_data", shared["eval_data"]),
        seed=options.get("seed", shared["seed"]),
        optimizer=_optimizer(name, options, shared["optimizer"]),
        # Shapes are those of the base for all, so fitting needs no weights of the member's own.
        method=_method(options.get("method"), shared["method"]).fitted(base),
        params=params,
        manifest=check_manifest({**(shared["manifest"] or {}), **options.get("manifest", {})}),
        workdir=None if workdir is None else Path(workdir),
    )


def listed(fleet: Sequence[Options], shared: Options, base: Any) -> list[Member]:
    """The members that a fleet lists. Raises ``ValueError`` where there is none, and for names that occur twice."""
    if not fleet:
        raise ValueError("fleet is empty; list at least one member, as {'data': ..., 'lr': ..., 'seed': ...}")
    # All names first: a folder is made for each.
    names = [_name(i, options) for i, options in enumerate(fleet)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two members of the fleet are called {name!r}; give each a name of its own")
    return [member(name, options, shared, base) for name, options in zip(names, fleet, strict=True)]


def _name(index: int, options: Options) -> str:
    """The name of a member of a fleet, which must be a folder's; its keys must be known."""
    name = str(options.get("name", index))
    for key in options:
        if key not in KEYS:
            raise ValueError(f"member {name!r} of the fleet has no key {key!r}{nearest(key, KEYS)}: {', '.join(KEYS)}")
    # The fleet's own checkpoints lie beside the members' folders.
    if name == "checkpoints":
        raise ValueError(f"a member of the fleet is called {name!r}, which cannot be the name of its folder")
    return files.check_name(name, "the name of a member of the fleet")


def _check_weights(name: str, params: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    for path, x in params.items():
        if path not in base or (x.shape, x.dtype) != (base[path].shape, base[path].dtype):
            expected = f"{base[path].shape} {base[path].dtype}" if path in base else "nothing"
            raise ValueError(
                f"member {name!r} of the fleet has {path} of {tuple(x.shape)} {x.dtype}, where the base has {expected}"
            )


def _optimizer(name: str, options: Options, shared: Any) -> Optimizer | Given:
    """A member's optimizer; its options override those of the fleet."""
    override = options.get("optimizer", {})
    override = {"name": override} if isinstance(override, str) else override
    default = find_optimizer(shared)
    rate = {"lr": options["lr"]} if "lr" in options else {}
    if isinstance(override, Mapping):
        override = {**override, **rate}
        if not override:
            return default
        if isinstance(default, Given):
            raise ValueError(
                f"member {name!r} of the fleet sets {', '.join(override)}, but the optimizer is an optax transformation, whose "
                "rate is its own; give a name or options to all"
            )
        # Over the shared options: a member that only sets `lr` keeps the others.
        return find_optimizer({**dataclasses.asdict(default), **override})
    # By identity: optax transformations are closures, which have no other equality.
    if override is not shared and not isinstance(override, Optimizer):
        raise ValueError(f"member {name!r} of the fleet has another optax transformation; one program has one")
    return dataclasses.replace(override, **rate) if isinstance(override, Optimizer) else find_optimizer(override)


def _method(override: Any, shared: Any) -> Method:
    """A member's method; options without a name are those of the method that all have, but for these."""
    method = shared if override is None else override
    if isinstance(method, Mapping) and "name" not in method:
        if isinstance(shared, Method):
            raise ValueError("a member's method is options alone, but the fleet's is a Method; give the member one too")
        method = {**({"name": shared} if isinstance(shared, str) else shared), **method}
    if isinstance(method, str):
        return methods.method(method)
    return methods.method(**method) if isinstance(method, Mapping) else method


# A list, so that the loop treats one run and a fleet the same way.
class Members(list[Member]):
    """The members of a run by itself: one, and no axis for it."""

    stacked = False

    def check(self, config: RunConfig) -> None:
        """Refuse what cannot be trained, evaluated or logged."""
        if self.stacked and config.log.wandb:
            raise ValueError("log.wandb follows one run, not a fleet; use log.tensorboard")
        for m in self:
            if m.data is None:
                raise ValueError(f"{m.label}data is None; only a fleet whose members all have their own needs none")
            config.check_evaluation(m.eval_data)

    def apply(self, model: Any, mesh: Any, objective: Any) -> Any:
        """The model in the step."""
        return step.apply_for(objective, model, mesh)

    def plans(self, plans: list[Plan]) -> list[Plan]:
        """The members' plans as one program can train them."""
        return plans

    def chosen(self, each: list[dict[str, Any]], plan: Plan, params: Any) -> dict[str, Any]:
        """The members' selections as the step takes them."""
        return each[0]

    def compile_step(self, recipe: step.Recipe, params: Any, chosen: Any, mesh: Any, differ: bool) -> step.Step:
        """The step, from shapes. differ: whether members have batches of their own."""
        return step.compile_step(recipe, params, chosen, mesh, self[0].seed)

    def remedies(self, update: Any, params: Any, chosen: Any, batch: Any, model: Any) -> Any:
        """A function that gives remedies for a run that does not fit, each with the bytes it would take."""
        # Not called yet: each remedy is a compilation, and most runs fit.
        return functools.partial(memory_check.remedies, update, batch, model, params)

    def identity(self, each: list[dict[str, Any]]) -> dict[str, Any]:
        """The identity of the run for its checkpoints, from those of its members."""
        return each[0]


class Fleet(Members):
    """Several runs over one base, trained by one program: what each has of its own is stacked.

    A member whose loss is not finite stays at its last good state, and its :attr:`Run.error` says so; the others go on.
    """

    stacked = True

    def apply(self, model: Any, mesh: Any, objective: Any) -> Any:
        # Across the members' axis nothing tells a kernel for TPUs which rows are a device's own.
        if is_jft_model(model) and model.execution.attention == "fused" and mesh is not None and mesh.size > 1:
            raise ValueError(
                "attention='fused' does not go with a fleet on several devices; use 'blockwise' or 'plain'"
            )
        return step.apply_for(objective, model)  # members may lie over the mesh where rows would

    def plans(self, plans: list[Plan]) -> list[Plan]:
        plans = [_shared_plan(plan) for plan in plans]
        _check_equal(self, plans)
        return plans

    def chosen(self, each: list[dict[str, Any]], plan: Plan, params: Any) -> dict[str, Any]:
        shapes = {p: tuple(x.shape) for p, x in tree.flatten(params).items()}
        return {
            p: np.stack(_padded([at[p] for at in each], plan.granularity(p, shapes[p]), shapes[p])) for p in each[0]
        }

    def compile_step(
        self, recipe: step.Recipe, params: Any, chosen: Any, mesh: Any, differ: bool, members: int = 0
    ) -> step.Step:
        paths = {path for m in self for path in m.params}
        # Without the members' axis: the plan knows of one run, and vmap adds the axis.
        one = {p: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for p, x in chosen.items()}
        return stacked.compile_step(recipe, params, paths, one, mesh, members or len(self), differ)

    def remedies(self, update: Any, params: Any, chosen: Any, batch: Any, model: Any) -> Any:
        def fewer() -> Iterator[tuple[str, int]]:
            differ, mesh = update.axes.batch, update.layout.mesh
            # Halves, since each try compiles.
            members = len(self) // 2
            while members:
                part = self.compile_step(update.recipe, params, chosen, mesh, differ, members)
                rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((members, *x.shape[1:]), x.dtype), batch)  # noqa: B023
                yield f"{members} members", part.memory(rows if differ else batch, params).total
                members //= 2

        return fewer

    def identity(self, each: list[dict[str, Any]]) -> dict[str, Any]:
        return {"fleet": {m.name: facts for m, facts in zip(self, each, strict=True)}}


def _shared_plan(plan: Plan) -> Plan:
    """The plan for a member: weights that would be written into stay the base, which all share."""
    leaves = {p: _not_live(how) for p, how in plan.leaves.items()}
    for path, how in leaves.items():
        if how.live:
            raise ValueError(f"{type(how).__name__} writes into {path}, which the members of a fleet share")
    return dataclasses.replace(plan, leaves=leaves)


# Recursive: composed parametrisations hold others, of which any may write into the weight.
def _not_live(how: Any) -> Any:
    """``how``, and what it is made of, with ``live`` turned off."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(how):
        value = getattr(how, field.name)
        if field.name == "live" and value:
            changed["live"] = False
        elif isinstance(value, Parametrisation):
            changed[field.name] = _not_live(value)
    # As it was where nothing changed, without a second check of its fields.
    return dataclasses.replace(how, **changed) if changed else how


def _check_equal(members: Fleet, plans: Sequence[Plan]) -> None:
    """Refuse what one program cannot train: other optimizers than by their rates, other methods than by what they select."""
    first = members[0]
    for m, plan in zip(members, plans, strict=True):
        if m.method.schedule is not None:
            raise ValueError(
                f"method {m.method.name!r} selects anew during the run, which a fleet does not; train it by itself"
            )
        # Rates and schedules enter the step as one number for each member.
        one, other = first.optimizer.unscheduled(), m.optimizer.unscheduled()
        if one != other:
            differ = [k for k, v in vars(one).items() if vars(other).get(k) != v] or ["kind"]
            raise ValueError(
                f"members {first.name!r} and {m.name!r} differ in optimizer.{', '.join(differ)}; inside a fleet lr, "
                "schedule, warmup and end may"
            )
        # Leaves hold how a weight trains, not what is selected in it, which is an array of the state.
        paths = [p for p in {**plans[0].leaves, **plan.leaves} if plans[0].leaves.get(p) != plan.leaves.get(p)]
        parts = [k for k in ("penalties", "rule") if getattr(first.method, k) != getattr(m.method, k)]
        if paths or parts:
            raise ValueError(
                f"members {first.name!r} and {m.name!r} train in other ways ({', '.join(parts + paths[:4])}); inside a "
                "fleet methods may differ in what they select and by which seed, not in how that trains"
            )


def _padded(each: Sequence[Any], unit: Granularity, shape: tuple[int, ...]) -> list[Any]:
    """Selections of all members in one weight, each with as many slots as the largest."""
    layout = unit.layout
    assert layout is not None, "only parts inside weights have coordinates"
    most = max(layout.slots(at) for at in each)
    # One program has one shape of coordinates, so smaller selections are padded.
    return [at if layout.slots(at) == most else layout.pad(at, most, shape) for at in each]
