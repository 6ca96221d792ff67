"""Generation: the cache against whole passes, sampling against NumPy, prompts, ends, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.data.tokenizer import byte_tokenizer
from jft.generation import Sampling, programs
from jft.generation.prompts import ends
from jft.generation.text import rounded
from jft.models import Model, decoding
from jft.models.decoder import DecoderConfig
from jft.models.encoder import EncoderConfig
from jft.models.rope import Rope
from jft.models.t5 import T5Config

MUTATIONS = [
    ("jft/models/decoding.py", "distance < mask.window", "distance <= mask.window"),
    ("jft/models/decoding.py", "return visible & (self.segments > 0)", "return visible"),
    ("jft/models/decoding.py", "[*values, v], first + count", "[*values, v], first"),
    ("jft/models/decoding.py", "filled=cache.filled + columns", "filled=cache.filled + 1"),
    ("jft/models/decoding.py", "positions = jnp.sum(cache.segments > 0", "positions = 1 + jnp.sum(cache.segments > 0"),
    ("jft/models/decoding.py", "tuple(stack[i] for stack", "tuple(stack[i : i + 1] for stack"),
    ("jft/models/decoding.py", "return self._parts[w.index]", "return self._parts[w.index - 1]"),
    ("jft/models/decoding.py", "joined = {key: jnp.concatenate", "joined = {key: 1.01 * jnp.concatenate"),
    (
        "jft/models/decoding.py",
        'isinstance(part["w"], jax.Array) for part in parts) and',
        "True for part in parts) and",
    ),
    ("jft/generation/programs.py", "decoding.fused(tree.cast(", "(tree.cast("),
    (
        "jft/generation/programs.py",
        "segments = (jnp.arange(T) >= T - lengths",
        "segments = (jnp.arange(T) > T - lengths",
    ),
    ("jft/generation/programs.py", "lengths[:, None, None] - 1, axis=1)", "lengths[:, None, None], axis=1)"),
    ("jft/generation/programs.py", "state.count - 1, axis=1", "state.count, axis=1"),
    ("jft/generation/sampling.py", "jnp.cumsum(p, axis=-1) - p < self.top_p", "jnp.cumsum(p, axis=-1) < self.top_p"),
    ("jft/generation/sampling.py", "+ jnp.log(self.min_p)", "- jnp.log(self.min_p)"),
    ("jft/generation/sampling.py", "logits.astype(jnp.float32) / self.temperature", "logits.astype(jnp.float32)"),
    ("jft/generation/text.py", "text[: min(cuts)]", "text[: max(cuts) + 1]"),
    ("jft/generation/text.py", "8 - len(view.eos) % 8", "-len(view.eos) % 8"),
]

CONFIG = DecoderConfig(
    vocab=264, width=32, layers=3, heads=4, kv_heads=2, hidden=48, max_positions=64, windows=(None, 5, 9), init_std=0.3
)
MODEL = Model(CONFIG)
PROMPTS = [[5, 11, 2, 30, 7, 7, 19], [3, 8, 1], [12]]
NEW = 9


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def greedy(params, prompt, steps, model=MODEL):
    """One whole pass a token."""
    apply = jax.jit(model.apply)
    ids = list(prompt)
    for _ in range(steps):
        # Padded, so that one program serves all lengths; a causal model does not look there.
        row = np.zeros((1, 24), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.argmax(np.asarray(apply(params, row))[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(params):
    return [greedy(params, prompt, NEW) for prompt in PROMPTS]


def lists(rows):
    return [row.tolist() for row in rows]


def test_cached_greedy(params, expected):
    assert lists(jft.generate(MODEL, params, PROMPTS, max_tokens=NEW)) == expected


def test_layers_in_one_scan(params, expected, monkeypatch):
    """As on accelerators, where layers stay stacked."""
    monkeypatch.setattr(programs.jax, "default_backend", lambda: "tpu")
    programs.programs.cache_clear()
    try:
        assert lists(jft.generate(MODEL, params, PROMPTS, max_tokens=NEW)) == expected
    finally:
        programs.programs.cache_clear()


def test_a_function_without_a_cache(params, expected):
    """Any causal apply, and a model whose frequencies change with the length."""
    apply = lambda params, batch: MODEL.apply(params, batch["tokens"])
    assert lists(jft.generate(apply, params, PROMPTS, max_tokens=NEW)) == expected


def test_other_lengths_and_numbers_compile_nothing(params):
    jft.generate(MODEL, params, PROMPTS, max_tokens=NEW)
    run = programs.programs(MODEL, Sampling(), rounded(NEW), True, 0, None)
    before = run.begin._cache_size(), run.extend._cache_size()
    for prompts, new in (([[9] * 12, [4], [1, 2]], 3), ([[7], [8] * 15, [6]], 14)):
        jft.generate(MODEL, params, prompts, max_tokens=new, eos=[5, 6], seed=3)
    assert (run.begin._cache_size(), run.extend._cache_size()) == before
    assert [rounded(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 100)] == [16, 16, 24, 24, 32, 48, 48, 64, 128]


def test_deltas(params):
    """Structured weights, as a run under training has them, and a task vector applied give the same tokens."""
    plan = jft.method("lora", rank=2).plan(params, MODEL)
    kept, trained = plan.init(jax.random.key(1), params)
    trained = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trained)
    bound = lists(jft.generate(MODEL, plan.bind(kept, trained), PROMPTS, max_tokens=NEW))
    merged = plan.merged(params, kept, trained)
    tau = jft.TaskVector.between(params, merged)
    assert bound == lists(jft.generate(MODEL, jft.apply(params, tau), PROMPTS, max_tokens=NEW))
    assert bound == [greedy(merged, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.optimized
def test_a_step_copies_no_cache(params):
    """The loop updates keys and values where they are: copies would cost more than the products of a small model."""
    run = programs.programs(MODEL, Sampling(), rounded(NEW), True, 0, None)
    rows, eos, seed = np.ones((3, 8), np.int32), np.zeros(0, np.int32), np.uint32(0)
    state = jax.eval_shape(run.begin, params, rows, np.full(3, 8, np.int32), np.zeros(3, bool), eos, seed)
    shapes = {",".join(map(str, x.shape)) for x in state.memory.k}
    assert len(shapes) == 1 and len(state.memory.k) == CONFIG.layers
    text = run.extend.lower(run.prepare(params), state, np.int32(NEW), eos, seed).compile().as_text()
    assert re.findall(rf"f32\[{shapes.pop()}\]\S* dynamic-update-slice\(", text)
    assert not re.findall(r"f32\[[\d,]*\]\S* copy\(", text)


def test_products_of_one_input_are_one(params):
    """Queries, keys and values, and gate and up: four products a layer in place of seven, where weights are plain arrays."""
    stacks = decoding.layer_stacks(params, each=True)
    _, cache = jax.eval_shape(
        lambda p: decoding.prefill(MODEL, p, jnp.ones((2, 4), int), jnp.ones((2, 4), int), 8, True), params
    )

    def products(layers):
        jaxpr = jax.make_jaxpr(lambda p, c: decoding.decode(MODEL, p, jnp.ones(2, int), c)[0])(layers, cache)
        return str(jaxpr).count("dot_general")

    # Two more of the attention of each layer, and the head.
    assert products(stacks) == 3 * (7 + 2) + 1
    assert products(decoding.fused(stacks)) == 3 * (4 + 2) + 1
    plan = jft.method("lora", rank=2, include="attn/v/").plan(params, MODEL)
    bound = decoding.fused(decoding.layer_stacks(plan.bind(*plan.init(jax.random.key(1), params)), each=True))
    assert not isinstance(bound["layers"][0]["attn"]["q"]["w"], decoding.Fused)
    assert isinstance(bound["layers"][0]["mlp"]["up"]["w"], decoding.Fused)


def test_biases_of_products_that_are_one():
    """As in Qwen 2; and an MLP without a gate."""
    model = Model(dataclasses.replace(CONFIG, layers=1, windows=None, qkv_bias=True, gated=False, mlp_bias=True))
    params = model.init(jax.random.key(0))
    params = tree.map_with_path(
        lambda p, x: x + 0.4 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) if p.endswith("/b") else x, params
    )
    assert lists(jft.generate(model, params, PROMPTS[:1], max_tokens=NEW)) == [greedy(params, PROMPTS[0], NEW, model)]


def test_on_a_mesh(params, expected):
    """Rows and weights over the devices, three rows on four of them."""
    mesh = jft.parallel.make_mesh({"fsdp": 4, "tensor": 2})
    sharded = jax.device_put(params, jft.parallel.shardings(params, mesh))
    assert lists(jft.generate(MODEL, sharded, PROMPTS, max_tokens=NEW)) == expected


def test_ends(params, expected):
    """A row ends before its eos, the others go on; all in batches of two, of which the last is half empty."""
    eos = expected[0][3]
    cut = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert lists(jft.generate(MODEL, params, PROMPTS, max_tokens=NEW, eos=eos, batch_size=2)) == cut
    assert lists(jft.generate(MODEL, params, PROMPTS, max_tokens=1)) == [row[:1] for row in expected]


def reference(logits, sampling):
    """The probabilities that tokens are drawn with, in float64."""
    z = np.asarray(logits, np.float64) / sampling.temperature
    order = np.argsort(-z)
    keep = np.ones(len(z), bool)
    if sampling.top_k:
        keep[order[sampling.top_k :]] = False
    p = np.where(keep, np.exp(z - z.max()), 0)
    p /= p.sum()
    if sampling.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= sampling.top_p]] = False
    keep &= np.where(keep, np.exp(z - z.max()), 0) >= sampling.min_p
    p = np.where(keep, p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.3, top_k=4),
        Sampling(1.0, top_p=0.6),
        Sampling(2.0, min_p=0.2),
        Sampling(1.5, top_k=9, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_sampling(sampling):
    logits = np.random.default_rng(0).normal(size=17).astype(np.float32) * 2
    expected = reference(logits, sampling)
    filtered = np.asarray(sampling.filtered(logits[None]))[0].astype(np.float64)
    p = np.exp(filtered - filtered.max())
    np.testing.assert_allclose(p / p.sum(), expected, atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(sampling.draw(jnp.broadcast_to(jnp.asarray(logits), (4000, 17)), keys))
    np.testing.assert_allclose(np.bincount(drawn, minlength=17) / 4000, expected, atol=0.03)


def test_draws_follow_the_seed(params):
    draw = lambda seed: lists(jft.generate(MODEL, params, [[5, 6]] * 3, max_tokens=NEW, temperature=1.0, seed=seed))
    one = draw(1)
    assert one == draw(1) and one != draw(2)
    # Rows have draws of their own.
    assert one[0] != one[1]


def test_text(params):
    """Text, a chat, stop strings and what is shown as it is made."""
    tokenizer = byte_tokenizer()
    assert ends(MODEL, tokenizer, chat=True) == (tokenizer.eos_id, tokenizer.core.token_to_id("<end>"))
    assert ends(MODEL, tokenizer, chat=False) == (tokenizer.eos_id,)
    options = {"tokenizer": tokenizer, "max_tokens": 30, "eos": (), "temperature": 1.0, "seed": 4}
    whole = jft.generate(MODEL, params, ["ab", "xyz"], **options)
    assert all(isinstance(text, str) and text for text in whole)
    stop = whole[0][5:7]
    shown = ["", ""]

    def show(i, text):
        shown[i] += text

    cut = jft.generate(MODEL, params, ["ab", "xyz"], stop=stop, show=show, **options)
    assert cut == [text.partition(stop)[0] for text in whole] == shown
    as_text = jft.generate(MODEL, params, "<bos><user>hi<end><assistant>", **options)
    assert jft.generate(MODEL, params, ["hi"], chat=True, **options) == as_text
    assert jft.generate(MODEL, params, [[{"role": "user", "content": "hi"}]], **options) == as_text


@pytest.mark.parametrize(
    ("model", "prompts", "options", "message"),
    [
        (MODEL, [[300]], {}, "prompt 0 holds id 300, and the model knows 0 to 263"),
        (MODEL, ["text"], {}, "text needs a tokenizer"),
        (MODEL, [[]], {}, "a prompt has no token"),
        (MODEL, [[1]], {"max_tokens": 0}, "max_tokens is 0"),
        (MODEL, [[1]], {"temperature": -1.0}, "temperature is -1.0"),
        (MODEL, [[1]], {"top_k": 3}, "set temperature above 0"),
        (MODEL, [[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        (MODEL, [[1]], {"stop": "x"}, "no tokenizer is given"),
        (Model(DecoderConfig(9, 8, 1, 2, rope=None, max_positions=8)), [[1] * 5], {"max_tokens": 4}, "the 8 positions"),
        (Model(T5Config(vocab=9)), [[1]], {}, "T5Config .t5. is no decoder"),
        (Model(EncoderConfig()), [[1]], {}, "EncoderConfig .* is no decoder"),
    ],
)
def test_refusals(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        jft.generate(model, {}, prompts, **options)


def test_no_cache_where_frequencies_change():
    from jft.models.decoding import has_cache

    dynamic = DecoderConfig(9, 8, 1, 2, max_positions=32, rope=Rope(kind="dynamic", factor=2.0))
    turned = Rope(kind="longrope", original_positions=16, short=(1.0,) * 4, long=(2.0,) * 4)
    long = DecoderConfig(9, 8, 1, 1, max_positions=64, rope=turned)
    assert [has_cache(Model(dynamic), n) for n in (32, 33)] == [True, False]
    assert [has_cache(Model(long), n) for n in (16, 17)] == [True, False]
    assert has_cache(MODEL, 10_000) and not has_cache(lambda p, b: b, 8)
