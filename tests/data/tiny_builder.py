"""A TFDS builder of 20 + 7 pictures, prepared without TensorFlow: PNG bytes need no encoder."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def _png(value: int) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(np.full((10 + value, 12, 3), value, np.uint8)).save(stream, "PNG")
    stream.seek(0)
    return stream


class Tiny(tfds.core.GeneratorBasedBuilder):
    """`image`, `label` (cat, dog), `text`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "text": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": _png(i), "label": i % 2, "text": f"text {i}"}


def prepare(directory) -> str:
    """The prepared data set's directory."""
    builder = Tiny(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)
