"""Changes carried from one base to another."""

import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import BaseMismatch, BitMask, Dense, TaskVector, apply
from jft.merge import (
    explained_variance,
    pre_post,
    re_adapt,
    recycle,
    relative_gap,
    shadow_ft,
    ties,
    transfer,
)
from tests.delta.algebra import close

MUTATIONS = [
    ("jft/merge/transfer.py", '"base": describe_base(target), ', ""),
    ("jft/merge/transfer.py", "path not in flat or tuple(flat[path].shape) != change.shape", "path not in flat"),
    (
        "jft/merge/transfer.py",
        "apply(base, transfer(tau, base), check=False)",
        "apply(base, -1.0 * transfer(tau, base), check=False)",
    ),
    ("jft/merge/transfer.py", "TaskVector.between(base, tune(start))", "TaskVector.between(start, tune(start))"),
    ("jft/merge/transfer.py", "jnp.sum(jnp.abs(a)) + jnp.sum(jnp.abs(b))", "jnp.sum(jnp.abs(a))"),
    ("jft/merge/transfer.py", "float(sums[0] / sums[1])", "float(sums[1] / sums[0])"),
    ("jft/merge/transfer.py", "[knowledge, adapter], [alpha, beta]", "[knowledge, adapter], [beta, alpha]"),
    ("jft/merge/transfer.py", "np.asarray(s, np.float64) ** 2", "np.asarray(s, np.float64)"),
    ("jft/merge/transfer.py", "before < explained *", "before <= explained * 1.2 *"),
    ("jft/merge/transfer.py", "jnp.where(kept, s, 0)", "s"),
    ("jft/merge/transfer.py", "[1 - weight, weight], **options", "[weight, 1 - weight], **options"),
]


def params(seed, **extra):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"w": draw(5, 4), "b": draw(4), "layers/w": draw(2, 3, 4), **extra}


def dense(tau, path):
    return np.asarray(tau[path].dense(), np.float64)


@pytest.mark.parametrize("carry", [transfer, shadow_ft])
def test_a_change_becomes_one_of_another_base(carry):
    old, tuned, new = params(0), params(1), params(2)
    tau = TaskVector.between(old, tuned)
    with pytest.raises(BaseMismatch):
        apply(new, tau)
    moved = carry(tau, new)
    after = apply(new, moved)
    for path in old:
        close(after[path], np.asarray(new[path], np.float64) + dense(tau, path))
    assert moved.manifest["transferred_from"] == tau.manifest["base"]["fingerprint"]
    # And with its base it adds to changes of the new one.
    assert (moved + TaskVector.between(new, tuned)).manifest["base"] == moved.manifest["base"]


def test_changes_that_do_not_fit_are_refused():
    old, new = params(0), params(1)
    tau = TaskVector.between(old, new)
    with pytest.raises(ValueError, match=r"'b' has shape \(4,\) in the task vector but is absent in the target"):
        transfer(tau, {path: x for path, x in new.items() if path != "b"})
    with pytest.raises(ValueError, match=r"'b' has shape \(4,\) in the task vector but is \(3,\) in the target"):
        transfer(tau, {**new, "b": jnp.ones(3)})
    mask = TaskVector({"w": BitMask.of(jnp.ones((5, 4), bool))})
    with pytest.raises(ValueError, match="base"):
        transfer(mask, new)


def test_recycle_tunes_every_version_from_the_change_so_far():
    bases = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.5, 1.0])}, {"w": jnp.array([0.0, 0.0])}]
    starts = []

    def tune(start):
        starts.append(np.asarray(start["w"]))
        return {"w": start["w"] * jnp.array([2.0, 1.0]) + jnp.array([0.0, 1.0])}

    tau = recycle(iter(bases), tune)
    # By hand: (2, 3) - (1, 2) = (1, 1); start (2.5, 2), (5, 3) - (1.5, 1) = (3.5, 2); start (3.5, 2), (7, 3).
    np.testing.assert_allclose(starts, [[1, 2], [2.5, 2], [3.5, 2]])
    close(tau["w"], [7.0, 3.0])
    assert apply(bases[-1], tau)["w"].tolist() == [7.0, 3.0]
    with pytest.raises(ValueError, match="no versions"):
        recycle([], tune)


def test_relative_gap():
    base, instruct = params(0), params(1)
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in p.values()]) for p in (base, instruct))
    assert relative_gap(base, instruct) == pytest.approx(np.abs(a - b).sum() / (np.abs(a) + np.abs(b)).sum(), rel=1e-6)
    assert relative_gap(base, base) == 0
    assert relative_gap({"w": jnp.zeros(2)}, {"w": jnp.zeros(2)}) == 0
    with pytest.raises(ValueError, match="'more' is not in both models"):
        relative_gap(base, params(1, more=jnp.ones(1)))


def low_rank(matrix, explained):
    """The fewest singular vectors that explain so much of the sum of squares."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    share = np.cumsum(s**2) / np.sum(s**2)
    rank = 0 if explained == 0 else int(np.argmax(share >= explained - 1e-12)) + 1
    return (u[:, :rank] * s[:rank]) @ vt[:rank], rank


@pytest.mark.parametrize("explained", [0.0, 0.5, 0.8])
def test_explained_variance(explained):
    base = params(3)
    tau = TaskVector.between(base, params(4))
    reduced = explained_variance(tau, explained)
    expected, rank = low_rank(dense(tau, "w"), explained)
    close(reduced["w"], expected, 10)
    assert reduced["w"].rank == rank
    layers = [low_rank(x, explained) for x in dense(tau, "layers/w")]
    close(reduced["layers/w"], np.stack([x for x, _ in layers]), 10)
    assert reduced["layers/w"].rank == max(r for _, r in layers)
    assert reduced["b"] is tau["b"]


def test_all_variance_is_the_change_itself_and_zeros_have_no_rank():
    tau = TaskVector({"w": Dense(jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32))})
    close(explained_variance(tau, 1.0)["w"], dense(tau, "w"), 10)
    assert explained_variance(TaskVector({"w": Dense(jnp.zeros((4, 3)))}), 0.9)["w"].rank == 0


def test_re_adapt():
    base = params(5)
    knowledge, instruct = (TaskVector.between(base, params(seed)) for seed in (6, 7))
    mixed = re_adapt(knowledge, instruct, 0.5, 0.8)
    close(mixed["w"], 0.5 * dense(knowledge, "w") + 0.8 * dense(instruct, "w"))
    reduced = re_adapt(knowledge, instruct, 0.5, 0.8, explained=0.5)
    close(reduced["w"], 0.5 * dense(knowledge, "w") + 0.8 * low_rank(dense(instruct, "w"), 0.5)[0], 10)
    close(reduced["b"], 0.5 * dense(knowledge, "b") + 0.8 * dense(instruct, "b"))


def test_pre_post():
    aligned, tuned = params(8), params(9)
    tau = TaskVector.between(aligned, tuned)
    after = apply(aligned, pre_post(tau, 0.3))
    for path in aligned:
        close(after[path], 0.7 * np.asarray(aligned[path], np.float64) + 0.3 * np.asarray(tuned[path], np.float64))
    # By TIES the aligned model, which has no sign anywhere, agrees with nobody: what stays has the weight alone.
    merged = pre_post(tau, 0.3, ties, density=1.0)
    close(merged["w"], 0.3 * dense(tau, "w"))
    with pytest.raises(ValueError, match="weight must be between 0 and 1, not 2"):
        pre_post(tau, 2.0)
