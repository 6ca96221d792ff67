"""Any other pure ``apply`` with jft: flax.nnx, flax.linen, Equinox, a plain function.

Each adapter returns ``(apply, params)`` with ``apply(params, batch) -> outputs``; every method, the training loop and task
vectors take such a pair. What they cannot have is the cost saving of structured weights: a low-rank update is merged into
the weight before each call. A module that takes something other than the whole batch says so with ``inputs``::

    apply, params = from_nnx(module, inputs=lambda batch: (batch["images"],))
    run = jft.finetune(apply, params, data, method="lora", objective="classification")

A module in training mode trains with dropout, whose key is another in every step and microbatch, and with batch statistics,
which each training pass replaces; it is evaluated in evaluation mode. ``params`` then hold the statistics as well, so that
task vectors, checkpoints and saved files have them; no method trains them by gradient. Padding rows of a batch count in
statistics. Scores of a selection, and linearized training, take the model in evaluation mode. ``apply.module(run.params)``
gives the module back, ``jft.save`` and ``jft.models.load_params`` write and read its parameters.

Adapters of equal modules that hold the same state compare equal, so a compiled step is reused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft import tree

Apply = Callable[[Any, Any], Any]
Inputs = Callable[[Any], tuple]
Statistics = dict[str, jax.Array]


def _whole(batch: Any) -> tuple:
    return (batch,)


class Adapter:
    """A model of another library. trains: whether :meth:`training` is another pass than that of evaluation.

    statistics: paths of the parameters that a training pass gives new values of, and no gradient.
    """

    trains: bool = False
    statistics: frozenset[str] = frozenset()

    def __call__(self, params: Any, batch: Any) -> Any:
        raise NotImplementedError

    def training(self, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Statistics]:
        """``(outputs, {path: new value})`` of a pass in training mode. key: of what it draws."""
        raise NotImplementedError

    def module(self, params: Any) -> Any:
        """What the library itself takes: its module or variables with ``params``."""
        raise NotImplementedError


def _checked(params: Any, statistics: frozenset[str]) -> frozenset[str]:
    """The statistics; ``ValueError`` for one that no task vector could change."""
    flat = tree.flatten(params)
    for path in sorted(statistics):
        if not jnp.issubdtype(flat[path].dtype, jnp.floating):
            raise ValueError(
                f"the statistic {path!r} is {flat[path].dtype}; only floating-point ones can change in training: name others"
            )
    return statistics


def statistics_of(model: Any) -> frozenset[str]:
    """The statistics of an :class:`Adapter`; other models have none."""
    return model.statistics if isinstance(model, Adapter) else frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class _Nnx(Adapter):
    """graph: of the module as it came; evaluated: in evaluation mode. rngs, rest: state that ``params`` do not hold."""

    graph: Any
    evaluated: Any
    rngs: Any
    rest: Any
    kinds: Any
    inputs: Inputs
    trains: bool
    statistics: frozenset[str]

    # Compared by identity: the arrays of ``rest`` are constants of a compiled step.
    def _merge(self, graph: Any, params: Any, rngs: Any) -> Any:
        # Imported on use: `import jft` must stay light.
        from flax import nnx

        return nnx.merge(graph, nnx.State(params), rngs, self.rest)

    def __call__(self, params: Any, batch: Any) -> Any:
        return self._merge(self.evaluated, params, self.rngs)(*self.inputs(batch))

    def training(self, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Statistics]:
        from flax import nnx

        is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        # A key for each of the module's streams, of that stream's shape.
        draw = lambda path, x: jax.random.split(tree.key_for(key, path), x.shape) if is_key(x) else x
        module = self._merge(self.graph, params, nnx.State(tree.map_with_path(draw, nnx.to_pure_dict(self.rngs))))
        outputs = module(*self.inputs(batch))
        after = tree.flatten(nnx.to_pure_dict(nnx.state(module, self.kinds)))
        return outputs, {path: after[path] for path in self.statistics}

    def module(self, params: Any) -> Any:
        return self._merge(self.graph, params, self.rngs)


def from_nnx(module: Any, inputs: Inputs = _whole, statistics: Any = None) -> tuple[Apply, Any]:
    """A ``flax.nnx`` module: its ``Param`` state is what trains.

    A module in training mode (as it is made, or after ``module.train()``) trains so, its ``BatchStat`` variables being the
    statistics; after ``module.eval()`` it trains in evaluation mode, and everything but ``Param`` stays constant.
    statistics: another kind of variable, or several, that a training pass changes.
    """
    from flax import nnx

    evaluated = nnx.clone(module)
    evaluated.eval()
    graph, everything = nnx.split(module)
    trains = graph != nnx.graphdef(evaluated)
    found = nnx.BatchStat if statistics is None else statistics
    kinds = nnx.Any(nnx.Param, *(found if isinstance(found, Sequence) else (found,))) if trains else nnx.Param
    params, rngs, rest = nnx.split_state(everything, kinds, nnx.RngState, ...)  # type: ignore[misc]  # "..." is the filter for the rest
    pure = nnx.to_pure_dict(params)
    trained = set(tree.flatten(nnx.to_pure_dict(nnx.filter_state(params, nnx.Param))))
    paths = frozenset(tree.flatten(pure)) - trained
    return _Nnx(graph, nnx.graphdef(evaluated), rngs, rest, kinds, inputs, trains, _checked(pure, paths)), pure


@dataclasses.dataclass(frozen=True, eq=False)
class _Linen(Adapter):
    """mutable: collections that ``params`` hold beside ``params``; others: those that stay constant."""

    linen: Any
    inputs: Inputs
    others: Any
    options: tuple[tuple[str, Any], ...]
    modes: tuple[tuple[str, Any], ...] | None = None
    rngs: tuple[str, ...] = ()
    mutable: tuple[str, ...] = ()
    statistics: frozenset[str] = frozenset()

    @property
    def trains(self) -> bool:  # type: ignore[override]  # of a frozen class
        return self.modes is not None

    def module(self, params: Any) -> Any:
        """The variables for ``module.apply``."""
        return {**(params if self.mutable else {"params": params}), **self.others}

    def __call__(self, params: Any, batch: Any) -> Any:
        return self.linen.apply(self.module(params), *self.inputs(batch), **dict(self.options))

    def training(self, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Statistics]:
        outputs, changed = self.linen.apply(
            self.module(params),
            *self.inputs(batch),
            **{**dict(self.options), **dict(self.modes or ())},
            rngs={name: tree.key_for(key, name) for name in self.rngs},
            mutable=list(self.mutable),
        )
        return outputs, tree.flatten({name: changed[name] for name in self.mutable})

    def _settings(self) -> tuple:
        return (self.linen, self.inputs, self.options, self.modes, self.rngs, self.mutable)

    def __hash__(self) -> int:
        # Without the other collections, whose arrays do not hash; ``__eq__`` looks at them.
        return hash(self._settings())

    def __eq__(self, other: object) -> bool:
        # The other collections are constants of a compiled step: one made for other statistics must not be reused.
        if not isinstance(other, _Linen):
            return False
        (leaves, structure), (others, of_other) = jax.tree.flatten(self.others), jax.tree.flatten(other.others)
        same = (self._settings(), structure) == (other._settings(), of_other)
        return same and all(a is b for a, b in zip(leaves, others, strict=True))


def from_linen(
    module: Any,
    variables: Any,
    inputs: Inputs = _whole,
    training: Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
    mutable: Sequence[str] = ("batch_stats",),
    **options: Any,
) -> tuple[Apply, Any]:
    """A ``flax.linen`` module and its ``init`` variables: ``params`` train, other collections stay constant.

    options are passed to every call (``train=False``), training over them in training (``{"train": True}``), with a key for
    each of ``rngs``; of ``mutable`` the collections that are there then change, and the parameters are ``{"params": ...,
    "batch_stats": ...}``. Without ``training`` the module trains as it is evaluated, and the parameters are those of
    ``params`` alone. Raises ``ValueError`` without a ``params`` collection.
    """
    if "params" not in variables:
        raise ValueError(
            f"linen variables have no 'params' collection, only {sorted(variables)}; pass module.init(...)"
        )
    changing = tuple(name for name in mutable if name in variables) if training is not None else ()
    others = {k: v for k, v in variables.items() if k not in ("params", *changing)}
    params = {name: variables[name] for name in ("params", *changing)} if changing else variables["params"]
    paths = frozenset(tree.flatten({name: variables[name] for name in changing}))
    # Tuples, as a compiled step hashes its adapter.
    modes = None if training is None else tuple(training.items())
    return _Linen(
        module, inputs, others, tuple(options.items()), modes, tuple(rngs), changing, _checked(params, paths)
    ), params


@dataclasses.dataclass(frozen=True)
class _Equinox(Adapter):
    """static, evaluated: the module without its arrays, as it came and in inference mode. states, dtypes: of its state."""

    static: Any
    evaluated: Any
    inputs: Inputs
    structure: Any
    batched: bool
    takes_key: bool
    trains: bool
    states: Any = None
    dtypes: tuple = ()
    statistics: frozenset[str] = frozenset()

    def _call(self, static: Any, params: Any, batch: Any, key: jax.Array | None) -> tuple[Any, Any]:
        """``(outputs, state)``, the state None where there is none."""
        # Equinox is no dependency of jft: who passes such a module has it.
        import equinox

        weights, state = (params, None) if self.states is None else (params["module"], self._state(params))
        module = equinox.combine(jax.tree.unflatten(self.structure, jax.tree.leaves(weights)), static)
        has_state = state is not None

        def one(inputs: tuple, key: jax.Array | None) -> Any:
            found = module(*inputs, *((state,) if has_state else ()), **({"key": key} if self.takes_key else {}))
            return found if has_state else (found, None)

        inputs = self.inputs(batch)
        if not self.batched:
            return one(inputs, key)
        # A key for each example; statistics are over the batch, which Equinox calls by this name.
        keys = None if key is None else jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
        of_keys = None if keys is None else 0
        return jax.vmap(one, in_axes=(0, of_keys), out_axes=(0, None), axis_name="batch")(inputs, keys)

    def _state(self, params: Any) -> Any:
        state = params["state"]
        return jax.tree.unflatten(self.states, [state[str(i)].astype(dtype) for i, dtype in enumerate(self.dtypes)])

    def __call__(self, params: Any, batch: Any) -> Any:
        return self._call(self.evaluated, params, batch, None)[0]

    def training(self, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Statistics]:
        outputs, state = self._call(self.static, params, batch, key)
        return outputs, {} if state is None else tree.flatten({"state": _numbered(state)})

    def module(self, params: Any) -> Any:
        """The module; with a state, ``(module, state)``."""
        import equinox

        weights = params if self.states is None else params["module"]
        module = equinox.combine(jax.tree.unflatten(self.structure, jax.tree.leaves(weights)), self.static)
        return module if self.states is None else (module, self._state(params))


def _numbered(state: Any) -> dict[str, Any]:
    """The leaves of a state, counters and flags in float32, so that changes of them are task vectors as well."""
    leaves = map(jnp.asarray, jax.tree.leaves(state))
    return {
        str(i): x.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32)
        for i, x in enumerate(leaves)
    }


def from_equinox(module: Any, inputs: Inputs = _whole, batched: bool = True, state: Any = None) -> tuple[Apply, Any]:
    """An Equinox-style module (a callable pytree): its floating-point arrays train.

    batched: the module takes one example and is mapped over the batch (``axis_name="batch"``), as is the custom there.
    state: of ``equinox.nn.make_with_state``, for a module that is called as ``module(*inputs, state)`` and returns
    ``(outputs, state)``; the parameters are then ``{"module": ..., "state": ...}``. A module with dropout or batch statistics
    trains with them unless it is in inference mode; where it takes a ``key``, it is given one.
    """
    import equinox

    inference = equinox.nn.inference_mode(module)
    arrays, static = equinox.partition(module, equinox.is_inexact_array)
    evaluated = equinox.partition(inference, equinox.is_inexact_array)[1]
    takes_key = "key" in inspect.signature(module).parameters
    trains = not equinox.tree_equal(static, evaluated)
    common = static, evaluated, inputs, jax.tree.structure(arrays), batched, takes_key, trains
    if state is None:
        return _Equinox(*common), arrays
    params = {"module": arrays, "state": _numbered(state)}
    dtypes = tuple(jnp.asarray(x).dtype for x in jax.tree.leaves(state))
    paths = frozenset(f"state/{name}" for name in params["state"])
    return _Equinox(*common, jax.tree.structure(state), dtypes, paths), params


@dataclasses.dataclass(frozen=True)
class _Function(Adapter):
    function: Callable
    inputs: Inputs
    in_training: Callable | None = None
    statistics: frozenset[str] = frozenset()

    @property
    def trains(self) -> bool:  # type: ignore[override]  # of a frozen class
        return self.in_training is not None

    def __call__(self, params: Any, batch: Any) -> Any:
        return self.function(params, *self.inputs(batch))

    def training(self, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Statistics]:
        assert self.in_training is not None, "there is one where the adapter trains"
        found = self.in_training(params, *self.inputs(batch), key=key)
        if not self.statistics:
            return found, {}
        outputs, after = found
        flat = tree.flatten(after)
        return outputs, {path: flat[path] for path in self.statistics}

    def module(self, params: Any) -> Any:
        return params


def from_function(
    function: Callable,
    params: Any,
    inputs: Inputs = _whole,
    training: Callable | None = None,
    statistics: str | Sequence[str] = (),
) -> tuple[Apply, Any]:
    """A plain function ``function(params, *inputs(batch))`` over any pytree of arrays.

    training: the function in training, ``training(params, *inputs(batch), key=key) -> outputs``; with ``statistics``, patterns
    of paths, it returns ``(outputs, params)``, and takes the leaves there from what it returns.
    """
    patterns = [statistics] if isinstance(statistics, str) else statistics
    if patterns and training is None:
        raise ValueError(f"statistics={statistics!r} are what a training pass changes; give training=")
    paths = frozenset(tree.matching(tree.flatten(params), patterns, "statistics")) if patterns else frozenset()
    return _Function(function, inputs, training, _checked(params, paths)), params
