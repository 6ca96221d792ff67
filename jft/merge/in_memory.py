"""Merging of task vectors that are in memory, sharded or not."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.compiled import program_cache
from jft.delta import Dense, TaskVector
from jft.delta import manifest as manifests
from jft.delta.encoding import Encoding
from jft.delta.numeric import wide
from jft.merge.rule import Pass, Rule, Tensor, ranked_before
from jft.merge.support import Support, support
from jft.select import threshold

Array = jax.Array
Options = tuple[tuple[str, Hashable], ...]


def merge(
    rule: Rule,
    vectors: Sequence[TaskVector],
    *,
    scale: Any = 1.0,
    base: Any = None,
    statistics: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    note: Mapping[str, Any] | None = None,
) -> Any:
    """The task vector that ``rule`` makes of ``vectors``, times ``scale``; with :attr:`Rule.each` a list, one per vector.

    A path that a vector lacks is a zero change of it. Layers of a stack, and experts, are tensors of their own. One path is
    dense at a time, in float32, sharded as the first of its deltas. Where a rule is elementwise and all deltas of a path
    store entries, no more than half of them together, none is dense: the result is entries, too. base: the parameters the
    vectors are changes of, for rules that read them and for masks and gates. statistics: one ``{path: pytree of arrays}`` per
    model, for rules that read them; arrays of a stacked path begin with the axes of the stack. note: entries of the manifest.

    Raises ``ValueError`` where the rule reads a base and there is none, or a change is relative to one;
    :class:`jft.delta.BaseMismatch` for vectors of different bases, or of another than ``base``.
    """
    taus = list(vectors)
    values = rule.values(len(taus))
    flat = _base(rule, taus, base)
    if rule.coefficients is not None:
        coefficients = [scale * c for c in rule.coefficients(values)]
        # The base itself is a term where it has a coefficient.
        terms = taus if len(coefficients) == len(taus) else [*taus, _whole(flat)]
        return TaskVector.combine(terms, coefficients)
    manifest = manifests.derive([t.manifest for t in taus], "merge", **(note or {}))
    tensors = _Tensors(rule, taus, values, flat, _statistics(rule, taus, statistics), seed)
    for look in rule.passes:
        tensors.known = (*tensors.known, tensors.reduced(look) if look.ranks is None else tensors.ranked(look))
    results = {path: tensors.run(path, rule.merge, scale) for path in tensors.paths}
    if not rule.each:
        return TaskVector({path: tensors.encoded(path, x) for path, x in results.items()}, manifest)
    return [TaskVector({p: tensors.encoded(p, x[i]) for p, x in results.items()}, manifest) for i in range(len(taus))]


def stack_axes(path: str, ndim: int) -> int:
    """How many leading axes of a weight count tensors: layers, and the experts in them. 0 outside stacks.

    >>> stack_axes("layers/mlp/up/w", 3), stack_axes("layers/experts/up/w", 4), stack_axes("embed/w", 2)
    (1, 2, 0)
    """
    # Other libraries number their layers; there every weight is a tensor.
    if tree.stack_of(path) is None or tree.layer_of(path) is not None:
        return 0
    return max(1, ndim - 2)


class _Tensors:
    """The tensors of several task vectors, path by path."""

    def __init__(
        self,
        rule: Rule,
        taus: Sequence[TaskVector],
        values: Mapping[str, Sequence[Any]],
        base: Mapping[str, Array] | None,
        statistics: Sequence[Mapping[str, Any]],
        seed: int,
    ) -> None:
        self.rule, self.taus, self.values, self.base = rule, taus, values, base
        self.statistics = statistics
        self.options: Options = tuple(sorted(rule.options.items()))
        with jax.ensure_compile_time_eval():
            self.key = jax.random.key(seed)
        self.paths = list(dict.fromkeys(path for tau in taus for path in tau))
        self.shapes = {path: next(tau[path].shape for tau in taus if path in tau) for path in self.paths}
        self.supports: dict[str, Support] = {}
        # Entries that no model changes add nothing to sums, and are none of the largest magnitudes.
        if rule.elementwise and not rule.base and not rule.statistics and ranked_before(rule.passes) is None:
            for path, shape in self.shapes.items():
                found = support([tau[path] for tau in taus if path in tau], stack_axes(path, len(shape)))
                if found is not None:
                    self.supports[path] = found
        # What the passes found so far.
        self.known: tuple[Any, ...] = ()

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """The parameters that are known, ``[N]`` float64: what ranks are computed from."""
        return {name: np.asarray(v, np.float64) for name, v in self.values.items() if _concrete(v)}

    def encoded(self, path: str, value: Array) -> Encoding:
        """The delta whose values were merged."""
        return self.supports[path].scatter(value) if path in self.supports else Dense(value)

    def arrays(self, path: str) -> tuple[Array, ...]:
        """What is merged of ``path`` of every vector, float32: the deltas, or their entries."""
        deltas = [self.array(path, i) for i in range(len(self.taus))]
        present = next(x for x in deltas if x is not None)
        return tuple(jnp.zeros_like(present) if x is None else x for x in deltas)

    def array(self, path: str, i: int) -> Array | None:
        """That of one vector; None where it has no such path."""
        if path not in self.taus[i]:
            return None
        if path in self.supports:
            return self.supports[path].gather(self.taus[i][path])
        delta = self.taus[i][path]
        if delta.relative and self.base is not None:
            delta = delta.resolve(self.base[path])
        if delta.shape != self.shapes[path]:
            raise ValueError(f"{path!r} has shape {self.shapes[path]} in one vector and {delta.shape} in another")
        try:
            return delta.dense()
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}; or merge with base=params") from None

    def statistics_of(self, path: str, stack: tuple[int, ...]) -> Any:
        """The statistics of ``path``, arrays ``[stack, N, ...]``; None where there are none."""
        trees = [one[path] for one in self.statistics if path in one]
        if not trees:
            return None
        if len(trees) < len(self.statistics):
            raise ValueError(f"some models have statistics of {path!r} and some have none; give all of them, or none")
        for x in jax.tree.leaves(trees):
            if tuple(x.shape[: len(stack)]) != stack:
                raise ValueError(f"statistics of {path!r} have shape {tuple(x.shape)}; they must begin with {stack}")
        return jax.tree.map(lambda *x: jnp.stack([wide(jnp.asarray(y)) for y in x], axis=len(stack)), *trees)

    def run(self, path: str, function: Callable[..., Any], scale: Any = 1.0, ranked: int | None = None) -> Any:
        """``scale * function(tensor, **options)`` for every tensor of a path, stacked as the path is.

        ranked: the number of the pass whose score this is: without what later ones found, so that it is the same program
        whenever it runs, and without traced parameters, which have no value where entries are ranked.
        """
        deltas = self.arrays(path)
        passes = self.known[:ranked]
        score = ranked_before(self.rule.passes[: len(passes)]) if ranked is None else None
        stack = self.shapes[path][: stack_axes(path, len(self.shapes[path]))]
        size = self.rule.entries(self.shapes[path][len(stack) :])
        ranks = None
        if self.rule.ranks is not None:
            # Of fewer entries than are ranked all are among them: the rest are zero.
            most = math.prod(deltas[0].shape[len(stack) :]) if path in self.supports else size
            ranks = jnp.asarray(np.minimum(self.rule.ranks(size, self.numbers), most), jnp.uint32)
        thresholds = [x for look, x in zip(self.rule.passes, passes, strict=False) if look.of is None]
        common = {
            "parameters": {
                name: jnp.stack([jnp.asarray(x, jnp.float32) for x in v])
                for name, v in self.values.items()
                if ranked is None or _concrete(v)
            },
            "ranks": ranks,
            "thresholds": thresholds[-1] if thresholds else None,
            "passes": passes,
            "key": tree.key_for(self.key, path),
        }
        stacked = {
            "base": wide(jnp.asarray(self.base[path])) if self.rule.base and self.base is not None else None,
            "statistics": self.statistics_of(path, stack),
            "scores": None if score is None else self.scores(path, score),
        }
        each = self.rule.each and function is self.rule.merge
        program = _program(
            function,
            self.options,
            len(stack),
            each,
            _sharding(deltas[0]) if function is self.rule.merge and not each else None,
        )
        return program(deltas, stacked, common, jnp.asarray(scale, jnp.float32))

    def reduced(self, look: Pass) -> Any:
        """What a pass sums up to over all tensors, or the maximum."""
        assert look.of is not None, "a pass without ranks has a function"
        inside, between = (jnp.sum, jnp.add) if look.reduce == "sum" else (jnp.max, jnp.maximum)
        total = None
        for path in self.paths:
            axes = tuple(range(stack_axes(path, len(self.shapes[path]))))
            part = jax.tree.map(functools.partial(inside, axis=axes), self.run(path, look.of))
            total = part if total is None else jax.tree.map(between, total, part)
        return total

    def ranked(self, look: Pass) -> Array:
        """The values ``[N, R]`` of the ranks of a pass among the entries of each whole vector."""
        assert look.ranks is not None, "the pass has ranks"
        size = sum(math.prod(shape) for shape in self.shapes.values())
        rows = []
        for i, row in enumerate(np.asarray(look.ranks(size, self.numbers))):
            with self._known():
                scores = {path: self.score(path, i) for path in self.paths}
                # Those that no model stores are zero, and come after all that are.
                stored = sum(x.size for x in scores.values())
                limit = lambda k, s=scores, n=stored: threshold.threshold(s, int(k))[0] if k <= n else 0.0
                rows.append([limit(k) if k > 0 else math.inf for k in row])
        return jnp.asarray(rows, jnp.float32)

    def score(self, path: str, i: int) -> Array:
        """What the next pass ranks the entries of model ``i`` by, of the shape of the weight."""
        number = len(self.known)
        if self.rule.passes[number].of is None:
            delta = self.array(path, i)
            shape = self.supports[path].compact if path in self.supports else self.shapes[path]
            return jnp.zeros(shape, jnp.float32) if delta is None else jnp.abs(delta)
        return jnp.take(self.scores(path, number), i, axis=stack_axes(path, len(self.shapes[path])))

    def scores(self, path: str, number: int) -> Array:
        """``[stack, N, ...]``, what the pass of that number ranks."""
        function = self.rule.passes[number].of
        assert function is not None, "magnitudes are no score"
        return self.run(path, function, ranked=number)

    def _known(self) -> contextlib.AbstractContextManager[None]:
        """The context in which what does not depend on a traced parameter has values, as where weights are learned."""
        # Only there: it evaluates operation by operation, which arrays on a mesh do not take.
        traced = any(not _concrete(v) for v in self.values.values())
        return jax.ensure_compile_time_eval() if traced else contextlib.nullcontext()


@program_cache(maxsize=256)
def _program(
    function: Callable[..., Any], options: Options, stack: int, each: bool, sharding: Any
) -> Callable[..., Any]:
    def program(deltas: tuple[Array, ...], stacked: Mapping[str, Any], common: Mapping[str, Any], scale: Array) -> Any:
        # [..., N, tensor]: the stack first, for it is what is mapped over.
        models = jnp.stack(deltas, axis=stack)
        shape = models.shape[:stack]

        def one(delta: Array, stacked: Mapping[str, Any], index: Array) -> Any:
            place = {
                "key": jax.random.fold_in(common["key"], index),
                "layer": index // math.prod(shape[1:]) if stack else index,
                "layers": jnp.int32(shape[0] if stack else 0),
            }
            tensor = Tensor(delta, **{**common, **stacked, **place})
            return jax.tree.map(lambda x: scale * x, function(tensor, **dict(options)))

        indices = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        # Experts side by side, so that a mesh may spread them; layers one after the other, so that one is dense at a time.
        for _ in range(stack - 1):
            one = jax.vmap(one)
        if stack:
            result = jax.lax.map(lambda args: one(*args), (models, stacked, indices))
        else:
            result = one(models, stacked, indices)
        # One result for each model: the axis of models stands behind the stack.
        return jnp.moveaxis(result, stack, 0) if each else result

    return jax.jit(program) if sharding is None else jax.jit(program, out_shardings=sharding)


def _sharding(delta: Array) -> Any:
    sharding = getattr(delta, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _statistics(
    rule: Rule, taus: Sequence[TaskVector], statistics: Sequence[Mapping[str, Any]] | None
) -> Sequence[Mapping[str, Any]]:
    if rule.statistics != (statistics is not None):
        raise ValueError(
            "this rule reads statistics of data; give one tree per model: statistics=[...]"
            if rule.statistics
            else "this rule reads no statistics"
        )
    if statistics is None:
        return ()
    if len(statistics) != len(taus):
        raise ValueError(f"statistics are of {len(statistics)} models, and there are {len(taus)} task vectors")
    return list(statistics)


def _concrete(values: Sequence[Any]) -> bool:
    return not any(isinstance(x, jax.core.Tracer) for x in values)


def _whole(base: Mapping[str, Array] | None) -> TaskVector:
    """The base as a change from nothing."""
    assert base is not None, "a rule with a coefficient for the base reads it"
    leaves = {path: Dense(jnp.asarray(x)) for path, x in base.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    return TaskVector(leaves, manifests.derive([], "base"))


def _base(rule: Rule, taus: Sequence[TaskVector], base: Any) -> dict[str, Array] | None:
    if base is None:
        if rule.base:
            raise ValueError("this rule reads the base; give its parameters: base=params")
        return None
    flat = tree.flatten(base)
    # Once for all vectors: it reads every weight.
    manifests.verify({"base": manifests.common_base(tau.manifest for tau in taus)}, flat)
    missing = [path for tau in taus for path in tau if path not in flat]
    if missing:
        raise ValueError(f"a task vector changes {missing[0]!r}, which the base does not have")
    return flat
