"""`build`: a loader from a plain dict; the only reader of data settings. The format is in :mod:`jft.data`."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jft.data.errors import DataError, choose, refuse_unknown
from jft.data.loader import Loader
from jft.data.packing import PACKS
from jft.data.pipeline import Process, Reading, Rows
from jft.data.source import Source, few_shot, held_out, limited
from jft.data.tasks import Task
from jft.data.tokenizer import Tokenizer, resolve

# The library a BPE is trained on when the tokenizer is 'bpe:VOCAB': at most so many records of each source.
_BPE_RECORDS = 20_000
_ROWS = ("limit", "shots", "holdout", "held_out")
_READING = ("threads", "prefetch", "workers")
_COMPONENT = ("source", "task", "weight", "tokenizer", "pack", *_ROWS)
# Arguments that come from build itself, never from a config.
_INTERNAL = ("self", "source", "tokenizer", "image_size", "pack")


def _sources() -> dict[str, Any]:
    # Imported on use: every source has libraries of its own.
    from jft.data.digits import Digits
    from jft.data.folders import ImageFolder
    from jft.data.huggingface import HuggingFace
    from jft.data.mnist import FashionMnist, Mnist
    from jft.data.reasoning_gym import ReasoningGym
    from jft.data.records import Json, Memory, Parquet
    from jft.data.stdlib import Stdlib
    from jft.data.tables import Csv, Jsonl
    from jft.data.tfds import Tfds

    return {
        "tfds": Tfds,
        "hf": HuggingFace,
        "jsonl": Jsonl,
        "json": Json,
        "csv": Csv,
        "parquet": Parquet,
        "rows": Memory,
        "image_folder": ImageFolder,
        "digits": Digits,
        "mnist": Mnist,
        "fashion_mnist": FashionMnist,
        "stdlib": Stdlib,
        "reasoning_gym": ReasoningGym,
    }


def _tasks() -> dict[str, Any]:
    from jft.data.language import LanguageModelling, PromptResponse, SequenceToSequence
    from jft.data.tasks import Contrastive, ImageClassification, TextClassification, TextRegression

    return {
        "classification": ImageClassification,
        "text_classification": TextClassification,
        "regression": TextRegression,
        "contrastive": Contrastive,
        "lm": LanguageModelling,
        "sft": PromptResponse,
        "seq2seq": SequenceToSequence,
    }


def _settings(of: Any) -> set[str]:
    return set(inspect.signature(of).parameters) - set(_INTERNAL)


def _plain(config: Any) -> dict[str, Any]:
    if hasattr(config, "to_dict"):  # ConfigDict
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise DataError(f"data settings must be a mapping, got {type(config).__name__} {config!r}")
    return dict(config)


def _task_class(settings: dict[str, Any], source: Source, sources: set[str]) -> Any:
    """The task named; where none is: classification for a source of images, language modelling for text."""
    if "task" in sources or "task" not in settings:  # digits, mnist: `task` says which labels
        return _tasks()["classification" if source.class_names("label") else "lm"]
    task = settings["task"]
    text = "text" in settings or "pair" in settings
    if task == "classification" and (text or not _has_images(source, settings)):
        task = "text_classification"
    return choose(task, _tasks(), "data task")


def _has_images(source: Source, settings: dict[str, Any]) -> bool:
    import numpy as np

    return "image" in settings or isinstance(source[0].get(settings.get("image_field", "image")), np.ndarray)


class _Component:
    """One source with its task, read from settings."""

    def __init__(self, settings: dict[str, Any]):
        if "source" not in settings:
            raise DataError(f"data: `source` is missing; known: {', '.join(sorted(_sources()))}")
        source_class = choose(settings["source"], _sources(), "data source")
        source_settings = _settings(source_class)
        # Before the source is opened: a misspelt key must not cost a download.
        self._refuse(settings, source_settings)
        # None in a config is the default.
        settings = {k: v for k, v in settings.items() if v is not None}
        self.tokenizer = settings.get("tokenizer")
        self.weight = settings.get("weight", 1)
        # True would pass for the weight 1.
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not self.weight > 0:
            raise DataError(f"weight must be a positive number, got {self.weight!r}")
        source = _call(source_class, {k: v for k, v in settings.items() if k in source_settings}, settings["source"])
        self.task_class = _task_class(settings, source, source_settings)
        task_settings = _settings(self.task_class)
        rest = {k: v for k, v in settings.items() if k not in source_settings and k not in _COMPONENT}
        refuse_unknown(
            rest,
            task_settings | source_settings | set(_COMPONENT),
            f"data ({settings['source']}, {self.task_class.__name__})",
        )
        self.values, self.pack = rest, settings.get("pack", False)
        choose(self.pack, PACKS, "pack")
        self.source = self._rows(source, settings)

    @staticmethod
    def _refuse(settings: dict[str, Any], source_settings: set[str]) -> None:
        known = source_settings | set(_COMPONENT).union(*(_settings(task) for task in _tasks().values()))
        refuse_unknown(settings, known, f"data ({settings['source']})")

    def _rows(self, source: Source, settings: dict[str, Any]) -> Source:
        if "holdout" in settings and "held_out" in settings:
            raise DataError("give holdout (train on the rest) or held_out (evaluate on that part), not both")
        # First of all: what is held out must not depend on how many rows are taken.
        for name in ("holdout", "held_out"):
            if name in settings:
                source = held_out(source, settings[name], keep=name == "held_out")
        if "shots" in settings:
            source = few_shot(source, settings["shots"], settings.get("label", "label"))
        # digits take their limit themselves
        return limited(source, settings["limit"]) if "limit" in settings and settings["source"] != "digits" else source

    @property
    def needs_tokenizer(self) -> bool:
        return "tokenizer" in inspect.signature(self.task_class).parameters

    def texts(self) -> Iterator[str]:
        """The texts a tokenizer is trained on."""
        for record in itertools.islice((self.source[i] for i in range(len(self.source))), _BPE_RECORDS):
            for key, value in record.items():
                if isinstance(value, str) and key != "path":
                    yield value
                elif isinstance(value, list):
                    contents = (m.get("content", m.get("value")) for m in value if isinstance(m, dict))
                    yield from (content for content in contents if isinstance(content, str))

    def task(self, tokenizer: Tokenizer | None, image_size: int | None, classes: Any = None) -> Task:
        arguments = {"tokenizer": tokenizer, "image_size": image_size, "pack": self.pack}
        parameters = inspect.signature(self.task_class).parameters
        # A source that names its classes is checked against them; what knows none takes them.
        label = self.values.get("label", "label")
        if classes is not None and "classes" in parameters and self.source.class_names(label) is None:
            arguments["classes"] = self.values.get("classes", classes)
        values = {**self.values, **{k: v for k, v in arguments.items() if k in parameters}}
        return _call(lambda **kw: self.task_class(self.source, **kw), values, self.task_class.__name__)


def _call(constructor: Any, values: dict[str, Any], what: str) -> Any:
    try:
        return constructor(**values)
    except TypeError as error:
        raise DataError(f"data ({what}): a setting is missing or has the wrong type: {error}") from error


# Keys of training data alone: which of its rows are left out, or how often they are drawn.
_OF_TRAINING = ("holdout", "held_out", "limit", "shots", "weight")


def derived(data: Any, part: Any) -> dict[str, Any]:
    """Settings of evaluation data: ``part`` where it names a source, else those of the training ``data`` with its keys.

    So ``{"held_out": 0.1}``, ``{"split": "test"}`` or ``{"files": "test.jsonl"}`` are enough, and what is changed in the
    training data holds for both. Not taken over: holdout, held_out, limit, shots, weight.
    """
    base, over = _plain(data), _plain(part)
    if not over or "source" in over or "mixture" in over:
        return over
    rest = {k: v for k, v in base.items() if k not in _OF_TRAINING}
    if "mixture" in rest:
        rest["mixture"] = [{k: v for k, v in _plain(p).items() if k not in _OF_TRAINING} for p in rest["mixture"]]
    return {**rest, **over}


def in_chat(data: Mapping[str, Any]) -> bool:
    """Whether a config of data renders its texts by the chat template."""
    return bool(data.get("chat") or data.get("messages"))


def known(source: str) -> set[str]:
    """The keys that data settings may have with this source. Raises :class:`DataError` for an unknown source."""
    source_settings = _settings(choose(source, _sources(), "data source"))
    return source_settings.union(_COMPONENT, _READING, ("buckets",), *(_settings(task) for task in _tasks().values()))


def _components(config: dict[str, Any]) -> list[_Component]:
    if "mixture" not in config:
        return [_Component(config)]
    mixture = config["mixture"]
    if not isinstance(mixture, list | tuple) or not mixture:
        raise DataError("mixture must be a list of data settings, each with its weight")
    common = {k: v for k, v in config.items() if k != "mixture"}
    return [_Component({**common, **_plain(part)}) for part in mixture]


def _rows(components: list[_Component], tasks: list[Task], tokenizer: Tokenizer | None) -> Rows:
    # Rows of one batch have one shape.
    layouts = {(c.pack, getattr(t, "max_length", 0)) for c, t in zip(components, tasks, strict=True) if t.packs}
    if len(layouts) > 1:
        raise DataError(f"mixture: pack and max_length must agree, got {sorted(map(str, layouts))}")
    for component, task in zip(components, tasks, strict=True):
        if component.pack and not task.packs:
            raise DataError(f"pack: {component.pack!r} is for lm and sft; {type(task).__name__} has one example a row")
    pack, length = next(iter(layouts), (False, 0))
    return Rows(pack, length, tokenizer.pad if tokenizer is not None else 0)


def _tokenizer(components: list[_Component], default: Any) -> Any:
    named = {str(c.tokenizer): c.tokenizer for c in components if c.tokenizer is not None}
    if len(named) > 1:
        raise DataError(f"mixture: all parts must name one tokenizer, got {', '.join(sorted(named))}")
    return next(iter(named.values()), default)


def _process(index: int | None, count: int | None) -> Process:
    if index is None or count is None:
        import jax

        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise DataError(f"process_index={index} must lie in 0..{count - 1} (process_count={count})")
    return Process(index, count)


def build(
    config: Any,
    *,
    batch_size: int,
    seed: int = 0,
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    image_size: int | None = None,
    train: bool = True,
    process_index: int | None = None,
    process_count: int | None = None,
    directory: str | os.PathLike | None = None,
    classes: Sequence[str] | None = None,
) -> Loader:
    """A :class:`Loader` from settings (a dict or ConfigDict; the format is in :mod:`jft.data`).

    batch_size: of all processes together. tokenizer: a :class:`Tokenizer`, "bytes", "bpe:VOCAB", a directory or a file;
    ``config["tokenizer"]`` goes before it. image_size: pixels, where ``image`` names none. train: endless, shuffled,
    augmented; False: once over, in order, every example counted once. process_index, process_count: JAX's by default.
    directory: where a trained BPE is kept. classes: names of the training data's, for data that names none itself.

    Raises :class:`DataError` for anything wrong; the first example of every source is prepared here, so wrong fields fail
    before a model is compiled, and :meth:`Loader.survey` prepares them all.
    """
    settings = _plain(config)
    process = _process(process_index, process_count)
    # Taken out, as these are of the loader and not of any part.
    reading = _reading({k: settings.pop(k) for k in _READING if k in settings})
    lengths = settings.pop("buckets", None)
    components = _components(settings)
    spec = _tokenizer(components, tokenizer)
    text_tokenizer = None
    if any(c.needs_tokenizer for c in components):
        texts = itertools.chain.from_iterable(c.texts() for c in components)
        text_tokenizer = resolve(spec, texts, directory)
    tasks = []
    for component in components:
        tasks.append(component.task(text_tokenizer, image_size, classes))
        # Of a mixture the first part says which there are.
        classes = tasks[0].classes if classes is None else classes
    return Loader(
        tasks,
        [c.weight for c in components],
        _rows(components, tasks, text_tokenizer),
        batch_size=batch_size,
        seed=seed,
        train=train,
        tokenizer=text_tokenizer,
        process=process,
        reading=reading,
        lengths=True if lengths is None else lengths,
    )


def _reading(settings: dict[str, Any]) -> Reading:
    options = {k: v for k, v in settings.items() if v is not None}
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(f"{name} must be a whole number, 0 or more; got {value!r}")
    return Reading(**options)
