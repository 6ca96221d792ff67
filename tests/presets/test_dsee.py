"""DSEE against float64 NumPy: the decomposition, low rank and entries that train together, and pruning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta, tree
from jft.models import DecoderConfig, Model
from jft.presets.dsee import GreBsmo, prune
from jft.select import budget
from tests.methods import stack
from tests.methods.low_rank import ALPHA, LINEAR, RANK, SCALE, Moments, W, check, turned
from tests.methods.stack import DATA, DOWN, UP

MUTATIONS = (
    ("jft/presets/dsee.py", "rank: int = 16", "rank: int = 4"),
    ("jft/presets/dsee.py", "count: int = 64", "count: int = 128"),
    ("jft/presets/dsee.py", "alpha: float | None = 32.0", "alpha: float | None = 16.0"),
    ("jft/presets/dsee.py", "attn/[qv]/w$", "attn/[qkv]/w$"),
    ("jft/presets/dsee.py", "InPlace(rate=low_rank.scale)", "InPlace()"),
    ("jft/presets/dsee.py", "0.02 * jax.random.normal", "0.2 * jax.random.normal"),
    ("jft/presets/dsee.py", "steps: int = 100", "steps: int = 50"),
    ("jft/presets/dsee.py", "threshold: float = 0.01", "threshold: float = 0.1"),
    ("jft/presets/dsee.py", "for _ in range(2):", "for _ in range(1):"),
    ("jft/presets/dsee.py", "jnp.abs(left) < how.threshold", "jnp.abs(left) > how.threshold"),
    ("jft/presets/dsee.py", "rest = left - s", "rest = left"),
    ("jft/presets/dsee.py", "stacked = jnp.swapaxes(w.astype(jnp.float32), -1, -2)", "stacked = w.astype(jnp.float32)"),
    ("jft/presets/dsee.py", "count - round((1 - keep) * count)", "round((1 - keep) * count)"),
    ("jft/presets/dsee.py", "jnp.abs(flat[p].astype(jnp.float32) + change[p])", "jnp.abs(flat[p].astype(jnp.float32))"),
)


def sparse_part(w, v, steps, growth, threshold):
    """S of ``w [O, I]`` from the row ``v``, in growing arrays: run_glue.py:402-453."""
    v = v[None]
    for _ in range(steps):
        s = np.zeros_like(w)
        for _ in range(2):
            u = np.linalg.qr((w - s) @ v.T)[0]
            v = u.T @ (w - s)
            s = w - u @ v
            s[np.abs(s) < threshold] = 0
        v = np.concatenate([v, np.linalg.qr(w - u @ v - s)[1][:growth]])
    return s


def decomposed(how, path, w):
    """|S| of every layer of ``w [L, I, O]``."""
    key = tree.key_for(jax.random.key(0), f"GreBsmo of {path}")
    first = [np.asarray(jax.random.normal(jax.random.fold_in(key, i), w.shape[1:2]), np.float64) for i in range(len(w))]
    each = [sparse_part(x.T, v, how.steps, how.growth, how.threshold).T for x, v in zip(w, first, strict=True)]
    return np.abs(each)


@dataclasses.dataclass
class Calibration:
    params: dict[str, Any]
    key: Any = dataclasses.field(default_factory=lambda: jax.random.key(0))

    @property
    def paths(self):
        return tuple(self.params)


def test_decomposition():
    w = np.random.default_rng(0).standard_normal((2, 24, 20)) * 0.1
    for how in (GreBsmo(5, steps=4, growth=2, threshold=0.05), GreBsmo(5, steps=3, growth=5)):
        found = how(Calibration({"w": jnp.asarray(w, jnp.float32)}))["w"]
        expected = decomposed(how, "w", np.float64(np.float32(w)))
        # An entry at the threshold may fall on either side of it.
        clear = np.abs(expected - how.threshold) > 1e-4
        np.testing.assert_allclose(np.asarray(found)[clear], expected[clear], atol=2e-4)
        assert 0 < (expected == 0).sum() < expected.size


def test_a_low_rank_part_that_fits_the_matrix_is_refused():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((24, 20)), jnp.float32)
    with pytest.raises(
        ValueError, match=r"leaves 0 entries of a matrix of w above 0.01, fewer than count=5.*filter_rank="
    ):
        GreBsmo(5, steps=10)(Calibration({"w": w}))


def test_defaults():
    """Chen et al. 2021: rank 16, 64 entries, of queries and values; VITA-Group/DSEE@61844c3, run_glue.py: lora_alpha 32,
    GreBsmo in 100 steps of five rows at 0.01."""
    method = jft.method("dsee")
    assert method.select.score == GreBsmo(64, 100, 5, 0.01) and method.select.budget == budget.PerMatrix(count=64)
    how = method.train
    assert (how.low_rank.rank, how.low_rank.alpha, how.low_rank.scale, how.first.rate) == (16, 32.0, 2.0, 2.0)
    model = Model(DecoderConfig(vocab=11, width=8, layers=1, heads=2, hidden=12))
    assert set(method.plan(model.abstract(), model).leaves) == {"layers/attn/q/w", "layers/attn/v/w"}
    assert jft.method("dsee", alpha=None).train.low_rank.scale == 1


class Dual:
    """``M W + (alpha / rank) (a b + S)``, with Adam on a, b and S, from the paper."""

    def __init__(self, masks, left):
        self.masks, self.left, self.adam = masks, left, Moments()
        self.parts = {}
        for p in LINEAR:
            key = jax.random.split(tree.key_for(jax.random.key(0), p))[1]
            a = 0.02 * np.asarray(jax.random.normal(key, (*W[p].shape[:2], RANK)), np.float64)
            self.parts[p] = {"a": a, "b": np.zeros((stack.LAYERS, RANK, W[p].shape[2])), "S": np.zeros(W[p].shape)}

    @property
    def whole(self):
        change = {p: SCALE * (x["a"] @ x["b"] + x["S"]) for p, x in self.parts.items()}
        return W | {p: self.left[p] * W[p] + change[p] for p in LINEAR}

    def step(self, batch):
        gradient = stack.gradient(self.whole, batch)
        for p, x in self.parts.items():
            g = SCALE * gradient[p]
            by_part = {"a": g @ turned(x["b"]), "b": turned(x["a"]) @ g, "S": g * self.masks[p]}
            self.parts[p] = {k: self.adam.step((p, k), x[k], by_part[k]) for k in x}


def svd_residual(rank):
    out = {}
    for p in LINEAR:
        u, s, v = np.linalg.svd(W[p], full_matrices=False)
        out[p] = np.abs(W[p] - (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :])
    return out


OPTIONS = {"rank": RANK, "alpha": ALPHA, "count": 6, "include": ""}


@pytest.mark.parametrize("form", ["grebsmo", "svd", "pruned"])
def test_three_steps(form):
    keep, every = 0.5 if form == "pruned" else 1.0, {p: np.ones(W[p].shape, bool) for p in LINEAR}
    left = stack.largest_of_each({p: np.abs(W[p]) for p in LINEAR}, lambda n: int(keep * n + 0.5))
    if form == "grebsmo":
        how = GreBsmo(6, steps=2, growth=1)
        method = jft.method("dsee", **OPTIONS)
        method = dataclasses.replace(method, select=dataclasses.replace(method.select, score=how))
        masks = stack.largest_of_each({p: decomposed(how, p, W[p]) for p in LINEAR}, 6)
    else:
        method = jft.method("dsee", **OPTIONS, filter_rank=3, exact=True, keep=keep)
        masks = stack.largest_of_each(svd_residual(3), 6)
    for steps in (1, 3):
        expected = Dual(masks, left if form == "pruned" else every)
        for batch in DATA[:steps]:
            expected.step(batch)
        finished = stack.run(method, steps)
        check(finished, expected, masks)
    if form == "svd":
        pruned_after(finished)


def pruned_after(finished):
    """One threshold for all matrices, of the tuned weights' size; the change stays whole."""
    tuned = stack.wide(finished.params)
    size = {p: np.abs(tuned[p]) for p in LINEAR}
    total = sum(x.size for x in size.values())
    kept = stack.largest_of_all(size, total - round(0.6 * total))
    assert abs(kept[UP].mean() - kept[DOWN].mean()) > 0.01, (
        "both matrices keep as much, as if each had its own threshold"
    )
    found = stack.wide(prune(stack.MODEL, stack.parameters(), finished.task_vector, 0.4))
    for p in W:
        expected = np.where(kept[p], W[p], 0) + tuned[p] - W[p] if p in kept else tuned[p]
        np.testing.assert_allclose(found[p], expected, atol=1e-6, err_msg=p)


@pytest.mark.optimized
def test_a_pruned_run_goes_on_after_an_interruption(tmp_path):
    method = {"name": "dsee", **OPTIONS, "filter_rank": 3, "keep": 0.5}
    for steps in (1, 3):
        resumed = stack.run(method, steps, workdir=tmp_path, checkpoint=1)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, stack.run(method, 3))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"exact=True asks for a full SVD.*give filter_rank"):
        jft.method("dsee", exact=True)
    with pytest.raises(ValueError, match=r"keep is 0\.0; it is the fraction"):
        prune(stack.MODEL, stack.parameters(), delta.TaskVector({}), 0.0)
