"""The base of a study: loaded, or pretrained here, as a backbone without any task's head."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import data, files, parallel, tree
from jft.analysis import run_store, settings
from jft.models.classifier import Classifier
from jft.models.core import Model
from jft.models.loading import fetch
from jft.train import experiment
from jft.train.config import check


@dataclasses.dataclass(frozen=True)
class Base:
    """model, params: the backbone. mesh: where it lies; None for one device. tokenizer: its own, a directory, or None.

    source: where it came from, or "". facts: what the report says of it.
    """

    model: Model
    params: Any
    mesh: Any
    tokenizer: Any
    source: str
    facts: Mapping[str, Any]
    fingerprint: str

    @property
    def image_size(self) -> int | None:
        """Pixels of a side of the images it takes; None for models of text."""
        return getattr(getattr(self.model.config, "vision", self.model.config), "image", None)


def prepare(config: Mapping[str, Any], common: Mapping[str, Any], workdir: Path) -> Base:
    """``base`` of a study's config: ``source`` loaded, or ``train`` run in ``workdir`` (taken from there where it is whole).

    common: the partial train config of all runs; its ``model`` says in which dtypes a source is loaded and how it runs,
    its ``mesh`` over which devices.
    """
    shared = check({key: common[key] for key in ("model", "mesh") if key in common})
    mesh = parallel.make_mesh(dataclasses.asdict(shared.mesh))
    # Without a mesh on one device, as runs there compile their programs.
    placed = mesh if mesh.size > 1 else None
    if config["source"]:
        model, params = experiment.build_model(dataclasses.replace(shared.model, source=config["source"]), mesh=placed)
        directory = fetch(config["source"])
        tokenizer = directory if (directory / "tokenizer.json").is_file() else None
        facts = {"steps": None, "seconds": None, "loss": None}
    else:
        model, params, tokenizer, facts = _pretrained(config["train"], workdir)
        params = jax.device_put(params, parallel.shardings(params, placed)) if placed is not None else params
    # A study puts its own heads on the backbone.
    if isinstance(model.config, Classifier):
        model = Model(model.config.backbone, model.execution)
        params = {key: value for key, value in params.items() if key != "classifier"}
    told = {
        "description": config["description"] or config["source"] or _describe(model.config),
        "parameters": tree.count(params),
        "bytes": tree.nbytes(params),
    }
    return Base(model, params, placed, tokenizer, config["source"], {**facts, **told}, tree.fingerprint(params))


def _pretrained(partial: Mapping[str, Any], workdir: Path) -> tuple[Model, Any, Any, dict[str, Any]]:
    """Model, parameters, tokenizer and facts of the training run ``partial``, run here unless it is whole already."""
    train = check(settings.overlay(settings.QUIET, partial))
    done, kept = run_store.read(workdir, train), workdir / "params.safetensors"
    if done is None:
        since = time.perf_counter()
        run = experiment.run(dataclasses.asdict(train), workdir)
        losses = [row["loss"] for row in run.metrics if row["split"] == "train"]
        write_params(run.params, kept)
        done = {"steps": train.steps, "seconds": time.perf_counter() - since, "loss": losses[-1]}
        run_store.write(workdir, train, done)
    # Once more, for the tokenizer and the classes that the model was built with.
    loader = data.build(
        train.data, batch_size=train.batch_size, directory=workdir, image_size=train.model.options.get("image")
    )
    model, _ = experiment.build_model(train.model, train.seed, None, loader.classes, loader.tokenizer)
    return model, read_params(kept), loader.tokenizer, done


def _describe(config: Any) -> str:
    """An architecture in a few words, from the sizes that every family has."""
    shown = (("layers", "{} layers"), ("heads", "{} heads"), ("width", "width {}"))
    sizes = [text.format(getattr(config, key)) for key, text in shown if hasattr(config, key)]
    return ", ".join([f"{config.family} model", *sizes])


def write_params(params: Any, path: Path) -> None:
    """Parameters by path in one safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    flat = tree.flatten(jax.device_get(params))
    with files.whole(path) as beside:
        save_file({p: np.ascontiguousarray(x) for p, x in flat.items()}, beside)


def read_params(path: Path) -> Any:
    """What :func:`write_params` wrote."""
    from safetensors.numpy import load_file

    return tree.unflatten({p: jnp.asarray(x) for p, x in load_file(path).items()})
