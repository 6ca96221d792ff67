"""The members of a fleet: what each has of its own, and what all must share to train in one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jft import tree
from jft.methods import Method, Plan
from jft.methods.parametrise import Parametrisation
from jft.names import nearest
from jft.train import identity
from jft.train.asked import Asked, find_method
from jft.train.optimizers import Given, Optimizer
from jft.train.optimizers import optimizer as find_optimizer

KEYS = ("name", "data", "eval_data", "seed", "lr", "optimizer", "method", "params", "manifest", "workdir")


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a fleet, with all that :func:`jft.finetune` was told of it, or of all.

    params: by path, weights that this member has in place of the shared base's. said: its manifest.
    """

    name: str
    data: Any
    eval_data: Any
    seed: int
    optimizer: Optimizer | Given
    method: Method
    params: Mapping[str, Any]
    said: Mapping[str, Any]
    workdir: Path | None

    def whole(self, base: Any) -> Any:
        """The parameters this member starts from."""
        return tree.like(base, {**tree.flatten(base), **self.params}) if self.params else base


def members(asked: Asked) -> list[Member]:
    """The members that a fleet lists, each laid over what is asked for all.

    Raises ``ValueError`` for unknown keys, names that are no folder's or stand twice, and weights the base has not.
    """
    if not asked.fleet:
        raise ValueError("fleet is empty; list at least one member, as {'data': ..., 'lr': ..., 'seed': ...}")
    found = [_member(i, said, asked) for i, said in enumerate(asked.fleet)]
    names = [m.name for m in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two members of the fleet are called {name!r}; give each a name of its own")
    return found


def _member(index: int, said: Mapping[str, Any], asked: Asked) -> Member:
    name = str(said.get("name", index))
    for key in said:
        if key not in KEYS:
            raise ValueError(f"member {name!r} of the fleet has no key {key!r}{nearest(key, KEYS)}: {', '.join(KEYS)}")
    if not name or name in (".", "..", "checkpoints") or "/" in name or "\\" in name:
        raise ValueError(f"a member of the fleet is called {name!r}, which cannot be the name of its folder")
    workdir = said.get("workdir")
    if workdir is None:
        workdir = None if asked.workdir is None else asked.workdir / name
    params = tree.flatten(said.get("params", {}))
    flat = tree.flatten(asked.params)
    for path, x in params.items():
        if path not in flat or (x.shape, x.dtype) != (flat[path].shape, flat[path].dtype):
            there = f"{flat[path].shape} {flat[path].dtype}" if path in flat else "nothing"
            raise ValueError(
                f"member {name!r} of the fleet has {path} of {tuple(x.shape)} {x.dtype}, where the base has {there}"
            )
    return Member(
        name=name,
        data=said.get("data", asked.data),
        eval_data=said.get("eval_data", asked.eval_data),
        seed=said.get("seed", asked.seed),
        optimizer=_optimizer(name, said, asked.optimizer),
        method=_method(said.get("method"), asked.method),
        params=params,
        said=identity.said_of_run({**(asked.manifest or {}), **said.get("manifest", {})}),
        workdir=None if workdir is None else Path(workdir),
    )


def _optimizer(name: str, said: Mapping[str, Any], shared: Any) -> Optimizer | Given:
    own = said.get("optimizer", {})
    own = {"name": own} if isinstance(own, str) else own
    below = find_optimizer(shared)
    if isinstance(own, Mapping):
        own = {**own, **({"lr": said["lr"]} if "lr" in said else {})}
        if not own:
            return below
        if isinstance(below, Given):
            raise ValueError(
                f"member {name!r} of the fleet sets {', '.join(own)}, but the optimizer is an optax transformation, whose "
                "rate is its own; give a name or options to all"
            )
        return find_optimizer({**dataclasses.asdict(below), **own})
    if own is not shared and not isinstance(own, Optimizer):
        raise ValueError(f"member {name!r} of the fleet has another optax transformation; one program has one")
    return (
        dataclasses.replace(own, lr=said["lr"]) if "lr" in said and isinstance(own, Optimizer) else find_optimizer(own)
    )


def _method(own: Any, shared: Any) -> Method:
    """A member's method; options without a name are those of the method that all have, but for these."""
    if own is None:
        own = shared
    if isinstance(own, Mapping) and "name" not in own:
        if isinstance(shared, Method):
            raise ValueError("a member's method is options alone, but the fleet's is a Method; give the member one too")
        own = {**({"name": shared} if isinstance(shared, str) else shared), **own}
    return find_method(own)


def sharing(plan: Plan) -> Plan:
    """The plan for a member: weights that would be written into stay the base, which all share."""
    leaves = {p: _sharing(how) for p, how in plan.leaves.items()}
    for path, how in leaves.items():
        if how.live:
            raise ValueError(f"{type(how).__name__} writes into {path}, which the members of a fleet share")
    return dataclasses.replace(plan, leaves=leaves)


def _sharing(how: Any) -> Any:
    """``how``, and what it is made of, with ``live`` turned off."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(how):
        value = getattr(how, field.name)
        if field.name == "live" and value:
            changed["live"] = False
        elif isinstance(value, Parametrisation):
            changed[field.name] = _sharing(value)
    return dataclasses.replace(how, **changed) if changed else how


def check_alike(found: Sequence[Member], plans: Sequence[Plan]) -> None:
    """Refuse what one program cannot train: other optimizers than by their rates, other methods than by what they select."""
    first = found[0]
    for member, plan in zip(found, plans, strict=True):
        if member.method.schedule is not None:
            raise ValueError(
                f"method {member.method.name!r} selects anew during the run, which a fleet does not; train it by itself"
            )
        one, other = first.optimizer.unscheduled(), member.optimizer.unscheduled()
        if one != other:
            differ = [k for k, v in vars(one).items() if vars(other).get(k) != v] or ["kind"]
            raise ValueError(
                f"members {first.name!r} and {member.name!r} differ in optimizer.{', '.join(differ)}; inside a fleet lr, "
                "schedule, warmup and end may"
            )
        paths = [p for p in {**plans[0].leaves, **plan.leaves} if plans[0].leaves.get(p) != plan.leaves.get(p)]
        parts = [k for k in ("penalties", "rule") if getattr(first.method, k) != getattr(member.method, k)]
        if paths or parts:
            raise ValueError(
                f"members {first.name!r} and {member.name!r} train in other ways ({', '.join(parts + paths[:4])}); inside a "
                "fleet methods may differ in what they select and by which seed, not in how that trains"
            )


def padded(chosen: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Selections of all members at the size of the largest: padding is out of range, as :mod:`jft.delta.selected` has it."""
    out: list[dict[str, Any]] = [{} for _ in chosen]
    for path in chosen[0]:
        ats = [c[path] for c in chosen]
        sizes = {at.shape for at in ats}
        axes = (
            [i for i, n in enumerate(zip(*sizes, strict=True)) if len(set(n)) > 1]
            if len({len(s) for s in sizes}) == 1
            else [0, 0]
        )
        if len(axes) > 1:
            raise ValueError(f"the selections of {path} are laid out differently: {', '.join(map(str, sorted(sizes)))}")
        for mine, at in zip(out, ats, strict=True):
            mine[path] = _grown(at, axes[0], max(s[axes[0]] for s in sizes), max(shapes[path])) if axes else at
    return out


def _grown(at: Any, axis: int, size: int, extent: int) -> Any:
    """``at`` with ``size`` places along ``axis``: new ones have first coordinates beyond ``extent`` and all others."""
    missing = size - at.shape[axis]
    if not missing:
        return at
    shape = (*at.shape[:axis], missing, *at.shape[axis + 1 :])
    start = jnp.maximum(jnp.max(at, initial=0) + 1, extent)
    places = start + jnp.arange(missing, dtype=at.dtype)
    new = jnp.broadcast_to(places.reshape(-1, *(1,) * (at.ndim - axis - 1)), shape)
    if axis < at.ndim - 1:  # coordinates stand last: those after the first are zero
        new = jnp.where(jnp.arange(at.shape[-1]) == 0, new, 0)
    return jnp.concatenate([at, new.astype(at.dtype)], axis)
