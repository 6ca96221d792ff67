"""`Method` and `Plan`: which weights train and how, first in general, then for one model's parameters."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jft import delta, parallel, tangent, tree
from jft.kernels.blocks_forms import Axes
from jft.methods import layer_runs
from jft.methods.layers import SomeLayers
from jft.methods.low_rank import LowRank
from jft.methods.parametrise import InPlace, Parametrisation, Statistic
from jft.methods.select import Select
from jft.models.adapters import statistics_of
from jft.models.core import STRUCTURED, Runs, is_jft_model, model_of
from jft.select import layers
from jft.select.granularity import Granularity
from jft.tree import lead


@dataclasses.dataclass(frozen=True)
class Method:
    """A composition: *select* which weights, *train* them in some parametrisation.

    also: patterns trained in place beside them (a task head, norms); a head that ``jft.load`` drew is among them by itself.
    freeze: patterns that never train, whatever else says so. penalties: what is added to the loss
    (:mod:`jft.methods.penalties`). rule: what is done to gradients and values at every step
    (:mod:`jft.methods.update_rules`). schedule: when parts are selected anew (:mod:`jft.methods.schedules`). name and
    options say where it came from and go into every manifest.

    forward: ``standard``, the model at the changed weights; or ``linearized``, ``f(theta0) + J(theta0) tau``: the weights
    stay the base, and outputs are linear in their change tau (:mod:`jft.tangent`). until: the site up to which a
    linearized model is linear (``features``: the encoder; the head comes after); None for all of it.
    """

    select: Select
    train: Parametrisation
    also: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    penalties: tuple[Any, ...] = ()
    rule: Any = None
    schedule: Any = None
    forward: Literal["standard", "linearized"] = "standard"
    until: str | None = None
    name: str = "custom"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a forward pass that is not known, or that the rest does not go with."""
        if self.forward not in ("standard", "linearized"):
            raise ValueError(f"forward {self.forward!r} is unknown; it is standard or linearized")
        if self.forward == "standard" and self.until is not None:
            raise ValueError(f"until={self.until!r} says how much of the model is linearized; add forward='linearized'")
        if self.forward == "linearized" and self.schedule is not None:
            raise ValueError(
                f"method {self.name!r} selects anew during the run and leaves what trained before in the weights, which "
                "would move the base that the model is linearized at; use forward='standard'"
            )

    def plan(self, params: Any, model: Any = None) -> Plan:
        """What this method does to ``params`` (arrays or shapes): a parametrisation for each weight that trains."""
        shapes = tree.flatten(params)
        if not shapes:
            raise ValueError("the model has no parameters to train")
        if self.forward == "linearized":
            tangent.check_forward_mode(model)
        stacked = is_jft_model(model)
        every, held = shapes, statistics_of(model_of(model))
        # No method selects them: they train by the model's own passes.
        shapes = {p: x for p, x in shapes.items() if p not in held}
        linear = tuple(model.linear_paths(params)) if stacked else _matrices(shapes)
        chosen = self.select.paths(shapes, linear)
        leaves: dict[str, Parametrisation] = {}
        choice = self.select.choice
        if self.select.inside:
            leaves = _parts(chosen, shapes, self.select, self.train, stacked)
        elif choice is None or self.undecided:
            leaves = dict.fromkeys(chosen, self.train)
        elif isinstance(choice, layers.Depth):
            leaves = layer_runs.by_layer(chosen, shapes, choice, self.train, stacked)
        else:
            leaves = layer_runs.by_table(choice({p: tuple(shapes[p].shape) for p in chosen}), shapes, self.train)
        # A new head is random: unless frozen it trains whatever the method selects, as in peft.
        drawn = tuple(f"^{re.escape(p)}$" for p in getattr(model, "drawn", ()) if p in shapes and p not in leaves)
        also = self.also + drawn
        if also:
            # After the selection: ``also`` trains whole what that would cut or leave out. ``freeze`` has the last word.
            leaves |= dict.fromkeys(tree.matching(shapes, also, "also"), InPlace())
        if self.freeze:
            for path in tree.matching(shapes, self.freeze, "freeze"):
                leaves.pop(path, None)
        # Integer leaves (position ids, counts) have no gradient; patterns that match them are no mistake.
        integers = [p for p in leaves if not jnp.issubdtype(shapes[p].dtype, jnp.floating)]
        for path in integers:
            leaves.pop(path)
        # Frozen leaves of a cut stack are in ``leaves`` too; an empty mapping is refused here as well.
        if all(isinstance(how, SomeLayers) and not any(how.trains) for how in leaves.values()):
            raise ValueError(
                f"method {self.name!r} selects no weight: include={self.select.patterns}, freeze={self.freeze}"
            )
        _check(leaves, shapes, self.name)
        linearized = self.forward == "linearized"
        layered = _linear_layers(shapes, linear, stacked)
        # The first in the order of the parameters, not in that of the patterns.
        lender = next((p for p in shapes if p in leaves and leaves[p].shares), None)
        # In the order of the parameters: equal plans then have equal items, whatever the order of the patterns.
        ordered = {
            p: leaves[p].fitted(
                lead=lead(p, len(shapes[p].shape), stacked),
                linearized=linearized,
                linear=p in layered,
                lender=None if p == lender else lender,
            )
            for p in shapes
            if p in leaves
        }
        # A linearized model is in evaluation mode, where they stay.
        running = {} if linearized else {p: Statistic(str(every[p].dtype)) for p in every if p in held}
        leaves = {p: (ordered | running)[p] for p in every if p in ordered or p in running}
        fixed = self._held(params, model)
        fixed = dataclasses.replace(fixed, also=also) if drawn else fixed
        plan = Plan(fixed, leaves, tuple(every), jax.tree.structure(params), structured=stacked)
        # Both may measure the change from the base; without them a second copy of the weights is not kept.
        return plan.anchored() if self.penalties or self.rule else plan

    def _held(self, params: Any, model: Any) -> Method:
        """The same where penalties have looked at the base and the model, if they want to (``fitted(params, model)``)."""
        fitted = tuple(x.fitted(params, model) if hasattr(x, "fitted") else x for x in self.penalties)
        return self if fitted == self.penalties else dataclasses.replace(self, penalties=fitted)

    def fitted(self, params: Any) -> Method:
        """The method of a run that trains ``params`` (arrays or shapes): with its schedule fitted to them."""
        if self.schedule is None:
            return self
        return dataclasses.replace(self, schedule=self.schedule.fitted(tree.flatten(params)))

    @property
    def undecided(self) -> layers.Choice | None:
        """What still has to say, from the base and the data, which whole layers and matrices train; None for nothing."""
        choice = self.select.choice
        return choice if getattr(choice, "from_data", False) else None

    def decide(self, calibration: Any) -> dict[str, Any]:
        """The table that :attr:`undecided` comes to."""
        choice = self.undecided
        if choice is None:
            raise ValueError(f"method {self.name!r} has nothing to decide from data")
        return dict(choice(calibration))

    def decided(self, table: layers.Table) -> Method:
        """The method after :attr:`undecided` has come to ``table``."""
        select = dataclasses.replace(self.select, layers=table, score=None)
        return dataclasses.replace(self, select=select)

    def __hash__(self) -> int:
        # Options are left out: a dict has no hash, and equal methods still hash alike.
        parts = (self.select, self.train, self.also, self.freeze, self.penalties, self.rule, self.schedule)
        return hash((self.name, self.forward, self.until, *parts))


def _parts(
    chosen: list[str], shapes: Mapping[str, Any], select: Select, train: Parametrisation, stacked: bool
) -> dict[str, Parametrisation]:
    """Parametrisations of what is selected inside weights: those that have such parts."""
    leaves: dict[str, Parametrisation] = {}
    for path in chosen:
        shape = shapes[path].shape
        unit = select.granularity_of(path, shape)
        if unit is not None and unit.axes <= len(shape) - lead(path, len(shape), stacked):
            leaves[path] = train.fitted(granularity=unit)
    if not leaves:
        raise ValueError(f"none of the weights that include={select.patterns} names is made of {select.granularity}")
    return leaves


def _matrices(shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """Weights of a model jft does not know that look like matrix products: two axes, and not an embedding table."""
    # By name, since tables have two axes as well.
    return tuple(p for p, x in shapes.items() if len(x.shape) == 2 and not re.search("embed|table|position", p.lower()))


def _linear_layers(shapes: Mapping[str, Any], linear: tuple[str, ...], stacked: bool) -> frozenset[str]:
    """The weights of linear layers, in layers and outside: neither tables nor patches, whose weight is a convolution's."""
    weights = (p for p in shapes if p.endswith("/w") and "patch" not in p.split("/"))
    return frozenset(weights if stacked else linear)


def _check(leaves: Mapping[str, Parametrisation], shapes: Mapping[str, Any], name: str) -> None:
    for path, how in leaves.items():
        if isinstance(how, LowRank) and (len(shapes[path].shape) < 2 or how.rank < 1):
            raise ValueError(
                f"method {name!r}: {path} of shape {shapes[path].shape} has no factors of rank {how.rank}; "
                "choose matrices (select.include) and a rank of at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A method laid out on one model's weights: the split into kept and trained, and the way back.

    leaves: ``{path: parametrisation}`` for what is not simply frozen. paths: all of them, in the order of the
    parameters' structure. structured: whether the model takes structured weights (jft's own models do; any other
    ``apply`` gets plain arrays). Plans compare and hash by what they do: a step compiled for one serves all its equals.
    """

    method: Method
    leaves: Mapping[str, Parametrisation]
    paths: tuple[str, ...]
    structure: Any
    structured: bool

    def __hash__(self) -> int:
        # The generated hash would fail on the mapping; fewer fields than equality compares are fine for a hash.
        return hash((tuple(self.leaves.items()), self.paths, self.structured, self.method.forward, self.method.until))

    @property
    def selects(self) -> tuple[str, ...]:
        """The paths inside which parts are selected, so that :meth:`init` needs to be told which."""
        return tuple(p for p, how in self.leaves.items() if how.selects)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The paths that a score or a search chooses among: what trains beside them, by ``also``, takes nothing of a budget."""
        if self.selects or not self.method.undecided:
            return self.selects or tuple(p for p, how in self.leaves.items() if not isinstance(how, Statistic))
        also = tree.matcher(self.method.also)
        return tuple(p for p in self.leaves if not (self.method.also and also(p)))

    def granularity(self, path: str, shape: Sequence[int]) -> Granularity:
        """As what the parts of a weight are selected that :attr:`selects` names."""
        unit = self.method.select.granularity_of(path, shape)
        if unit is None:
            raise ValueError(f"{self.method.name!r} selects nothing inside {path}")
        return unit

    @property
    def random(self) -> bool:
        """Whether a training step draws noise."""
        drawn = (getattr(penalty, "random", False) for penalty in self.method.penalties)
        return any(how.random for how in self.leaves.values()) or any(drawn)

    def anchored(self) -> Plan:
        """The same, keeping of the base what it takes to measure the change from it."""
        return dataclasses.replace(self, leaves={p: how.fitted(anchored=True) for p, how in self.leaves.items()})

    def on_mesh(self, specs: Mapping[str, PartitionSpec], params: Any) -> Plan:
        """The same where weights are cut as ``specs`` say, which products with parts of them follow."""
        shapes, leaves = tree.flatten(params), dict(self.leaves)
        for path in self.selects:
            # A PartitionSpec may be shorter than the shape.
            whole = (*specs[path], *(None,) * (len(shapes[path].shape) - len(specs[path])))
            *lead, rows, columns = (parallel.names(axis) for axis in ((None, *whole) if len(whole) < 2 else whole))
            leaves[path] = leaves[path].fitted(mesh_axes=Axes(parallel.BATCH_AXES, rows, columns, tuple(lead)))
        return dataclasses.replace(self, leaves=leaves)

    def init(
        self,
        key: jax.Array,
        params: Any,
        chosen: Mapping[str, Any] | None = None,
        base: Mapping[str, jax.Array] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(kept, trained)``, both by path. Trained values are copies, safe to donate; kept ones are ``params``' own.

        chosen: ``{path: at}``, the selected parts of the weights that :attr:`selects` names. base: weights by path that the
        change is measured from, where ``params`` have trained before.
        """
        kept: dict[str, Any] = {}
        trained: dict[str, Any] = {}
        chosen = chosen or {}
        for path, w in tree.flatten(params).items():
            how = self.leaves.get(path)
            if how is None:
                kept[path], trained[path] = w, None
            else:
                origin = None if base is None else base[path]
                # A key for each path: a weight's draw does not depend on which others train.
                kept[path], trained[path] = how.init(tree.key_for(key, path), w, chosen.get(path), origin)
        # Frozen weights, and leaves of a stack of which no run trains, would be empty nodes in the optimizer's state.
        return kept, {p: t for p, t in trained.items() if jax.tree.leaves(t)}

    def bind(
        self, kept: Mapping[str, Any], trained: Mapping[str, Any], dtype: Any = None, key: jax.Array | None = None
    ) -> Any:
        """The parameters the model sees, differentiable in ``trained``; trained values cast to ``dtype`` if given.

        key: of the noise of a training step, for methods that are :attr:`random`.
        """
        bound = []
        for path in self.paths:
            how = self.leaves.get(path)
            if how is None:
                bound.append(kept[path])
                continue
            values = self.values(trained, path)
            # Masters are cast here, inside the differentiated function, so that their gradients are float32 again.
            values = values if how.exact else tree.cast(values, dtype)
            bound.append(how.bind(kept[path], values, self._takes_structured(path), self._noise(path, key)))
        return jax.tree.unflatten(self.structure, bound)

    def values(self, trained: Mapping[str, Any], path: str) -> Any:
        """What trains at ``path``, and what another weight holds for it."""
        how, private = self.leaves[path], trained.get(path, ())
        return (
            private if how.lender is None else {**private, **{name: trained[how.lender][name] for name in how.shares}}
        )

    def _takes_structured(self, path: str) -> bool:
        """Whether the model takes a structured weight at ``path``."""
        leaf = self.structured and path.rsplit("/", 1)[-1] in STRUCTURED
        return leaf or _cut(self.leaves[path], self.structured)

    def _noise(self, path: str, key: jax.Array | None) -> jax.Array | None:
        return tree.key_for(key, path) if key is not None and self.leaves[path].random else None

    def outputs(
        self,
        apply: Any,
        kept: Mapping[str, Any],
        trained: Mapping[str, Any],
        batch: Any,
        dtype: Any = None,
        key: jax.Array | None = None,
    ) -> Any:
        """What the model gives for ``batch``, by the method's forward pass; differentiable in ``trained``, as :meth:`bind`."""
        if self.method.forward == "standard":
            return apply(self.bind(kept, trained, dtype, key), batch)
        tangents, build = self._direction(kept, trained, key)
        until = self.method.until
        # Beyond ``until`` the model is the ordinary one, at the changed weights.
        after = None if until is None else self.bind(kept, trained, dtype, key)
        return tangent.forward(apply, build, tangents, batch, until, after)

    def _direction(self, kept: Mapping[str, Any], trained: Mapping[str, Any], key: jax.Array | None = None) -> Any:
        """The weights that move, and the parameters from those."""
        tangents = {p: self.leaves[p].tangent(kept[p], self.values(trained, p), self._noise(p, key)) for p in trained}

        def build(weights: Mapping[str, Any]) -> Any:
            seen = {p: delta.changed.as_seen(w, self._takes_structured(p)) for p, w in weights.items()}
            return jax.tree.unflatten(self.structure, [seen[p] if p in seen else kept[p] for p in self.paths])

        return tangents, build

    def derivative(self, apply: Any, kept: Mapping[str, Any], trained: Mapping[str, Any], batch: Any) -> Any:
        """``J(theta0) tau`` of a linearized method, at its site ``until`` or the outputs; differentiable in ``trained``."""
        tangents, build = self._direction(kept, trained)
        return tangent.pair(apply, build, tangents, batch, self.method.until)[1]

    def base(self, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Any:
        """The parameters before training, where everything that trains keeps them."""
        tangents = {p: how.tangent(kept[p], self.values(trained, p)) for p, how in self.leaves.items()}
        flat = [_base(tangents[p]) if p in tangents else kept[p] for p in self.paths]
        return jax.tree.unflatten(self.structure, flat)

    def commit(self, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
        """``kept`` after an update: live weights hold the new values."""
        live = {p: kept[p] for p in trained if self.leaves[p].live}
        new = {p: {**k, "w": self.leaves[p].spread(k, trained[p], k["w"])} for p, k in live.items()}
        return {**kept, **new}

    def detach(self, kept: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """``kept`` as ``(frozen, live, chosen)``: what never changes, weights that every update writes into, selections."""
        frozen, live, chosen = dict(kept), {}, {}
        for path, how in self.leaves.items():
            # Apart: the step donates and returns live weights, and a reselection replaces the selections.
            if how.live or how.selects:
                # A copy, because what follows takes keys out of it.
                frozen[path] = dict(kept[path])
            if how.live:
                live[path] = frozen[path].pop("w")
            if how.selects:
                chosen[path] = frozen[path].pop("at")
        return frozen, live, chosen

    def attach(self, frozen: Mapping[str, Any], live: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`detach`."""
        kept = dict(frozen)
        for path, w in live.items():
            kept[path] = {**kept[path], "w": w}
        for path, at in chosen.items():
            kept[path] = {**kept[path], "at": at}
        return kept

    def change(self, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
        """How far ``trained`` is from the base, shaped like it, of an :meth:`anchored` plan."""
        return {p: self._each(lambda leaf, x, p=p: leaf.change(kept[p], x), p, t) for p, t in trained.items()}

    def count(self, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Any:
        """How many values train, padding aside."""
        # Layouts pad every matrix to the fullest one; padding trains nothing.
        one = lambda leaf, x, p: tree.count(x) if leaf.count is None else leaf.count(kept[p])
        each = {p: self._each(functools.partial(one, p=p), p, t) for p, t in trained.items()}
        return sum(jax.tree.leaves(each))

    def size(self, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> int:
        """How many parameters the model has, frozen ones included."""
        plain = lambda k, t: {p: how.bind(k[p], self.values(t, p), structured=False) for p, how in self.leaves.items()}
        # Shapes of the formed weights: kept and trained values may hold more or fewer numbers than the weight.
        inside = tree.count(jax.eval_shape(plain, dict(kept), dict(trained)))
        return inside + sum(tree.size(kept[p]) for p in self.paths if p not in self.leaves)

    def _each(self, function: Any, path: str, values: Any) -> Any:
        """``function(leaf, value)`` of every array that trains at ``path``, with what it is."""
        # An optimizer may have put empty nodes in the place of values that it leaves to another.
        inside = lambda leaf, value: jax.tree.map(functools.partial(function, leaf), value)
        return jax.tree.map(inside, self.leaves[path].leaves()[1], values)

    def decays(self, trained: Mapping[str, Any], paths: frozenset[str]) -> dict[str, Any]:
        """Which leaves of ``trained`` weight decay is for, a bool each, where it is for ``paths``."""
        return {p: self._each(lambda leaf, _, p=p: leaf.decays and p in paths, p, t) for p, t in trained.items()}

    def matrices(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """For each leaf of ``trained`` the matrices it stacks, if any (:class:`jft.delta.Matrices`)."""
        return {p: self._each(lambda leaf, x: leaf.stacked_matrices(x.ndim), p, t) for p, t in trained.items()}

    def penalty(
        self, kept: Mapping[str, Any], trained: Mapping[str, Any], key: jax.Array | None = None
    ) -> jax.Array | None:
        """What the method adds to the loss, once per batch; None where that is nothing. key: for what draws."""
        each = [self.leaves[p].penalty(kept[p], self.values(trained, p)) for p in trained]
        parts = [x for x in each if x is not None]
        for index, penalty in enumerate(self.method.penalties):
            noise = None if key is None else tree.key_for(key, f"penalty {index}")
            # Only penalties that draw take a key: the others' signature stays that of a function of the values.
            drawn = (noise,) if getattr(penalty, "random", False) else ()
            parts.append(penalty(self, kept, trained, *drawn))
        return functools.reduce(jnp.add, parts) if parts else None

    def merged(self, base: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> Any:
        """Plain parameters after training, in the dtypes and containers of ``base`` (arrays or shapes)."""
        flat = tree.flatten(base)
        bound = {p: how.bind(kept[p], self.values(trained, p), structured=False) for p, how in self.leaves.items()}
        out = {p: bound[p] if p in bound else kept[p] for p in flat}
        # Rounded once, at the end, to the dtype that the model came in.
        return tree.like(base, {p: x.astype(flat[p].dtype) for p, x in out.items()})

    def encode(self, base: Any, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, delta.Encoding]:
        """``{path: encoded change}`` for what trained, in float32."""
        flat = tree.flatten(base)
        return {p: self.leaves[p].encode(flat[p], kept[p], self.values(trained, p)) for p in trained}

    def scales(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """Learning-rate multipliers, shaped like ``trained``."""
        return {p: self._each(lambda leaf, _: leaf.rate, p, t) for p, t in trained.items()}

    def specs(
        self, specs: Mapping[str, PartitionSpec], params: Any, chosen: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shardings of :meth:`init`'s result, from those of the weights by path."""
        weights, chosen = tree.flatten(params), chosen or {}
        # The key's value does not matter for shapes.
        shapes = jax.eval_shape(self.init, jax.random.key(0), params, chosen)
        kept: dict[str, Any] = dict(specs)
        trained: dict[str, Any] = {}
        for path, how in self.leaves.items():
            lay = lambda leaf, x, path=path: leaf.sharding(specs[path], weights[path], x.ndim)
            of_kept, of_trained = how.leaves(chosen.get(path))
            kept[path] = jax.tree.map(lay, of_kept, shapes[0][path])
            if path in shapes[1]:
                trained[path] = jax.tree.map(lay, of_trained, shapes[1][path])
        return kept, trained


def _base(tangent: Any) -> jax.Array:
    """The weight that a tangent is at."""
    if isinstance(tangent, Runs):
        return jnp.concatenate([delta.changed.base(part) for part in tangent.parts])
    return delta.changed.base(tangent)


def _cut(how: Parametrisation, structured: bool) -> bool:
    """A stack cut into runs is for the scan over layers to take apart, whatever its leaf is called."""
    return structured and isinstance(how, SomeLayers)
