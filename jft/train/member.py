"""`Member`: one run of those that train together, with all that :func:`jft.finetune` was told of it, or of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jft import methods, tree
from jft.methods import Method
from jft.names import nearest
from jft.train import identity
from jft.train.optimizers import Given, Optimizer
from jft.train.optimizers import optimizer as find_optimizer

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


def member(name: str, given: Options, shared: Options, base: Any) -> Member:
    """The member that has what is ``given`` for it, laid over what is ``shared`` by all; both by :data:`KEYS`."""
    workdir, above = given.get("workdir"), shared["workdir"]
    if workdir is None:
        workdir = None if above is None else Path(above) / name
    params = tree.flatten(given.get("params", {}))
    _check_weights(name, params, tree.flatten(base))
    return Member(
        name=name,
        data=given.get("data", shared["data"]),
        eval_data=given.get("eval_data", shared["eval_data"]),
        seed=given.get("seed", shared["seed"]),
        optimizer=_optimizer(name, given, shared["optimizer"]),
        method=_method(given.get("method"), shared["method"]),
        params=params,
        manifest=identity.check_manifest({**(shared["manifest"] or {}), **given.get("manifest", {})}),
        workdir=None if workdir is None else Path(workdir),
    )


def listed(fleet: Sequence[Options], shared: Options, base: Any) -> list[Member]:
    """The members that a fleet lists. Raises ``ValueError`` where there is none, and for names that stand twice."""
    if not fleet:
        raise ValueError("fleet is empty; list at least one member, as {'data': ..., 'lr': ..., 'seed': ...}")
    names = [_name(i, given) for i, given in enumerate(fleet)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two members of the fleet are called {name!r}; give each a name of its own")
    return [member(name, given, shared, base) for name, given in zip(names, fleet, strict=True)]


def _name(index: int, given: Options) -> str:
    """The name of a member of a fleet, which must be a folder's; its keys must be known."""
    name = str(given.get("name", index))
    for key in given:
        if key not in KEYS:
            raise ValueError(f"member {name!r} of the fleet has no key {key!r}{nearest(key, KEYS)}: {', '.join(KEYS)}")
    if not name or name in (".", "..", "checkpoints") or "/" in name or "\\" in name:
        raise ValueError(f"a member of the fleet is called {name!r}, which cannot be the name of its folder")
    return name


def _check_weights(name: str, params: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    for path, x in params.items():
        if path not in base or (x.shape, x.dtype) != (base[path].shape, base[path].dtype):
            there = f"{base[path].shape} {base[path].dtype}" if path in base else "nothing"
            raise ValueError(
                f"member {name!r} of the fleet has {path} of {tuple(x.shape)} {x.dtype}, where the base has {there}"
            )


def _optimizer(name: str, given: Options, shared: Any) -> Optimizer | Given:
    """A member's optimizer; options are laid over those that all have."""
    above = given.get("optimizer", {})
    above = {"name": above} if isinstance(above, str) else above
    below = find_optimizer(shared)
    rate = {"lr": given["lr"]} if "lr" in given else {}
    if isinstance(above, Mapping):
        above = {**above, **rate}
        if not above:
            return below
        if isinstance(below, Given):
            raise ValueError(
                f"member {name!r} of the fleet sets {', '.join(above)}, but the optimizer is an optax transformation, whose "
                "rate is its own; give a name or options to all"
            )
        return find_optimizer({**dataclasses.asdict(below), **above})
    if above is not shared and not isinstance(above, Optimizer):
        raise ValueError(f"member {name!r} of the fleet has another optax transformation; one program has one")
    return dataclasses.replace(above, **rate) if isinstance(above, Optimizer) else find_optimizer(above)


def _method(given: Any, shared: Any) -> Method:
    """A member's method; options without a name are those of the method that all have, but for these."""
    which = shared if given is None else given
    if isinstance(which, Mapping) and "name" not in which:
        if isinstance(shared, Method):
            raise ValueError("a member's method is options alone, but the fleet's is a Method; give the member one too")
        which = {**({"name": shared} if isinstance(shared, str) else shared), **which}
    if isinstance(which, str):
        return methods.method(which)
    return methods.method(**which) if isinstance(which, Mapping) else which
