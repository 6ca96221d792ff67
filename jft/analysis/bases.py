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

from jft import data, parallel, safetensors_files, tree
from jft.analysis import run_store, settings
from jft.models.classifier import Classifier
from jft.models.core import Model
from jft.models.loading import fetch
from jft.train import experiment
from jft.train.config import check


@dataclasses.dataclass(frozen=True)
class Base:
    """model, params: the backbone. mesh: its devices; None for one device. tokenizer: its own, a directory, or None.

    source: its directory or hub id, or "". facts: its rows in the report.
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

    @property
    def matrices(self) -> tuple[str, ...]:
        """The paths of the weights of all products, those outside layers among them."""
        return tuple(path for path in tree.flatten(self.params) if path.endswith("/w"))


def prepare(config: Mapping[str, Any], common: Mapping[str, Any], workdir: Path) -> Base:
    """``base`` of a study's config: ``source`` loaded, or ``train`` run in ``workdir`` (taken from there where it is whole).

    common: the partial train config of all runs; its ``model`` says in which dtypes a source is loaded and how it runs,
    its ``mesh`` over which devices.
    """
    train_config = check({key: common[key] for key in ("model", "mesh") if key in common})
    mesh = parallel.make_mesh(dataclasses.asdict(train_config.mesh))
    # Without a mesh on one device, as runs there compile their programs.
    model_mesh = mesh if mesh.size > 1 else None
    if config["source"]:
        model, params = experiment.build_model(
            dataclasses.replace(train_config.model, source=config["source"]), mesh=model_mesh
        )
        # In the hub's cache by now, as the model was loaded from there.
        directory = fetch(config["source"])
        tokenizer = directory if (directory / "tokenizer.json").is_file() else None
        facts = {"steps": None, "seconds": None, "loss": None}
    else:
        model, params, tokenizer, facts = _pretrained(config["train"], workdir)
        params = jax.device_put(params, parallel.shardings(params, model_mesh)) if model_mesh is not None else params
    # A study puts its own heads on the backbone.
    if isinstance(model.config, Classifier):
        model = Model(model.config.backbone, model.execution)
        params = {key: value for key, value in params.items() if key != "classifier"}
    size_facts = {
        "description": config["description"] or config["source"] or _describe(model.config),
        "parameters": tree.count(params),
        "bytes": tree.nbytes(params),
    }
    return Base(
        model, params, model_mesh, tokenizer, config["source"], {**facts, **size_facts}, tree.fingerprint(params)
    )


def _pretrained(partial: Mapping[str, Any], workdir: Path) -> tuple[Model, Any, Any, dict[str, Any]]:
    """Model, parameters, tokenizer and facts of the training run ``partial``, run here unless it is whole already."""
    train = check(settings.overlay(settings.QUIET, partial))
    facts, file = run_store.read(workdir, train), workdir / "params.safetensors"
    if facts is None:
        since = time.perf_counter()
        run = run_store.train(lambda: experiment.run(dataclasses.asdict(train), workdir), [workdir])
        losses = [row["loss"] for row in run.metrics if row["split"] == "train"]
        write_params(run.params, file)
        facts = {"steps": int(run.state.step), "seconds": time.perf_counter() - since, "loss": losses[-1]}
        run_store.write(workdir, train, facts)
    # Once more, for the tokenizer and the classes that the model was built with.
    loader = data.build(
        train.data, batch_size=train.batch_size, directory=workdir, image_size=train.model.options.get("image")
    )
    model, _ = experiment.build_model(train.model, train.seed, None, loader.classes, loader.tokenizer)
    return model, read_params(file), loader.tokenizer, facts


def _describe(config: Any) -> str:
    """An architecture in a few words, from the sizes that every family has."""
    parts = (("layers", "{} layers"), ("heads", "{} heads"), ("width", "width {}"))
    sizes = [text.format(getattr(config, key)) for key, text in parts if hasattr(config, key)]
    return ", ".join([f"{config.family} model", *sizes])


def write_params(params: Any, path: Path) -> None:
    """Parameters by path in one safetensors file, whole or not at all."""
    flat = tree.flatten(jax.device_get(params))
    safetensors_files.save({p: np.ascontiguousarray(x) for p, x in flat.items()}, path)


def read_params(path: Path) -> Any:
    """Parameters from a file of :func:`write_params`; ``ValueError`` where it is damaged or gone."""
    if not path.is_file():
        raise ValueError(f"{path} is gone, the base of this study; remove {path.parent} to pretrain it again")
    try:
        flat = safetensors_files.load(path)
    except ValueError as error:
        raise ValueError(f"{error}, or remove {path.parent} to pretrain the base again") from None
    # Copies: a map of the file would keep it open, and end with it.
    return tree.unflatten({p: jnp.array(x) for p, x in flat.items()})
