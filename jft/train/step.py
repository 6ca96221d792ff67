"""One training step: a single compiled program whose state is donated, cached for all runs with the same recipe and shapes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jft import parallel, tree
from jft.compiled import program_cache
from jft.methods import Plan
from jft.models.adapters import Adapter, Statistics, statistics_of
from jft.models.core import is_jft_model, model_of, on_mesh
from jft.models.logits import Logits
from jft.train import feed
from jft.train.metrics import Work, peak_flops
from jft.train.objectives import LanguageModel, Objective, Seq2Seq, TowardBase
from jft.train.optimizers import Given, Optimizer
from jft.train.state import Holdings, Layout, State, abstract, create, lay_out

Metrics = dict[str, jax.Array]
Gradients = tuple[Any, jax.Array, dict[str, jax.Array], Any, Statistics]


@dataclasses.dataclass(frozen=True)
class Apply:
    """A model's ``apply(params, batch)`` on a mesh, as a value: of equal models equal, which Python's bound methods are not.

    chunk: outputs are :class:`~jft.models.logits.Logits` of so many tokens of a row at a time; 0: arrays.
    """

    model: Any
    mesh: Any = None
    chunk: int = 0

    def __call__(self, params: Any, batch: Any, hooks: Any = None) -> Any:
        with on_mesh(self.mesh):
            # A hook on products sees that of the head only where the model itself makes it.
            if self.chunk and (hooks is None or hooks.product is None):
                found = self.model.head_states(params, batch, hooks)
                logits = lambda states: Logits(states, self.model.head_params(params), self.head, self.chunk)
                return logits(found) if hooks is None else (logits(found[0]), found[1])
            rest = {} if hooks is None else {"hooks": hooks}
            return (self.model.apply if hasattr(self.model, "apply") else self.model)(params, batch, **rest)

    def head(self, params: Any, h: Any) -> Any:
        """A jft model's :meth:`~jft.models.Model.head`."""
        with on_mesh(self.mesh):
            return self.model.head(params, h)


def apply_of(model: Any, mesh: Any = None) -> Callable[[Any, Any], Any]:
    """``apply(params, batch)`` of a jft model, or of a callable, which is that already, traced for ``mesh``."""
    return Apply(model, mesh) if mesh is not None or hasattr(model, "apply") else model


def apply_for(objective: Objective, model: Any, mesh: Any = None) -> Callable[[Any, Any], Any]:
    """:func:`apply_of` whose outputs are for ``objective`` alone: those of a jft model are in chunks, where it says so.

    Raises ``ValueError`` where the objective takes no chunks.
    """
    chunk = model.execution.logits_chunk if is_jft_model(model) else 0
    if chunk and not takes_chunks(objective):
        raise ValueError(
            f"logits_chunk={chunk}: {type(objective).__name__} takes all logits at once; use logits_chunk=0, or an objective "
            "that reads its outputs through jft.train.objectives.per_position and says so by chunks = True"
        )
    return in_chunks(objective, apply_of(model, mesh))


def takes_chunks(objective: Objective) -> bool:
    """Whether an objective takes :class:`~jft.models.logits.Logits`."""
    return getattr(objective, "chunks", False)


def in_chunks(objective: Objective, apply: Any) -> Callable[[Any, Any], Any]:
    """``apply`` of :func:`apply_of`, with outputs in chunks where the model says so and ``objective`` takes them."""
    model = model_of(apply)
    if not is_jft_model(model) or not takes_chunks(objective):
        return apply
    return dataclasses.replace(apply, chunk=model.execution.logits_chunk)


def dtype_of(model: Any, params: Any) -> Any:
    """The dtype that trained values are cast to: a jft model's execution dtype; else the one that all weights have, or None."""
    if is_jft_model(model):
        return model.execution.dtype
    held = statistics_of(model_of(model))
    weights = [x for p, x in tree.flatten(params).items() if p not in held]
    dtypes = {np.dtype(x.dtype) for x in weights if jnp.issubdtype(x.dtype, jnp.floating)}
    # A model of mixed dtypes chose them weight by weight, and a cast to one would undo that.
    return dtypes.pop() if len(dtypes) == 1 else None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The computation of a step, apart from shapes and numbers that vary: equal recipes share compiled programs.

    apply: the model. dtype: what trained values are cast to before the model sees them; None as they are. accumulate:
    microbatches per batch. decayed: paths under weight decay.
    """

    apply: Callable[[Any, Any], Any]
    plan: Plan
    objective: Objective
    optimizer: Optimizer | Given
    accumulate: int = 1
    dtype: Any = None
    decayed: frozenset[str] = frozenset()

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}; it must be at least 1")
        if self.accumulate > 1 and not self.objective.splits:
            raise ValueError(
                f"accumulate={self.accumulate} does not go with {type(self.objective).__name__}: every example of the batch "
                "is compared with every other, so microbatches minimise another loss; use accumulate=1 and shard the batch"
            )

    @property
    def training(self) -> Adapter | None:
        """The model, where it has a pass for training that is not that of evaluation: dropout, batch statistics."""
        model = model_of(self.apply)
        # A linearized model is a function of the change alone, so it is in evaluation mode.
        standard = self.plan.method.forward == "standard"
        return model if standard and isinstance(model, Adapter) and model.trains else None

    # Cached: optax makes new closures at each call, and jit knows a function by its identity.
    @functools.cached_property
    def transform(self) -> optax.GradientTransformationExtraArgs:
        """From gradients to updates for a learning rate of 1. Where selections change, values may have ages of their own."""
        if isinstance(self.optimizer, Given):
            # The step passes `change` to every optimizer; those that know of none ignore it.
            return optax.with_extra_args_support(self.optimizer.given)
        decays = functools.partial(self.plan.decays, paths=self.decayed)
        schedule = self.plan.method.schedule
        return self.optimizer.transform(decays, self.plan.matrices, aged=schedule is not None and schedule.aged)


def gradients(
    recipe: Recipe, kept: Any, trained: Any, batch: Any, mesh: Any = None, key: jax.Array | None = None
) -> Gradients:
    """``(gradient, loss, metric means, weight, statistics)`` of ``sum of losses / weight of the whole batch`` in ``trained``.

    The weight is known before the first microbatch, so any division of the batch gives the same gradient; noise (of
    ``key``) is the same in all of them. What the method adds to the loss is added once. statistics: of the model, by path,
    after the batch.
    """
    gradient, value, means, weight, statistics = _data_gradients(recipe, kept, trained, batch, mesh, key)
    penalty = functools.partial(recipe.plan.penalty, kept, key=key)
    # By shape: whether there is a penalty is known while tracing, and nothing is computed for the answer.
    if jax.eval_shape(penalty, trained) is None:
        return gradient, value, means, weight, statistics
    # Apart from the loss of the data, since with accumulation it would be added once for each microbatch.
    added, pull = jax.value_and_grad(penalty)(trained)
    return jax.tree.map(jnp.add, gradient, pull), value + added, {**means, "penalty": added}, weight, statistics


def _data_gradients(
    recipe: Recipe, kept: Any, trained: Any, batch: Any, mesh: Any, key: jax.Array | None, base: Any = None
) -> Gradients:
    """As :func:`gradients`. base: parameters whose outputs the objective gets together with those of the model."""
    weight = recipe.objective.weight(batch)

    def loss(trained: Any, batch: Any, index: Any = 0) -> tuple[jax.Array, tuple[dict, Statistics]]:
        outputs, statistics = _outputs(recipe, kept, trained, batch, key, index)
        if base is not None:
            # Targets are constants, wherever the base's parameters come from.
            outputs = outputs, jax.lax.stop_gradient(recipe.apply(base, batch))
        total, _, sums = recipe.objective.loss(outputs, batch)
        # Inside the loss, so that gradients are in the scale of the mean from the first sum on.
        return total / weight, ({k: v / weight for k, v in sums.items()}, statistics)

    one = jax.value_and_grad(loss, has_aux=True)
    if recipe.accumulate == 1:
        (value, (means, statistics)), gradient = one(trained, batch)
        return gradient, value, means, weight, statistics
    parts = parallel.microbatches(batch, recipe.accumulate, mesh)

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        so_far, statistics = carry
        # One microbatch after the other moves the statistics, as one batch after the other does.
        (value, (means, statistics)), gradient = one(trained | statistics, *part)
        return (jax.tree.map(jnp.add, so_far, (value, means, gradient)), statistics), None

    # Zeros in place of a first microbatch outside the scan, which would compile the model twice.
    (value, (means, changed)), gradient = jax.eval_shape(one, trained, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, means, gradient))
    counted = parts, jnp.arange(recipe.accumulate)
    ((value, means, gradient), statistics), _ = jax.lax.scan(add, (zeros, {p: trained[p] for p in changed}), counted)
    return gradient, value, means, weight, statistics


def _outputs(
    recipe: Recipe, kept: Any, trained: Any, batch: Any, key: jax.Array | None, index: Any
) -> tuple[Any, Statistics]:
    """The model's outputs in training, and new values of its statistics. index: of the microbatch."""
    if recipe.training is None:
        return recipe.plan.outputs(recipe.apply, kept, trained, batch, recipe.dtype, key), {}
    assert key is not None, "a recipe that trains in a mode of its own has one"
    params = recipe.plan.bind(kept, trained, recipe.dtype, key)
    # Unlike the method's noise, dropout is another in every microbatch: its rows are other rows.
    outputs, found = recipe.training.training(params, batch, jax.random.fold_in(tree.key_for(key, "model"), index))
    return outputs, {path: jax.lax.stop_gradient(x).astype(trained[path].dtype) for path, x in found.items()}


def _gradient_to_base(recipe: Recipe, kept: Any, trained: Any, batch: Any, mesh: Any, key: jax.Array | None) -> Any:
    """The gradient of the cross entropy to what the base itself predicts."""
    toward = dataclasses.replace(recipe, objective=TowardBase(recipe.objective))
    return _data_gradients(toward, kept, trained, batch, mesh, key, recipe.plan.base(kept, trained))[0]


def step(
    recipe: Recipe, mesh: Any, state: State, live: Any, frozen: Any, batch: Any, rate: jax.Array, sound: jax.Array
) -> tuple[State, Any, Metrics]:
    """The next state, the live weights with its values, and the step's metrics.

    rate: the learning rate, float32. sound: whether all losses and gradients so far were finite; from the first that is
    not, the state stays as it was, so that the last good one is still there when the host learns of it.
    """
    plan, rule = recipe.plan, recipe.plan.method.rule
    kept = plan.attach(frozen, live, state.chosen)
    # From the step, so that a run that is taken up draws what it would have drawn.
    draws = plan.random or recipe.training is not None
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if draws else None
    gradient, loss, means, weight, statistics = gradients(recipe, kept, state.trained, batch, mesh, key)
    # Before clipping and rules: the number that tells of a diverging run.
    norm = optax.tree.norm(gradient)
    # The norm is not finite as soon as one entry of the gradient is not.
    sound = sound & jnp.isfinite(loss) & jnp.isfinite(norm)

    memory = state.memory
    if rule and rule.to_base:
        anchor = _gradient_to_base(recipe, kept, state.trained, batch, mesh, key)
        # Negative, so that it is never the key of a step's own noise.
        noise = jax.random.fold_in(jax.random.wrap_key_data(state.rng), -1 - state.step)
        gradient = rule.join(noise, gradient, anchor)
    if rule:
        gradient, memory = rule.gradient(plan, kept, state.trained, gradient, memory)
    change = functools.partial(plan.change, kept, state.trained)
    updates, opt_state = recipe.transform.update(gradient, state.opt_state, state.trained, change=change)
    scales = plan.scales(state.trained)
    # The rate is an argument, which keeps one program for all rates; transforms are made for a rate of 1.
    updates = {p: jax.tree.map(lambda u, s: u * (rate * s), u, scales[p]) for p, u in updates.items()}
    trained = optax.apply_updates(state.trained, updates)
    if rule:
        trained, memory = rule.values(plan, kept, trained, memory)
    # Last, since nothing else may move them.
    trained = trained | statistics

    new = State(state.step + 1, trained, opt_state, state.rng, state.chosen, memory)
    # A select, not a branch: the host learns of a bad step only after the next one has been queued.
    new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state)
    # After the select, so that live weights stay as they were with the rest.
    with on_mesh(mesh):
        _, live, _ = plan.detach(plan.commit(kept, new.trained))
    metrics = {
        "loss": loss,
        **means,
        "grad_norm": norm,
        "param_norm": optax.tree.norm(trained),
        "update_norm": optax.tree.norm(updates),
        "weight": weight,
        "sound": sound,
    }
    return new, live, metrics


class Step:
    """The step of a recipe on a layout, compiled ahead of time for each batch shape it meets.

    start: the optimizer's first state of trained values, compiled once as well. stack: the shape of what members have one
    number each of, as learning rates: () for a run by itself. single: shapes of one member's state.
    """

    stack: tuple[int, ...] = ()

    def __init__(self, recipe: Recipe, layout: Layout, holdings: Holdings):
        self.recipe, self.layout = recipe, layout
        self.holdings = abstract(holdings, layout.holdings)
        self.single = self.holdings.state
        self._jitted = jax.jit(
            functools.partial(step, recipe, layout.mesh),
            # Not what is frozen, which may be the caller's own base.
            donate_argnums=(0, 1),
            out_shardings=(layout.state, layout.holdings.live, layout.replicated),
        )
        self.start = jax.jit(recipe.transform.init, out_shardings=layout.state.opt_state)
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def compiled(self, batch: Any) -> jax.stages.Compiled:
        """The program for batches like this one (arrays or shapes)."""
        leaves, structure = jax.tree.flatten(batch)
        # Ahead of time, and not by calling the jitted function: memory and FLOPs are asked of the compiled one.
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._programs:
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding(x)) for x in leaves]
            one = self.layout.replicated
            rate = jax.ShapeDtypeStruct(self.stack, jnp.float32, sharding=one)
            sound = jax.ShapeDtypeStruct(self.stack, jnp.bool_, sharding=one)
            batch_shapes, held = jax.tree.unflatten(structure, shapes), self.holdings
            lowered = self._jitted.lower(held.state, held.live, held.frozen, batch_shapes, rate, sound)
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def _sharding(self, x: Any) -> Any:
        return self.layout.batch if x.ndim else self.layout.replicated

    def __call__(self, held: Holdings, batch: Any, rate: Any, sound: Any) -> tuple[Holdings, Metrics]:
        """The holdings after the step (those before are donated, but for frozen weights), and the step's metrics."""
        state, live, metrics = self.compiled(batch)(held.state, held.live, held.frozen, batch, rate, sound)
        return Holdings(state, live, held.frozen), metrics

    def memory(self, batch: Any, params: Any, donated: bool = False) -> parallel.MemoryEstimate:
        """Memory of a run on each device: the compiled step's, and that of the base where it lies apart from it.

        donated: live weights are the base's own, so of these there is no second copy.
        """
        estimate = parallel.estimate(self.compiled(batch))
        return dataclasses.replace(estimate, arguments=estimate.arguments + self._apart(params, donated))

    def _apart(self, params: Any, donated: bool) -> int:
        """Bytes on each device of base weights that the step itself does not take."""
        held = self.holdings
        # Base weights that are arguments of the program are in its estimate already.
        counted = {path for path, frozen in held.frozen.items() if jax.tree.leaves(frozen) and path not in held.live}
        counted |= set(held.live) if donated else set()
        shardings = tree.flatten(self.layout.params)
        return sum(
            math.prod(shardings[path].shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
            for path, x in tree.flatten(params).items()
            if path not in counted
        )

    def member(self, held: Holdings, index: int) -> tuple[State, dict[str, Any]]:
        """``(state, kept)`` of one member, here the only one."""
        return held.state, self.recipe.plan.attach(held.frozen, held.live, held.state.chosen)


class Key:
    """A recipe, layout and shapes, and ``more``, as one value, hashable where the recipe is.

    parts: the arguments that a step is made with, of keys that are equal equal ones; default the first three.
    """

    def __init__(self, recipe: Recipe, layout: Layout, holdings: Holdings, *more: Any, parts: tuple | None = None):
        self.parts: tuple = parts or (recipe, layout, holdings)
        # Shardings go into the shapes, since a layout, with its dicts, has no hash.
        leaves, structure = jax.tree.flatten((layout.batch, layout.replicated, abstract(holdings, layout.holdings)))
        self.compared = (recipe, layout.mesh, structure, tuple(leaves), more)

    def __hash__(self) -> int:
        return hash(self.compared)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.compared == other.compared


@program_cache
def _make(key: Key) -> Step:
    return Step(*key.parts)


def make(recipe: Recipe, layout: Layout, holdings: Holdings) -> Step:
    """The step of ``recipe`` on ``layout``; one that was made before for equals is reused, with its compiled programs.

    ``holdings`` are arrays or shapes. A recipe with unhashable parts gets a step of its own.
    """
    # Shapes, or the cache would keep arrays of a finished run alive.
    return _make(Key(recipe, layout, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), holdings)))


def shapes(recipe: Recipe, params: Any, chosen: Mapping[str, Any], seed: int = 0) -> Holdings:
    """The shapes of what a run of ``recipe`` holds, from arrays or shapes of parameters and a selection."""
    plan = recipe.plan
    # Any key does: shapes do not depend on it.
    kept, trained = jax.eval_shape(plan.init, jax.random.key(0), params, chosen)
    frozen, live, chosen = plan.detach(kept)
    # A closure over plan and seed, which are no arrays and would be traced otherwise.
    state = jax.eval_shape(lambda t, c: create(plan, t, c, recipe.transform, seed), trained, chosen)
    return Holdings(state, live, frozen)


def compile_step(recipe: Recipe, params: Any, chosen: Mapping[str, Any], mesh: Any, seed: int = 0) -> Step:
    """The step of ``recipe`` on ``mesh``, from arrays or shapes; batches are compiled for as they come."""
    if mesh is not None:
        recipe = dataclasses.replace(recipe, plan=recipe.plan.on_mesh(parallel.specs(params, mesh), params))
    held = shapes(recipe, params, chosen, seed)
    return make(recipe, lay_out(params, recipe.plan, held, mesh), held)


def flops(compiled: jax.stages.Compiled) -> float | None:
    """FLOPs of one execution on each device as XLA counts them; a scan's body counts once. None where it does not tell."""
    cost = compiled.cost_analysis()
    # Some backends give no analysis, or one without FLOPs.
    return float(cost["flops"]) if cost and cost.get("flops", 0) > 0 else None


def formula_flops(params: Any, trained_paths: Any, tokens: float, predicts_tokens: bool) -> float:
    """``(4 N + 2 T) * tokens``: N all weights in products, T those of them that train (6 N for full fine-tuning).

    Forward 2N, gradient of activations 2N, gradient of weights 2T per token; attention scores are left out. Embedding
    tables are looked up, not multiplied; one that is also the output head of a model that predicts tokens counts.
    """
    flat = tree.flatten(params)
    tied = predicts_tokens and not any(p.endswith("head/w") for p in flat)
    sizes = {
        p: tree.size(x) for p, x in flat.items() if not p.endswith("/table") or (tied and p.endswith("embed/table"))
    }
    total = sum(sizes.values())
    training = sum(n for p, n in sizes.items() if p in trained_paths)
    return (4 * total + 2 * training) * tokens


def work(update: Step, batch: Any, params: Any, times: int = 1) -> Work:
    """FLOPs of one step of ``batch``: by formula where it is tokens, padding included, else as XLA counts the compiled step.

    times: members that each go through the whole batch.
    """
    device = update.layout.device
    peak = peak_flops(device)
    peak = peak * update.layout.devices if peak else None
    tokens = feed.positions(batch)
    recipe = update.recipe
    # The formula first: XLA counts a scan over layers, and one over microbatches, as one pass of its body.
    if tokens:
        predicts = isinstance(recipe.objective, LanguageModel | Seq2Seq)
        count = formula_flops(params, recipe.plan.leaves, tokens, predicts)
        return Work(count * times, f"(4 N + 2 T) per token: {count:.3g} a step", peak, tokens)
    counted = flops(update.compiled(batch))
    if counted is None:
        return Work(None, "nothing: this backend does not count", peak)
    # XLA counts the program of one device.
    total = counted * update.layout.devices
    return Work(total, f"XLA's count, the body of a scan once: {total:.3g} a step", peak)
