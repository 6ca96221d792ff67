"""The coefficient search, on cases small enough to work out by hand."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from jft import merge
from jft.delta import BaseMismatch, Dense, TaskVector, describe

MUTATIONS = (
    ("jft/merge/search.py", "np.linspace(0, 1, 21)", "np.linspace(0, 1, 20)"),
    ("jft/merge/search.py", '-abs(row["coefficient"])', 'abs(row["coefficient"])'),
    ("jft/merge/search.py", '"score": -float(target)', '"score": float(target)'),
    ("jft/merge/search.py", "float(a) / float(single[task])", "float(a)"),
    ("jft/merge/search.py", "sum(normalised.values()) / len(normalised)", "sum(normalised.values())"),
    ("jft/merge/search.py", "float(sum(accuracies.values())) / len(accuracies)", "float(sum(accuracies.values()))"),
    ("jft/merge/search.py", "_at_coefficient(base, -tau", "_at_coefficient(base, tau"),
    ("jft/merge/search.py", "float(control) >= threshold", "float(control) > threshold"),
    ("jft/merge/search.py", "threshold: float = 0.95,\n    check", "threshold: float = 0.9,\n    check"),
)


def base():
    return {"w": jnp.zeros(2)}


def vector(x, y):
    return TaskVector({"w": Dense(jnp.array([x, y], jnp.float32))}, describe(base()))


def test_grid_is_21_points_from_0_to_1():
    found = merge.search(lambda c: -((c - 0.35) ** 2))
    assert [row["coefficient"] for row in found.table] == [round(0.05 * i, 2) for i in range(21)]
    assert found.best == 0.35
    assert found.row["score"] == 0
    assert found.feasible


def test_ties_go_to_the_smallest_magnitude_and_nan_never_wins():
    assert merge.search(lambda c: 1.0, [0.5, -0.25, 1.0]).best == -0.25
    found = merge.search(lambda c: float("nan") if c > 0.5 else c, [0.0, 0.5, 1.0])
    assert found.best == 0.5
    assert len(found.table) == 3
    found = merge.search(lambda c: float("nan"), [0.5, 1.0])
    assert (found.best, found.feasible, found.row) == (0.0, False, None)


def test_addition_maximises_mean_normalised_accuracy():
    # Accuracies by hand: A = 0.5 + 0.4 w0, B = 0.8 - w1**2 * 0.4 with w = c * (1, 2) summed of (1, 0) and (0, 2).
    evaluate = {"A": lambda p: 0.5 + 0.4 * p["w"][0], "B": lambda p: 0.8 - 0.4 * p["w"][1] ** 2}
    found = merge.addition_search(
        base(), [vector(1, 0), vector(0, 2)], evaluate, {"A": 0.9, "B": 0.8}, grid=[0.0, 0.1, 0.2, 0.5]
    )
    # Mean of (0.5 + 0.4 c) / 0.9 and 1 - 2 c**2: 0.777.., 0.79.., 0.7822.., 0.638..: greatest at 0.1.
    want = [((0.5 + 0.4 * c) / 0.9 + 1 - 2 * c * c) / 2 for c in (0.0, 0.1, 0.2, 0.5)]
    np.testing.assert_allclose([row["score"] for row in found.table], want, rtol=1e-6)
    assert found.best == 0.1
    assert found.row["accuracy/A"] == pytest.approx(0.54)
    assert found.row["normalised/B"] == pytest.approx(0.98)
    assert found.row["accuracy"] == pytest.approx((0.54 + 0.784) / 2)


def test_negation_keeps_the_control():
    # Target 0.9 - 0.5 c, control 0.8 - 0.2 c**2: the constraint 0.8 - 0.2 c**2 >= 0.76 holds up to sqrt(0.2) = 0.447.
    found = merge.negation_search(
        base(), vector(1, 0), lambda p: 0.9 + 0.5 * p["w"][0], lambda p: 0.8 - 0.2 * p["w"][0] ** 2
    )
    assert found.best == 0.4
    assert found.feasible
    assert [row["feasible"] for row in found.table] == [True] * 9 + [False] * 12
    assert found.row["target"] == pytest.approx(0.7)
    loose = merge.negation_search(
        base(), vector(1, 0), lambda p: 0.9 + 0.5 * p["w"][0], lambda p: 0.8 - 0.2 * p["w"][0] ** 2, threshold=0.75
    )
    assert loose.best == 1.0


def test_a_control_of_exactly_the_threshold_is_kept():
    control = {0.0: 1.0, -0.5: 0.95, -1.0: np.nextafter(0.95, 0)}
    found = merge.negation_search(
        base(), vector(1, 0), lambda p: p["w"][0], lambda p: control[float(p["w"][0])], grid=[0.0, 0.5, 1.0]
    )
    assert (found.best, [row["feasible"] for row in found.table]) == (0.5, [True, True, False])


def test_control_that_nothing_keeps_gives_zero_and_says_so():
    control = lambda p: 0.8 if not p["w"].any() else 0.1
    found = merge.negation_search(base(), vector(1, 0), lambda p: 0.5, control, grid=[0.5, 1.0])
    assert (found.best, found.feasible) == (0.0, False)
    assert [row["feasible"] for row in found.table] == [False, False]
    # With 0 in the grid the base itself meets it, whatever the target.
    found = merge.negation_search(base(), vector(1, 0), lambda p: 0.5, control)
    assert (found.best, found.feasible) == (0.0, True)


def test_one_set_of_merged_parameters_at_a_time():
    alive = []

    def evaluate(params):
        gc.collect()
        assert not [w for w in alive if w() is not None and w() is not params["w"]]
        alive.append(weakref.ref(params["w"]))
        return 0.5

    merge.addition_search(base(), [vector(1, 0)], {"A": evaluate}, {"A": 1.0}, grid=[0.25, 0.5, 1.0])
    assert len(alive) == 3


def test_the_base_is_verified_once():
    with pytest.raises(BaseMismatch, match="differ in w"):
        merge.negation_search({"w": jnp.ones(2)}, vector(1, 0), lambda p: 0.5, lambda p: 0.5)
    found = merge.negation_search({"w": jnp.ones(2)}, vector(1, 0), lambda p: 0.5, lambda p: 0.5, check=False)
    assert found.best == 0.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: merge.search(lambda c: 1.0, []), "no coefficients"),
        (lambda: merge.search(lambda c: 1.0, [0.1, 0.1]), "distinct finite"),
        (lambda: merge.search(lambda c: 1.0, [float("inf")]), "distinct finite"),
        (lambda: merge.search(lambda c: {"loss": 1.0}), "row with 'score'; it has loss"),
        (lambda: merge.addition_search(base(), [vector(1, 0)], {}, {}), "no tasks"),
        (lambda: merge.addition_search(base(), [vector(1, 0)], {"A": len}, {"B": 1.0}), "'A' is in one alone"),
        (lambda: merge.addition_search(base(), [vector(1, 0)], {"A": len}, {"A": 0.0}), "'A' must be positive"),
        (lambda: merge.negation_search(base(), vector(1, 0), len, len, threshold=95), r"in \(0, 1\], not 95"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
