"""A small decoder, its dense gradients in float64, and a masked Adam in NumPy to follow a run with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jft
from jft import tree
from jft.models import ClipConfig, DecoderConfig, Model, VisionConfig
from jft.models.clip import TextConfig
from jft.models.core import Execution
from jft.train.objectives import LanguageModel

RATE = 1e-2
ADAM = {"name": "adam", "lr": RATE, "clip": 0.0, "eps": 1e-3}
CONFIG = DecoderConfig(vocab=13, width=8, layers=4, heads=4, kv_heads=2, head_size=2, hidden=12, init_std=0.4)
MODEL = Model(CONFIG)


@functools.cache
def parameters(config=CONFIG, seed=0):
    return config.init(jax.random.key(seed))


def batches(count=4, rows=4, length=6, seed=1, vocab=13):
    r = np.random.default_rng(seed)
    return [{"tokens": r.integers(0, vocab, (rows, length)).astype(np.int32)} for _ in range(count)]


def wide(params):
    return {p: np.asarray(x, np.float64) for p, x in tree.flatten(params).items()}


@functools.cache
def _gradient(config):
    model, objective = Model(config, Execution(dtype=jnp.float64)), LanguageModel()

    def loss(params, batch):
        total, weight, _ = objective.loss(model.apply(params, batch), batch)
        return total / weight

    return jax.jit(jax.value_and_grad(loss))


def loss_and_gradient(weights, batch, config=CONFIG):
    """The loss and its gradient in all weights, by path, in float64."""
    with jax.enable_x64(True):
        value, found = _gradient(config)(tree.unflatten({p: jnp.asarray(w) for p, w in weights.items()}), batch)
        return float(value), {p: np.asarray(g, np.float64) for p, g in tree.flatten(found).items()}


def gradient(weights, batch, config=CONFIG):
    return loss_and_gradient(weights, batch, config)[1]


class Adam:
    """Adam in float64 on masked weights; every entry corrects its bias by how often it has trained, if ``aged``."""

    def __init__(self, weights, b1=0.9, b2=0.999, eps=1e-3):
        self.w = {p: w.copy() for p, w in weights.items()}
        zeros = lambda: {p: np.zeros_like(w) for p, w in weights.items()}
        self.m, self.v, self.age = zeros(), zeros(), zeros()
        self.b1, self.b2, self.eps = b1, b2, eps

    def step(self, gradient, masks, rate=RATE):
        for p, w in self.w.items():
            on = np.broadcast_to(masks.get(p, False), w.shape)
            # What does not train has no moments: it begins anew when it does.
            self.m[p] = np.where(on, self.b1 * self.m[p] + (1 - self.b1) * gradient[p], 0.0)
            self.v[p] = np.where(on, self.b2 * self.v[p] + (1 - self.b2) * gradient[p] ** 2, 0.0)
            self.age[p] = np.where(on, self.age[p] + 1, 0.0)
            age = np.maximum(self.age[p], 1)
            update = (self.m[p] / (1 - self.b1**age)) / (np.sqrt(self.v[p] / (1 - self.b2**age)) + self.eps)
            self.w[p] = np.where(on, w - rate * update, w)


class Descent:
    """Plain gradient descent on masked weights."""

    def __init__(self, weights):
        self.w = dict(weights)

    def step(self, gradient, masks, rate=RATE):
        self.w = {p: w - rate * np.broadcast_to(masks.get(p, False), w.shape) * gradient[p] for p, w in self.w.items()}


def followed(base, masks_at, steps, data, config=CONFIG, change=None, kind=Adam):
    """Weights after ``steps`` in float64; ``masks_at(step, weights)`` says where they train, by path."""
    optimizer = kind(wide(base))
    for n in range(steps):
        g = gradient(optimizer.w, data[n % len(data)], config)
        optimizer.step(change(g) if change else g, masks_at(n, optimizer.w))
    return optimizer.w


def run(method, steps, params, data, model=MODEL, **options):
    return jft.finetune(
        model, params, data, steps=steps, method=method, optimizer=options.pop("optimizer", ADAM), objective="lm",
        log={"progress": False}, **options,
    )  # fmt: skip


@jax.jit
def dense(deltas):
    """The changes of a task vector as arrays, by path."""
    return {p: x.dense() for p, x in deltas.items()}


def compare(result, expected, base, support, tolerance=1e-5):
    """A run's weights against the reference, untouched ones bit for bit, and the support of its task vector."""
    base, changes = tree.flatten(base), dense(result.task_vector.deltas)
    for path, w in tree.flatten(result.params).items():
        on = np.broadcast_to(support.get(path, False), w.shape)
        np.testing.assert_allclose(w, expected[path], atol=tolerance, rtol=0, err_msg=path)
        assert np.array_equal(np.asarray(w)[~on], np.asarray(base[path])[~on]), f"{path} moved where it is frozen"
        change = np.asarray(changes.get(path, np.zeros(w.shape)))
        assert not change[~on].any(), f"{path} has a change where it is frozen"
        np.testing.assert_allclose(change, expected[path] - np.asarray(base[path], np.float64), atol=tolerance)


def check(method, masks_at, params, data, model=MODEL, config=CONFIG, steps=(1, 3), change=None, kind=Adam, **options):
    """One and three steps of a method against the reference; the last run."""
    for count in steps:
        optimizer = ADAM if kind is Adam else {"name": "sgd", "lr": RATE, "momentum": 0.0, "clip": 0.0}
        result = run(method, count, params, data, model, optimizer=optimizer, **options)
        seen = [masks_at(n, None) for n in range(count)]
        paths = {p for masks in seen for p in masks}
        shape = {p: w.shape for p, w in tree.flatten(params).items()}
        support = {p: np.any([np.broadcast_to(m.get(p, False), shape[p]) for m in seen], axis=0) for p in paths}
        compare(result, followed(params, masks_at, count, data, config, change, kind), params, support)
        # Nothing that should train was left out.
        for path, on in support.items():
            stored = result.task_vector[path]
            if isinstance(stored, jft.delta.Rows):
                assert set(map(int, stored.indices)) == set(np.flatnonzero(on.reshape(len(on), -1).any(1)))
            elif isinstance(stored, jft.delta.Slices | jft.delta.Blocks | jft.delta.Entries):
                assert stored.values.size == on.sum(), path
    return result


def in_layers(params, layers, include=lambda path: True):
    """Masks of whole layers."""
    out = {}
    for path, w in tree.flatten(params).items():
        if path.startswith("layers/") and include(path):
            mask = np.isin(np.arange(w.shape[0]), list(layers))
            out[path] = mask.reshape(-1, *(1,) * (w.ndim - 1))
    return out


def passed(w, tokens, gates=None, dropped=None):
    """``(residual streams entering each layer, logits [B, T, V])`` of weights ``w`` by path, in float64 NumPy.

    gates: ``{"heads": [L, H], "channels": [L, F], "outputs": [L, D]}``, what each unit's output is multiplied by. dropped:
    ``(attention [L, B, T, H K], mlp [L, B, T, D])``, what the heads' values and the MLP's output are multiplied by.
    """
    c = CONFIG
    B, T = tokens.shape
    gates = gates or {}
    one = np.ones(c.layers)
    heads, channels, outputs = (gates.get(n, one[:, None]) for n in ("heads", "channels", "outputs"))
    attention, mlp = dropped or (one, one)
    norm = lambda x, s: x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * s
    angle = np.arange(T)[:, None] * c.rope.theta ** (-np.arange(0, c.head_size, 2) / c.head_size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    h, streams = w["embed/table"][tokens], []
    for i in range(c.layers):
        streams.append(h)
        p = lambda name, i=i: w[f"layers/{name}"][i]
        x = norm(h, p("attn_norm/scale"))
        q, k, v = ((x @ p(f"attn/{n}/w")).reshape(B, T, -1, c.head_size) for n in "qkv")
        k, v = (np.repeat(y, c.heads // c.kv_heads, axis=2) for y in (rotate(k), v))
        scores = np.einsum("bthk,bshk->bhts", rotate(q), k) / np.sqrt(c.head_size)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        seen = np.einsum("bhts,bshk->bthk", weights, v) * heads[i][:, None]
        h = h + (seen.reshape(B, T, -1) * attention[i]) @ p("attn/o/w")
        x = norm(h, p("mlp_norm/scale"))
        gate = x @ p("mlp/gate/w")
        inner = gate / (1 + np.exp(-gate)) * (x @ p("mlp/up/w")) * channels[i]
        h = h + (inner @ p("mlp/down/w")) * outputs[i] * mlp[i]
    return streams, norm(h, w["final_norm/scale"]) @ w["head/w"]


def clip(vision=3, text=2):
    """A small CLIP with so many layers in its towers."""
    images = VisionConfig(image=8, patch=4, width=8, layers=vision, heads=2, hidden=16)
    return ClipConfig(images, TextConfig(vocab=11, width=8, layers=text, heads=2, hidden=16, positions=6), projection=4)
