"""`run`: an experiment from a config: its model, data, method and mesh, and a call of :func:`jft.train.finetune`."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jft import data, files, methods, models, parallel, tree
from jft.data.config import derived, in_chat
from jft.models.loading import describe, fetch
from jft.names import nearest
from jft.train import feed, lock
from jft.train.config import Config, ModelConfig, check, check_length
from jft.train.finetune import finetune
from jft.train.training import Run

ARCHITECTURES = {
    "decoder": "DecoderConfig",
    "encoder": "EncoderConfig",
    "vision": "VisionConfig",
    "clip": "ClipConfig",
    "t5": "T5Config",
}
# Not float64, which JAX computes in only where x64 is enabled.
DTYPES = ("float32", "bfloat16", "float16")


def run(config: Any, workdir: str | Path | None, *, callbacks: Sequence[Any] = (), dry_run: bool = False) -> Run:
    """Train what ``config`` (a ConfigDict or nested dict, see :mod:`jft.train.config`) says, in ``workdir``.

    Writes ``config.json``, ``metrics.jsonl``, ``checkpoints/`` and ``task_vector.safetensors`` there. Started again with the
    same workdir it goes on where it stopped. Every error in the config is found before training starts.

    With ``fleet``, a list of sections, its members train side by side and a list of runs comes back. A section has ``name``,
    ``seed``, and ``data``, ``eval_data``, ``method`` and ``optimizer``, whose keys are laid over those of the config.

    callbacks: as in :func:`jft.finetune`. dry_run: everything up to the first step, printed; nothing is written, and None comes
    back.
    """
    config = check(config)
    check_length(config)
    # Sections are checked first: errors in a config must not wait for data and weights to load.
    sections = [_section(one, i) for i, one in enumerate(config.fleet)]
    # The first member's data stands for all where tokenizer, classes and image size come from the data.
    if sections and not config.data:
        config = dataclasses.replace(config, data=dict(sections[0].get("data", {})))
    if not config.data:
        raise ValueError("config.data is empty; say at least data.source (see jft.data)")
    _one_base(config.model)
    method = methods.method(**config.method)
    # Before data is opened: a mesh that the devices do not make up is refused in no time.
    mesh = parallel.make_mesh(dataclasses.asdict(config.mesh))
    # A dry run has none, so that it can write nothing.
    workdir = None if dry_run or workdir is None else _directory(workdir)
    where = {"workdir": None if workdir is None else str(workdir.absolute()), "dry_run": dry_run}
    parallel.agree("config", {**config.written(), **where, **parallel.environment()})
    # Before the data, which writes a tokenizer there.
    with lock.of_all(workdir) if workdir is not None else contextlib.nullcontext():
        return _run(config, sections, method, mesh, workdir, callbacks, dry_run)


def _run(
    config: Config,
    sections: list[dict[str, Any]],
    method: Any,
    mesh: Any,
    workdir: Path | None,
    callbacks: Sequence[Any],
    dry_run: bool,
) -> Run:
    """:func:`run` of a config that was checked, alone in its workdir."""
    # Before the model, whose vocabulary and number of classes may come from the data.
    train, test = loaders(config, workdir)
    tokenizer = train.tokenizer
    if jax.process_count() > 1:
        # Each process reads files of its own, which may be others under the same path. Before the look at all records, which
        # would tell of what came of that.
        contents = {"content of data": train.fingerprint, "content of eval_data": test.fingerprint if test else None}
        parallel.agree("content", {**contents, "content of model.source": _base_content(config.model)})
    highest = look(config, train, test)
    _say(config, _length(config, train))
    # One device needs no mesh, and programs without shardings are the simplest.
    model, params = build_model(config.model, config.seed, mesh if mesh.size > 1 else None, train.classes, tokenizer)
    _check_tokens(params, highest)
    # Otherwise rows that are too long would stop the run at its first evaluation.
    if test is not None:
        feed.check(test.largest(), model, None)
    source = config.model.source or config.model.arch
    manifest = {"source": source, "data": config.data, "config": config.written()}
    return finetune(
        model,
        params,
        train,
        steps=config.steps or None,
        epochs=config.epochs or None,
        method=method,
        optimizer=dataclasses.asdict(config.optimizer),
        objective={"name": config.objective, **config.objective_options} if config.objective else None,
        mesh=mesh if mesh.size > 1 else None,
        eval_data=test,
        eval_every=config.eval.every,
        eval_batches=config.eval.batches,
        samples=_samples(config),
        accumulate=config.accumulate,
        seed=config.seed,
        workdir=workdir,
        checkpoint=dataclasses.asdict(config.checkpoint),
        log=dataclasses.asdict(config.log),
        profile=None if dry_run else dataclasses.asdict(config.profile),
        tokenizer=tokenizer,
        manifest=manifest,
        # Nobody else holds these parameters; the members of a fleet share them to the end.
        donate=not sections,
        fleet=[_member(config, one, (train, test), workdir) for one in sections] or None,
        callbacks=callbacks,
        dry_run=dry_run,
    )


def _samples(config: Config) -> dict[str, Any]:
    """The options of :class:`jft.train.samples.Samples`; none where nothing is generated."""
    if not config.eval.samples and not config.eval.exact_match:
        return {}
    chat = in_chat(config.data)
    options = {"prompts": config.eval.samples, "exact_match": config.eval.exact_match}
    return {**options, "max_tokens": config.eval.max_tokens, "chat": chat}


def _say(config: Config, text: str) -> None:
    if config.log.progress and jax.process_index() == 0:
        print(text, flush=True)


def _length(config: Config, train: Any) -> str:
    """How long the run is, in steps or epochs as the config says, and what that is in the other."""
    if config.epochs:
        return f"{config.epochs:g} epochs of {train.epoch:.4g} steps, each of {config.batch_size} rows"
    # Packed rows are known once all records are tokenised, which no text is worth.
    epochs = f", {config.steps / train.epoch:.3g} epochs" if not train.rows.pack else ""
    return f"{config.steps} steps, each of {config.batch_size} rows{epochs}"


def look(config: Config, train: Any, test: Any) -> int:
    """Look at all records of the loaders, say what is there, and refuse what could not be used; the highest token id."""
    highest = -1
    for name, loader in (("data", train), ("eval_data", test)):
        if loader is not None and config.check_data > 0:
            try:
                found = loader.survey(config.check_data)
            except data.DataError as error:
                raise data.DataError(f"{name}: {error}") from None
            _say(config, found.text(name, loader))
            highest = max(highest, found.highest)
    return highest


OWN = ("name", "seed", "data", "eval_data", "method", "optimizer")


def _section(section: Any, index: int) -> dict[str, Any]:
    """A member of ``config.fleet``, refused where it has keys that a member cannot have."""
    if not isinstance(section, Mapping):
        raise ValueError(f"config.fleet[{index}] is {section!r}; a member is a section with keys {', '.join(OWN)}")
    for key in section:
        if key not in OWN:
            raise ValueError(f"config.fleet[{index}] has no key {key!r}{nearest(key, OWN)}; it has: {', '.join(OWN)}")
    return dict(section)


def _member(
    config: Config, section: Mapping[str, Any], shared: tuple[Any, Any], workdir: Path | None
) -> dict[str, Any]:
    """The options of a member of the fleet for :func:`finetune`."""
    sections = {k: v for k, v in section.items() if k in ("data", "eval_data", "method")}
    settings: dict[str, Any] = {
        # A section that names another source or method begins anew: options of the old one are not its own.
        k: v if v.get("source", "") or "name" in v else {**getattr(config, k), **v}
        for k, v in sections.items()
    }
    seed = section.get("seed", config.seed)
    changed = dataclasses.replace(config, seed=seed, **settings)
    out: dict[str, Any] = {k: v for k, v in section.items() if k in ("name", "optimizer")} | {"seed": seed}
    if "method" in settings:
        out["method"] = settings["method"]
    # Another seed is another order of the data, as for a run by itself.
    if seed != config.seed or "data" in sections or "eval_data" in sections:
        # Members without loaders of their own share one object, which `Streams` knows by identity and reads once.
        out["data"], out["eval_data"] = loaders(changed, workdir, shared[0])
        look(changed, out["data"], out["eval_data"])
    # `config.json` of a member is that of a run by itself, which `jft train` could repeat.
    written = dataclasses.replace(changed, fleet=()).written()
    written["optimizer"] |= section.get("optimizer", {})
    return {**out, "manifest": {"data": changed.data, "config": written}}


def _base_content(config: ModelConfig) -> str | None:
    """A digest of the files of a pretrained base."""
    if not config.source:
        return None
    directory = fetch(config.source)
    if directory.is_file():
        return files.fingerprint([directory])
    # What a model is made of; other files, as those of a download, may differ between hosts.
    parts = [path for path in directory.iterdir() if path.suffix in (".json", ".safetensors")]
    return files.fingerprint(parts)


def build_model(
    config: ModelConfig, seed: int = 0, mesh: Any = None, classes: Any = None, tokenizer: Any = None
) -> Any:
    """``(model, params)`` of a ``model`` section, sharded over ``mesh``.

    classes: names of the data's classes, counted where ``config.classes`` is -1. tokenizer: gives the vocabulary of an
    architecture that names none, and is refused where it has more tokens than the model has rows.
    """
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) not in DTYPES:
            raise ValueError(f"config.model.{name} is {getattr(config, name)!r}; choose one of {', '.join(DTYPES)}")
    _one_base(config)
    count = config.classes
    if count < 0:
        if not classes:
            raise ValueError(
                "config.model.classes is -1, but the data has no classes; give a number (1 for a regression)"
            )
        count = len(classes)
    # A head may have more, as those of a study's tasks have.
    if classes and 0 < count < len(classes):
        raise ValueError(f"config.model.classes is {count}, but the data has {len(classes)} classes; set it to -1")
    if config.source:
        model, params = models.load(
            config.source,
            mesh,
            dtype=config.param_dtype,
            classes=count,
            # Only a classifier pools.
            pool=config.pool if count else None,
            seed=seed,
            **config.options,
        )
    else:
        model, params = _from_scratch(config, seed, mesh, count, tokenizer)
    _check_vocabulary(params, tokenizer)
    # Execution only: parameters stay in `param_dtype`, which loading has set.
    execution = {"remat": config.remat, "attention": config.attention, "logits_chunk": config.logits_chunk}
    return model.with_(dtype=jnp.dtype(config.dtype), **execution), params


def _directory(workdir: str | Path) -> Path:
    """A path all processes can write to; checkpoints are renamed and metrics appended, which object stores cannot do."""
    if "://" in str(workdir):
        raise ValueError(
            f"workdir {workdir} is a URL; give a directory, for a bucket one where it is mounted (gcsfuse)"
        )
    return Path(workdir)


def _one_base(config: ModelConfig) -> None:
    if bool(config.source) == bool(config.arch):
        raise ValueError("config.model needs one of source (pretrained) and arch (random weights), not both or neither")


def _from_scratch(config: ModelConfig, seed: int, mesh: Any, classes: int, tokenizer: Any) -> Any:
    if config.arch not in ARCHITECTURES:
        hint = nearest(config.arch, ARCHITECTURES)
        raise ValueError(
            f"config.model.arch {config.arch!r} is unknown{hint}; choose one of {', '.join(ARCHITECTURES)}"
        )
    options = dict(config.options)
    kind = getattr(models, ARCHITECTURES[config.arch])
    # A default: a config may have more rows than tokens, as padding for the mesh.
    if tokenizer is not None and "vocab" in kind.__dataclass_fields__:
        options.setdefault("vocab", tokenizer.rows)
    architecture = _architecture(kind, options, f"config.model.options of {config.arch}")
    if classes:
        architecture = models.Classifier(architecture, classes, config.pool)
    model = models.Model(architecture)
    key = jax.random.key(seed)
    shardings = None if mesh is None else parallel.shardings(model.abstract(config.param_dtype), mesh)
    # Under jit with shardings each device makes its own shards; no device ever holds the whole model. Without a mesh too:
    # outside jit the values round otherwise, and a base drawn on one device would be another on eight.
    return model, jax.jit(lambda k: model.init(k, jnp.dtype(config.param_dtype)), out_shardings=shardings)(key)


def _architecture(kind: Any, options: Mapping[str, Any], where: str) -> Any:
    """``kind(**options)``; sections inside (a CLIP's towers, a decoder's experts) become dataclasses."""
    hints = typing.get_type_hints(kind)
    values = {}
    for option, value in options.items():
        if option not in hints:
            near = nearest(option, hints, hint="; did you mean '{}'?", otherwise=f"; it has: {', '.join(hints)}")
            raise ValueError(f"{where}: there is no option {option!r}{near}")
        # The dataclass may be inside a union, as `Experts | None`.
        inner = next((t for t in (hints[option], *typing.get_args(hints[option])) if dataclasses.is_dataclass(t)), None)
        if inner is not None and isinstance(value, Mapping):
            value = _architecture(inner, value, f"{where}.{option}")
        # Architectures are hashed as static arguments; a list has no hash.
        values[option] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    # A required field is missing: names were checked above.
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def loaders(config: Config, workdir: Path | None, first: Any = None) -> tuple[Any, Any]:
    """The loaders for training and evaluation (None without), with the tokenizer and image size of the base.

    first: the loader of another member of a fleet, whose tokenizer this one takes and whose classes it must have.
    """
    tokenizer, image_size = None, config.model.options.get("image")
    if config.model.source:
        directory = fetch(config.model.source)
        # Vision models have none.
        tokenizer = directory if directory.is_file() or (directory / "tokenizer.json").is_file() else None
        base_config = {} if directory.is_file() else describe(directory)
        # A CLIP config has it in the vision tower's section.
        image_size = base_config.get("image_size") or (base_config.get("vision_config") or {}).get("image_size")
    shared: Any = {"batch_size": config.batch_size, "seed": config.seed, "image_size": image_size, "directory": workdir}
    train = data.build(config.data, tokenizer=tokenizer if first is None else first.tokenizer, **shared)
    # Names may differ, since members learn other tasks; the head has one shape.
    if first is not None and train.classes is not None and len(train.classes) != len(first.classes or ()):
        raise ValueError(
            f"members of the fleet have classes {first.classes} and {train.classes}; one model has as many for all"
        )
    if not config.eval_data:
        return train, None
    # Ids mean the same in both only if one tokenizer made them, also where it was trained on the training data.
    settings = {k: v for k, v in derived(config.data, config.eval_data).items() if k != "tokenizer"}
    test = data.build(settings, tokenizer=train.tokenizer, train=False, classes=train.classes, **shared)
    if train.classes != test.classes:
        raise ValueError(
            f"eval_data has classes {test.classes}, data has {train.classes}; they must be the same, in order"
        )
    return train, test


def _check_tokens(params: Any, highest: int) -> None:
    """Refuse token ids that the model has no row for; vocabularies may have gaps, so that their size does not tell."""
    for path, x in tree.flatten(params).items():
        if path.endswith("embed/table") and highest >= x.shape[-2]:
            raise ValueError(
                f"the data holds the token {highest}, but {path} has {x.shape[-2]} rows; use the model's own tokenizer"
            )


def _check_vocabulary(params: Any, tokenizer: Any) -> None:
    tables = {p: x.shape[-2] for p, x in tree.flatten(params).items() if p.endswith("embed/table")}
    for path, rows in tables.items():
        # Lookups clip their indices: too large an id would train the last row, and raise nothing.
        if tokenizer is not None and tokenizer.rows > rows:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens with ids up to {tokenizer.rows - 1}, but {path} has {rows} "
                "rows; use the model's own tokenizer, and look at the ids of its special tokens"
            )
