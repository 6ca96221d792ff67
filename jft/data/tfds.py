"""TensorFlow Datasets as a source: random access to array_record files, without TensorFlow."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jft import strict_json
from jft.data.errors import DataError, shorten
from jft.data.source import Source
from jft.names import nearest


class _Quiet(logging.Filter):
    """Drops the advice to install OpenCV, printed once per process by TFDS."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "OpenCV" not in record.getMessage()


def _builder(name: str | None, directory: str | None, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").addFilter(_Quiet())
    if (name is None) == (directory is None):
        raise DataError(
            "tfds: give either name ('mnist', 'glue/sst2', 'mnist:3.0.1') or directory (a prepared data set)"
        )
    if directory is not None:
        if not os.path.isfile(os.path.join(directory, "dataset_info.json")):
            raise DataError(
                f"tfds: {directory!r} holds no dataset_info.json; name the directory of a version (.../1.0.0)"
            )
        _check_features(Path(directory))
        try:
            return tfds.builder_from_directory(directory)
        except Exception as error:  # protobuf's errors, and whatever the features make of what they find
            raise DataError(f"tfds: {directory!r} cannot be read: {shorten(str(error), 200)}") from error
    # A set that is prepared there, of a builder that is not installed, is read by what its files say.
    _check_features(Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / str(name).split(":")[0])
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.core.registered.list_imported_builders()
        near = nearest(str(name).split("/")[0].split(":")[0], known, n=3, hint=" Nearest: {}.")
        raise DataError(f"tfds: no data set named {name!r}.{near}") from None
    except (ValueError, AssertionError, ModuleNotFoundError) as error:
        raise DataError(f"tfds: {name!r} cannot be built: {str(error).splitlines()[0]}") from error


# Names of the class in its JSON form, older and newer; protobuf takes both spellings of the latter.
_CLASS = ("type", "pythonClassName", "python_class_name")


def _check_features(folder: Path) -> None:
    """:class:`DataError` where a ``features.json`` in ``folder`` names a class that is not of tensorflow_datasets.

    TFDS imports the module of that class, so that a folder from elsewhere could run any module that can be imported here.
    """
    for file in sorted(folder.rglob("features.json")) if folder.is_dir() else ():
        pending: list[Any] = [strict_json.read(file, error=DataError, hint="prepare the data set again")]
        while pending:
            value = pending.pop()
            if isinstance(value, list):
                pending += value
            elif isinstance(value, dict):
                pending += value.values()
                for name in (value[key] for key in _CLASS if key in value):
                    if isinstance(name, str) and not name.startswith("tensorflow_datasets."):
                        raise DataError(
                            f"{file} names the class {name!r:.80}, whose module would be imported; only features of "
                            "tensorflow_datasets itself are read"
                        )
                # JSON inside JSON, of features that write themselves so.
                if isinstance(value.get("json"), str):
                    pending.append(strict_json.loads(value["json"], file, error=DataError))


class Tfds(Source):
    """A split of a TensorFlow Datasets builder (``builder.as_data_source``): features decoded to NumPy and ``str``.

    name: ``"mnist"``, ``"glue/sst2"``, ``"cifar10:3.0.2"``; or directory: a prepared data set of any builder, local ones
    included. data_dir: where prepared sets live (TFDS's default otherwise). split: TFDS's split strings
    (``"train[:90%]"``). download: prepare the set where it is missing; False: refuse.
    Prepare a set before a run of several processes: each would download it.
    Raises :class:`DataError` for an unknown set or split, one that is not prepared, or one whose files are not
    array_record (TFRecord has no random access).
    """

    def __init__(
        self,
        name: str | None = None,
        split: str = "train",
        directory: str | None = None,
        data_dir: str | None = None,
        download: bool = False,
    ):
        builder = _builder(name, directory, data_dir)
        self.name = f"tfds {name or directory} ({split})"
        if not builder.is_prepared():
            if not download:
                raise DataError(
                    f"tfds: {name!r} is not prepared in {builder.data_dir}; set download: true, or data_dir"
                )
            # TFRecord, the default, has no random access.
            builder.download_and_prepare(file_format="array_record")
        file_format = getattr(builder.info.file_format, "value", str(builder.info.file_format))
        if file_format != "array_record":
            raise DataError(
                f"tfds: {name or directory} was prepared as {file_format}, which has no random access; prepare it again:"
                " download_and_prepare(file_format='array_record')"
            )
        self.builder, self.split = builder, split
        self.data = self._open()
        if len(self.data) == 0:
            raise DataError(f"{self.name}: the split holds no examples")

    def _open(self, decoders: dict[str, Any] | None = None) -> Any:
        try:
            return self.builder.as_data_source(split=self.split, decoders=decoders)
        except (ValueError, KeyError) as error:
            splits = ", ".join(f"{k} ({v.num_examples})" for k, v in self.builder.info.splits.items())
            raise DataError(f"{self.name}: cannot read split {self.split!r}; the set has {splits}") from error

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.data[index]
        # TFDS has text as bytes; a broken character must not end a run.
        return {k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for k, v in record.items()}

    def class_names(self, field: str) -> tuple[str, ...] | None:
        features = self.builder.info.features
        names = getattr(features[field], "names", None) if field in features else None
        return None if names is None else tuple(names)

    def column(self, field: str) -> Sequence[Any]:
        import tensorflow_datasets as tfds

        # Decoding pictures to learn labels would take minutes; the other fields stay encoded.
        features = self.builder.info.features
        skipped = {
            k: tfds.decode.SkipDecoding()
            for k, v in features.items()
            if k != field and isinstance(v, tfds.features.Image)
        }
        data = self._open(skipped)
        return [data[i][field] for i in range(len(data))]
