"""SMT: blocks of q, k, v and of the MLP by the mean of their summed gradient, against its rule in float64 NumPy."""

import functools
import inspect

import numpy as np
import pytest

import jft
from jft.methods import select
from jft.presets.smt import smt
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder

DATA, SIDE, BATCHES = decoder.batches(), 4, 3
KINDS = {
    "attention": [f"layers/attn/{n}/w" for n in "kqv"],
    "mlp": [f"layers/mlp/{n}/w" for n in ("down", "gate", "up")],
}
ALL = 2 * 13 * 8 + 4 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8) + 4 * 3 * 8 * 12  # embedding and head, q k v o, MLP
POOLS = {
    "mean_abs": lambda x: np.abs(x.mean((2, 4))),
    "abs_mean": lambda x: np.abs(x).mean((2, 4)),
    "l2": lambda x: np.sqrt((x**2).sum((2, 4))),
}
MUTATIONS = (
    ("jft/presets/smt.py", '"(^|/)attn/[qkv]/"', '"(^|/)attn/"'),
    ("jft/presets/smt.py", "mlp: float = 0.0,", "mlp: float = 0.0084,"),
    ("jft/presets/smt.py", '] = "mean_abs",', '] = "abs_mean",'),
    ("jft/presets/smt.py", 'of="matrices"', 'of="candidates"'),
    ("jft/presets/smt.py", "calibration.gradient(self.batches)", "calibration.gradient(1)"),
    ("jft/select/granularity.py", "jnp.abs(jnp.mean(x, axes))", "jnp.mean(jnp.abs(x), axes)"),
    ("jft/select/budget.py", "own[self.part(path)][1].append(path)", "own[0][1].append(path)"),
)


@functools.cache
def summed():
    base = decoder.wide(decoder.parameters())
    each = [decoder.gradient(base, b) for b in DATA[:BATCHES]]
    return {p: sum(g[p] for g in each) for p in base}


def blocks(fractions, pool="mean_abs"):
    """Which blocks of each kind are among its best, by path: bool ``[L, I/4, O/4]``."""
    out = {}
    for kind, fraction in fractions.items():
        cut = {p: summed()[p].reshape(4, -1, SIDE, summed()[p].shape[2] // SIDE, SIDE) for p in KINDS[kind]}
        score = {p: POOLS[pool](x) for p, x in cut.items()}
        flat = np.concatenate([s.ravel() for s in score.values()])
        mask = np.zeros(flat.size, bool)
        mask[np.argsort(-flat, kind="stable")[: int(fraction * ALL / SIDE**2)]] = True
        ends = np.cumsum([s.size for s in score.values()])[:-1]
        out |= {p: m.reshape(score[p].shape) for p, m in zip(score, np.split(mask, ends), strict=True)}
    return out


def chosen(**options):
    """What the preset selects, as :func:`blocks` gives it."""
    plan = jft.method("smt", block=(SIDE, SIDE), batches=BATCHES, **options).plan(decoder.parameters(), decoder.MODEL)
    calibration = RunCalibration(decoder.MODEL, decoder.parameters(), plan.selects, LanguageModel(), DATA)
    found = {}
    for path, at in select.choose(plan, calibration, {}).items():
        rows, columns = (n // SIDE for n in calibration.params[path].shape[1:])
        found[path] = np.zeros((4, rows, columns), bool)
        for layer, i, j in ((n, *ij) for n, one in enumerate(np.asarray(at)[:, 0, 0]) for ij in one):
            if i < rows and j < columns:
                found[path][layer, i, j] = True
    return found


def test_each_kind_has_a_budget_of_its_own_whatever_the_other_is():
    for mlp in (0.06, 0.12):
        found = chosen(attention=0.06, mlp=mlp)
        for path, mask in blocks({"attention": 0.06, "mlp": mlp}).items():
            np.testing.assert_array_equal(found[path], mask, err_msg=path)
        count = {kind: sum(found[p].sum() for p in paths) for kind, paths in KINDS.items()}
        assert count == {"attention": int(0.06 * ALL) // 16, "mlp": int(mlp * ALL) // 16}


@pytest.mark.parametrize("pool", POOLS)
def test_pools_of_the_code(pool):
    assert chosen(mlp=0.1, pool=pool, attention=0).keys() == set(KINDS["mlp"])
    for path, mask in blocks({"mlp": 0.1}, pool).items():
        np.testing.assert_array_equal(chosen(mlp=0.1, pool=pool, attention=0)[path], mask, err_msg=path)


def test_by_default_blocks_of_q_k_and_v_train():
    masks = {p: np.repeat(np.repeat(m, SIDE, 1), SIDE, 2) for p, m in blocks({"attention": 0.1}).items()}
    method = jft.method("smt", attention=0.1, block=(SIDE, SIDE), batches=BATCHES)
    decoder.check(method, lambda n, w: masks, decoder.parameters(), DATA, steps=(3,))


def test_defaults_are_those_of_the_released_code():
    """fine_tune.py: downsample_attention_blocks_ratio 0.0084, downsample_mlp_blocks_ratio -1, calculate_strategy mean_abs."""
    defaults = {p.name: p.default for p in inspect.signature(smt).parameters.values()}
    assert defaults == {"attention": 0.0084, "mlp": 0.0, "block": (256, 256), "batches": 100, "pool": "mean_abs"}
    shapes = {p: np.zeros(s) for p, s in {"attn/q/w": (2, 2), "head/w": (2, 2)}.items()}
    assert jft.method("smt").select.paths(shapes, tuple(shapes)) == ["attn/q/w"]


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="attention and mlp both 0 trains nothing"):
        jft.method("smt", attention=0)
    with pytest.raises(ValueError, match=r"pool 'max' is none of smt's; choose one of mean_abs"):
        jft.method("smt", pool="max")
    with pytest.raises(ValueError, match=r"density 0.9 of all 2128 parameters of the matrices is 1915"):
        chosen(attention=0.9)
