"""A model cut in two: the first layers as a function whose results are kept, and a model that starts behind them.

What the first layers make of an example never changes while they are frozen. It is computed once, and every epoch after
that costs the remaining layers only. Both halves take the parameters of the whole model, so that what trains in the second
half is a change of the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jft import tree
from jft.models import blocks
from jft.models.core import Execution, Hooks, Model, Params, Runs, Scope

Array = jax.Array
Skipped = tuple[tuple[str, int], ...]


def split(model: Model, layers: int | Mapping[str, int]) -> tuple[Prefix, Model]:
    """``(prefix, suffix)``: ``suffix.apply(params, prefix(params, batch))`` is ``model.apply(params, batch)``.

    layers: how many layers the prefix has, in every stack of the model or by stack (CLIP: ``{"vision/layers": 8,
    "text/layers": 6}``; a stack that is not named is run whole by the suffix). Decoders, encoders, vision transformers,
    CLIP, and classifiers on them (on T5's encoder as well). Parameters of the prefix get zero gradients from the suffix:
    freeze them, as by ``last_k_layers``. Skip tuning (Wu et al. 2024, arXiv:2412.11509) calls this layer-wise skipping.

    Raises ValueError for a number of layers that a stack does not have, and for models whose layers are not one stack:
    with a memory, with token selection, or sequence to sequence.
    """
    config = model.config
    base = getattr(config, "backbone", config)
    _check(base, whole=base is config)
    stacks = tree.stacks(tree.flatten(model.abstract()))
    if isinstance(layers, Mapping):
        unknown = [name for name in layers if name not in stacks]
        if unknown:
            raise ValueError(f"this model has no layers {unknown[0]!r}; its stacks are {', '.join(stacks)}")
        counts = dict(layers)
    else:
        counts = dict.fromkeys(stacks, layers)
    for name, count in counts.items():
        if not 1 <= count <= stacks[name]:
            raise ValueError(f"a prefix of {count} layers: {name!r} has {stacks[name]}; choose 1 to {stacks[name]}")
    skipped = tuple(sorted(counts.items()))
    suffix_config = Suffix(base, skipped)
    suffix = suffix_config if base is config else dataclasses.replace(config, backbone=suffix_config)
    return Prefix(base, model.execution, skipped), dataclasses.replace(model, config=suffix)


def precompute(prefix: Prefix, params: Params, batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The suffix's batch for each of ``batches``, on the host, as NumPy arrays."""
    for batch in batches:
        yield jax.device_get(prefix(params, batch))


def suffix_input(scope: Scope, stack: str) -> Array | None:
    """The input of the first layer that ``scope`` runs of ``stack``, where that is not the stack's first; else None."""
    return scope.features.get(stack) if isinstance(scope, _SuffixScope) else None


@dataclasses.dataclass(frozen=True)
class Prefix:
    """``prefix(params, batch)``: the batch with the residual stream that enters the suffix, in place of its images.

    It stands under ``features [B, T, D]``, for CLIP ``vision/features`` and ``text/features``, in the activation dtype.
    """

    base: Any
    execution: Execution
    skipped: Skipped

    def __call__(self, params: Params, batch: Any) -> dict[str, Any]:
        fields = dict(batch) if hasattr(batch, "keys") else {"images" if batch.ndim == 4 else "tokens": batch}
        features = _run_prefix(self, params, fields)
        # The features replace the images; tokens stay, as masks and positions come from them.
        if "images" in fields and features.keys() & {"features", "vision/features"}:
            del fields["images"]
        return fields | features


@functools.partial(jax.jit, static_argnums=0)
def _run_prefix(prefix: Prefix, params: Params, batch: Any) -> dict[str, Array]:
    scope = _PrefixScope(prefix.execution, dict(prefix.skipped))
    # What comes after the prefix is traced as well, and left out by the compiler: nothing reads it.
    run = prefix.base.outputs if hasattr(prefix.base, "outputs") else prefix.base.hidden_states
    run(scope, params, batch)
    return {_key(stack): h for stack, h in scope.outputs.items()}


@dataclasses.dataclass(frozen=True)
class Suffix:
    """The architecture ``base`` behind the first ``(stack, layers)`` of ``skipped``, with the parameters of all of it.

    Its batches come from a :class:`Prefix`. Everything else about it is as ``base`` says. Checkpoints are those of the
    whole model: save with that.
    """

    base: Any
    skipped: Skipped

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling look names up before the fields exist: handing those on would not end.
        if name.startswith("__") or name in ("base", "skipped"):
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def family(self) -> str:
        """A name that no checkpoint has."""
        return f"suffix of {self.base.family}"

    def init(self, key: Array, dtype: Any) -> dict:
        """The parameters of the whole model."""
        return self.base.init(key, dtype)

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """The outputs of ``base`` for the batch that the features were made of. ValueError where there are none."""
        scope = Scope(execution, hooks)
        return blocks.finish(scope, self.outputs(scope, params, batch))

    def outputs(self, scope: Scope, params: Params, batch: Any) -> Any:
        """Outputs, in the scope of a caller."""
        return self._run_suffix(self.base.outputs, scope, params, self._with_features(batch))

    def hidden_states(self, scope: Scope, params: Params, batch: Any) -> Array:
        """Hidden states, which a classifier pools."""
        return self._run_suffix(self.base.hidden_states, scope, params, self._with_features(batch))

    def image_embedding(self, scope: Scope, params: Params, batch: Any) -> Array:
        """The image embedding, which a classifier on CLIP reads."""
        return self._run_suffix(self.base.image_embedding, scope, params, batch)

    def text_embedding(self, scope: Scope, params: Params, batch: Any) -> Array:
        """CLIP's text embedding."""
        return self._run_suffix(self.base.text_embedding, scope, params, batch)

    def _with_features(self, batch: Any) -> Any:
        fields = batch if hasattr(batch, "keys") else {}
        if not any(_key(stack) in fields for stack, _ in self.skipped):
            keys = " or ".join(repr(_key(stack)) for stack, _ in self.skipped)
            raise ValueError(f"the batch has no {keys}, only {sorted(fields)}; make it with the prefix that split gave")
        return batch

    def _run_suffix(self, function: Callable[..., Any], scope: Scope, params: Params, batch: Any) -> Any:
        fields = batch if hasattr(batch, "keys") else {}
        features = {stack: fields[_key(stack)] for stack, _ in self.skipped if _key(stack) in fields}
        suffix_scope = _SuffixScope(scope, dict(self.skipped), features)
        out = function(suffix_scope, params, batch)
        collect(scope, [suffix_scope])
        return out


class _PrefixScope(Scope):
    """The scope of a prefix: runs the first layers of each stack, and keeps their outputs."""

    def __init__(self, execution: Execution, skipped: Mapping[str, int]):
        super().__init__(execution)
        self.skipped = skipped
        self.outputs: dict[str, Array] = {}

    def layers(self, prefix: str, body: Any, h: Array, params: Params, xs: Any = None) -> Array:
        count = self.skipped.get(prefix)
        if count is None:
            return super().layers(prefix, body, h, params, xs)
        h = stack_scope(self, prefix, 0, count).layers(prefix, body, h, cut(params, 0, count), cut(xs, 0, count))
        self.outputs[prefix] = h
        return h


class _SuffixScope(Scope):
    """The scope of a suffix: runs the last layers of each stack, from the outputs of the first ones."""

    def __init__(self, outer: Scope, skipped: Mapping[str, int], features: Mapping[str, Array]):
        super().__init__(outer.execution, outer.hooks, outer.state)
        self.skipped = skipped
        self.features = {stack: x.astype(outer.execution.dtype) for stack, x in features.items()}

    def layers(self, prefix: str, body: Any, h: Array, params: Params, xs: Any = None) -> Array:
        if prefix not in self.skipped:
            return super().layers(prefix, body, h, params, xs)
        if prefix not in self.features:
            raise ValueError(f"the batch has no {_key(prefix)!r}; make it with the prefix that split gave")
        first, last = self.skipped[prefix], length(params)
        # A prefix of all layers leaves nothing to scan.
        if first == last:
            return self.features[prefix]
        piece = stack_scope(self, prefix, first, last)
        h = piece.layers(prefix, body, self.features[prefix], cut(params, first, last), cut(xs, first, last))
        collect(self, [piece])
        return h


def _key(stack: str) -> str:
    return stack.removesuffix("layers") + "features"


def _check(base: Any, whole: bool) -> None:
    if getattr(base, "memory", None) is not None:
        raise ValueError("a model with memory layers has two stacks that alternate; it cannot be split")
    if getattr(getattr(base, "vision", base), "selection", None) is not None:
        raise ValueError("a vision transformer that selects tokens cannot be split; use with_selection(model, None)")
    if isinstance(base, Suffix):
        raise ValueError("this model is split already; split the whole one")
    if not hasattr(base, "outputs") and (whole or not hasattr(base, "hidden_states")):
        raise ValueError(f"a {base.family!r} model cannot be split into a prefix and a suffix of layers")


def cut(tree: Any, start: int, stop: int) -> Any:
    """Layers ``start`` to ``stop`` of stacked leaves: arrays, structured weights, or :class:`~jft.models.core.Runs` of them.

    Runs stay runs, cut where they overlap; those that lie wholly inside are not copied.
    """
    return jax.tree.map(lambda leaf: _leaf(leaf, start, stop), tree, is_leaf=lambda x: isinstance(x, Runs))


def _leaf(leaf: Any, start: int, stop: int) -> Any:
    if not isinstance(leaf, Runs):
        # A slice would copy, outside jit.
        return leaf if (start, stop) == (0, leaf.shape[0]) else jax.lax.slice_in_dim(leaf, start, stop, axis=0)
    parts, sizes, first = [], [], 0
    for part, size in zip(leaf.parts, leaf.sizes, strict=True):
        low, high = max(start - first, 0), min(stop - first, size)
        if low < high:
            parts.append(part if high - low == size else cut(part, low, high))
            sizes.append(high - low)
        first += size
    return Runs(tuple(parts), tuple(sizes))


def length(tree: Any) -> int:
    """The number of layers of stacked leaves."""
    leaf = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Runs))[0]
    return sum(leaf.sizes) if isinstance(leaf, Runs) else leaf.shape[0]


def stack_scope(scope: Scope, prefix: str, start: int, stop: int) -> Scope:
    """A scope for layers ``start`` to ``stop`` of the stack ``prefix``: hook state of its layers is cut to them."""
    state = {k: cut(v, start, stop) if k.startswith(prefix + "/") else v for k, v in scope.state.items()}
    return Scope(scope.execution, scope.hooks, state)


def collect(scope: Scope, pieces: Sequence[Scope]) -> None:
    """Hand what hooks read in the pieces of a stack, in order, to ``scope``: by name, stacked over layers again.

    Reads whose shapes differ from piece to piece (a piece may have fewer tokens) stay apart, as a tuple.
    """
    for name in dict.fromkeys(name for piece in pieces for name in piece.reads):
        reads = [piece.reads[name] for piece in pieces if name in piece.reads]
        if name in scope.reads:
            raise ValueError(f"site {name!r} was read twice in one pass; site names are unique")
        scope.reads[name] = _stacked(reads)


def _stacked(reads: list[Any]) -> Any:
    rows = [[x.shape[1:] for x in jax.tree.leaves(read)] for read in reads]
    if any(shapes != rows[0] for shapes in rows):
        return tuple(reads)
    return reads[0] if len(reads) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *reads)
