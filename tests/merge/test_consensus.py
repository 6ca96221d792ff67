"""Rules that find in a merged vector what each task needs: TALL masks, consensus, EMR; NumPy, then FusionBench."""

import numpy as np
import pytest

from jft.merge import task_arithmetic
from jft.merge.consensus import consensus, tall_masks
from jft.merge.emr import emr
from tests.merge import peers
from tests.merge.draws import ODD, assert_close, flat, split, vectors

MUTATIONS = [
    ("jft/merge/consensus.py", "jnp.abs(merged - tensor.deltas)", "jnp.abs(merged + tensor.deltas)"),
    ("jft/merge/consensus.py", "axis=0) >= least", "axis=0) > least"),
    ("jft/merge/consensus.py", 'divide="none", zero', 'divide="count", zero'),
    ("jft/merge/consensus.py", "jnp.abs(tensor.deltas) > tensor.weighted", "jnp.abs(tensor.deltas) >= tensor.weighted"),
    ("jft/merge/emr.py", "deltas * sign > 0", "deltas * sign >= 0"),
    ("jft/merge/emr.py", 'if rescale == "sum" else jnp.mean', 'if rescale == "sum" else jnp.sum'),
    ("jft/merge/emr.py", "before / jnp.where(after == 0, 1, after)", "after / jnp.where(before == 0, 1, before)"),
    ("jft/merge/emr.py", "sign == 0, -1, sign", "sign == 0, 1, sign"),
]
WEIGHTS = [1.0, 0.5, 2.0]


def multi_task(xs, weights, kind, density=0.2):
    """The sum of the vectors; or of those with the elected sign, after trimming the whole model."""
    if kind == "task_arithmetic":
        return sum(w * x for w, x in zip(weights, xs, strict=True))
    kth = lambda x: np.sort(np.abs(x))[len(x) - int(density * len(x)) - 1]
    trimmed = [np.where(np.abs(x) >= kth(x), x, 0) for x in xs]
    sign = np.sign(sum(trimmed))
    sign[sign == 0] = np.sign(sign.sum())
    return sum(w * x * (np.sign(x) == sign) for w, x in zip(weights, trimmed, strict=True))


def masks(xs, merged, lambdas):
    return [np.abs(x) > lam * np.abs(merged - x) for x, lam in zip(xs, lambdas, strict=True)]


@pytest.mark.parametrize("kind", ["task_arithmetic", "ties"])
def test_masks(kind):
    taus, lambdas = vectors(), [0.2, 0.5, 1.0]
    xs = [flat(tau) for tau in taus]
    merged = multi_task(xs, WEIGHTS, kind)
    needed = masks(xs, merged, lambdas)
    # Entries at the very limit of a mask are among the cases.
    assert kind == "ties" or any(
        np.any(np.abs(x) == lam * np.abs(merged - x)) for x, lam in zip(xs, lambdas, strict=True)
    )
    result = tall_masks(taus, WEIGHTS, mask_lambda=lambdas, multi_task=kind)
    for mask, tau in zip(needed, result, strict=True):
        np.testing.assert_allclose(flat(tau), mask * merged, atol=5e-7)
    for least in (1, 2) if kind == "task_arithmetic" else (2,):
        tau = consensus(taus, WEIGHTS, mask_lambda=lambdas, multi_task=kind, least=least)
        np.testing.assert_allclose(flat(tau), (sum(needed) >= least) * merged, atol=5e-7)


def test_limits_of_consensus():
    taus = vectors()
    assert_close(consensus(taus, WEIGHTS, least=0), task_arithmetic(taus, WEIGHTS))
    assert not np.any(flat(consensus(taus, least=4)))
    # With lambda 0 a task needs whatever it changed.
    changed = np.stack([flat(tau) != 0 for tau in taus]).sum(0) >= 2
    expected = changed * flat(task_arithmetic(taus))
    np.testing.assert_allclose(flat(consensus(taus, mask_lambda=0.0)), expected, atol=5e-7)
    assert_close(consensus(taus), consensus(taus[::-1]))


def emr_reference(parts, rescale, negative_zero):
    """``parts``: for each model, name -> array."""
    reduce = np.sum if rescale == "sum" else np.mean
    before, after, out = np.zeros(len(parts)), np.zeros(len(parts)), [{} for _ in parts]
    for name in parts[0]:
        xs = np.stack([part[name] for part in parts])
        sign = np.sign(xs.sum(0))
        sign[sign == 0] = -1 if negative_zero else 0
        kept = xs * sign > 0
        unified = sign * np.abs(xs * kept).max(0)
        for i in range(len(xs)):
            before[i] += reduce(np.abs(xs[i]))
            after[i] += reduce(np.abs(kept[i] * unified))
            out[i][name] = kept[i] * unified
    return [{name: x * before[i] / after[i] for name, x in one.items()} for i, one in enumerate(out)]


@pytest.mark.parametrize(("preset", "options"), [("paper", ("sum", False)), ("fusionbench", ("mean", True))])
def test_emr(preset, options):
    taus = vectors()
    expected = emr_reference([split(tau) for tau in taus], *options)
    for tau, one in zip(emr(taus, preset=preset), expected, strict=True):
        np.testing.assert_allclose(flat(tau), np.concatenate([x.ravel() for x in one.values()]), atol=5e-7)


def test_laws_of_emr():
    taus = vectors()
    # One model is its own unified vector, and every vector keeps the sum of magnitudes of its task.
    assert_close(emr(taus[:1])[0], taus[0])
    merged = emr(taus)
    for tau, one in zip(taus, merged, strict=True):
        np.testing.assert_allclose(np.abs(flat(one)).sum(), np.abs(flat(tau)).sum(), rtol=1e-5)
    for one, other in zip(merged, emr(taus[::-1])[::-1], strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("rule", [tall_masks, consensus, emr])
def test_odd_shapes(rule):
    taus = vectors(2, shapes=ODD)
    merged = rule([taus[0], 0.0 * taus[0]])
    for tau in merged if isinstance(merged, list) else [merged]:
        assert np.all(np.isfinite(flat(tau)))


def test_presets_differ():
    taus = vectors()
    for rule in (emr, tall_masks):
        paper, theirs = (flat(rule(taus, preset=preset)[0]) for preset in ("paper", "fusionbench"))
        assert np.linalg.norm(paper - theirs) > 0.01 * np.linalg.norm(paper)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (consensus, {"least": -1}),
        (tall_masks, {"mask_lambda": -0.1}),
        (tall_masks, {"multi_task": "sum"}),
        (emr, {"zero": 0}),
    ],
)
def test_wrong_options(rule, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rule(vectors(), **options)


@pytest.mark.peers
def test_fusionbench():
    import torch

    taus = vectors()
    tensors = [{n: torch.tensor(x, dtype=torch.float32) for n, x in split(tau).items()} for tau in taus]
    joined = lambda x: torch.cat([one.reshape(-1) for one in x.values()]).numpy()
    unified, needed, scales = peers.fusionbench("method.emr_merging.utils").emr_merge(tensors)
    for i, tau in enumerate(emr(taus, preset="fusionbench")):
        expected = joined({n: unified[n] * needed[n][i] * scales[i] for n in unified})
        np.testing.assert_allclose(flat(tau), expected, atol=5e-7)

    theirs = peers.fusionbench("method.tall_mask.utils")
    x = torch.stack([torch.tensor(joined(one)) for one in tensors])
    mask = theirs.generate_task_masks(x, x, torch.zeros(x.shape[1]), tall_mask_lambda=0.6).numpy()
    for i, tau in enumerate(tall_masks(taus, preset="fusionbench")):
        np.testing.assert_allclose(flat(tau), mask[i] * x.sum(0).numpy(), atol=5e-7)
