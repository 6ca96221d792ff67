"""Remedies for a step that does not fit into memory, each really compiled, and nothing allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jft import methods, parallel
from jft.methods import Plan
from jft.models.core import is_jft_model
from jft.train import feed, step

CHUNKS = 8
"""Chunks into which a remedy cuts the logits of a row: few products, and an eighth of the logits."""


def remedies(update: step.Step, batch: Any, model: Any, params: Any) -> Iterator[tuple[str, int]]:
    """(what to change, bytes with it), from what costs the user least."""
    recipe, layout = update.recipe, update.layout

    # As if `params` were not donated: never less than the run will take.
    def total(recipe: step.Recipe, params: Any) -> int:
        # LoRA, as a remedy, selects in no weight.
        chosen = {p: at for p, at in update.holdings.state.chosen.items() if p in recipe.plan.selects}
        return step.compile_step(recipe, params, chosen, layout.mesh).memory(batch, params).total

    def rerun(**execution: Any) -> step.Recipe:
        apply = step.apply_for(recipe.objective, model.with_(**execution), layout.mesh)
        return dataclasses.replace(recipe, apply=apply)

    # Shapes alone: nothing may be allocated where memory is short.
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    # First what keeps every number of the run, then what changes numbers or the method.
    if is_jft_model(model) and model.execution.remat != "full":
        yield "model.remat='full'", total(rerun(remat="full"), abstract)
    if (
        is_jft_model(model)
        and model.execution.attention == "plain"
        # Rows of one block gain nothing from blocks.
        and _longest(batch) > model.execution.attention_block
    ):
        yield "model.attention='blockwise'", total(rerun(attention="blockwise"), abstract)
    chunk = _longest(batch) // CHUNKS
    if (
        is_jft_model(model)
        and model.predicts_tokens
        and step.takes_chunks(recipe.objective)
        and not model.execution.logits_chunk
        and chunk
    ):
        yield f"model.logits_chunk={chunk}", total(rerun(logits_chunk=chunk), abstract)
    rows = feed.rows(batch)
    shards = parallel.batch_shards(layout.mesh)
    # Two tries only: each is a compilation.
    for times in (2, 4):
        parts = recipe.accumulate * times
        # Each microbatch must still divide over the devices.
        if recipe.objective.splits and rows % parts == 0 and (rows // parts) % shards == 0:
            yield f"accumulate={parts}", total(dataclasses.replace(recipe, accumulate=parts), abstract)
    if any(x.dtype == jnp.float32 for x in jax.tree.leaves(abstract)):
        in_bfloat16 = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype), abstract
        )
        yield "model.param_dtype='bfloat16'", total(recipe, in_bfloat16)
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
