"""Tasks over labels: examples for classification and for image-text contrast from the records of a source.

A task is made for one source and turns record ``index`` into a fixed-shape example, or None where it is left out.
Rows of text are padded to ``longest``, and cropped to a bucket afterwards (:mod:`jft.data.buckets`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft.data.errors import DataError, choose, refuse_unknown, shorten
from jft.data.images import ImageSettings, preprocess
from jft.data.source import Source, field_of
from jft.data.tokenizer import Encoded, Tokenizer

TOO_LONG = ("truncate", "drop", "error")
Example = dict[str, Any]  # arrays and NumPy scalars


class Task:
    """A source seen as examples. ``packs``: rows are tokens of any length, to be padded or packed afterwards."""

    packs = False
    drops = False  # whether some records may be left out (too long, too short)
    classes: tuple[str, ...] | None = None
    longest: tuple[int, ...] = ()  # of text: tokens of its longest row, of an encoder-decoder both sides
    truncated = 0  # examples that were cut so far

    def __init__(self, source: Source):
        self.source = source

    def example(self, index: int, rng: np.random.Generator | None) -> Example | None:
        """Example ``index``; a :class:`DataError` that lacks its place gets it."""
        try:
            return self.encode(index, self.source[index], rng)
        except DataError as error:
            where = self.source.where(index)
            # The source may have named the place already.
            if str(error).startswith(where):
                raise
            raise DataError(f"{where}: {error}") from error.__cause__

    def encode(self, index: int, record: Mapping[str, Any], rng: np.random.Generator | None) -> Example | None:
        raise TypeError(f"{type(self).__name__} encodes nothing")

    def text(self, index: int, record: Mapping[str, Any], spec: str) -> str:
        """A field of the record, or, where ``spec`` holds braces, the text ``"Q: {question}"`` filled from its fields."""
        if "{" not in spec:
            value = field_of(self.source, index, spec, record)
            if not isinstance(value, str):
                raise DataError(f"field {spec!r} must be text, got {type(value).__name__} {shorten(value)}")
            return value
        try:
            return spec.format_map(record)
        except KeyError as error:
            # Raises, naming the nearest field.
            field_of(self.source, index, error.args[0], record)
            raise
        except (ValueError, IndexError, AttributeError) as error:
            raise DataError(f"text pattern {spec!r} cannot be filled: {error}") from None


def fit(ids: np.ndarray, max_length: int, too_long: str, way_out: str = "raise max_length") -> bool:
    """Whether a row of ids is kept; an over-long one is refused where ``too_long`` says so."""
    if len(ids) <= max_length or too_long == "truncate":
        return True
    if too_long == "drop":
        return False
    raise DataError(
        f"{len(ids)} tokens, more than max_length={max_length}; {way_out}, or set too_long to 'truncate' or 'drop'"
    )


def check_length(max_length: Any, too_long: str, name: str = "max_length") -> None:
    """:class:`DataError` for a length below 2 (no target) and an unknown policy."""
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
        raise DataError(f"{name} must be a whole number of tokens, at least 2, got {max_length!r}")
    choose(too_long, TOO_LONG, "too_long")


def padded(ids: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    """``ids`` cut or filled to ``length``."""
    row = np.full(length, fill, ids.dtype)
    row[: min(length, len(ids))] = ids[:length]
    return row


MOST = 1000
"""Different values of a label field that are still classes."""


class Labels:
    """Class names of a label field, and the class index of a value of it.

    The names come from ``classes`` (a list of names, or a number of classes), from the source (TFDS, HF features, folders,
    digits), or else are the values that the field has, sorted, numbers by size: values 0 to n are then indices, others (a
    rating from 1 to 5) names. Evaluation takes those of the training data, for one split may lack a class.
    """

    def __init__(self, source: Source, field: str, classes: Sequence | int | None):
        self.field = field
        known = source.class_names(field)
        if classes is None and known is None:
            names: Sequence = _values(source, field)
        elif classes is None:
            names = known or ()
        elif isinstance(classes, int):
            names = known if known is not None and len(known) == classes else [str(i) for i in range(classes)]
        else:
            names = [str(c) for c in classes]
        if len(names) < 2 or len(set(names)) != len(names):
            raise DataError(f"classes must be at least two different names, got {shorten(list(names))}")
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(self.names)}
        # Names that are numbers and no indices, such as 1 to 5: a value is then a name.
        numbers = all(map(_is_number, names)) and list(names) != [str(i) for i in range(len(names))]
        self._numbers = known is None and numbers

    def __call__(self, value: Any) -> np.int32:
        """The class index of a name, of an index, or of an index written as text."""
        if (isinstance(value, str) or self._numbers) and (name := _text(value)) in self._index:
            return np.int32(self._index[name])
        try:
            # 3.0 is an index, 3.5 is none.
            index = int(value) if not isinstance(value, float) or value == int(value) else -1
        except (TypeError, ValueError, OverflowError):
            index = -1
        if self._numbers or not 0 <= index < len(self.names):
            raise DataError(
                f"label {self.field!r} is {shorten(value)}, neither one of the {len(self.names)} classes"
                f" {shorten(list(self.names), 120)} nor an index of them"
            )
        return np.int32(index)


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _text(value: Any) -> str:
    # CSV has text only, and a column of integers with gaps becomes one of floats elsewhere.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _values(source: Source, field: str) -> list[str]:
    """The different values of a label field, sorted. :class:`DataError` for one, and for as many as no classes are."""
    # A label that is missing is no class; the pass over all data names its record.
    values = {_text(value) for value in source.column(field) if value is not None and value != ""}
    if not 2 <= len(values) <= MOST:
        raise DataError(
            f"{source.name}: field {field!r} has {len(values)} different value{'s' * (len(values) > 1)}, such as"
            f" {shorten(sorted(values)[:9], 100)}, which make no classes; set label to another field, or classes to a list of"
            " names or their number"
        )
    if not all(map(_is_number, values)):
        return sorted(values)
    ascending = sorted(values, key=float)
    whole = ascending[0] == "0" and all(value.isdigit() for value in ascending)
    # One that no row has is a class all the same, if it is between others that begin at 0.
    return (
        [str(i) for i in range(int(ascending[-1]) + 1)] if whole and int(ascending[-1]) < 2 * len(values) else ascending
    )


def image_settings(settings: Mapping[str, Any] | None, image_size: int | None) -> ImageSettings | None:
    """The ``image`` block of a config as :class:`ImageSettings`; None where neither a block nor a size is given."""
    if settings is None and image_size is None:
        return None
    values = dict(settings or {})
    refuse_unknown(values, ImageSettings.__dataclass_fields__, "image")
    values.setdefault("size", image_size)
    if values["size"] is None:
        raise DataError("image: size (pixels) is missing, and the model names none")
    for pair in ("area", "ratio"):
        if pair in values:
            if not isinstance(values[pair], list | tuple) or len(values[pair]) != 2:
                raise DataError(f"image.{pair} must be two numbers, got {values[pair]!r}")
            values[pair] = tuple(values[pair])
    return ImageSettings(**values)


class Images:
    """The picture of a record as float32 [H, W, C], preprocessed.

    Without an ``image`` block, a float array [H, W, C] (of ``image_size``, if one is given) is taken as it is.
    """

    def __init__(self, field: str, settings: Mapping[str, Any] | None, image_size: int | None):
        self.field, self.settings = field, image_settings(settings, image_size)
        self.as_is = settings is None

    def __call__(self, image: Any, rng: np.random.Generator | None) -> np.ndarray:
        ready = isinstance(image, np.ndarray) and image.ndim == 3 and np.issubdtype(image.dtype, np.floating)
        if self.as_is and ready and (self.settings is None or image.shape[:2] == (self.settings.size,) * 2):
            return image.astype(np.float32)
        if self.settings is None:
            raise DataError(
                f"field {self.field!r} needs preprocessing: set image: {{size: 224, normalize: 'clip', ...}}"
            )
        return preprocess(image, self.settings, rng)


class ImageClassification(Task):
    """``{"images": float32 [H, W, C], "labels": int32}`` from fields ``image`` and ``label``."""

    def __init__(self, source: Source, image_field: str = "image", label: str = "label", classes: Any = None,
                 image: Mapping[str, Any] | None = None, image_size: int | None = None):  # fmt: skip
        super().__init__(source)
        self.labels, self.images = Labels(source, label, classes), Images(image_field, image, image_size)
        self.classes = self.labels.names

    def encode(self, index: int, record: Mapping[str, Any], rng: np.random.Generator | None) -> Example:
        image = field_of(self.source, index, self.images.field, record)
        label = field_of(self.source, index, self.labels.field, record)
        return {"images": self.images(image, rng), "labels": self.labels(label)}


class _Sentences:
    """Texts as padded ids with the tokenizer's special tokens, cut (longest first, in a pair) to ``max_length``."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, too_long: str):
        check_length(max_length, too_long)
        self.tokenizer, self.max_length, self.too_long, self.truncated = tokenizer, max_length, too_long, 0
        # By the tokenizer, which keeps the special tokens and shortens the longer text of a pair.
        if too_long == "truncate":
            from dataclasses import replace

            from tokenizers import Tokenizer as Core

            core = Core.from_str(tokenizer.core.to_str())  # a copy: truncation is a state of the tokenizer
            core.enable_truncation(max_length)
            self.tokenizer = replace(tokenizer, core=core)

    def __call__(self, text: str, pair: str | None = None) -> Example | None:
        encoding: Encoded = self.tokenizer.encode(text, pair, special=True)
        ids = encoding.ids
        if not len(ids):
            raise DataError("the text has no tokens")
        if not fit(ids, self.max_length, self.too_long):
            return None
        self.truncated += encoding.cut
        row = {
            "tokens": padded(ids, self.max_length, self.tokenizer.pad),
            "segments": padded(np.ones(len(ids), np.int32), self.max_length),
        }
        if pair is not None:
            row["token_types"] = padded(encoding.types, self.max_length)
        return row


class _LabelledText(Task):
    """A text, or a pair of texts, with a label: ``{"tokens", "segments": int32 [T], "labels"}``."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, text: str, pair: str | None, max_length: int, too_long: str
    ):
        super().__init__(source)
        self.sentences, self.fields = _Sentences(tokenizer, max_length, too_long), (text, pair)
        self.drops, self.longest = too_long == "drop", (max_length,)

    @property
    def truncated(self) -> int:  # type: ignore[override]  # counted where texts are cut
        return self.sentences.truncated

    def label_of(self, index: int, record: Mapping[str, Any]) -> np.generic:
        """The label of a record; :class:`DataError` for one that is none."""
        raise NotImplementedError

    def encode(self, index: int, record: Mapping[str, Any], rng: np.random.Generator | None) -> Example | None:
        text, pair = (None if f is None else self.text(index, record, f) for f in self.fields)
        label = self.label_of(index, record)
        row = self.sentences(text or "", pair)
        return None if row is None else {**row, "labels": label}


class TextClassification(_LabelledText):
    """``{"tokens", "segments": int32 [T], "labels": int32}``; with ``pair`` also ``token_types``.

    text, pair: fields, or patterns with braces. The tokenizer's special tokens ([CLS], [SEP] ...) are added.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, text: str = "text", pair: str | None = None,
                 label: str = "label", classes: Any = None, max_length: int = 512, too_long: str = "truncate"):  # fmt: skip
        super().__init__(source, tokenizer, text, pair, max_length, too_long)
        self.labels = Labels(source, label, classes)
        self.classes = self.labels.names

    def label_of(self, index: int, record: Mapping[str, Any]) -> np.generic:
        return self.labels(field_of(self.source, index, self.labels.field, record))


class TextRegression(_LabelledText):
    """``{"tokens", "segments": int32 [T], "labels": float32}``: texts, or pairs of them, with a number (``classes: 1``)."""

    def __init__(self, source: Source, tokenizer: Tokenizer, text: str = "text", pair: str | None = None,
                 label: str = "label", max_length: int = 512, too_long: str = "truncate"):  # fmt: skip
        super().__init__(source, tokenizer, text, pair, max_length, too_long)
        self.label = label

    def label_of(self, index: int, record: Mapping[str, Any]) -> np.generic:
        value = field_of(self.source, index, self.label, record)
        try:
            label = np.float32(value)
        except (TypeError, ValueError):
            label = np.float32(np.nan)
        if not np.isfinite(label):
            raise DataError(f"label {self.label!r} is {shorten(value)}, which is no number")
        return label


class Contrastive(Task):
    """``{"images": [H, W, C], "tokens", "segments": [T]}``: pictures and their captions (Radford et al. 2021, 2103.00020).

    text: the caption's field or pattern; where the field holds a class index, its name fills ``template``
    ("a photo of a {}.").
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, image_field: str = "image", text: str = "text",
                 template: str = "{}", max_length: int = 77, too_long: str = "truncate",
                 image: Mapping[str, Any] | None = None, image_size: int | None = None):  # fmt: skip
        super().__init__(source)
        self.images, self.sentences = (
            Images(image_field, image, image_size),
            _Sentences(tokenizer, max_length, too_long),
        )
        self.field, self.template, self.drops = text, template, too_long == "drop"
        self.labels = Labels(source, text, None) if source.class_names(text) else None

    def encode(self, index: int, record: Mapping[str, Any], rng: np.random.Generator | None) -> Example | None:
        if self.labels is not None:
            label = self.labels(field_of(self.source, index, self.field, record))
            # Class names are often identifiers; a caption has words.
            caption = self.labels.names[int(label)].replace("_", " ")
        else:
            caption = self.text(index, record, self.field)
        row = self.sentences(self.template.format(caption))
        image = field_of(self.source, index, self.images.field, record)
        return None if row is None else {"images": self.images(image, rng), **row}
