"""Classifiers on every kind of backbone, against transformers where it has the same one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import tree
from jft.models import Model
from jft.models.classifier import Classifier
from jft.models.core import Hooks, Scope
from jft.models.decoder import DecoderConfig
from jft.models.encoder import EncoderConfig
from jft.models.hf import encoders, vision
from jft.models.hf.mapping import Family
from jft.models.t5 import T5Config
from jft.models.vision import VisionConfig
from tests.models import parity

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 31, (3, 7))
SEGMENTS = (np.arange(7)[None] < np.array([7, 4, 2])[:, None]).astype(int)
TEXT = {"tokens": TOKENS, "segments": SEGMENTS}
IMAGES = {"images": RNG.standard_normal((3, 8, 8, 1)).astype(np.float32)}
SIZES = dict(width=12, layers=2, heads=3, hidden=16)
BACKBONES = {
    "bert": EncoderConfig(vocab=31, positions=9, **SIZES),
    "roberta": EncoderConfig(
        family="roberta", vocab=31, positions=11, position_offset=2, types=1, pooler=False, **SIZES
    ),
    "distilbert": EncoderConfig(family="distilbert", vocab=31, positions=9, types=0, pooler=False, **SIZES),
    "vit": VisionConfig(image=8, patch=4, channels=1, **SIZES),
    "t5": T5Config(vocab=31, width=12, head=4, heads=3, hidden=16, layers=2, decoder_layers=1),
    "llama": DecoderConfig(vocab=31, width=12, layers=2, heads=3, hidden=16),
}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply(params, batch)


def batch_of(name):
    return IMAGES if name == "vit" else TEXT


def torch_model(kind):
    import transformers as t

    k = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=17, num_labels=5)
    text = dict(vocab_size=31, max_position_embeddings=11)
    distil = dict(dim=12, n_layers=2, n_heads=3, hidden_dim=17, num_labels=5)
    return parity.shaken(
        {
            "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**k, **text)),
            "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**k, **text)),
            "distilbert": lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(**distil, **text)),
            "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**k, image_size=8, patch_size=4, num_channels=1)),
        }[kind]()
    )


def with_head(family: Family) -> Family:
    """The family whose table also holds the head, as loading and saving a classifier put it together."""
    table = lambda c: {**family.table(c.backbone), **family.classifier(c.backbone, c.classes)}
    return dataclasses.replace(family, table=table)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "vit"])
def test_outputs_and_gradients_as_transformers(kind):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peer, family = torch_model(kind), (vision if kind == "vit" else encoders).FAMILIES[kind]
    assert family.classifier_architecture == type(peer).__name__
    model = Model(Classifier(parity.load(peer, family).config, classes=5))
    if kind == "vit":
        theirs = peer(torch.tensor(IMAGES["images"]).permute(0, 3, 1, 2)).logits
    else:
        theirs = peer(torch.tensor(TOKENS), attention_mask=torch.tensor(SEGMENTS)).logits
    parity.agree(peer, with_head(family), model, [theirs], lambda p: [model.apply(p, batch_of(kind))])


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "vit"])
def test_checkpoints_are_read_and_saved_for_transformers(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = torch_model(kind)
    images = kind == "vit"
    auto = transformers.AutoModelForImageClassification if images else transformers.AutoModelForSequenceClassification
    loaded, model, params = parity.round_trip(peer, auto, tmp_path, classes=5)
    assert type(loaded) is type(peer)
    x = torch.tensor(IMAGES["images"]).permute(0, 3, 1, 2) if images else torch.tensor(TOKENS)
    assert torch.allclose(loaded(x).logits, peer(x).logits, atol=1e-6)
    ours = apply(model, params, IMAGES if images else TOKENS)
    np.testing.assert_allclose(ours, peer(x).logits.detach(), atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_parameters_are_unchanged_and_the_head_stands_beside_them(name):
    backbone, key = BACKBONES[name], jax.random.key(3)
    params = Classifier(backbone, 4).init(key)
    bare, flat = tree.flatten(backbone.init(key)), tree.flatten(params)
    assert {p for p in flat if p not in bare} >= {"classifier/w", "classifier/b"}
    assert all(p.startswith("classifier/") for p in flat if p not in bare)
    for path, leaf in bare.items():
        np.testing.assert_array_equal(flat[path], leaf)
    assert apply(Model(Classifier(backbone, 4)), params, batch_of(name)).shape == (3, 4)


def test_defaults_are_those_of_each_family():
    chosen = {name: (c.pool, c.dense) for name, c in ((n, Classifier(b, 2)) for n, b in BACKBONES.items())}
    assert chosen == {
        "bert": ("pooler", "none"),
        "roberta": ("cls", "tanh"),
        "distilbert": ("cls", "relu"),
        "vit": ("cls", "none"),
        "t5": ("mean", "none"),
        "llama": ("last", "none"),
    }


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
def test_pooling_reads_the_tokens_it_names(name, pool):
    backbone = BACKBONES[name]
    model = Model(Classifier(backbone, 4, pool=pool))
    params = model.init(jax.random.key(0))
    h = np.asarray(jax.jit(lambda p: backbone.hidden_states(Scope(model.execution), p, TEXT))(params))
    rows = {
        "cls": h[:, 0],
        "last": h[np.arange(3), SEGMENTS.sum(1) - 1],
        "mean": np.stack([h[i, : SEGMENTS[i].sum()].mean(0) for i in range(3)]),
    }
    head = jax.device_get(params["classifier"])
    np.testing.assert_allclose(apply(model, params, TEXT), rows[pool] @ head["w"] + head["b"], atol=1e-5)


def test_last_finds_the_end_of_left_padded_rows_and_images_average_patches():
    model = Model(Classifier(BACKBONES["llama"], 4))
    params = model.init(jax.random.key(0))
    left = {"tokens": TOKENS, "segments": SEGMENTS[:, ::-1]}
    alone = apply(model, params, TOKENS[1:2, 3:])
    np.testing.assert_allclose(np.asarray(apply(model, params, left))[1:2], alone, atol=1e-5)
    vit = Model(Classifier(BACKBONES["vit"], 4, pool="mean"))
    params = vit.init(jax.random.key(0))
    mean = np.asarray(apply(Model(BACKBONES["vit"]), params, IMAGES))[:, 1:].mean(1)
    np.testing.assert_allclose(apply(vit, params, IMAGES), mean @ np.asarray(params["classifier"]["w"]), atol=1e-5)


def test_hooks_and_forward_mode_reach_the_head():
    model = Model(Classifier(BACKBONES["roberta"], 4))
    params = model.init(jax.random.key(0))
    names = []
    hooks = Hooks(product=lambda name, x, w, s: (x @ w, names.append(name)), value=lambda n, h, s: (h, jnp.sum(h)))
    logits, reads = jax.jit(lambda p: model.apply(p, TEXT, hooks=hooks))(params)
    assert {"classifier", "classifier/dense", "layers/attn/q"} <= set(names)
    assert "final" in reads
    np.testing.assert_allclose(logits, apply(model, params, TEXT), atol=1e-6)
    parity.forward_matches_reverse(jax.jit(lambda p: model.apply(p, TEXT)), params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "at least 1 class, not 0"),
        ({"classes": 2, "pool": "max"}, "pool 'max' is unknown"),
        ({"classes": 2, "pool": "pooler"}, "'roberta' model has no pooler"),
        ({"classes": 2, "pool": "embedding"}, "'embedding' does not go with 'roberta'"),
        ({"classes": 2, "dense": "mish"}, "dense 'mish' is unknown"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(BACKBONES["roberta"], **options)
