"""`RunCalibration`: gradients, outputs and batches that scores read, computed as the training step would compute them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jft import parallel, tree
from jft.compiled import program_cache
from jft.methods import InPlace, Method, Plan, Select
from jft.methods.parametrise import Parametrisation
from jft.models.core import is_jft_model
from jft.select import calibration
from jft.train import evaluation, feed
from jft.train.feed import Feed
from jft.train.objectives import Objective
from jft.train.optimizers import beginning
from jft.train.per_example import Each, squares, tapped
from jft.train.state import find_mesh
from jft.train.step import Recipe, apply_for, apply_of, dtype_of, in_chunks

Array = jax.Array
Weights = dict[str, Array]


# `Setting` holds no weights: it is a static argument of the cache below, which would keep them alive.
@dataclasses.dataclass(frozen=True)
class Setting:
    """The static part of a score's program, and its layout; equal settings share compiled functions.

    order: all paths. places: shardings of the candidates on a mesh. dtype: of candidates where the model sees them.
    accumulate: microbatches per batch. chunk: examples whose whole gradients are held at once.
    """

    apply: Callable[[Any, Any], Any]
    objective: Objective
    structure: Any
    order: tuple[str, ...]
    mesh: Any
    places: tuple[tuple[str, Any], ...]
    dtype: Any
    accumulate: int
    chunk: int

    def tree(self, rest: Mapping[str, Array], chosen: Mapping[str, Array]) -> Any:
        """The parameters; candidates in the dtype in which the step shows trained values to the model."""
        # The rest stays in the dtype of the base, as frozen weights do in the step.
        flat = {**rest, **tree.cast(dict(chosen), self.dtype)}
        return jax.tree.unflatten(self.structure, [flat[p] for p in self.order])

    def laid(self, values: Weights) -> Weights:
        """``values`` sharded as the weights are."""
        # A tuple of pairs in the field, because a dict has no hash. Without a mesh it is empty and nothing is constrained.
        shardings = dict(self.places)
        constrain = jax.lax.with_sharding_constraint
        return {p: constrain(x, shardings[p]) if p in shardings else x for p, x in values.items()}


def _gradient(setting: Setting, rest: Weights, chosen: Weights, batch: Any) -> Weights:
    """The step's gradient: of the sum of losses over the weight of the whole batch, in ``chosen`` alone."""
    # Of the whole batch, before the split: microbatches with unequal weights then still add up to its gradient.
    weight = setting.objective.weight(batch)
    apply = in_chunks(setting.objective, setting.apply)

    def loss(chosen: Weights, part: Any) -> Array:
        # Penalties of the method are left out: scores are of the data.
        return setting.objective.loss(apply(setting.tree(rest, chosen), part), part)[0] / weight

    def one(part: Any) -> Weights:
        gradients = jax.grad(loss)(chosen, part)
        return setting.laid({p: g.astype(jnp.float32) for p, g in gradients.items()})

    if setting.accumulate == 1:
        return one(batch)
    parts = parallel.microbatches(batch, setting.accumulate, setting.mesh)
    # float32, where the base may be bfloat16: small gradients would vanish in the sum.
    zeros = {p: jnp.zeros(w.shape, jnp.float32) for p, w in chosen.items()}
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)
    return jax.lax.scan(add, setting.laid(zeros), parts)[0]


# Module functions, no closures: `_jit` finds a compiled program through the function object.
def _fold_gradient(setting: Setting, update: Callable, carry: Any, rest: Weights, chosen: Weights, batch: Any) -> Any:
    return update(carry, _gradient(setting, rest, chosen, batch))


def _add(total: Weights, gradient: Weights) -> Weights:
    return jax.tree.map(jnp.add, total, gradient)


def _add_square(total: Weights, gradient: Weights) -> Weights:
    return jax.tree.map(lambda a, g: a + jnp.square(g), total, gradient)


def _add_size(total: Weights, gradient: Weights) -> Weights:
    return jax.tree.map(lambda a, g: a + jnp.abs(g), total, gradient)


def _add_result(setting: Setting, compute: Callable, total: Any, params: Any, batch: Any, *arguments: Any) -> Any:
    result = compute(params, batch, *arguments)
    return jax.tree.map(lambda a, x: a + x.astype(jnp.float32), total, result)


@program_cache(maxsize=64)
def _jit(function: Callable, *static: Any, sharding: Any = None) -> Callable:
    """``function`` with its static arguments bound, compiled, its first free argument donated and results at ``sharding``."""
    # Donated, so that a running sum as large as the weights exists once.
    return jax.jit(functools.partial(function, *static), donate_argnums=0, out_shardings=sharding)


class RunCalibration:
    """The :class:`jft.select.calibration.Calibration` of a training run.

    model: a jft model, or any ``apply(params, batch)``. params: the base, arrays on their devices. paths: the candidates.
    objective: of the run. data: what :class:`jft.train.feed.Feed` takes and can be begun anew (a list of batches, a
    loader), or a function that gives such a thing each time it is called. seed: of all draws. mesh: default that of
    ``params``. dtype: as in :func:`jft.finetune`. accumulate: microbatches per batch. chunk: examples whose gradients in the
    weights that are no matrix of a product (:mod:`jft.train.per_example`) are held at once; default one for each shard of the
    batch.
    train: ``train(steps, table=None, how=None, penalties=(), begins=False) -> parameters`` (a pytree, or by path) after
    training of the candidates, or with a table of the layers that it names; what :meth:`tuned` gives. begins: by the first
    steps of the run's own schedule.
    evaluate: ``evaluate(parameters) -> metrics`` on held-out data.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        paths: Any,
        objective: Objective,
        data: Any,
        *,
        seed: int = 0,
        mesh: Any = None,
        dtype: Any = None,
        accumulate: int = 1,
        chunk: int | None = None,
        train: Callable[..., Any] | None = None,
        evaluate: Callable[[Any], dict[str, float]] | None = None,
    ):
        # Every score starts from the same batches, so the data is opened once for each.
        if hasattr(data, "__next__"):
            raise ValueError(
                "scores read the data from its beginning, which an iterator has left; give a list or loader"
            )
        if accumulate > 1 and not objective.splits:
            raise ValueError(f"accumulate={accumulate} does not go with {type(objective).__name__}: it does not split")
        self.model, self.objective, self._data, self._train = model, objective, data, train
        self._evaluate = evaluate
        # `after` moves it on, in a copy; a calibration itself never changes.
        self._passed = 0  # batches that training up to here has taken
        self.mesh = find_mesh(params) if mesh is None else mesh
        if self.mesh is None:
            # Numpy weights have no `sharding`, which `_zeros` and `stream` read.
            params = jax.tree.map(jnp.asarray, params)
        else:
            params = jax.device_put(params, parallel.shardings(params, self.mesh))
        self._tree, self.params = params, tree.flatten(params)
        # In the model's order, whatever the caller's, so that equal candidates make equal settings.
        candidates = frozenset(paths)
        self.paths = tuple(p for p in self.params if p in candidates)
        self._check(candidates)
        self.key = jax.random.key(seed)
        self._setting = Setting(
            apply_of(model, self.mesh),
            objective,
            jax.tree.structure(params),
            tuple(self.params),
            self.mesh,
            () if self.mesh is None else tuple((p, self.params[p].sharding) for p in self.paths),
            dtype_of(model, params) if dtype is None else dtype,
            accumulate,
            # One example on each device: the least memory that leaves none of them idle.
            chunk or (1 if self.mesh is None else parallel.batch_shards(self.mesh)),
        )

    def _check(self, paths: Any) -> None:
        for path in paths:
            if path not in self.params:
                raise ValueError(f"candidate {path!r} is no weight of the model")
            if not jnp.issubdtype(self.params[path].dtype, jnp.floating):
                raise ValueError(f"candidate {path!r} is {self.params[path].dtype}, which has no gradient")

    def lead(self, path: str) -> int:
        return tree.lead(path, self.params[path].ndim, is_jft_model(self.model))

    @property
    def _weights(self) -> tuple[Weights, Weights]:
        chosen = {p: self.params[p] for p in self.paths}
        return {p: w for p, w in self.params.items() if p not in chosen}, chosen

    def _zeros(self) -> Weights:
        """Float32 zeros, each sharded as its weight."""
        return {p: jnp.zeros(self.params[p].shape, jnp.float32, device=self.params[p].sharding) for p in self.paths}

    def stream(self) -> Generator[Any, None, None]:
        """The next training batches, on the devices; refused where the loop would refuse them."""
        data = self._data() if callable(self._data) else self._data
        # Not the default device: a run may be on another one, and arrays of two devices do not mix.
        device = next(iter(self.params.values())).sharding
        # Closed also when a consumer stops early: a loader has threads.
        with contextlib.closing(feed.Feed(data, self.model)) as source:
            # One by one: a position of the data is the loader's own, and not a count to go to.
            for step in range(self._passed):
                source.next(step, self.objective)
            step = self._passed
            while True:
                batch = source.next(step, self.objective)
                yield jax.device_put(batch, device) if self.mesh is None else parallel.put_batch(batch, self.mesh)
                step += 1

    def batches(self, count: int) -> Generator[Any, None, None]:
        """The first ``count`` of :meth:`stream`."""
        if count < 1:
            raise ValueError(f"a score over {count} batches; it must be at least 1")
        with contextlib.closing(self.stream()) as stream:
            for _ in range(count):
                yield next(stream)

    def fold(self, update: Callable[[Any, Weights], Any], carry: Any, batches: int) -> Any:
        # Cached by `update`: a module function compiles once, a lambda at each call.
        run, weights = _jit(_fold_gradient, self._setting, update), self._weights
        for batch in self.batches(batches):
            carry = run(carry, *weights, batch)
        return carry

    def gradient(self, batches: int = 1) -> Weights:
        return _mean(self.fold(_add, self._zeros(), batches), batches, "gradient")

    def squares(
        self, count: int, per: calibration.Per = "example", power: int = 2, tokens: Literal["mean", "sum"] = "mean"
    ) -> Weights:
        for name, value, known in (
            ("per", per, ("batch", "example", "sampled")),
            ("power", power, (1, 2)),
            ("tokens", tokens, ("mean", "sum")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, known))}")
        if per == "batch":
            # `power` picks between named functions, so that the cache above sees equal ones.
            total = self.fold(_add_square if power == 2 else _add_size, self._zeros(), count)
        else:
            total = self._over_examples(count, Each(per == "sampled", power, tokens == "sum"))
        return _mean(total, count, "squared gradient")

    def _over_examples(self, count: int, how: Each) -> Weights:
        name = type(self.objective).__name__
        if count < 1:
            raise ValueError(f"a score over {count} examples; it must be at least 1")
        if not self.objective.splits:
            raise ValueError(f"{name} compares examples with each other, so one alone has no loss; take per='batch'")
        if how.sampled and not hasattr(self.objective, "sampled_loss"):
            raise ValueError(f"{name} has no sampled_loss(key, outputs, batch); take per='example'")
        # They depend on the shapes of a batch, of which there is none before the first.
        taps: tuple[str, ...] | None = None
        weights = self._weights
        total, seen, done = self._zeros(), 0, 0
        # By name, so that these draws are not those of another score with the same seed.
        key = tree.key_for(self.key, "sampled targets")
        with contextlib.closing(self.stream()) as stream:
            while seen < count:
                batch = next(stream)
                if taps is None:
                    taps = tapped(self.model, self._setting, *weights, batch)
                    run = _jit(squares, self._setting, how, taps)
                draw = jax.random.fold_in(key, done)
                # Counts are arrays: as Python numbers they would be constants, and each batch would compile anew.
                total, now = run(total, jnp.int32(seen), *weights, batch, jnp.int32(count), draw)
                # Data without any example that counts would keep this loop going for ever.
                if int(now) == seen:
                    raise ValueError(f"in batch {done} of the data no example counts; look at its masks")
                seen, done = int(now), done + 1
        return total

    def sums(self, compute: Callable[..., Any], batches: int, *arguments: Any) -> Any:
        # Small, and read by the host: whole on every device.
        sharding = None if self.mesh is None else parallel.replicated(self.mesh)
        run = _jit(_add_result, self._setting, compute, sharding=sharding)
        total: Any = None
        for batch in self.batches(batches):
            if total is None:
                # Only a batch tells the shapes of what is summed.
                shapes = jax.eval_shape(compute, self._tree, batch, *arguments)
                total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
            total = run(total, self._tree, batch, *arguments)
        return total

    def tuned(
        self, steps: int, table: calibration.Table | None = None, how: Any = None, penalties: tuple = ()
    ) -> Weights:
        trained = self._trained(steps, table=table, how=how, penalties=penalties or None)
        # A table may train weights that are no candidates, and a search evaluates the whole model.
        return trained if table is not None else {p: trained[p] for p in self.paths}

    def _trained(self, steps: int, **options: Any) -> Weights:
        if self._train is None:
            raise ValueError("this score trains first, which this calibration cannot; give RunCalibration(train=...)")
        if steps < 1:
            raise ValueError(f"a score after {steps} steps of training; it must be at least 1")
        # None is left out, so that `train` may lack options that a score does not use.
        return tree.flatten(self._train(steps, **{k: v for k, v in options.items() if v is not None}))

    def after(self, steps: int, how: Any = None) -> RunCalibration:
        trained = self._trained(steps, how=how, begins=True)
        other = self.at({p: trained[p] for p in self.paths})
        other._passed = self._passed + steps
        return other

    def at(self, weights: Mapping[str, Array]) -> RunCalibration:
        other = copy.copy(self)
        other.params = {**self.params, **weights}
        other._tree = tree.like(self._tree, other.params)
        return other

    def with_objective(self, objective: Any) -> RunCalibration:
        other = copy.copy(self)
        other.objective, other._setting = objective, dataclasses.replace(self._setting, objective=objective)
        return other

    def evaluate(self, params: Mapping[str, Array]) -> dict[str, float]:
        if self._evaluate is None:
            raise ValueError("this score evaluates, which this calibration cannot; give RunCalibration(evaluate=...)")
        return self._evaluate(tree.like(self._tree, params))


def _mean(total: Weights, count: int, what: str) -> Weights:
    """``total / count``, refused where it is not finite."""
    # One transfer to the host for all paths.
    sound = jax.device_get({p: jnp.all(jnp.isfinite(x)) for p, x in total.items()})
    bad = next((p for p, s in sound.items() if not s), None)
    if bad is not None:
        raise ValueError(f"the {what} of {bad} is not finite; look at the weights and the first batches of the data")
    return {p: x / count for p, x in total.items()}


def calibration_of(
    recipe: Recipe,
    model: Any,
    params: Any,
    stream: Feed,
    mesh: Any,
    seed: int,
    optimizer: Any,
    of: int,
    eval_data: Any = None,
    eval_batches: int = 0,
) -> RunCalibration:
    """The calibration of a run: ``params``, and the batches that the stream gives next. of: the steps of the run."""

    # Through `finetune`, so that the score sees what the loop does: clipping, schedules, noise.
    def train(steps: int, table: Any = None, how: Any = None, penalties: tuple = (), begins: bool = False) -> Any:
        # Here, since finetune imports reselection, which imports this module.
        from jft.train.finetune import finetune

        if table is None:
            phase = _phase(recipe.plan, how or InPlace(), penalties)
        else:
            method = recipe.plan.method
            # In place, whatever the parametrisation of the run: a search compares layers.
            phase = Method(Select(), InPlace(), method.also, method.freeze, name="phase").decided(table)
        # The run itself must begin with the batches that the score has used.
        position = stream.position()
        tuned = finetune(
            model,
            params,
            # finetune closes what it opens from its data, and this stream is still needed.
            _StreamIterator(stream, recipe.objective),
            steps=steps,
            method=phase,
            optimizer=beginning(optimizer, of) if begins else optimizer,
            objective=recipe.objective,
            mesh=mesh,
            accumulate=recipe.accumulate,
            dtype=recipe.dtype,
            seed=seed,
            # This training is no part of what the user sees of the run.
            log={"progress": False},
        )
        stream.seek(position)
        # In float32, so that small steps from a base of fewer bits are seen.
        inside = recipe.plan.candidates
        in_float32 = lambda p, x: jax.ShapeDtypeStruct(
            x.shape, jnp.promote_types(x.dtype, jnp.float32) if p in inside else x.dtype
        )
        return tuned.merged(tree.map_with_path(in_float32, params))

    def evaluate(params: Any) -> dict[str, float]:
        # Refused when a score first evaluates: most scores do not.
        if eval_data is None or hasattr(eval_data, "__next__"):
            raise ValueError("this method chooses by evaluation, again and again; give eval_data, a list or a loader")
        # One compiled program for all candidates: equal models are equal arguments.
        compute = evaluation.sums(apply_for(recipe.objective, model, mesh), recipe.objective)
        return evaluation.mean(compute, params, eval_data, recipe.objective, mesh, eval_batches, model=model)

    return RunCalibration(
        model,
        params,
        recipe.plan.candidates,
        recipe.objective,
        # Peeked at, not taken: training starts with the batches that scores looked at.
        lambda: _ahead(stream),
        seed=seed,
        mesh=mesh,
        dtype=recipe.dtype,
        accumulate=recipe.accumulate,
        train=train,
        evaluate=evaluate,
    )


def _phase(plan: Plan, how: Parametrisation, penalties: tuple) -> Method:
    """Training of the candidates of ``plan`` as a whole, and as the plan does of whatever else trains."""
    inside = plan.candidates
    # Anchored and escaped: a path is a regular expression here, and a prefix of other paths.
    named = {p: f"^{re.escape(p)}$" for p in plan.leaves}
    others = tuple(pattern for p, pattern in named.items() if p not in inside)
    return Method(Select(tuple(named[p] for p in inside)), how, others, penalties=penalties, name="phase")


def _ahead(stream: Feed) -> Iterator[Any]:
    """The batches that ``stream`` will give, from the next one on."""
    count = 0
    while True:
        count += 1
        # The feed keeps all that was peeked at, so that a second score sees the same batches.
        yield stream.ahead(count)[-1]


class _StreamIterator:
    """The batches of a run's stream as data of another run; the lender seeks back to where it stood."""

    def __init__(self, stream: Feed, objective: Any):
        self._stream, self._objective, self._taken = stream, objective, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # `Feed.next` takes a step and the objective, which an iterator's does not; the step is for its messages.
        self._taken += 1
        return self._stream.next(self._taken - 1, self._objective)
