"""A merge of checkpoints on disk, from a recipe to a directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from jft.merge import output, streaming
from jft.merge.plan import Plan, plan
from jft.merge.recipe import Recipe
from jft.models.hf import writer

MANIFEST = writer.MERGE


def merge_to_disk(
    recipe: Recipe,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    shard_bytes: float = 5e9,
    workers: int | None = None,
    progress: Callable[[Plan], Callable[[int], None]] | None = None,
) -> Plan:
    """Write the model of ``recipe`` to ``target``, whole or not at all, tensor by tensor.

    An interrupted merge that is started again goes on from the shards that were finished: of models below ``shard_bytes``,
    which are one shard, from the start. Memory: about 1 GB, or the largest tensor in float32 as often as there are models
    and two more times. progress: called with the plan, gives a function of the bytes read for each tensor written.

    Raises ``ValueError`` for everything that :func:`plan` and :func:`jft.merge.streaming.run` refuse, and an occupied target.
    """
    target = Path(target).expanduser()
    writer.check_target(target, overwrite)
    planned = plan(recipe)
    described = planned.manifest | {"shard_bytes": shard_bytes}
    with output.unfinished(target, described, overwrite) as directory:
        written = output.Output(directory, planned.tensors, shard_bytes)
        with contextlib.closing(written):
            streaming.run(planned.jobs, written, recipe.seed, workers, progress(planned) if progress else None)
        writer.write_index(directory, written.shards)
        writer.write_json(directory / "config.json", planned.config)
        writer.write_json(directory / MANIFEST, planned.manifest)
        writer.copy_companions(planned.companions, directory)
    return planned
