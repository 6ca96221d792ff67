"""BERT, RoBERTa and DistilBERT against transformers, and what padding, packing and execution leave unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models import Model
from jft.models.core import Hooks
from jft.models.encoder import EncoderConfig
from jft.models.hf.encoders import FAMILIES
from tests.models import parity

TINY = EncoderConfig(vocab=37, width=12, layers=3, heads=3, hidden=20, positions=16)
TOKENS = np.random.default_rng(0).integers(3, 37, (2, 7))


def torch_models():
    import transformers as t

    k = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=17)
    bert = dict(vocab_size=37, max_position_embeddings=15)
    distil = dict(vocab_size=41, dim=10, n_layers=3, n_heads=2, hidden_dim=23, max_position_embeddings=9)
    return {
        "bert": lambda: t.BertModel(t.BertConfig(**k, **bert)),
        "bert-wide": lambda: t.BertModel(
            t.BertConfig(
                **(k | dict(num_hidden_layers=1, hidden_act="gelu_new", layer_norm_eps=1e-5)), **bert, type_vocab_size=3
            )
        ),
        "bert-mlm": lambda: t.BertForMaskedLM(t.BertConfig(**k, **bert)),
        "roberta": lambda: t.RobertaModel(t.RobertaConfig(**k, **bert, pad_token_id=1, type_vocab_size=1)),
        "roberta-pad2": lambda: t.RobertaForMaskedLM(
            t.RobertaConfig(**(k | dict(hidden_act="relu")), **bert, pad_token_id=2, type_vocab_size=2)
        ),
        "distilbert": lambda: t.DistilBertModel(t.DistilBertConfig(**distil)),
        "distilbert-relu": lambda: t.DistilBertForMaskedLM(
            t.DistilBertConfig(**(distil | dict(activation="relu", n_layers=1)))
        ),
    }


@pytest.mark.peers
@pytest.mark.parametrize(
    "name", ["bert", "bert-wide", "bert-mlm", "roberta", "roberta-pad2", "distilbert", "distilbert-relu"]
)
def test_outputs_and_gradients_as_transformers(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch_model = parity.shaken(torch_models()[name]())
    family = FAMILIES[torch_model.config.model_type]
    model = parity.load(torch_model, family)
    base = getattr(torch_model, torch_model.base_model_prefix, torch_model)
    lengths = np.array([7, 4])
    attended = np.arange(7)[None] < lengths[:, None]
    pad = torch_model.config.pad_token_id
    tokens = np.where(attended, TOKENS, pad)
    batch = {"tokens": tokens, "segments": attended.astype(int)}
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(attended.astype(int))}
    if model.config.types:
        batch["token_types"] = np.arange(7)[None].repeat(2, 0) % model.config.types
        inputs["token_type_ids"] = torch.tensor(batch["token_types"])
    # padded places carry no meaning (RoBERTa gives them position pad); the real ones are compared
    theirs = [base(**inputs).last_hidden_state * torch.tensor(attended)[..., None]]
    if model.config.pooler:  # a first token with tanh, which the bare jft model does not apply
        return _with_pooler(torch_model, base, family, model, inputs, batch, theirs, attended)
    parity.agree(torch_model, family, model, theirs, lambda p: [model.apply(p, batch) * attended[..., None]])


def _with_pooler(torch_model, base, family, model, inputs, batch, theirs, attended):
    def ours(p):
        h = model.apply(p, batch)
        return [h * attended[..., None], jnp.tanh(h[:, 0] @ p["pooler"]["w"] + p["pooler"]["b"])]

    parity.agree(torch_model, family, model, [*theirs, base(**inputs).pooler_output], ours)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["bert", "bert-mlm", "roberta", "distilbert-relu"])
def test_checkpoints_are_read_and_saved_for_transformers(kind, tmp_path):
    """With and without prefix, and with heads of other tasks, which are dropped."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    peer = parity.shaken(torch_models()[kind]())
    loaded, model, params = parity.round_trip(peer, transformers.AutoModel, tmp_path)
    base = getattr(peer, peer.base_model_prefix, peer)
    ids = torch.tensor(TOKENS)
    expected = base(ids).last_hidden_state
    assert torch.allclose(loaded(ids).last_hidden_state, expected, atol=1e-6)
    np.testing.assert_allclose(apply(model, params, TOKENS), expected.detach(), atol=1e-5)


def test_old_checkpoints_without_prefix_and_with_gamma_beta_are_read():
    table = FAMILIES["bert"].table(TINY)
    assert "embeddings.word_embeddings.weight" in table["embed/table"].aliases
    scale = table["layers/attn_norm/scale"]
    assert "bert.encoder.layer.{layer}.attention.output.LayerNorm.gamma" in (scale.name, *scale.aliases)


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
    alone = apply(model, params, TOKENS[:, :5])
    segments = np.array([[1] * 5 + [0] * 2] * 2)
    padded = apply(model, params, {"tokens": TOKENS, "segments": segments})
    np.testing.assert_allclose(padded[:, :5], alone, atol=1e-5)


def test_left_padding_changes_nothing(model, params):
    segments = np.array([[0] * 2 + [1] * 5] * 2)
    padded = apply(model, params, {"tokens": TOKENS, "segments": segments})
    np.testing.assert_allclose(padded[:, 2:], apply(model, params, TOKENS[:, 2:]), atol=1e-5)


def test_packed_rows_are_separate_sequences(model, params):
    packed = {"tokens": TOKENS, "segments": np.array([[1, 1, 1, 2, 2, 2, 2]] * 2)}
    out = apply(model, params, packed)
    np.testing.assert_allclose(out[:, :3], apply(model, params, TOKENS[:, :3]), atol=1e-5)
    np.testing.assert_allclose(out[:, 3:], apply(model, params, TOKENS[:, 3:]), atol=1e-5)


@pytest.mark.slow
def test_execution_does_not_change_outputs_or_gradients(model, params):
    parity.unchanged_by_execution(model, params, TOKENS)


def test_hooks_read_and_edit_every_site(model, params):
    def hooked(hooks):
        return jax.jit(lambda p: model.apply(p, TOKENS, hooks=hooks))(params)

    out, reads = hooked(Hooks(value=lambda name, h, s: (h, h)))
    assert set(reads) == {"embed", "layers/in", "layers/attn/out", "layers/mlp/out", "final"}
    assert reads["layers/in"].shape == (3, 2, 7, 12)
    np.testing.assert_array_equal(reads["layers/in"][0], reads["embed"])
    np.testing.assert_array_equal(reads["final"], out)
    double = lambda name, x, w, s: ((x @ w) * (2.0 if name == "layers/attn/q" else 1.0), name)
    products = []
    edited, _ = hooked(Hooks(product=lambda *a: (double(*a)[0], products.append(a[0]))))
    doubled = jax.tree_util.tree_map_with_path(
        lambda k, x: 2 * x if jax.tree_util.keystr(k, simple=True, separator="/") == "layers/attn/q/w" else x, params
    )
    np.testing.assert_allclose(edited, apply(model, doubled, TOKENS), atol=1e-5)
    assert set(products) == {f"layers/{n}" for n in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")}


def test_forward_mode_is_the_transpose_of_reverse_mode(model, params):
    parity.forward_matches_reverse(jax.jit(lambda p: model.apply(p, TOKENS)), params)


def test_init_draws_by_path(model):
    key = jax.random.key(1)
    direct, jitted = model.init(key), jax.jit(model.init)(key)
    assert jax.tree.structure(model.abstract()) == jax.tree.structure(direct)
    for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(model.init(key, jnp.bfloat16)))


def test_bad_input_is_refused(model, params):
    with pytest.raises(ValueError, match="17 tokens is longer than the model's 16 positions"):
        model.apply(params, np.ones((1, 17), int))
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 3"):
        EncoderConfig(width=10, heads=3)
    with pytest.raises(ValueError, match="activation 'mish'"):
        EncoderConfig(activation="mish")
    with pytest.raises(ValueError, match="position_embedding_type = 'relative_key'"):
        FAMILIES["bert"].from_hf({"position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match="activation 'mish' is not supported"):
        FAMILIES["bert"].from_hf({"hidden_act": "mish"})


def test_token_types_are_refused_where_there_are_none():
    config = EncoderConfig(family="distilbert", vocab=5, width=4, layers=1, heads=1, hidden=4, types=0, pooler=False)
    model, tokens = Model(config), np.ones((1, 2), int)
    with pytest.raises(ValueError, match="distilbert has no token types"):
        model.apply(model.init(jax.random.key(0)), {"tokens": tokens, "token_types": tokens})
