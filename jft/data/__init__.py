"""Data: sources, tasks, packing and Grain pipelines, all from one dict.

    loader = jft.data.build({"source": "digits", "task": "parity"}, batch_size=64)
    batches = iter(loader)
    batch = next(batches)                       # {"images": float32 [64, 8, 8, 1], "labels": int32 [64]}
    state = batches.get_state()                 # bytes; batches.set_state(state) goes on with the same next batch

**The format.** One source and one task, as plain keys of one dict; an unknown key is refused with the nearest known one.

    {"source": "digits", "task": "parity", "split": "train", "rotate": 90}
    {"source": "stdlib", "kind": "docstrings", "task": "lm", "tokenizer": "bytes", "max_length": 256, "pack": "concat"}
    {"source": "jsonl", "files": "a/*.jsonl", "task": "sft", "prompt": "question", "response": "answer",
     "max_length": 512, "pack": "first_fit"}
    {"source": "jsonl", "files": "chats.jsonl", "task": "sft", "messages": "messages", "loss": "responses"}
    {"source": "json", "files": "alpaca.json", "task": "sft", "max_length": 512}
    {"source": "rows", "rows": [{"text": "good", "label": "yes"}, ...], "task": "classification"}     # from Python
    {"source": "tfds", "name": "cifar10", "split": "train", "holdout": 0.1, "task": "classification",
     "image": {"size": 224, "crop": "random", "flip": True, "normalize": "clip"}}
    {"source": "tfds", "name": "glue/sst2", "task": "classification", "text": "sentence"}
    {"source": "image_folder", "root": "gtsrb", "split": "train", "image": {"size": 224, "normalize": "clip"}}
    {"mixture": [{"source": "jsonl", "files": "a.jsonl", "weight": 2}, {"source": "jsonl", "files": "b.jsonl"}],
     "task": "sft", "max_length": 512}          # keys next to `mixture` hold for every part

**source** (its settings are the arguments of the class): ``digits`` (:class:`~jft.data.digits.Digits`), ``mnist`` and
``fashion_mnist`` (:mod:`jft.data.mnist`; of packages that have to be installed), ``stdlib``
(:class:`~jft.data.stdlib.Stdlib`), ``jsonl`` (:class:`~jft.data.tables.Jsonl`), ``json`` (arrays of objects,
:class:`~jft.data.records.Json`), ``csv`` (:class:`~jft.data.tables.Csv`), ``parquet`` (:class:`~jft.data.records.Parquet`),
``rows`` (a list of dicts, or a dict of columns, in memory: :class:`~jft.data.records.Memory`), ``tfds``
(:class:`~jft.data.tfds.Tfds`), ``hf`` (:class:`~jft.data.huggingface.HuggingFace`), ``image_folder``
(:class:`~jft.data.folders.ImageFolder`) and ``reasoning_gym`` (:class:`~jft.data.reasoning_gym.ReasoningGym`).

**task** (likewise): ``classification`` (images; texts, where ``text`` is set or the records hold no image:
:class:`~jft.data.tasks.ImageClassification`, :class:`~jft.data.tasks.TextClassification`), ``regression`` (texts with a
number, :class:`~jft.data.tasks.TextRegression`), ``contrastive`` (:class:`~jft.data.tasks.Contrastive`), ``lm``
(:class:`~jft.data.language.LanguageModelling`), ``sft`` (:class:`~jft.data.language.PromptResponse`), ``seq2seq``
(:class:`~jft.data.language.SequenceToSequence`). With ``digits`` and ``mnist``, ``task`` says which labels the scans get:
identity, parity, magnitude, prime, loops, thirds; with ``fashion_mnist`` identity, worn_on, season, buttons.

**rows**: ``limit`` (so many, by a fixed seed), ``shots`` (so many a class), ``holdout: 0.1`` (without a fixed tenth) and
``held_out: 0.1`` (that tenth: the "Val" sets of task arithmetic). **weight**: its share of a training
mixture, in examples; evaluation reads every part once, whatever its weight.

**classes**: a list of names, or their number; else those of the source, else the values that the label field has.

**buckets**: rows of text that are not packed are padded to one of a few lengths, which the lengths of the texts choose (at
most four, each compiled once); ``False``: all to ``max_length``; ``[32, 128]``: these and ``max_length``. Batches are made of
texts of like length, in windows of the global order (:mod:`jft.data.buckets`).

**pack** (``lm``, ``sft``): ``"first_fit"``, ``"concat"``, or ``False``, the default: one example a row. **too_long**:
``"error"`` (the default for ``lm``, ``sft``, ``seq2seq``), ``"truncate"`` or ``"drop"``.

**tokenizer**: ``"bytes"``, ``"bpe:VOCAB"`` (trained on the data, kept in ``directory``), a Hugging Face directory, a
tokenizer.json or a GGUF file. **reading**: ``threads`` (4), ``prefetch`` (64 examples), ``workers`` (0 processes).

**Limits.** A record of JSONL or CSV has 64 MiB at most, an image of a folder 2**26 pixels; files are regular ones, no pipes or
devices. A chat template has 10 s and 50 million characters for a conversation. docs/files.md has all of them.

**Order and position.** See :mod:`jft.data.pipeline`: unpacked training data has one global order for any number of
processes, threads and workers, and a saved position may be resumed on another number of them. Packed data, and data
with dropped records and one length, resumes exactly on the same number; another is refused. Evaluation counts every example
once. ``loader.survey()`` prepares all records ahead and says what is wrong with any; ``loader.epoch``: batches of one pass.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jft.data.errors import DataError

# Loaded at first use: `import jft` must not import Grain.
_LATE = {
    "build": "jft.data.config",
    "Loader": "jft.data.loader",
    "show": "jft.data.display",
    "Tokenizer": "jft.data.tokenizer",
}
__all__ = ["DataError", "Loader", "Tokenizer", "build", "show"]

if TYPE_CHECKING:
    from jft.data.config import build
    from jft.data.display import show
    from jft.data.loader import Loader
    from jft.data.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'jft.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
