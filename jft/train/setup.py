"""From a recipe and a base to what a step needs: shapes, where they lie, the compiled step, and the arrays themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.methods import Plan
from jft.train import settling, step
from jft.train.settling import Settled
from jft.train.state import Holdings, State, create, lay_out


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


def hold(update: step.Step, params: Any, chosen: Mapping[str, Any], seed: int, donate: bool = False) -> Holdings:
    """All that the run holds before its first step. ``params`` lie as ``update.layout`` says.

    donate: live weights take over the memory of ``params``, which cannot be used afterwards.
    """
    plan, places = update.recipe.plan, update.layout.holdings
    kept, trained = plan.init(jax.random.key(seed), params, chosen)
    frozen, live, chosen = plan.detach(kept)
    trained = jax.device_put(trained, places.state.trained)
    rule = plan.method.rule
    state = State(
        step=jax.device_put(np.zeros((), np.int32), places.state.step),
        trained=trained,
        opt_state=update.start(trained),
        rng=jax.device_put(np.asarray(jax.random.key_data(jax.random.key(seed))), places.state.rng),
        chosen=jax.device_put(chosen, places.state.chosen),
        memory=jax.device_put(rule.init(trained), places.state.memory) if rule else None,
    )
    return Holdings(state, own(live, places.live, donate), jax.device_put(frozen, places.frozen))


def take_up(
    update: step.Step, params: Any, state: State, settled: Settled, seed: int, donate: bool = False
) -> Holdings:
    """All that a run holds that goes on from ``state``: live weights hold its values again, and what settled in them."""
    plan, places = update.recipe.plan, update.layout.holdings
    base = tree.flatten(params)
    kept, _ = plan.init(jax.random.key(seed), tree.like(params, settling.write(settled, base)), state.chosen, base)
    frozen, live, _ = plan.detach(kept)
    frozen, live = jax.device_put(frozen, places.frozen), own(live, places.live, donate)
    return Holdings(state, _committed(plan, frozen, live, state), frozen)


def go_back(update: step.Step, held: Holdings, state: State) -> Holdings:
    """What is held, with another state of the same run and live weights that have its values."""
    return Holdings(state, _committed(update.recipe.plan, held.frozen, held.live, state), held.frozen)


def _committed(plan: Plan, frozen: Any, live: Any, state: State) -> Any:
    def write(live: Any, frozen: Any, state: State) -> Any:
        return plan.detach(plan.commit(plan.attach(frozen, live, state.chosen), state.trained))[1]

    return jax.jit(write, donate_argnums=0)(live, frozen, state) if live else live


def own(live: Any, places: Any, donate: bool) -> Any:
    """Live weights as the run's own: copies, unless it may take the base's."""
    live = jax.device_put(live, places)
    return live if donate else jax.tree.map(lambda x: jnp.array(x, copy=True), live)
