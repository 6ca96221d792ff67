"""T5 of both versions against transformers; relative position buckets; packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models import Model
from jft.models.core import Hooks
from jft.models.hf.seq2seq import FAMILIES
from jft.models.t5 import T5Config, bucket
from tests.models import parity

FAMILY = FAMILIES["t5"]
RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.integers(2, 31, (2, 9)), RNG.integers(2, 31, (2, 6))
TINY = T5Config(vocab=31, width=10, head=3, heads=2, hidden=14, layers=2, decoder_layers=3, buckets=8, max_distance=12)


def torch_model(own_head=False, **options):
    import torch
    import transformers as t

    sizes = dict(
        vocab_size=31,
        d_model=10,
        d_kv=3,
        d_ff=14,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
    )
    model = t.T5ForConditionalGeneration(t.T5Config(**(sizes | options)))
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(31, 10) * 0.3)
    return parity.shaken(model)


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "own_head": True, "num_decoder_layers": 3},
        {"feed_forward_proj": "gated-silu", "num_layers": 1, "d_kv": 5, "relative_attention_num_buckets": 12},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ],
)
def test_outputs_and_gradients_as_transformers(options):
    """v1.0; v1.1 with its own head; others. The last does not scale, with one embedding for both ends."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peer = torch_model(**options)
    model = parity.load(peer, FAMILY)
    attended = np.arange(9)[None] < np.array([9, 5])[:, None]
    theirs = peer(
        input_ids=torch.tensor(SOURCE),
        attention_mask=torch.tensor(attended.astype(int)),
        decoder_input_ids=torch.tensor(TARGET),
    ).logits
    batch = {"tokens": SOURCE, "segments": attended.astype(int), "decoder_tokens": TARGET}
    parity.agree(peer, FAMILY, model, [theirs], lambda p: [model.apply(p, batch)])


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [
        {"num_decoder_layers": 1},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "own_head": True},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"own_head": True},
    ],
)
def test_checkpoints_are_read_and_saved_for_transformers(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    peer = torch_model(**options)
    loaded, model, params = parity.round_trip(peer, transformers.AutoModelForSeq2SeqLM, tmp_path)
    assert model.config.tied == ("own_head" not in options)
    assert model.config.scale_outputs == ("tie_word_embeddings" not in options)
    expected = peer(input_ids=torch.tensor(SOURCE), decoder_input_ids=torch.tensor(TARGET)).logits
    again = loaded(input_ids=torch.tensor(SOURCE), decoder_input_ids=torch.tensor(TARGET)).logits
    assert torch.allclose(again, expected, atol=1e-5)
    ours = apply(model, params, {"tokens": SOURCE, "decoder_tokens": TARGET})
    np.testing.assert_allclose(ours, expected.detach(), atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 12), (64, 1000)])
def test_every_distance_falls_into_the_bucket_of_transformers(bidirectional, buckets, far):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-3000, 3001)
    theirs = t5.T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional, buckets, far)
    np.testing.assert_array_equal(bucket(distance, buckets, far, bidirectional), theirs.numpy())


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply(params, batch)


@pytest.fixture(scope="module")
def model():
    return Model(TINY)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def test_padding_changes_nothing(model, params):
    alone = apply(model, params, {"tokens": SOURCE[:, :6], "decoder_tokens": TARGET[:, :4]})
    batch = {
        "tokens": SOURCE,
        "segments": np.array([[1] * 6 + [0] * 3] * 2),
        "decoder_tokens": TARGET,
        "decoder_segments": np.array([[1] * 4 + [0] * 2] * 2),
    }
    np.testing.assert_allclose(apply(model, params, batch)[:, :4], alone, atol=1e-5)


def test_packed_rows_are_separate_pairs(model, params):
    packed = {
        "tokens": SOURCE,
        "segments": np.array([[1] * 4 + [2] * 5] * 2),
        "decoder_tokens": TARGET,
        "decoder_segments": np.array([[1] * 2 + [2] * 4] * 2),
    }
    out = apply(model, params, packed)
    first = apply(model, params, {"tokens": SOURCE[:, :4], "decoder_tokens": TARGET[:, :2]})
    second = apply(model, params, {"tokens": SOURCE[:, 4:], "decoder_tokens": TARGET[:, 2:]})
    np.testing.assert_allclose(out, np.concatenate([first, second], 1), atol=1e-5)


def test_the_decoder_does_not_look_ahead(model, params):
    other = TARGET.copy()
    other[:, 4:] = 3
    a, b = (apply(model, params, {"tokens": SOURCE, "decoder_tokens": t})[:, :4] for t in (TARGET, other))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_execution_and_forward_mode(model, params):
    batch = {"tokens": SOURCE, "decoder_tokens": TARGET}
    parity.unchanged_by_execution(model, params, batch)
    parity.forward_matches_reverse(jax.jit(lambda p: model.apply(p, batch)), params)


def test_hooks_reach_products_and_sites_of_both_sides(model, params):
    names = []
    product = lambda name, x, w, s: (x @ w, names.append(name))
    hooks = Hooks(product=product, value=lambda name, h, s: (h, jnp.sum(h)))
    batch = {"tokens": SOURCE, "decoder_tokens": TARGET}
    reads = jax.eval_shape(lambda p: model.apply(p, batch, hooks=hooks)[1], params)
    encoder = {f"encoder/{s}" for s in ("embed", "layers/in", "layers/attn/out", "layers/mlp/out", "final")}
    assert set(reads) == encoder | {s.replace("encoder", "decoder") for s in encoder} | {"decoder/layers/cross/out"}
    assert {"decoder/layers/cross/k", "encoder/layers/mlp/up", "head"} <= set(names)


def test_bad_input_is_refused(model, params):
    with pytest.raises(ValueError, match="no 'decoder_tokens'"):
        model.apply(params, SOURCE)
    with pytest.raises(ValueError, match="buckets 6 must be a multiple of 4"):
        T5Config(buckets=6)
    with pytest.raises(ValueError, match="feed_forward_proj = 'other-relu' is not supported"):
        FAMILY.from_hf({"feed_forward_proj": "other-relu"})
