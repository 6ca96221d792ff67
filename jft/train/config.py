"""The schema of a run's config: every key with its type, its default and what it means.

A config file returns a :class:`ml_collections.ConfigDict` made by :func:`default` with values set; :func:`check` turns it
into a :class:`Config`, and refuses keys and types that are not of the schema. Sections whose keys depend on a name (``data``,
``method``, ``model.options``) are open here and checked by what is built from them.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from jft.names import nearest

_TYPES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    tuple: "a list",
    dict: "a section",
}


def _key(default: Any, doc: str) -> Any:
    # Dataclasses refuse a mutable default, and a factory gives each config a dict of its own.
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base."""

    source: str = _key("", "a Hugging Face directory or hub id, a directory that jft saved, or a GGUF file")
    arch: str = _key("", "instead of source: decoder, encoder, vision, clip or t5, with random weights")
    options: dict = _key({}, "with arch: fields of its config (width, layers, ...); with source: of jft.load")
    dtype: str = _key("float32", "activations and products: float32 or bfloat16")
    param_dtype: str = _key("float32", "base weights; what trains has float32 masters whatever this is")
    remat: str = _key("none", "what the backward pass recomputes: none, dots or full")
    attention: str = _key(
        "plain",
        "plain; blockwise: in memory linear in tokens; fused: a kernel of the platform, not of linearized methods",
    )
    logits_chunk: int = _key(
        0,
        "of models that predict tokens: tokens of a row whose logits exist at once in training and evaluation; 0: all",
    )
    classes: int = _key(0, "a classifier of that many classes on top; 0 for none, -1 for as many as the data has")
    pool: str = _key("auto", "what the classifier reads: cls, mean, last, pooler or auto")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """See :class:`jft.train.Optimizer`."""

    name: str = _key("adamw", "adamw, adam, sgd, lion, adafactor or muon")
    lr: float = _key(1e-4, "peak learning rate")
    weight_decay: float = _key(0.0, "decoupled: value -= lr * weight_decay * (value - target)")
    decay_to: str = _key("zero", "the target: zero, or base for the value before training")
    decay: tuple = _key((), "patterns of paths that decay; empty: all but biases and norms")
    b1: float = _key(0.9, "first moment's decay")
    b2: float = _key(0.999, "second moment's decay")
    eps: float = _key(1e-8, "added to the root of the second moment")
    momentum: float = _key(0.9, "of sgd and muon")
    schedule: str = _key("constant", "after warmup: constant, linear or cosine")
    warmup: int = _key(0, "steps of linear rise")
    end: float = _key(0.0, "the last learning rate, as a fraction of lr")
    clip: float = _key(1.0, "largest global gradient norm; 0 for none")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 for the rest."""

    data: int = _key(1, "copies of everything, each with a part of the batch")
    fsdp: int = _key(-1, "parts of weights and of the batch")
    tensor: int = _key(1, "parts of each matrix product")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When to evaluate."""

    every: int = _key(0, "steps between evaluations; 0: at the end only")
    batches: int = _key(0, "batches of each; 0: all")
    samples: tuple = _key((), "of decoders: prompts to continue at each evaluation, also in samples.jsonl")
    exact_match: int = _key(0, "of decoders: examples to answer at each evaluation, scored as exact_match; 0: none")
    max_tokens: int = _key(64, "new tokens of a sample or answer, at most")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """See :class:`jft.train.checkpoints.Checkpointing`."""

    every: int = _key(0, "steps between checkpoints; 0: by the clock, see minutes, and when asked to stop")
    keep: int = _key(2, "newest checkpoints that stay")
    best: str = _key("", "keep, and end with, the best by this metric of evaluation")
    accept: bool = _key(False, "go on though data, tokenizer, objective or optimizer settings have changed")
    minutes: float = _key(30.0, "where every is 0: minutes between checkpoints; 0: none")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """See :class:`jft.train.Logging`."""

    every: int = _key(10, "steps between rows of metrics")
    progress: bool = _key(True, "show the run on stdout")
    tensorboard: bool = _key(False, "also to workdir/tensorboard")
    wandb: str = _key("", "also to this Weights & Biases project")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """See :class:`jft.train.Profiling`."""

    steps: int = _key(0, "steps to trace with jax.profiler into workdir/profile, for xprof or perfetto; 0: none")
    start: int = _key(3, "steps before them, counted from where the run began or went on")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run, see :func:`jft.parallel.start`. How it is started, not what it is."""

    coordinator: str = _key("", "of several processes: host:port of process 0; empty: $JFT_COORDINATOR")
    processes: int = _key(0, "how many there are; 0: $JFT_NUM_PROCESSES, else 1")
    process_id: int = _key(-1, "which of them this one is, from 0; -1: $JFT_PROCESS_ID")
    cluster: bool = _key(False, "find all three as the scheduler says (TPU pods, SLURM, ...), as does $JFT_MULTIHOST=1")
    timeout: int = _key(300, "seconds to wait for all processes to come")
    heartbeat: int = _key(60, "seconds without a sign of life after which a process counts as lost, and the others end")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = _key(0, "of initial values and of the data's order")
    steps: int = _key(0, "updates; either these or epochs")
    epochs: float = _key(0.0, "passes over the training data, of a mixture over as many examples as all its parts have")
    batch_size: int = _key(32, "examples per update, over all devices")
    accumulate: int = _key(1, "microbatches per batch; any number gives the same gradient")
    objective: str = _key("", "lm, classification, regression, contrastive or seq2seq; empty: what the data asks for")
    objective_options: dict = _key({}, "its options: z_loss, label_smoothing")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: dict = _key({}, "training data, in the format of jft.data.build")
    eval_data: dict = _key({}, "evaluation data; without a source: that of data, with these keys; empty for none")
    check_data: float = _key(
        20.0, "seconds to look at all records of each before anything is compiled; 0: at the first alone"
    )
    # Open: its keys are those of the method's function, which the registry checks.
    method: dict = _key({"name": "full"}, "name of a method and its options: see `jft methods`")
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    fleet: tuple = _key(
        (), "runs to train side by side, each a section of what it has of its own: see jft.train.experiment"
    )
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def written(self) -> dict[str, Any]:
        """What ``config.json`` and the result say: all but how the processes were started."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "distributed"}


def default() -> ConfigDict:
    """A config with every key at its default. Locked: an unknown key is refused where it is set; open sections take any."""
    config = ConfigDict(_plain(Config()))
    # Locking is recursive, so the open sections are unlocked one by one.
    config.lock()
    for section in (config.data, config.eval_data, config.method, config.model.options, config.objective_options):
        section.unlock()
    return config


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def check(config: Any) -> Config:
    """The :class:`Config` that a ConfigDict or nested dict says; keys that are absent take their defaults.

    Raises ``ValueError`` for a key that is not of the schema, with the nearest one, and for a value of the wrong type, with the
    type expected and the value.
    """
    # `to_dict` also resolves field references, which have no type to check.
    return _check(config.to_dict() if isinstance(config, ConfigDict) else config, Config, "")


def check_length(config: Config) -> None:
    """``ValueError`` unless exactly one of steps and epochs is given."""
    if config.steps < 0 or config.epochs < 0:
        raise ValueError(f"config.steps is {config.steps} and config.epochs {config.epochs:g}; they cannot be negative")
    if not config.steps and not config.epochs:
        raise ValueError(
            "how long to train is not given; set config.steps (updates) or config.epochs (passes over the data)"
        )
    if config.steps and config.epochs:
        raise ValueError(
            f"config.steps={config.steps} and config.epochs={config.epochs:g} are both given; set one of them to 0"
        )


def _check(value: Any, schema: type, prefix: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"config.{prefix.rstrip('.')} is {value!r}; it is a section with keys {', '.join(_names(schema))}"
        )
    # Not `field.type`: annotations are strings here.
    types = typing.get_type_hints(schema)
    for key in value:
        if key not in types:
            keys = f"; keys: {', '.join(types)}"
            near = nearest(key, types, hint=f"; did you mean {prefix}{{}}?", otherwise=keys)
            raise ValueError(f"config has no key {prefix}{key}{near}")
    return schema(**{key: _convert(inner, types[key], prefix + key) for key, inner in value.items()})


def _convert(value: Any, kind: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _check(value, typing.cast(type, kind), name + ".")
    # A section may be a dict in which a ConfigDict was put; what reads it expects plain dicts.
    if kind is dict and isinstance(value, Mapping):
        return {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in value.items()}
    # JSON has lists only, and a tuple can be hashed, as an optimizer's `decay` must.
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(x.to_dict() if isinstance(x, ConfigDict) else x for x in value)
    # `lr=1` on a command line; a bool would pass for an int here.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int to Python, but steps=True is a mistake.
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"config.{name} is {value!r} ({type(value).__name__}); it takes {_TYPES[kind]}")


def _names(schema: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(schema)]


def documentation(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """``(key, default, what it means)`` of every key, in order."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from documentation(hints[field.name], f"{prefix}{field.name}.")
        else:
            value = field.default_factory() if callable(field.default_factory) else field.default
            yield f"{prefix}{field.name}", value, field.metadata["doc"]
