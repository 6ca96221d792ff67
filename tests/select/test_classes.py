"""Likely classes against the rule of the released code, written out, and against frequencies."""

import jax
import numpy as np
import pytest

from jft.select.classes import kept_ranks, likely_classes, with_classes

MUTATIONS = (
    ("jft/select/classes.py", "min(math.ceil(ratio * classes), most)", "min(int(ratio * classes), most)"),
    ("jft/select/classes.py", "np.linspace(0.0, 5.0,", "np.linspace(0.0, 1.0,"),
    ("jft/select/classes.py", "(density - density.min()) / spread", "density / spread"),
    ("jft/select/classes.py", "jnp.where(own, jnp.inf, ", "jnp.where(own, 0.0, "),
    ("jft/select/classes.py", "jnp.max(jnp.asarray(similarity", "jnp.min(jnp.asarray(similarity"),
    (
        "jft/select/classes.py",
        "        if choose is None:\n",
        "        if True:\n            key = jax.random.fold_in(key, 1)\n",
    ),
)
SIMILARITY = np.array([[9, 5, 4, 3, 2, 1], [0, 1, 2, 3, 4, 9]], np.float32)


@pytest.mark.parametrize(("classes", "options"), [(21, {}), (240, {}), (30, {"ratio": 0.2, "most": 4, "decay": 2.0})])
def test_ranks_are_kept_with_the_published_probabilities(classes, options):
    """skip_tuning.py: min(ceil(.5 C), 50) surely, then ``expon.pdf(linspace(0, 5), scale=.3)`` scaled to [0, 1]."""
    ratio, most, scale = options.get("ratio", 0.5), options.get("most", 50), options.get("decay", 0.3)
    sure = min(int(np.ceil(ratio * classes)), most)
    x = np.linspace(0, 5, classes - sure)
    pdf = np.exp(-x / scale) / scale
    chance = np.concatenate([np.ones(sure), (pdf - pdf.min()) / (pdf.max() - pdf.min())])
    drawn = np.mean([kept_ranks(k, classes, **options) for k in jax.random.split(jax.random.key(1), 400)], axis=0)
    np.testing.assert_allclose(drawn, chance, atol=0.11)
    assert drawn[: sure + 1].all() and not drawn[-1]


def test_few_classes():
    keep = lambda *options: kept_ranks(jax.random.key(0), *options).tolist()
    assert keep(1) == [True] and keep(2) == [True, False] and keep(5, 1.0) == [True] * 5


def test_classes_are_ranked_by_their_largest_similarity_and_labels_come_first():
    """The best of both rows are 9, 5, 4, 3, 4, 9: without labels 0, 5, 1, 2, 4, 3."""
    best = lambda n: np.arange(6) < n
    cases = (
        (best(2), [0, 5], [0, 5]),
        (best(3), [0, 5], [0, 1, 5]),
        (best(4), [3, 3], [0, 1, 3, 5]),
        (best(5), [0, 5], [0, 1, 2, 4, 5]),
        (np.array([True, True, False, False, False, True]), [0, 5], [0, 3, 5]),
        (best(6), [2, 1], [0, 1, 2, 3, 4, 5]),
    )
    labels = np.array([labels for _, labels, _ in cases])
    found = jax.jit(lambda x, labels: [likely_classes(c[0], x, y) for c, y in zip(cases, labels, strict=True)])
    for (_, own, expected), (classes, targets) in zip(cases, found(SIMILARITY, labels), strict=True):
        np.testing.assert_array_equal(classes, expected)
        np.testing.assert_array_equal(np.asarray(classes)[targets], own)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 images of 6 classes, of whose ranks the first 1 are kept"):
        likely_classes(np.arange(6) < 1, SIMILARITY, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"kept \(4 in all\)"):
        likely_classes(np.arange(4) < 3, SIMILARITY, np.array([0, 1]))
    for options in ({"ratio": 0.0}, {"ratio": 1.5}, {"most": 0}, {"decay": 0.0}):
        with pytest.raises(ValueError, match="ratio is in"):
            kept_ranks(jax.random.key(0), 6, **options)


def test_with_classes():
    """Ranks are drawn once: equal batches have equal classes."""
    one = {"labels": np.array([0, 5]), "similarity": SIMILARITY}
    batches = [{**one, "x": i} for i in range(9)]
    out = list(with_classes(batches, jax.random.key(3), decay=5.0))
    kept = kept_ranks(jax.random.key(3), 6, decay=5.0)
    for i, batch in enumerate(out):
        assert batch.keys() == {"labels", "x", "classes"} and batch["x"] == i
        assert batch["classes"].shape == (2, 6) and batch["classes"][:, [0, 5]].all()
        assert batch["classes"][0].sum() == kept.sum() and (batch["classes"][0] == batch["classes"][1]).all()
        assert (batch["classes"] == out[0]["classes"]).all()
    drawn = {tuple(kept_ranks(k, 6, decay=5.0)) for k in jax.random.split(jax.random.key(0), 20)}
    assert len(drawn) > 1
