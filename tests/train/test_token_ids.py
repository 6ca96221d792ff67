"""Token ids that the embedding has no row for: refused wherever a batch or a tokenizer meets a model."""

import jax
import numpy as np
import pytest

import jft
from jft.data import tokenizer
from jft.models import ClipConfig, DecoderConfig, Model, VisionConfig
from jft.models.clip import TextConfig
from jft.train import evaluate, experiment, feed

MUTATIONS = [
    ("jft/train/feed.py", "not 0 <= ids.min() <= ids.max() < rows", "not 0 <= ids.min() <= ids.max() <= rows"),
    (
        "jft/train/feed.py",
        'for name in ("tokens", "decoder_tokens"):\n        ids',
        'for name in ("tokens",):\n        ids',
    ),
    ("jft/train/feed.py", "            check_ids(self._ahead[-1][1], self._model)", "            pass"),
    ("jft/train/evaluation.py", "        feed.check_ids(batch, model)", "        pass"),
    ("jft/train/experiment.py", "tokenizer.rows > rows", "tokenizer.vocab_size > rows"),
    ("jft/data/tokenizer.py", "return 1 + max((*ids, *given), default=-1)", "return 1 + max(ids, default=-1)"),
]
MODEL = Model(DecoderConfig(vocab=11, width=4, layers=1, heads=1))
GOOD, BAD = ({"tokens": np.array([[0, n]], np.int32)} for n in (10, 11))


def test_batches():
    feed.check_ids(GOOD, MODEL)
    for batch, message in (
        (BAD, "tokens holds id 11, and the model has 11 tokens, 0 to 10"),
        (BAD["tokens"], "tokens holds id 11"),
        ({"tokens": np.array([[-1]])}, "tokens holds id -1"),
        ({**GOOD, "decoder_tokens": np.array([[0, 99]])}, "decoder_tokens holds id 99"),
    ):
        with pytest.raises(ValueError, match=message):
            feed.check_ids(batch, MODEL)
    # Shapes have no ids, an empty row none, and of other models nothing is known.
    feed.check_ids({"tokens": jax.ShapeDtypeStruct((1, 2), np.int32)}, MODEL)
    feed.check_ids({"tokens": np.zeros((1, 0), np.int32)}, MODEL)
    feed.check_ids(BAD, lambda params, batch: batch)


def test_the_vocabulary_is_that_of_the_text():
    vision = VisionConfig(image=4, patch=2, width=4, layers=1, heads=1)
    clip = ClipConfig(vision=vision, text=TextConfig(vocab=7, width=4, layers=1, heads=1, hidden=4, positions=4))
    assert feed.vocabulary(Model(clip)) == 7
    assert feed.vocabulary(Model(jft.models.Classifier(MODEL.config, 2))) == 11
    assert feed.vocabulary(Model(vision)) is None


def test_training_and_evaluation_refuse_them():
    params = MODEL.init(jax.random.key(0))
    with pytest.raises(ValueError, match="tokens holds id 11"):
        jft.finetune(MODEL, params, [BAD], steps=1)
    # Later batches too: each as it is drawn.
    stream = feed.Feed([GOOD, BAD], MODEL)
    stream.ahead(1)
    with pytest.raises(ValueError, match="tokens holds id 11"):
        stream.ahead(2)
    with pytest.raises(ValueError, match="tokens holds id 11"):
        evaluate(MODEL, params, [BAD])


def test_a_tokenizer_needs_rows_for_its_largest_id():
    plain = tokenizer.byte_tokenizer()
    assert plain.rows == plain.vocab_size == 264
    from tokenizers import Tokenizer, models

    gap = tokenizer.Tokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 20}, unk_token="a")))
    assert (gap.vocab_size, gap.rows) == (2, 21)
    for name in ("bos_id", "eos_id", "pad_id", "start_id"):
        assert tokenizer.Tokenizer(gap.core, **{name: 30}).rows == 31
    params = {"embed": {"table": np.zeros((20, 2))}}
    with pytest.raises(ValueError, match="2 tokens with ids up to 20, but embed/table has 20 rows"):
        experiment._check_vocabulary(params, gap)
    experiment._check_vocabulary({"embed": {"table": np.zeros((21, 2))}}, gap)
