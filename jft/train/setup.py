"""From a recipe and a base to what a step needs: shapes, where they lie, the compiled step, and the arrays themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.methods import Plan
from jft.train import step
from jft.train.axis import join, take
from jft.train.state import Holdings, Settled, State, create, lay_out

Seeds = int | Sequence[int]
Overlays = Sequence[Mapping[str, Any]]


def shapes(recipe: step.Recipe, params: Any, chosen: Mapping[str, Any], seed: int = 0) -> Holdings:
    """What a run of ``recipe`` holds, from parameters and a selection given as arrays or shapes, without making it."""
    plan = recipe.plan
    kept, trained = jax.eval_shape(plan.init, jax.random.key(0), params, chosen)
    frozen, live, chosen = plan.detach(kept)
    state = jax.eval_shape(lambda t, c: create(plan, t, c, recipe.transform, seed), trained, chosen)
    return Holdings(state, live, frozen)


def compile_step(recipe: step.Recipe, params: Any, chosen: Mapping[str, Any], mesh: Any, seed: int = 0) -> step.Step:
    """The step of ``recipe`` on ``mesh``, from arrays or shapes; batches are compiled for as they come."""
    held = shapes(recipe, params, chosen, seed)
    return step.make(recipe, lay_out(params, recipe.plan, held, mesh), held)


def hold(
    update: step.Step, params: Any, chosen: Any, seed: Seeds, donate: bool = False, overlays: Overlays = ({},)
) -> Holdings:
    """All that a run holds before its first step. ``params`` lie as ``update.layout`` says.

    seed, overlays: of a fleet those of its members; overlays: by path, weights in place of the base's. donate: live weights
    take over the memory of ``params``, which cannot be used afterwards.
    """
    plan, places = update.recipe.plan, update.layout.state
    chosen = jax.device_put(chosen, places.chosen)
    frozen, live, trained = _start(update, params, chosen, seed, donate, overlays, {})
    trained = jax.device_put(trained, places.trained)
    keys = [np.asarray(jax.random.key_data(jax.random.key(s))) for s in _listed(seed)]
    rule = plan.method.rule
    memory = (jax.vmap(rule.init) if update.stack else rule.init)(trained) if rule else None
    state = State(
        step=jax.device_put(np.zeros(update.stack, np.int32), places.step),
        trained=trained,
        opt_state=update.start(trained),
        rng=jax.device_put(join(keys, update.holdings.state.rng), places.rng),
        chosen=chosen,
        memory=jax.device_put(memory, places.memory),
    )
    return Holdings(state, live, frozen)


def take_up(
    update: step.Step, params: Any, state: State, settled: Settled, seed: Seeds, donate: bool, overlays: Overlays
) -> Holdings:
    """All that a run holds that goes on from ``state``: live weights hold its values again, and what settled in them."""
    frozen, live, _ = _start(update, params, state.chosen, seed, donate, overlays, settled)
    return Holdings(state, _committed(update.recipe.plan, frozen, live, state), frozen)


def _listed(seed: Seeds) -> Sequence[int]:
    return seed if isinstance(seed, Sequence) else [seed]


def _start(
    update: step.Step, params: Any, chosen: Any, seed: Seeds, donate: bool, overlays: Overlays, settled: Settled
) -> tuple[Any, Any, Any]:
    """``(frozen, live, trained)`` of all members, each made as a run by itself makes its own."""
    plan, like, places = update.recipe.plan, update.holdings, update.layout.holdings
    each: list[tuple[Any, Any, Any]] = []
    for i, (key, weights) in enumerate(zip(map(jax.random.key, _listed(seed)), overlays, strict=True)):
        base = {**tree.flatten(params), **weights}
        start = tree.like(params, {p: settled[p].written(w) if p in settled else w for p, w in base.items()})
        selected = take(chosen, i) if update.stack else chosen
        kept, trained = plan.init(key, start, selected, base if settled else None)
        frozen, live, _ = plan.detach(kept)
        if each:  # what members share is held once, not until all are made
            frozen = jax.tree.map(lambda to, a, b: b if to.ndim > b.ndim else a, like.frozen, each[0][0], frozen)
        each.append((frozen, live, trained))
    frozens, lives, values = zip(*each, strict=True)
    frozen = jax.device_put(join(frozens, like.frozen), places.frozen)
    return frozen, own(lives[0], places.live, donate), join(values, like.state.trained)


def measured(update: step.Step, held: Holdings, calibrations: Sequence[Callable[[], Any]], steps: int) -> Holdings:
    """What is held, with what the method's rule finds out about each member's base before the first of ``steps`` updates."""
    plan, rule = update.recipe.plan, update.recipe.plan.method.rule
    if rule is None:
        return held
    memory = held.state.memory
    first = [rule.start(take(memory, i) if update.stack else memory, steps) for i in range(len(calibrations))]
    each = [rule.measure(plan, look(), own) for own, look in zip(first, calibrations, strict=True)]
    each = [own if found is None else found for own, found in zip(first, each, strict=True)]
    if each[0] is not None:
        memory = jax.device_put(join(each, update.holdings.state.memory), update.layout.state.memory)
    return dataclasses.replace(held, state=dataclasses.replace(held.state, memory=memory))


def go_back(update: step.Step, held: Holdings, state: State) -> Holdings:
    """What is held, with another state of the same run and live weights that have its values."""
    return Holdings(state, _committed(update.recipe.plan, held.frozen, held.live, state), held.frozen)


def _committed(plan: Plan, frozen: Any, live: Any, state: State) -> Any:
    def write(live: Any, frozen: Any, state: State) -> Any:
        return plan.detach(plan.commit(plan.attach(frozen, live, state.chosen), state.trained))[1]

    return jax.jit(write, donate_argnums=0)(live, frozen, state) if live else live


def own(live: Any, places: Any, donate: bool) -> Any:
    """Live weights for the run alone: copies, unless it may take the base's."""
    live = jax.device_put(live, places)
    return live if donate else jax.tree.map(lambda x: jnp.array(x, copy=True), live)
