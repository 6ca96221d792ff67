"""Any other pure ``apply`` with jft: flax.nnx, flax.linen, Equinox, a plain function.

Each adapter returns ``(apply, params)`` with ``apply(params, batch) -> outputs``; every method, the training loop and task
vectors take such a pair. What they cannot have is the cost saving of structured weights: a low-rank update is merged into
the weight before each call. A module that takes something other than the whole batch says so with ``inputs``::

    apply, params = from_nnx(module, inputs=lambda batch: (batch["images"],))
    run = jft.finetune(apply, params, data, method="lora", objective="classification")

Adapters of equal modules that hold the same state compare equal, so a compiled step is reused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Apply = Callable[[Any, Any], Any]
Inputs = Callable[[Any], tuple]


def _whole(batch: Any) -> tuple:
    return (batch,)


@dataclasses.dataclass(frozen=True)
class _Nnx:
    graph: Any
    rest: Any
    inputs: Inputs

    def __call__(self, params: Any, batch: Any) -> Any:
        # Imported on use: `import jft` must stay light.
        from flax import nnx

        state = nnx.State(params)
        return nnx.merge(self.graph, state, self.rest)(*self.inputs(batch))

    def __hash__(self) -> int:
        # ``rest`` holds arrays, which do not hash.
        return hash((self.graph, self.inputs))

    def __eq__(self, other: object) -> bool:
        # The arrays of ``rest`` are constants of a compiled step, so only the same adapter is surely the same program.
        return self is other


def from_nnx(module: Any, inputs: Inputs = _whole) -> tuple[Apply, Any]:
    """A ``flax.nnx`` module: its ``Param`` state is what trains; other state (statistics, RNG) stays constant.

    Put the module in evaluation mode (``module.eval()``) first: dropout and running statistics do not advance.
    """
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]  # "..." is the filter for the rest
    return _Nnx(graph, rest, inputs), nnx.to_pure_dict(params)


@dataclasses.dataclass(frozen=True, eq=False)
class _Linen:
    module: Any
    inputs: Inputs
    others: Any
    options: tuple[tuple[str, Any], ...]

    def __call__(self, params: Any, batch: Any) -> Any:
        return self.module.apply({"params": params, **self.others}, *self.inputs(batch), **dict(self.options))

    def __hash__(self) -> int:
        # Without the other collections, whose arrays do not hash; ``__eq__`` looks at them.
        return hash((self.module, self.inputs, self.options))

    def __eq__(self, other: object) -> bool:
        # The other collections are constants of a compiled step: one made for other statistics must not be reused.
        if not isinstance(other, _Linen):
            return False
        (leaves, structure), (other_leaves, other_structure) = (
            jax.tree.flatten(self.others),
            jax.tree.flatten(other.others),
        )
        same = (self.module, self.inputs, self.options, structure) == (
            other.module,
            other.inputs,
            other.options,
            other_structure,
        )
        return same and all(a is b for a, b in zip(leaves, other_leaves, strict=True))


def from_linen(module: Any, variables: Any, inputs: Inputs = _whole, **options: Any) -> tuple[Apply, Any]:
    """A ``flax.linen`` module and its ``init`` variables: ``params`` train, other collections stay constant.

    options are passed to every call (``deterministic=True``). Raises ``ValueError`` without a ``params`` collection.
    """
    if "params" not in variables:
        raise ValueError(
            f"linen variables have no 'params' collection, only {sorted(variables)}; pass module.init(...)"
        )
    others = {k: v for k, v in variables.items() if k != "params"}
    # A tuple, as a compiled step hashes its adapter.
    return _Linen(module, inputs, others, tuple(options.items())), variables["params"]


@dataclasses.dataclass(frozen=True)
class _Equinox:
    static: Any
    inputs: Inputs
    structure: Any
    batched: bool

    def __call__(self, params: Any, batch: Any) -> Any:
        # Equinox is no dependency of jft: who passes such a module has it.
        import equinox

        module = equinox.combine(jax.tree.unflatten(self.structure, jax.tree.leaves(params)), self.static)
        call = jax.vmap(module) if self.batched else module
        return call(*self.inputs(batch))


def from_equinox(module: Any, inputs: Inputs = _whole, batched: bool = True) -> tuple[Apply, Any]:
    """An Equinox-style module (a callable pytree): its floating-point arrays train.

    batched: the module takes one example and is mapped over the batch, as is the custom there.
    """
    import equinox

    arrays, static = equinox.partition(module, equinox.is_inexact_array)
    return _Equinox(static, inputs, jax.tree.structure(arrays), batched), arrays


@dataclasses.dataclass(frozen=True)
class _Function:
    function: Callable
    inputs: Inputs

    def __call__(self, params: Any, batch: Any) -> Any:
        return self.function(params, *self.inputs(batch))


def from_function(function: Callable, params: Any, inputs: Inputs = _whole) -> tuple[Apply, Any]:
    """A plain function ``function(params, *inputs(batch))`` over any pytree of arrays."""
    return _Function(function, inputs), params
