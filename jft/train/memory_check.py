"""Before anything is allocated: the step compiled from shapes, what memory it takes, and what would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import methods, parallel, tree
from jft.methods import Plan
from jft.models.core import is_jft_model
from jft.parallel import MemoryEstimate
from jft.train import feed, setup, step
from jft.train.objectives import LanguageModel, Seq2Seq
from jft.train.progress import Work, peak_flops


def global_shapes(batch: Any, axis: int = 0) -> Any:
    """Shapes of the global batch, from this process's rows of it, which lie along ``axis``."""

    def widen(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = tuple(n * jax.process_count() if i == axis else n for i, n in enumerate(x.shape))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(widen, batch)


def _beside(params: Any, update: step.Step, donated: bool) -> int:
    """Bytes on each device of base weights that the step itself does not take, but that stay beside it.

    donated: live weights are the base's own, so of these there is no second copy.
    """
    held = update.holdings
    taken = {path for path, frozen in held.frozen.items() if jax.tree.leaves(frozen) and path not in held.live}
    taken |= set(held.live) if donated else set()
    places = tree.flatten(update.layout.params)
    total = 0
    for path, x in tree.flatten(params).items():
        if path not in taken:
            total += math.prod(places[path].shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    return total


def needs(update: step.Step, batch: Any, params: Any, donated: bool = False) -> MemoryEstimate:
    """Memory of a run on each device: the compiled step's, and the base where it lies beside."""
    found = parallel.estimate(update.compiled(batch))
    return dataclasses.replace(found, arguments=found.arguments + _beside(params, update, donated))


def check(
    update: step.Step, batch: Any, model: Any, params: Any, donated: bool = False, alternatives: Any = None
) -> MemoryEstimate:
    """The memory a run needs, refused with the cheapest remedies where the devices have less.

    alternatives: what gives pairs (what to change, bytes with it) in place of the remedies for one run. The budget is the
    device's own, or ``JFT_DEVICE_MEMORY``. Raises :class:`jft.parallel.MemoryBudgetError`.
    """
    found = needs(update, batch, params, donated)
    remedies = alternatives or (lambda: _remedies(update, batch, model, params))
    return parallel.check(found, parallel.device_budget(update.layout.device), remedies)


def _remedies(update: step.Step, batch: Any, model: Any, params: Any) -> Iterator[tuple[str, int]]:
    """(what to change, bytes with it), from what costs the user least; each really compiled, none allocated."""
    recipe, layout = update.recipe, update.layout

    def total(recipe: step.Recipe, params: Any) -> int:
        chosen = {p: at for p, at in update.holdings.state.chosen.items() if p in recipe.plan.selects}
        return needs(setup.compile_step(recipe, params, chosen, layout.mesh), batch, params).total

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    if is_jft_model(model) and model.execution.remat != "full":
        changed = dataclasses.replace(recipe, apply=step.apply_of(model.with_(remat="full"), layout.mesh))
        yield "model.remat='full'", total(changed, abstract)
    if (
        is_jft_model(model)
        and model.execution.attention == "plain"
        and _longest(batch) > model.execution.attention_block
    ):
        changed = dataclasses.replace(recipe, apply=step.apply_of(model.with_(attention="blockwise"), layout.mesh))
        yield "model.attention='blockwise'", total(changed, abstract)
    rows = feed.rows(batch)
    shards = parallel.batch_shards(layout.mesh)
    for times in (2, 4):
        parts = recipe.accumulate * times
        if recipe.objective.splits and rows % parts == 0 and (rows // parts) % shards == 0:
            yield f"accumulate={parts}", total(dataclasses.replace(recipe, accumulate=parts), abstract)
    if any(x.dtype == jnp.float32 for x in jax.tree.leaves(abstract)):
        halved = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype), abstract
        )
        yield "model.param_dtype='bfloat16'", total(recipe, halved)
    plan = None if recipe.plan.method.name == "lora" else _low_rank(abstract, model)
    if plan is not None:
        yield "method='lora' with rank=8", total(dataclasses.replace(recipe, plan=plan), abstract)


def _longest(batch: Any) -> int:
    """Tokens of a row; 0 where the batch has none."""
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    return 0 if tokens is None else tokens.shape[-1]


def _low_rank(params: Any, model: Any) -> Plan | None:
    """The plan of a small LoRA; None for a model that has no matrices for it."""
    try:
        return methods.method("lora", rank=8).plan(params, model)
    except ValueError:
        return None


def work(update: step.Step, batch: Any, params: Any, times: int = 1) -> Work:
    """FLOPs of one step: by formula where the batch is tokens, else as XLA counts the compiled step.

    times: members that each go through the whole batch.
    """
    device = update.layout.device
    peak = peak_flops(device)
    peak = peak * update.layout.devices if peak else None
    tokens = feed.positions(batch)
    recipe = update.recipe
    if tokens:
        predicts = isinstance(recipe.objective, LanguageModel | Seq2Seq)
        count = step.formula_flops(params, recipe.plan.leaves, tokens, predicts)
        return Work(count * times, f"(4 N + 2 T) per token: {count:.3g} a step", peak)
    counted = step.flops(update.compiled(batch))
    if counted is None:
        return Work(None, "nothing: this backend does not count", peak)
    total = counted * update.layout.devices
    return Work(total, f"XLA's count, the body of a scan once: {total:.3g} a step", peak)
