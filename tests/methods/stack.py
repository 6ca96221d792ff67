"""A small stacked classifier, its gradients in float64 NumPy, and a masked Adam to follow a run with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jft
from jft import tree
from jft.models import Model
from jft.models.core import Scope
from jft.tree import lead
from tests.methods.decoder import dense

LAYERS, WIDTH, HIDDEN, CLASSES = 2, 6, 8, 3
UP, BIAS, DOWN, HEAD = "layers/up/w", "layers/up/b", "layers/down/w", "head/w"
SHAPES = {
    UP: (LAYERS, WIDTH, HIDDEN), BIAS: (LAYERS, HIDDEN), DOWN: (LAYERS, HIDDEN, WIDTH), HEAD: (WIDTH, CLASSES),
}  # fmt: skip
RATE = 1e-2
ADAM = {"name": "adam", "lr": RATE, "clip": 0.0}


@dataclasses.dataclass(frozen=True)
class Stack:
    """``h + tanh(h up + b) down`` in each layer, then a head."""

    family: str = "stack"

    def init(self, key, dtype=jnp.float32):
        return parameters()

    def forward(self, execution, params, batch, hooks=None):
        scope = Scope(execution, hooks)

        def body(scope, h, p, _):
            return h + scope.dot("layers/down", jnp.tanh(scope.dot("layers/up", h, p["up"])), p["down"])

        h = scope.layers("layers", body, batch["x"].astype(execution.dtype), params["layers"])
        y = scope.dot("head", h, params["head"])
        return y if hooks is None else (y, scope.reads)


MODEL = Model(Stack())


def parameters(seed=0):
    r = np.random.default_rng(seed)
    flat = {p: jnp.asarray((0.5 * r.normal(size=s)).astype(np.float32)) for p, s in SHAPES.items()}
    return tree.like(tree.unflatten({p: 0 for p in sorted(SHAPES)}), flat)


def wide(params):
    return {p: np.asarray(x, np.float64) for p, x in tree.flatten(params).items()}


def batches(count=5, rows=8, seed=1):
    r = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        x = r.normal(size=(rows, WIDTH)).astype(np.float32)
        out.append({"x": x, "labels": x[:, :CLASSES].argmax(1).astype(np.int32)})
    return out


DATA = batches()


def forward(w, batch):
    """``(h, inner)`` of every layer, and the logits last of ``h``."""
    h = [np.asarray(batch["x"], np.float64)]
    inner = []
    for i in range(LAYERS):
        inner.append(np.tanh(h[-1] @ w[UP][i] + w[BIAS][i]))
        h.append(h[-1] + inner[-1] @ w[DOWN][i])
    return [*h, h[-1] @ w[HEAD]], inner


def moved(w, change, batch):
    """The derivative of the logits along ``change``, ``{path: array}``, in forward mode."""
    h, inner = forward(w, batch)
    d = {p: change.get(p, np.zeros(s)) for p, s in SHAPES.items()}
    dh = np.zeros_like(h[0])
    for i in range(LAYERS):
        du = (1 - inner[i] ** 2) * (dh @ w[UP][i] + h[i] @ d[UP][i] + d[BIAS][i])
        dh = dh + du @ w[DOWN][i] + inner[i] @ d[DOWN][i]
    return dh @ w[HEAD] + h[LAYERS] @ d[HEAD]


def loss_gradient(z, batch):
    """``d(mean cross entropy) / dz``."""
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return (p - np.eye(CLASSES)[batch["labels"]]) / len(z)


def pulled(w, dz, batch):
    """``{path: array}``: ``dz``, shaped like the logits, times their derivative in every weight."""
    h, inner = forward(w, batch)
    out = {p: np.zeros(s) for p, s in SHAPES.items()}
    out[HEAD] = h[LAYERS].T @ dz
    dh = dz @ w[HEAD].T
    for i in reversed(range(LAYERS)):
        out[DOWN][i] = inner[i].T @ dh
        du = dh @ w[DOWN][i].T * (1 - inner[i] ** 2)
        out[UP][i], out[BIAS][i] = h[i].T @ du, du.sum(0)
        dh = dh + du @ w[UP][i].T
    return out


def gradient(w, batch):
    """``{path: d(mean cross entropy) / d(w)}``."""
    return pulled(w, loss_gradient(forward(w, batch)[0][-1], batch), batch)


def rows(count, data=DATA):
    """The first ``count`` examples, each a batch."""
    each = [{k: x[i : i + 1] for k, x in b.items()} for b in data for i in range(len(b["x"]))]
    return each[:count]


W = wide(parameters())
LINEAR, BODY = (UP, DOWN), (UP, BIAS, DOWN)


def average(values):
    """The mean of ``{path: array}`` over a list of them."""
    return {p: np.mean([v[p] for v in values], axis=0) for p in SHAPES}


def sizes(values):
    return {p: np.abs(x) for p, x in values.items()}


def everything(paths=tuple(SHAPES)):
    return {p: np.ones(SHAPES[p], bool) for p in paths}


class Adam:
    """Adam on the entries of a mask, each with an age of its own; what is outside keeps its moments."""

    def __init__(self, rate=RATE, b1=0.9, b2=0.999, eps=1e-8):
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps
        self.age, self.mean, self.square = ({p: np.zeros(s) for p, s in SHAPES.items()} for _ in range(3))

    def step(self, w, g, masks):
        out = dict(w)
        for p, mask in masks.items():
            age, m, v = self.age[p], self.mean[p], self.square[p]
            age[mask] += 1
            m[mask] = self.b1 * m[mask] + (1 - self.b1) * g[p][mask]
            v[mask] = self.b2 * v[mask] + (1 - self.b2) * g[p][mask] ** 2
            a = np.maximum(age, 1)
            ratio = m / (1 - self.b1**a) / (np.sqrt(v / (1 - self.b2**a)) + self.eps)
            out[p] = w[p] - np.where(mask, self.rate * ratio, 0.0)
        return out

    def forget(self, masks):
        """Moments of what is outside ``masks`` are gone."""
        for p, mask in masks.items():
            for held in (self.age[p], self.mean[p], self.square[p]):
                held[~mask] = 0


def follow(w, masks, steps, data=DATA, added=None):
    """Weights after ``steps`` of masked Adam; ``added(w)`` is the gradient of a penalty."""
    adam = Adam()
    for n in range(steps):
        g = gradient(w, data[n % len(data)])
        extra = added(w) if added else {}
        w = adam.step(w, {p: x + extra.get(p, 0) for p, x in g.items()}, masks)
    return w


def largest(score, k):
    """The mask of the ``k`` largest entries of one array, ties to the earlier."""
    order = np.argsort(-score, axis=None, kind="stable")[:k]
    mask = np.zeros(score.size, bool)
    mask[order] = True
    return mask.reshape(score.shape)


def largest_of_all(scores, k):
    """Masks of the ``k`` largest entries of all arrays together."""
    flat = largest(np.concatenate([s.ravel() for s in scores.values()]), k)
    ends = np.cumsum([s.size for s in scores.values()])[:-1]
    parts = np.split(flat, ends)
    return {p: m.reshape(s.shape) for (p, s), m in zip(scores.items(), parts, strict=True)}


def largest_of_each(scores, k):
    """Masks of the ``k`` (a number or a function of the size) largest entries of each layer's matrix."""
    count = k if callable(k) else lambda _: k
    return {p: np.stack([largest(x, count(x.size)) for x in s]) for p, s in scores.items()}


def of_all(scores, density, paths):
    """Masks of the largest ``int(density * entries)`` of ``paths`` together, ties in the order of the model's parameters."""
    ordered = {p: scores[p] for p in sorted(paths)}
    return largest_of_all(ordered, int(density * sum(s.size for s in ordered.values())))


def of_each(scores, k):
    """Masks of the ``k`` largest entries of each matrix inside the layers."""
    return largest_of_each({p: scores[p] for p in LINEAR}, k)


def run(method, steps, **options):
    given = {"data": DATA, "optimizer": ADAM, "objective": "classification", "log": {"progress": False}} | options
    params = given.pop("params", None) or parameters()
    return jft.finetune(MODEL, params, given.pop("data"), steps=steps, method=method, **given)


@functools.partial(jax.jit, static_argnums=0)
def _entries(units, chosen):
    """Masks of the entries of the chosen units, by path."""
    out = {}
    for path, unit in units:
        shape, outer = SHAPES[path], lead(path, len(SHAPES[path]), True)
        out[path] = unit.expand(unit.mask_of(chosen[path], shape, outer), shape, outer)
    return out


def masks(finished):
    """Which entries of each weight trained at the end of a run."""
    chosen = finished.state.chosen
    found = _entries(tuple((p, finished.plan.granularity(p, SHAPES[p])) for p in chosen), chosen)
    return {p: np.asarray(found[p]) for p in chosen}


def check(finished, expected, support=None, tolerance=1e-5):
    """A run's weights are those of NumPy, and its task vector changes no entry outside ``support``."""
    for path, w in wide(finished.params).items():
        np.testing.assert_allclose(w, expected[path], atol=tolerance, rtol=0, err_msg=path)
    if support is None:
        return
    changes = dense({p: x for p, x in finished.task_vector.items() if p in support})
    for path in SHAPES:
        if path not in support:
            assert path not in finished.task_vector, path
        else:
            moved = np.asarray(changes[path])
            assert not moved[~support[path]].any() and moved.any() == support[path].any(), path


def check_entries(method, expected, beside=(), steps=(1, 3), added=None, **options):
    """A run selects the entries of the masks ``expected`` and moves them, and all of ``beside``, as Adam in NumPy does."""
    trained = dict(expected) | everything(beside)
    for count in steps:
        finished = run(method, count, **options)
        found = masks(finished)
        assert set(found) == set(expected)
        for path, mask in expected.items():
            np.testing.assert_array_equal(found[path], mask, err_msg=path)
        check(finished, follow(W, trained, count, added=added), trained)
    return finished
