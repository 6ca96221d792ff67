"""The search for coefficients, on cases small enough to work out by hand."""

import gc
import itertools
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from jft import merge
from jft.delta import BaseMismatch, Dense, TaskVector, describe

MUTATIONS = (
    ("jft/merge/search.py", "np.linspace(0, 1, 21)", "np.linspace(0, 1, 20)"),
    ("jft/merge/search.py", '"score": -float(target)', '"score": float(target)'),
    ("jft/merge/search.py", "float(a) / float(single[task])", "float(a)"),
    ("jft/merge/search.py", "sum(normalised.values()) / len(normalised)", "sum(normalised.values())"),
    ("jft/merge/search.py", "float(sum(accuracies.values())) / len(accuracies)", "float(sum(accuracies.values()))"),
    ("jft/merge/search.py", "_at_coefficient(base, -tau", "_at_coefficient(base, tau"),
    ("jft/merge/search.py", "float(control) >= threshold", "float(control) > threshold"),
    ("jft/merge/search.py", "threshold: float = 0.95,\n    check", "threshold: float = 0.9,\n    check"),
    ("jft/merge/search.py", "-sum(abs(x) for x", "sum(abs(x) for x"),
    ("jft/merge/search.py", "if eligible else", "if True else"),
    ("jft/merge/search.py", "return [x for part in point for x in numbers(part)]", "return []"),
    ("jft/merge/points.py", "itertools.product(*values.values())", "zip(*values.values())"),
    ("jft/merge/points.py", "while len(drawn) < count", "for _ in range(count)"),
    ("jft/merge/points.py", "point[name] = options[i]", "point[name] = options[0]"),
    ("jft/merge/points.py", "if key not in rows", "if True"),
    ("jft/merge/points.py", "[row(point), *(row", "[*(row"),
    ("jft/merge/points.py", "check_data(data, allow_test)", "check_data(data)"),
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


def test_points_of_several_numbers():
    """The sum of magnitudes decides between equal scores, then the order; names and flags have no magnitude."""
    points = [(0.5, -0.5), (0.75, 0.0), (-0.25, 0.25), (0.5, 0.0)]
    assert merge.search(lambda p: 1.0, points).best == (-0.25, 0.25)
    assert merge.search(lambda p: sum(p), points).best == (0.75, 0.0)
    points = [{"weights": (0.5, 0.5), "elect": "sum"}, {"weights": (0.5, 0.25), "elect": "count", "rescale": True}]
    found = merge.search(lambda p: 1.0, points)
    assert found.best == points[1]
    assert found.row == {"coefficient": points[1], "score": 1.0, "feasible": True}
    found = merge.search(lambda p: {"score": 1.0, "feasible": False}, points)
    assert (found.best, found.feasible, found.row) == (None, False, None)


def test_grids_and_draws():
    axes = {"a": (0.0, 0.5, 1.0), "b": ("x", "y")}
    every = [{"a": a, "b": b} for a in axes["a"] for b in axes["b"]]
    assert merge.product(axes) == every
    drawn = merge.draws(axes, 6, seed=3)
    assert sorted(map(str, drawn)) == sorted(map(str, every))
    assert drawn != every
    assert merge.draws(axes, 4, seed=3) == drawn[:4]
    assert len({str(merge.draws(axes, 3, seed)) for seed in range(5)}) > 1
    # 1001**20 points are not listed.
    fine = merge.draws({str(i): np.linspace(0, 1, 1001) for i in range(20)}, 50)
    assert 0.45 < np.mean([list(p.values()) for p in fine]) < 0.55


def test_coordinate_descent():
    """Where the score is a sum over the axes it is the best of the grid, and no point is scored twice."""
    axes = {name: np.linspace(-1, 1, 9).tolist() for name in "abc"}
    calls = []

    def score(p):
        calls.append(tuple(p.values()))
        return -((p["a"] - 0.5) ** 2) - abs(p["b"] + 0.75) - (p["c"] - 0.3) ** 2

    found = merge.coordinate_search(score, axes)
    assert found.best == merge.search(score, merge.product(axes)).best == {"a": 0.5, "b": -0.75, "c": 0.25}
    count = len(found.table)
    assert len(set(calls[:count])) == count == len(calls) - 9**3
    # One round of 1 + 8 + 8 + 8, and one that finds the lines through the point: 8 + 8 more, the last is known.
    assert count == 25 + 16
    assert len(merge.coordinate_search(score, axes, rounds=1).table) == 25


def test_coordinate_descent_with_a_constraint():
    """Forgetting with control kept; a start that breaks the constraint moves to what keeps it."""
    axes = {"a": [0.0, 0.5, 1.0], "b": [0.0, 0.5, 1.0]}
    row = lambda p: merge.negation_row(0.9 - 0.3 * p["a"] - 0.2 * p["b"], 0.8 - 0.06 * p["a"] - 0.03 * p["b"], 0.8)
    kept = [p for p in itertools.product(*axes.values()) if 0.8 - 0.06 * p[0] - 0.03 * p[1] >= 0.76]
    best = max(kept, key=lambda p: 0.3 * p[0] + 0.2 * p[1])
    # a is worth 5 and b 6.67 for each unit of control, which is 0.04: the best has a of 0 and all of b.
    assert best == (0.0, 1.0)
    assert merge.search(row, merge.product(axes)).best == dict(zip("ab", best, strict=True))
    found = merge.coordinate_search(row, axes, {"a": 1.0, "b": 1.0})
    assert found.table[0]["feasible"] is False
    assert found.row["control"] >= 0.76
    # Descent depends on where it starts: a first, and b is what is left of the control.
    assert merge.coordinate_search(row, axes).best == {"a": 0.5, "b": 0.0}
    # A start off the axes is left for what is better alone.
    off = merge.coordinate_search(lambda p: p["b"] * (p["a"] == 0.25), axes, {"a": 0.25, "b": 0.5})
    assert off.best == {"a": 0.25, "b": 1.0}
    # Nothing to gain: the point stays where the magnitude is least, and the second round ends it.
    assert merge.coordinate_search(lambda p: 1.0, axes, {"a": 1.0, "b": 1.0}).best == {"a": 0.0, "b": 0.0}
    assert merge.coordinate_search(lambda p: {"score": 1.0, "feasible": False}, axes).best is None


def test_tuning_of_weights_and_of_options():
    weighted = lambda p, taus: merge.task_arithmetic(taus, weights=[p["A"], p["B"]])
    evaluate = {"A": lambda p: 0.8 - (p["w"][0] - 0.5) ** 2, "B": lambda p: 0.6 - (p["w"][1] - 1.0) ** 2}
    measure = merge.addition_measure(evaluate, {"A": 0.8, "B": 0.6})
    axes = {"A": merge.GRID, "B": [0.0, 0.25, 0.5]}
    taus = [vector(1, 0), vector(0, 4)]
    for points in (axes, merge.product(axes)):
        merged, found = merge.tune(weighted, taus, points, measure, base=base(), data="validation")
        assert found.best == {"A": 0.5, "B": 0.25}
        np.testing.assert_allclose(merged["w"].dense(), [0.5, 1.0])
        assert found.row["score"] == pytest.approx(1.0)
    note = merged.manifest["search"]
    assert (note["data"], note["best"], len(note["table"])) == ("validation", found.best, 63)
    # Options of a rule: half the entries, twice.
    rule = lambda p, taus: merge.ties(taus, scope="tensor", **p)
    points = merge.product({"density": (0.5, 1.0), "scale": (1.0, 2.0)})
    score = lambda p: -jnp.sum((p["w"] - jnp.array([0.0, 8.0])) ** 2)
    merged, found = merge.tune(rule, [vector(1, 4)], points, score, base=base(), data="validation")
    assert found.best == {"density": 0.5, "scale": 2.0}
    np.testing.assert_array_equal(merged["w"].dense(), [0.0, 8.0])


def test_tuning_where_nothing_is_feasible_changes_nothing():
    measure = merge.negation_measure(base(), lambda p: 0.5, lambda p: 0.1 if p["w"].any() else 0.8)
    merged, found = merge.tune(
        lambda c, taus: -taus[0] * c, [vector(1, 0)], [0.5, 1.0], measure, base=base(), data="val"
    )
    assert (len(merged), found.best, merged.manifest["search"]["feasible"]) == (0, 0.0, False)


@pytest.mark.parametrize("data", ["mnist/test", "TEST", "my_test_split", "gsm8k testset", "tests", "x/test[:10%]"])
def test_test_data_is_refused(data):
    how = {"base": base(), "points": [0.5], "measure": lambda p: 1.0}
    run = lambda **more: merge.tune(lambda c, taus: taus[0] * c, [vector(1, 0)], data=data, **how, **more)
    with pytest.raises(ValueError, match="not chosen on test data"):
        run()
    assert run(allow_test=True)[0].manifest["search"]["data"] == data


def test_names_that_only_contain_test():
    for data in ("latest", "contest/train", "mnist/validation"):
        merge.tune(lambda c, t: t[0] * c, [vector(1, 0)], [0.5], lambda p: 1.0, base=base(), data=data)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: merge.search(lambda c: 1.0, []), "no coefficients"),
        (lambda: merge.search(lambda c: 1.0, [0.1, 0.1]), "distinct finite"),
        (lambda: merge.search(lambda c: 1.0, [float("inf")]), "distinct finite"),
        (lambda: merge.search(lambda c: 1.0, [(0.5, float("nan"))]), "distinct finite"),
        (lambda: merge.search(lambda c: 1.0, [{"a": 1, "b": 2}, {"b": 2, "a": 1}]), "distinct finite"),
        (lambda: merge.search(lambda c: 1.0, [0.5, (0.5,)]), "of one kind"),
        (lambda: merge.product({}), "no axes"),
        (lambda: merge.product({"a": []}), "'a' has no values"),
        (lambda: merge.product({"a": [1, 1]}), "'a' must be distinct"),
        (lambda: merge.draws({"a": [1, 2]}, 3), "count is 3; the grid has 2 points"),
        (lambda: merge.coordinate_search(len, {"a": [1]}, {"b": 1}), "start must have the axes a, not b"),
        (lambda: merge.coordinate_search(len, {"a": [1]}, rounds=0), "rounds must be at least 1"),
        (lambda: merge.tune(len, [vector(1, 0)], [1.0], len, base=base(), data=" "), "name the data"),
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
