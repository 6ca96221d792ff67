"""Memory layers against NumPy in float64: product keys by brute force, a whole decoder, hooks, runs, tables that train."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.dot import dot
from jft.models import Model
from jft.models.core import Hooks, Runs
from jft.models.decoder import DecoderConfig
from jft.models.memory import Memory, lookup
from tests.models import parity

MEMORY = Memory(slots=16, layers=(1, 2, 4), heads=2, top_k=3, key_size=6, value_size=5)
CONFIG = DecoderConfig(
    vocab=19,
    width=8,
    layers=5,
    heads=2,
    hidden=12,
    rope=None,
    max_positions=16,
    windows=(None, 2, None, 3, None),
    init_std=0.5,
    memory=MEMORY,
)
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7)).astype(np.int32)
MODEL = Model(CONFIG)


@functools.cache
def params():
    rng = np.random.default_rng(2)
    shapes = CONFIG.shapes().items()
    drawn = {p: 1 + rng.standard_normal(s) / 4 if "norm" in p else rng.standard_normal(s) / 2 for p, s in shapes}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree.unflatten(drawn))


@functools.cache
def outputs():
    return jax.jit(MODEL.apply)(params(), TOKENS)


def run(params, hooks):
    return jax.jit(lambda p: MODEL.apply(p, TOKENS, hooks))(params)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale


def every_score(queries, keys):
    """``[..., H, S]``: each query times the whole key of each slot, written out."""
    heads, _, side, half = keys.shape
    whole = np.stack([np.concatenate([keys[:, 0, i], keys[:, 1, j]], -1) for i in range(side) for j in range(side)], 1)
    return np.einsum("...hk,hsk->...hs", queries.reshape(*queries.shape[:-1], heads, 2 * half), whole)


def read(x, p, table):
    """A memory layer in place of an MLP, and how often each slot is read."""
    scores = every_score(x @ p["q"]["w"], p["keys"])
    out, counts = np.zeros((*x.shape[:2], table.shape[1])), np.zeros(len(table), int)
    for place in np.ndindex(*scores.shape[:-1]):
        slots = np.argsort(-scores[place], kind="stable")[: MEMORY.top_k]
        out[place[:2]] += softmax(scores[place][slots]) @ table[slots]
        np.add.at(counts, slots, 1)
    return (silu(x @ p["gate"]["w"]) * out) @ p["down"]["w"], counts


def reference(p, tokens):
    """Logits of the decoder in float64, the outputs of its MLPs and memories in order, and all slot counts."""
    h = p["embed"]["table"][tokens] + p["positions"]["table"][: tokens.shape[1]]
    T, added, counts, done = tokens.shape[1], [], 0, {True: 0, False: 0}
    distance = np.arange(T)[:, None] - np.arange(T)
    for i, window in enumerate(CONFIG.windows):
        remembers = i in MEMORY.layers
        stack = p["memory"]["layers"] if remembers else p["layers"]
        w = jax.tree.map(lambda x, j=done[remembers]: x[j], stack)
        done[remembers] += 1
        x = norm(h, w["attn_norm"]["scale"])
        q, k, v = ((x @ w["attn"][n]["w"]).reshape(*x.shape[:2], 2, 4) for n in "qkv")
        scores = np.einsum("bthk,bshk->bhts", q, k) / 2
        scores = np.where((distance >= 0) & (distance < (window or T)), scores, -np.inf)
        h = h + np.einsum("bhts,bshk->bthk", softmax(scores), v).reshape(h.shape) @ w["attn"]["o"]["w"]
        x, m = norm(h, w["mlp_norm"]["scale"]), w["mlp"]
        if remembers:
            y, read_here = read(x, m, p["memory"]["table"])
            counts = counts + read_here
        else:
            y = (silu(x @ m["gate"]["w"]) * (x @ m["up"]["w"])) @ m["down"]["w"]
        added.append(y)
        h = h + y
    return norm(h, p["final_norm"]["scale"]) @ p["head"]["w"], added, counts


@functools.cache
def expected():
    return reference(jax.tree.map(lambda x: np.asarray(x, np.float64), params()), TOKENS)


def test_lookup_finds_the_best_of_all_slots():
    rng = np.random.default_rng(1)
    memory = Memory(slots=49, layers=(0,), heads=3, top_k=5, key_size=8)
    queries, keys = rng.standard_normal((2, 6, 24)), rng.standard_normal((3, 2, 7, 4))
    slots, weights = lookup(jnp.asarray(queries, jnp.float32), jnp.asarray(keys, jnp.float32), memory)
    scores = every_score(queries, keys)
    order = np.argsort(-scores, axis=-1)[..., :5]
    np.testing.assert_array_equal(slots, order)
    np.testing.assert_allclose(weights, softmax(np.take_along_axis(scores, order, -1)), atol=1e-6)


def test_reading_every_slot():
    """With k = n the softmax runs over n of n squared slots, each once."""
    memory = Memory(slots=4, layers=(0,), heads=1, top_k=2, key_size=2)
    slots, weights = lookup(jnp.ones((1, 1, 2)), jnp.arange(4.0).reshape(1, 2, 2, 1), memory)
    assert slots.tolist() == [[[[3, 1]]]] or slots.tolist() == [[[[3, 2]]]]  # of two equal scores either
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_a_decoder_with_memory():
    np.testing.assert_allclose(outputs(), expected()[0], rtol=1e-4, atol=1e-4)


def test_shapes_and_names():
    shapes = {p: x.shape for p, x in tree.flatten(MODEL.abstract()).items()}
    assert shapes == CONFIG.shapes()
    assert shapes["layers/mlp/up/w"] == (2, 8, 12) and shapes["layers/attn/q/w"] == (2, 8, 8)
    assert shapes["memory/layers/attn/q/w"] == (3, 8, 8) and shapes["memory/layers/mlp/keys"] == (3, 2, 2, 4, 3)
    assert shapes["memory/table"] == (16, 5)
    assert "memory/layers/mlp/up/w" not in shapes


def test_keys_and_values_are_drawn_by_their_size():
    drawn = jax.jit(lambda key: MODEL.init(key)["memory"])(jax.random.key(0))
    assert abs(float(jnp.std(drawn["table"])) * 5**0.5 - 1) < 0.2
    assert abs(float(jnp.std(drawn["layers"]["mlp"]["keys"])) * 6**0.5 - 1) < 0.2


def test_hooks_read_both_stacks_in_order():
    hooks = Hooks(
        product=lambda name, x, w, state: (dot(x, w) + (0 if state is None else state), None),
        value=lambda name, h, state: (h, h),
        state={"memory/layers/mlp/q": jnp.zeros(3)},
    )
    out, reads = run(params(), hooks)
    np.testing.assert_allclose(out, outputs(), atol=1e-5)
    added = expected()[1]
    assert set(reads) == {"embed", "final"} | {
        f"{s}layers/{n}" for s in ("", "memory/") for n in ("in", "attn/out", "mlp/out")
    }
    np.testing.assert_allclose(reads["layers/mlp/out"], np.stack([added[0], added[3]]), atol=1e-4)
    np.testing.assert_allclose(reads["memory/layers/mlp/out"], np.stack([added[i] for i in (1, 2, 4)]), atol=1e-4)


def test_hook_state_reaches_its_layer():
    """A push on the output of the last memory alone, given as state with a row per memory layer."""
    push = jnp.zeros((3, 8)).at[2, 1].set(100.0)
    hooks = Hooks(
        value=lambda name, h, s: (h if s is None else h + s, h if name == "memory/layers/in" else None),
        state={"memory/layers/mlp/out": push},
    )
    out, reads = run(params(), hooks)
    assert not np.allclose(out, outputs(), atol=1)
    _, plain = run(params(), dataclasses.replace(hooks, state={}))
    np.testing.assert_allclose(reads["memory/layers/in"], plain["memory/layers/in"], atol=1e-5)


@pytest.mark.slow
def test_execution_and_modes():
    parity.unchanged_by_execution(MODEL, params(), TOKENS)


def test_layers_cut_into_runs():
    def runs(stack, sizes):
        starts = np.cumsum([0, *sizes])
        return jax.tree.map(
            lambda x: Runs(tuple(x[s : s + n] for s, n in zip(starts, sizes, strict=False)), sizes), stack
        )

    p = params()
    cut = {
        **p,
        "layers": runs(p["layers"], (1, 1)),
        "memory": {**p["memory"], "layers": runs(p["memory"]["layers"], (1, 2))},
    }
    np.testing.assert_allclose(jax.jit(MODEL.apply)(cut, TOKENS), outputs(), atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moved:
    """A frozen table and a change of three of its rows."""

    w: jax.Array
    rows: jax.Array

    def __jft_take__(self, ids):
        where = jnp.full(16, 3).at[jnp.array([2, 5, 11])].set(jnp.arange(3))
        return self.w[ids] + jnp.take(self.rows, where[ids], axis=0, mode="fill", fill_value=0)


def test_rows_of_a_structured_table_get_their_gradient():
    def loss(table):
        p = params()
        return jnp.mean(jnp.square(MODEL.apply({**p, "memory": {**p["memory"], "table": table}}, TOKENS)))

    dense = jax.jit(jax.grad(loss))(params()["memory"]["table"])
    sparse = jax.jit(jax.grad(lambda rows: loss(Moved(params()["memory"]["table"], rows))))(jnp.zeros((3, 5)))
    np.testing.assert_allclose(sparse, np.asarray(dense)[[2, 5, 11]], atol=1e-6)
    assert np.all((np.abs(dense).sum(1) > 0) == (expected()[2] > 0))


def test_saving_is_refused(tmp_path):
    with pytest.raises(ValueError, match="family 'memory' has no Hugging Face form"):
        jft.save(MODEL, params(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 15}, "slots is 15; product keys need a square number, such as 9"),
        ({"top_k": 5}, "top_k is 5; choose 1 to 4"),
        ({"key_size": 5}, "key_size 5"),
        ({"layers": (1, 1)}, "each once"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MEMORY, **change)


@pytest.mark.parametrize("layers", [(5,), (0, 1, 2, 3, 4)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="of 5 layers: name some of 0 to 4, not all"):
        dataclasses.replace(CONFIG, memory=dataclasses.replace(MEMORY, layers=layers))
